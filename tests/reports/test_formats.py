"""Models whose tensors are no plain weights, or stand under other names, or in a folder with more beside
them: each is read as what it is, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from safetensors.numpy import save_file

import della
from della.checkpoint.source import open_source
from della.errors import CheckpointError, DellaError

Tensors = dict[str, Any]
F8 = ml_dtypes.float8_e4m3fn


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def llama(prefix: str = "model.", seed: int = 0) -> Tensors:
    names = [f"{prefix}{n}" for n in ("embed_tokens.weight", "norm.weight")]
    names += [f"{prefix}layers.{k}.{n}.weight" for k in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")]
    made = rng(seed)
    return {n: (made.normal(0, 0.1, (8,) if "norm" in n else (8, 8))).astype(np.float32) for n in names}


def tuned(base: Tensors, seed: int = 1) -> Tensors:
    made = rng(seed)
    return {k: (v + made.normal(0, 0.01, v.shape)).astype(v.dtype) for k, v in base.items()}


def recipe(folder: Path, models: tuple[str, ...] = ("FT",), **more: Any) -> Path:
    made: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "BASE"}
    made |= {"models": [{"model": name} for name in models]} | more
    if made["merge_method"] == "linear":
        del made["base_model"]
    (folder / "recipe.yml").write_text(json.dumps(made))
    return folder / "recipe.yml"


def pair(folder: Path, base: Tensors, expert: Tensors, **more: Any) -> Path:
    put(folder, {"BASE/model.safetensors": base, "FT/model.safetensors": expert})
    return recipe(folder, **more)


def merged(path: Path) -> Tensors:
    della.merge(path, path.parent / "out", fsync=False)
    with open_source(str(path.parent / "out")) as model:
        return {name: view.read() for name, view in model.tensors.items()}


def refused(path: Path) -> str:
    with pytest.raises(DellaError) as told:
        della.merge(path, path.parent / "out", fsync=False)
    assert not (path.parent / "out").exists()
    return str(told.value)


# ---- codes ------------------------------------------------------------------------------------------------

SCALES = [
    "l.scale", "l.weight_scale", "l.weight_scale_inv", "l.weight.scale", "l.scale_weight", "l.input_scale",
    "l.weight_scale_2", "l.weight_quantizer._amax", "scaled_fp8", None,
]  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [F8, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_float8_is_codes_unless_the_recipe_says_otherwise(
    tmp_path: Path, scale: str | None, dtype: Any, method: str
) -> None:
    tensors: Tensors = {"l.weight": rng().normal(0, 100, (8, 8)).astype(dtype)}
    plain = dict(tensors)
    if scale:
        tensors[scale] = np.array([0.001], np.float32)
    for name in ("BASE", "FT", "TWO"):
        put(
            tmp_path, {f"{name}/model.safetensors": tensors | ({"b": np.array([hash(name) % 7], np.float32)})}
        )
    said = refused(recipe(tmp_path, ("FT", "TWO"), merge_method=method))
    assert "l.weight" in said
    assert ("plain_fp8: true" in said) == (scale is None)
    if scale is None:
        put(
            tmp_path,
            {
                "FT/model.safetensors": {
                    k: (v.astype(np.float32) * 1.5).astype(dtype) for k, v in plain.items()
                }
            },
        )
        put(tmp_path, {"BASE/model.safetensors": plain})
        found = merged(recipe(tmp_path, plain_fp8=True))  # the cure that is named
        assert np.array_equal(
            found["l.weight"].astype(np.float32),
            (plain["l.weight"].astype(np.float32) * 1.5).astype(dtype).astype(np.float32),
        )


INTEGERS = [
    ("l.weight", np.int8, "l.weight_scale"), ("l.weight._data", np.int8, "l.weight._scale"),
    ("l.weight", np.uint8, "l.weight.absmax"), ("l.qweight", np.int32, "l.scales"),
    ("l.weight", np.int8, "l.scale"), ("l.weight_packed", np.int32, "l.weight_scale"),
    ("mlp.experts.down_proj_blocks", np.uint8, "mlp.experts.down_proj_scales"),
    ("l.weight", np.int8, None), ("l.W_q", np.uint8, "l.meta_scale"), ("l.weight", np.uint16, None),
    ("l.weight", np.complex64, None), ("l.codes", np.int16, "l.codebooks"), ("l.weight", np.int8, "l.SCB"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "scale"), INTEGERS)
def test_integers_that_are_weights(tmp_path: Path, name: str, dtype: Any, scale: str | None) -> None:
    for seed, model in enumerate(("FT", "TWO")):
        tensors: Tensors = {
            name: rng(seed).integers(0, 99, (8, 8)).astype(dtype),
            "b": np.array([seed], np.float32),
        }
        if scale:
            tensors[scale] = rng(seed).random((8, 1)).astype(np.float32)
        put(tmp_path, {f"{model}/model.safetensors": tensors})
    said = refused(recipe(tmp_path, ("FT", "TWO"), merge_method="linear"))
    assert "quantised" in said
    assert "quantise the merge instead" in said


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("position_ids", np.arange(16).reshape(1, 16)),
        ("h.0.attn.bias", np.tril(np.ones((4, 4), bool))[None, None]),
        ("h.0.attn.bias", np.tril(np.ones((4, 4), np.uint8))[None, None]),
        ("layers.0.relative_position_index", np.arange(16).reshape(4, 4)),
        ("bn.num_batches_tracked", np.array(7)),
        ("freqs_cis", np.ones((4, 4), np.complex64)),
    ],
)
def test_buffers_are_no_weights(tmp_path: Path, name: str, values: Any) -> None:
    base = llama() | {name: values}
    other = np.asarray(values + values.dtype.type(1)) if values.dtype != bool else ~values
    path = pair(tmp_path, base, tuned(llama()) | {name: other})
    with della.plan(path) as plan:
        (note,) = [note for note in plan.notes if name in note]
    assert note.startswith("FT: ")
    assert np.array_equal(merged(path)[name], values)
    path = pair(tmp_path, base, tuned(llama()) | {name: values})
    with della.plan(path) as plan:
        assert not [note for note in plan.notes if name in note]


FACTORS = [
    "q.lora_A.weight", "q.lora_B.default.weight", "lora_unet_q.lora_down.weight", "q.lora_up.weight",
    "q.lora_embedding_A", "lora_te.hada_w1_a", "q.lokr_w2", "q.lokr_w1_b", "q.dora_scale",
    "q.lora_magnitude_vector",
    "q.lora.down.weight_lora_A", "q.ia3_l", "q.oft_blocks", "base_model.model.q.lora_A.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("beside", [False, True])
def test_factors_of_adapters_are_never_averaged(tmp_path: Path, name: str, beside: bool) -> None:
    for seed, model in enumerate(("FT", "TWO")):
        tensors: Tensors = {name: rng(seed).normal(size=(2, 8)).astype(np.float32)}
        put(tmp_path, {f"{model}/model.safetensors": tensors | (llama() if beside else {})})
    put(tmp_path, {"FT/adapter_config.json": {"base_model_name_or_path": "owner/the-base"}})
    said = refused(recipe(tmp_path, ("FT", "TWO"), merge_method="linear"))
    assert "factors of an adapter" in said
    assert "owner/the-base" in said


def test_a_folder_with_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "BASE/model.safetensors": llama(),
            "FT/adapter_config.json": {"base_model_name_or_path": "o/b", "peft_type": "LORA"},
        },
    )
    put(tmp_path, {"FT/adapter_model.safetensors": {"q.lora_A.weight": np.ones((2, 8), np.float32)}})
    assert "an adapter (LoRA)" in (said := refused(recipe(tmp_path)))
    assert "o/b" in said


# ---- names ------------------------------------------------------------------------------------------------

PREFIXES = [
    ("model.", "module.model."), ("model.", "_orig_mod.model."), ("module.model.", "model."), ("model.", ""),
    ("", "model.diffusion_model."), ("model.language_model.", "language_model.model."), ("model.", "bert."),
    ("model.", "base_model.model.model."), ("model.", "module._orig_mod.model."),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), PREFIXES)
@pytest.mark.parametrize("more", [{}, {"missing": "base", "extra": "ignore"}])
def test_names_under_another_prefix(tmp_path: Path, ours: str, theirs: str, more: dict[str, str]) -> None:
    base = llama(ours)
    wanted = tuned(base)
    expert = {theirs + name.removeprefix(ours): values for name, values in wanted.items()}
    path = pair(tmp_path, base, expert, **more)
    with della.plan(path) as plan:
        (note,) = [note for note in plan.notes if "prefix" in note]
        assert (plan.coverage[0].merged, plan.coverage[0].of) == (6, 6)
    assert "FT: 6 of 6 names differ" in note
    found = merged(path)
    assert found.keys() == wanted.keys()
    assert all(np.allclose(found[name], values, atol=1e-6) for name, values in wanted.items())
    assert della.verify(tmp_path / "out", sources=1.0, inputs=True, base_dir=tmp_path).is_well


def test_a_part_in_the_middle_of_names(tmp_path: Path) -> None:
    base = llama()
    expert = {name.replace("layers.0.", "layers.0._orig_mod."): v for name, v in tuned(base).items()}
    found = merged(pair(tmp_path, base, expert))
    assert all(np.allclose(found[name], values, atol=1e-6) for name, values in tuned(base).items())


def test_two_parts_with_prefixes_of_their_own(tmp_path: Path) -> None:
    base = llama("model.language_model.") | {"model.visual.proj.weight": np.ones((4, 4), np.float32)}
    wanted = tuned(base)
    expert = {
        n.replace("model.language_model.", "language_model.model.").replace("model.visual.", "visual."): v
        for n, v in wanted.items()
    }
    found = merged(pair(tmp_path, base, expert))
    assert all(np.allclose(found[name], values, atol=1e-6) for name, values in wanted.items())


def test_a_prefix_that_does_not_fit_is_told_and_no_cure_empties_the_merge(tmp_path: Path) -> None:
    base = llama()
    expert = {"module." + name: np.ones((3, 3), np.float32) for name in base}
    said = refused(pair(tmp_path, base, expert))
    assert "0 of 6 names in common" in said
    assert "they differ by the prefix 'module.'" in said
    assert "missing: base" not in said
    assert "extra: ignore" not in said


def test_another_architecture_is_one_short_problem(tmp_path: Path) -> None:
    put(tmp_path, {"BASE/config.json": {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30}})
    put(tmp_path, {"FT/config.json": {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 3}})
    expert = {name: np.ones((3, 3), np.float32) for name in llama()}
    said = refused(pair(tmp_path, llama(), expert))
    assert "hidden_size 256 against 576, num_hidden_layers 3 against 30" in said
    assert len(said) < 500


@pytest.mark.parametrize("swapped", [False, True])
def test_experts_one_by_one_against_fused(tmp_path: Path, swapped: bool) -> None:
    singles = {
        f"l.experts.{e}.{n}_proj.weight": np.ones((4, 4), np.float32)
        for e in range(3)
        for n in ("up", "down")
    }
    fused = {f"l.experts.{n}": np.ones((3, 4, 8), np.float32) for n in ("gate_up_proj", "down_proj")}
    common = {"norm.weight": np.ones(4, np.float32)}
    models = (singles | common, fused | common)
    said = refused(pair(tmp_path, *(models[::-1] if swapped else models)))
    assert "experts are stored one by one" in said
    assert "missing: base" not in said


# ---- folders, headers, references -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "model-00007-of-00009.safetensors",
        "x.gguf",
        "m.onnx",
    ],
)
def test_what_of_a_folder_was_not_read(tmp_path: Path, name: str) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    if name.endswith(".safetensors"):
        save_file({"z": np.ones(2, np.float32)}, tmp_path / "FT" / name)
    else:
        (tmp_path / "FT" / name).write_bytes(b"x")
    with della.plan(path) as plan:
        (note,) = [note for note in plan.notes if "not read" in note]
    assert note == f"FT: {name} beside model.safetensors: not read"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    base = {"v": np.ones(4, np.float32), "w": np.zeros(4, np.float32)}
    put(tmp_path, {"BASE/model.safetensors": base})
    put(
        tmp_path,
        {
            "FT/m-1.safetensors": {"w": base["w"] + 1},
            "FT/m-2.safetensors": {"v": base["v"], "w": base["w"] + 2},
        },
    )
    put(
        tmp_path,
        {"FT/model.safetensors.index.json": {"weight_map": {"w": "m-1.safetensors", "v": "m-2.safetensors"}}},
    )
    path = recipe(tmp_path)
    with della.plan(path) as plan:
        (note,) = [note for note in plan.notes if "m-2.safetensors" in note]
    assert "the index says m-1.safetensors" in note
    assert merged(path)["w"].tolist() == [1] * 4


@pytest.mark.parametrize("metadata", [b"null", b"{}", b'{"a":"b"}'])
@pytest.mark.parametrize("pad", [b"", b"   "])
def test_headers_that_are_valid(tmp_path: Path, metadata: bytes, pad: bytes) -> None:
    data = np.arange(4, dtype=np.float32)
    body = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},"__metadata__":' + metadata
    body += b',"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + pad
    put(tmp_path, {"BASE/model.safetensors": {"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}})
    (tmp_path / "FT").mkdir()
    (tmp_path / "FT/model.safetensors").write_bytes(len(body).to_bytes(8, "little") + body + data.tobytes())
    found = merged(recipe(tmp_path))
    assert (found["v"].tolist(), found["w"].tolist()) == ([0, 1], [2, 3])


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    for name in ("BASE", "FT"):
        (tmp_path / name / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    merged(path)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["run+v2", "a+b/c", "./run+v2"])
def test_a_folder_goes_before_syntax(tmp_path: Path, name: str) -> None:
    put(tmp_path, {"BASE/model.safetensors": llama(), f"{name}/model.safetensors": tuned(llama())})
    found = merged(recipe(tmp_path, (name,)))
    assert np.allclose(found["model.norm.weight"], tuned(llama())["model.norm.weight"], atol=1e-6)
    assert "LoRA adapter" in refused(recipe(tmp_path / "BASE", ("no+such",)))


def test_a_url_of_a_file_and_a_folder_of_a_hub_cache(tmp_path: Path) -> None:
    commit = "a" * 40
    put(tmp_path, {"BASE/model.safetensors": llama(), "my model/model.safetensors": tuned(llama())})
    put(tmp_path, {f"models--o--n/snapshots/{commit}/model.safetensors": tuned(llama())})
    put(tmp_path, {f"models--o--n/snapshots/{'b' * 40}/model.safetensors": llama()})
    (tmp_path / "models--o--n/refs").mkdir()
    (tmp_path / "models--o--n/refs/main").write_text(commit)
    wanted = tuned(llama())["model.norm.weight"]
    for name in ((tmp_path / "my model").as_uri(), "models--o--n"):
        found = merged(recipe(tmp_path, (name,)))
        assert np.allclose(found["model.norm.weight"], wanted, atol=1e-6)
        della.merge(recipe(tmp_path, (name,)), tmp_path / "out", overwrite=True, fsync=False)
        __import__("shutil").rmtree(tmp_path / "out")
    (tmp_path / "models--o--n/refs/main").unlink()
    assert "name one of its snapshots" in refused(recipe(tmp_path, ("models--o--n",)))


@pytest.mark.parametrize(
    ("page", "repo"),
    [
        ("https://huggingface.co/owner/name", ("owner/name", None)),
        ("https://huggingface.co/owner/name/", ("owner/name", None)),
        ("https://huggingface.co/owner/name/tree/v1.0", ("owner/name", "v1.0")),
        ("https://hf.co/owner/name", ("owner/name", None)),
    ],
)
def test_a_page_of_the_hub(page: str, repo: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, revision: str | None, *, weights: bool) -> Any:
        asked.append((name, revision))
        raise CheckpointError("not here")

    monkeypatch.setattr("della.checkpoint.source.fetch", fetch)
    with pytest.raises(CheckpointError, match="not here"):
        open_source(page)
    assert asked == [repo]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_model_without_tensors(tmp_path: Path, method: str) -> None:
    for name in ("BASE", "FT", "TWO"):
        put(tmp_path, {f"{name}/model.safetensors": {} if name != "BASE" else llama()})
    assert "holds no tensor" in refused(recipe(tmp_path, ("FT", "TWO"), merge_method=method))


@pytest.mark.parametrize(("ours", "theirs", "whose"), [(8, 10, "this model's"), (10, 8, "the base's")])
def test_whose_vocabulary_is_larger(tmp_path: Path, ours: int, theirs: int, whose: str) -> None:
    base, expert = llama(), tuned(llama())
    base["model.embed_tokens.weight"] = np.zeros((ours, 8), np.float32)
    expert["model.embed_tokens.weight"] = np.zeros((theirs, 8), np.float32)
    assert f"{whose} vocabulary is larger" in refused(pair(tmp_path, base, expert))
