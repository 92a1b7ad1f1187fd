"""della calibrate: the norms of WANDA, by NumPy and by torch, and a file that a recipe can name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from commands import Command
from numpy_llamas import CONFIGS, in_torch, make_config, random_tensors
from safetensors.numpy import load_file

import della
from della.errors import CheckpointError, EvaluationError, OutputError
from della.evaluate import calibration
from della.evaluate.calibration import calibrate, hf_norms, llama_norms, read_texts
from della.evaluate.llama import Llama
from della.experiments.demo import EXPERTS, TRIO, tasks

TEXTS = [[5, 9, 11, 40], [7], [3, 3, 60, 21, 8, 13, 2]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    items = [item for task in EXPERTS for item in tasks.items(task, "validation", 4)]
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items[:-1]]
    last = json.dumps({"text": items[-1].prompt + items[-1].answer, "answer": 3})
    path.write_text("\n".join([*lines, "", last, ""]))
    return path


def test_norms_are_those_of_the_inputs_of_each_layer() -> None:
    config = make_config(CONFIGS["grouped and tied"]) | {"num_hidden_layers": 1}
    tensors = random_tensors(config)
    found = llama_norms(Llama(config, tensors), TEXTS)
    parts = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{p}_proj" for p in "koqv")]
    assert sorted(found) == [f"model.layers.0.{part}.weight" for part in parts], "and no head that is tied"
    assert {vector.dtype for vector in found.values()} == {np.dtype(np.float32)}
    embedded = tensors["model.embed_tokens.weight"][[token for text in TEXTS for token in text]].astype(float)
    scale = 1 / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + config["rms_norm_eps"])
    normed = embedded * scale * tensors["model.layers.0.input_layernorm.weight"]
    for part in "qkv":
        wanted = np.sqrt((normed**2).sum(axis=0))
        np.testing.assert_allclose(found[f"model.layers.0.self_attn.{part}_proj.weight"], wanted, rtol=1e-5)
    twice = llama_norms(Llama(config, tensors), TEXTS * 2)
    for name, vector in found.items():
        np.testing.assert_allclose(twice[name], vector * np.sqrt(2), rtol=1e-6)


def test_a_model_that_was_calibrated_computes_what_it_did() -> None:
    config = make_config(CONFIGS["plain"])
    model = Llama(config, random_tensors(config))
    before = model.logits(TEXTS[0])
    found = llama_norms(model, TEXTS)
    assert model.watch is None
    assert model.logits(TEXTS[0]).tobytes() == before.tobytes()
    assert found["lm_head.weight"].shape == (32,)


@pytest.mark.parametrize("variant", CONFIGS.values(), ids=CONFIGS.keys())
def test_torch_and_numpy_agree(variant: dict[str, Any]) -> None:
    config = make_config(variant)
    tensors = random_tensors(config)
    theirs = in_torch(config, tensors)
    ours, found = llama_norms(Llama(config, tensors), TEXTS), hf_norms(theirs, TEXTS)
    assert sorted(found) == sorted(ours)
    for name, vector in ours.items():
        np.testing.assert_allclose(found[name], vector, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in theirs.modules())


@pytest.mark.parametrize("name", ["base", "math"])
def test_the_norms_of_the_trio_agree(tmp_path: Path, data: Path, name: str) -> None:
    pytest.importorskip("transformers", reason="needs torch and transformers")
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    by_numpy = calibrate(str(TRIO / name), data, tmp_path / "numpy.safetensors", backend="numpy")
    by_torch = calibrate(str(TRIO / name), data, tmp_path / "torch.safetensors", backend="hf")
    assert (by_numpy.layers, by_numpy.texts) == (by_torch.layers, by_torch.texts) == (22, 12)
    assert by_numpy.tokens == by_torch.tokens
    ours, theirs = load_file(by_numpy.out), load_file(by_torch.out)
    assert sorted(ours) == sorted(theirs)
    for key, vector in ours.items():
        assert vector.dtype == np.float32
        np.testing.assert_allclose(theirs[key], vector, rtol=1e-4)


def test_what_is_calibrated_can_be_merged_by(command: Command, tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    for name in EXPERTS:
        words = ["calibrate", str(TRIO / name), "--data", str(data), "--out", f"{name}.safetensors"]
        more = ["--backend", "numpy", "--limit", "5", *(["--json"] if name == "math" else [])]
        done = command(tmp_path, *words, *more)
        assert done.returncode == 0, done.stderr
        if name == "math":
            told = json.loads(done.stdout.splitlines()[-1])
            tokens = told.pop("tokens")
            assert told == {"event": "calibrated", "out": "math.safetensors", "layers": 22, "texts": 5}
        else:
            assert done.stdout == ""
            *_, line = done.stderr.splitlines()  # slow machines tell more
            assert line.startswith(f"{name}.safetensors: norms of 22 layers over 5 texts, ")
    again = calibrate(str(TRIO / "math"), data, tmp_path / "again.safetensors", backend="numpy", limit=5)
    assert again.out.read_bytes() == (tmp_path / "math.safetensors").read_bytes()
    assert again.tokens == tokens
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: della\nbase_model: {TRIO}/base\nmodels:\n"
        + "".join(f"  - {{model: {TRIO}/{name}, input_norms: {name}.safetensors}}\n" for name in EXPERTS)
        + "parameters: {density: 0.5, importance: wanda}\n"
    )
    with della.plan(tmp_path / "recipe.yml") as plan:
        assert plan.notes == tuple(
            f"{TRIO}/{name}: 22 of 30 tensors are ranked by |delta| times input norms; "
            "the others have none, and are ranked by |delta|"
            for name in EXPERTS
        )
    della.merge(tmp_path / "recipe.yml", tmp_path / "out", fsync=False)


def test_texts_of_a_file(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_bytes(' one\u2028still one \n\n{"text": 1}\r\nthree'.encode())
    assert read_texts(plain) == [" one\u2028still one ", '{"text": 1}', "three"]
    assert read_texts(plain, 2) == [" one\u2028still one ", '{"text": 1}']
    lines.write_text('{"text": "a"}\n{"prompt": "b ", "answer": "c", "more": 1}\n')
    assert read_texts(lines) == ["a", "b c"]


BAD: dict[str, tuple[bytes, str]] = {
    "no.txt": (b" \n", "holds no text; expected one a line, or JSON lines in a .jsonl file"),
    "bytes.txt": (b"\xff\n", "not UTF-8 text ("),
    "list.jsonl": (b'{"text": ""}\n["a"]\n', f"2: {calibration.FORM}"),
    "half.jsonl": (b'{"prompt": "a"}\n', f"1: {calibration.FORM}"),
    "number.jsonl": (b'{"text": 3}\n', f"1: {calibration.FORM}"),
    "no-json.jsonl": (b"plain\n", f"1: {calibration.FORM}"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_hold_no_texts(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        read_texts(tmp_path / name)
    assert str(caught.value).replace(f"{tmp_path / name}:", "").strip().startswith(message)


def test_what_cannot_be_done_is_told_before_the_model_is_loaded(tmp_path: Path, data: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.touch()

    def told(**changes: Any) -> str:
        model, given, out = changes.pop("model", "x"), changes.pop("data", data), changes.pop("out", "n")
        with pytest.raises(EvaluationError) as caught:
            calibrate(str(model), given, tmp_path / f"{out}.safetensors", **{"backend": "numpy", **changes})
        return str(caught.value)

    assert re.fullmatch(r"backend 'nunpy': .*\bhf\b.*; did you mean 'numpy'\?", told(backend="nunpy"))
    assert told(out="taken") == f"{taken}: exists already; remove it, or choose another name"
    assert told(data=tmp_path / "x").endswith("x: cannot be read (No such file or directory)")
    assert told() == "x: no such folder; the numpy backend reads local models only"
    with pytest.raises(EvaluationError, match=r"norms: expected a name that ends in \.safetensors"):
        calibrate("x", data, tmp_path / "norms")
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    assert "tokenizer.json: cannot be read" in told(model=tmp_path)
    tokenizer = {"tokenizer.json": (TRIO / "base/tokenizer.json").read_bytes()}
    config = json.loads((TRIO / "base/config.json").read_text()) | {"hidden_act": "gelu"}
    weights = (TRIO / "base/model.safetensors").read_bytes()
    put(tmp_path / "gelu", tokenizer | {"config.json": config, "model.safetensors": weights})
    assert told(model=tmp_path / "gelu").endswith('does not compute this hidden_act; try backend="hf"')


def test_a_model_that_transformers_cannot_load(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("transformers", reason="needs torch and transformers")
    put(tmp_path / "m", {"config.json": {"model_type": "none"}})
    with pytest.raises(EvaluationError, match="m: transformers cannot load it: "):
        calibrate(str(tmp_path / "m"), data, tmp_path / "n.safetensors")


def test_a_model_without_a_linear_layer_is_told(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPT-2, whose layers are Conv1D and whose head is tied: a file of no norms would rank nothing."""
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    from della.evaluate import hf

    config = transformers.GPT2Config(
        vocab_size=512, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(TRIO / "base")
    model = transformers.GPT2LMHeadModel(config)
    monkeypatch.setattr(hf, "load", lambda *_: (tokenizer, model, "cpu"))
    with pytest.raises(
        EvaluationError, match=r"^gpt: has no linear layer \(torch\.nn\.Linear\) whose inputs"
    ):
        calibrate("gpt", data, tmp_path / "n.safetensors", limit=1)


def test_nothing_is_left_where_it_fails(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    with pytest.raises(OutputError, match=r"n\.safetensors: cannot be written, there is no folder "):
        calibrate("none", data, tmp_path / "no/n.safetensors", backend="numpy")  # before the model is run
    original = load_file(TRIO / "base/model.safetensors")
    names = ("config.json", "tokenizer.json")
    sides = {name: (TRIO / "base" / name).read_bytes() for name in names}
    wide = {name: value.astype(np.float32) for name, value in original.items()}
    wide["model.embed_tokens.weight"][:] = np.nan
    put(tmp_path / "big", sides | {"model.safetensors": wide})
    with np.errstate(all="ignore"), pytest.raises(CheckpointError, match=r"big: .*model\.layers.*\bnan\b"):
        calibrate(str(tmp_path / "big"), data, tmp_path / "n.safetensors", backend="numpy", limit=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big"]
