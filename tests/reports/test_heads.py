"""What stands around the tensors: heads that are tied or not, configurations, tokenizers, side files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put

import della
from della.checkpoint.source import open_source
from della.errors import CheckpointError, DellaError
from della.planning.heads import TIED_TYPES

Tensors = dict[str, Any]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 12,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


def llama(seed: int = 0, head: int | None = None, layers: int = 1) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (12, 8), "model.norm.weight": (8,)}
    for k in range(layers):
        at = f"model.layers.{k}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}
        shapes |= {f"{at}mlp.{n}_proj.weight": (16, 8) for n in ("gate", "up")} | {
            f"{at}mlp.down_proj.weight": (8, 16)
        }
        shapes |= {f"{at}{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
    made = {n: rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}
    if head is not None:
        made[HEAD] = np.random.default_rng(head).normal(0, 0.1, (12, 8)).astype(np.float32)
    return made


def tuned(base: Tensors, seed: int = 1) -> Tensors:
    rng = np.random.default_rng(seed)
    return {k: (v + rng.normal(0, 0.01, v.shape)).astype(v.dtype) for k, v in base.items()}


def config(**more: Any) -> dict[str, Any]:
    return {key: value for key, value in (CONFIG | more).items() if value is not None}


def pair(
    folder: Path, base: Tensors, expert: Tensors, ours: Any = None, theirs: Any = None, **more: Any
) -> Path:
    ours = CONFIG if ours is None else ours
    put(folder, {"BASE/model.safetensors": base, "BASE/config.json": ours})
    put(folder, {"FT/model.safetensors": expert, "FT/config.json": ours if theirs is None else theirs})
    made: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "BASE",
        "models": [{"model": "FT"}],
    }
    (folder / "recipe.yml").write_text(json.dumps(made | more))
    return folder / "recipe.yml"


def merged(path: Path) -> tuple[Tensors, dict[str, Any]]:
    out = path.parent / "out"
    della.merge(path, out, fsync=False)
    _loads(out)
    with open_source(str(out)) as model:
        return {name: view.read() for name, view in model.tensors.items()}, model.config


def _loads(out: Path) -> None:
    """transformers loads it, and its logits are those of the merged tensors."""
    found = json.loads((out / "config.json").read_text()) if (out / "config.json").exists() else {}
    if found.get("architectures") != ["LlamaForCausalLM"] or not importlib.util.find_spec("transformers"):
        return
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, told = loaded
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with open_source(str(out)) as source, torch.no_grad():
        head = source.tensors.get(HEAD, source.tensors[EMBED]).read()
        ids = torch.tensor([[1, 5, 7]])
        hidden = model.model(ids).last_hidden_state
        assert np.allclose(model(ids).logits.numpy(), hidden.numpy() @ head.T, atol=1e-4)


def refused(path: Path) -> str:
    with pytest.raises(DellaError) as told:
        della.merge(path, path.parent / "out", fsync=False)
    assert not (path.parent / "out").exists()
    return str(told.value)


def notes(path: Path) -> list[str]:
    with della.plan(path) as plan:
        return list(plan.notes)


# ---- heads ------------------------------------------------------------------------------------------------


def test_a_head_that_differs_is_kept_and_the_result_is_untied(tmp_path: Path) -> None:
    base, expert = llama(), tuned(llama()) | {HEAD: llama(head=3)[HEAD]}
    path = pair(tmp_path, base, expert)
    assert [note for note in notes(path) if "FT: lm_head.weight differs" in note]
    found, written = merged(path)
    assert np.allclose(found[HEAD], expert[HEAD], atol=1e-6)
    assert np.allclose(found[EMBED], expert[EMBED], atol=1e-6)
    assert written["tie_word_embeddings"] is False
    assert della.verify(tmp_path / "out", sources=1.0, base_dir=tmp_path).is_well


def test_a_head_of_one_of_two_experts(tmp_path: Path) -> None:
    base, one, two = llama(), tuned(llama(), 1), tuned(llama(), 2) | {HEAD: llama(head=3)[HEAD]}
    pair(tmp_path, base, one, models=[{"model": n, "parameters": {"weight": 0.5}} for n in ("FT", "TWO")])
    put(tmp_path, {"TWO/model.safetensors": two, "TWO/config.json": CONFIG})
    found, written = merged(tmp_path / "recipe.yml")
    assert np.allclose(found[HEAD], 0.5 * one[EMBED] + 0.5 * two[HEAD], atol=1e-6), (
        "a tied head is the embeddings"
    )
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("method", ["task_arithmetic", "della"])
def test_equal_bytes_are_a_copy(tmp_path: Path, method: str) -> None:
    base, expert = llama(), tuned(llama())
    for ours in (base, base | {HEAD: base[EMBED]}):
        path = pair(
            tmp_path, ours, expert | {HEAD: expert[EMBED]}, merge_method=method, parameters={"density": 0.7}
        )
        assert [note for note in notes(path) if "lm_head.weight is a copy" in note]
        found, written = merged(path)
        assert HEAD not in found
        assert written["tie_word_embeddings"] is True
        __import__("shutil").rmtree(tmp_path / "out")


@pytest.mark.parametrize("kind", sorted(TIED_TYPES)[:40])
def test_a_type_that_ties_where_its_configuration_is_silent(tmp_path: Path, kind: str) -> None:
    silent = config(model_type=kind, tie_word_embeddings=None, architectures=None)
    expert = tuned(llama())
    found, _ = merged(pair(tmp_path, llama(), expert | {HEAD: expert[EMBED]}, silent))
    assert HEAD not in found


def test_an_equal_head_of_an_untied_model_stays(tmp_path: Path) -> None:
    base = llama() | {HEAD: llama()[EMBED]}
    found, written = merged(pair(tmp_path, base, tuned(base), config(tie_word_embeddings=False)))
    assert np.allclose(found[HEAD], tuned(base)[HEAD], atol=1e-6)
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [True, False])
def test_a_base_with_a_head_of_its_own_and_a_model_without(tmp_path: Path, tied: bool) -> None:
    base = llama(head=3)
    ours = config(tie_word_embeddings=tied)
    expert = tuned(llama())
    said = refused(pair(tmp_path, base, expert, ours, config()))
    assert "ties its head" in said
    assert "missing: base" in said
    found, written = merged(
        pair(tmp_path, base, expert, ours, config(), missing="base")
    )  # the cure that is named
    assert np.array_equal(found[HEAD], base[HEAD])
    assert written["tie_word_embeddings"] is False


def test_nested_configurations(tmp_path: Path) -> None:
    nested = {"model_type": "x", "text_config": {"tie_word_embeddings": True, "n": 1}}
    expert = tuned(llama()) | {HEAD: llama(head=3)[HEAD]}
    _, written = merged(pair(tmp_path, llama(), expert, nested))
    assert written["tie_word_embeddings"] is False
    assert written["text_config"]["tie_word_embeddings"] is False


def test_linear_keeps_a_head_too(tmp_path: Path) -> None:
    one, two = tuned(llama(), 1), tuned(llama(), 2) | {HEAD: llama(head=3)[HEAD]}
    pair(tmp_path, one, two)
    made = {"merge_method": "linear", "models": [{"model": "BASE"}, {"model": "FT"}]}
    (tmp_path / "recipe.yml").write_text(json.dumps(made))
    found, written = merged(tmp_path / "recipe.yml")
    assert np.allclose(found[HEAD], (one[EMBED] + two[HEAD]) / 2, atol=1e-6)
    assert written["tie_word_embeddings"] is False


@pytest.mark.parametrize("kept", [("shared.weight",), ("shared.weight", "encoder.embed_tokens.weight")])
def test_copies_of_encoder_and_decoder_follow_the_shared_one(tmp_path: Path, kept: tuple[str, ...]) -> None:
    table = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    kind = {"model_type": "t5", "tie_word_embeddings": True}
    path = pair(tmp_path, dict.fromkeys(names, table), dict.fromkeys(kept, table + 1), kind, missing="base")
    found, _ = merged(path)
    assert list(found) == ["shared.weight"]
    assert np.allclose(found["shared.weight"], table + 1)


def test_a_classifier_on_a_causal_base_is_named_as_one(tmp_path: Path) -> None:
    expert = tuned(llama()) | {"score.weight": np.ones((5, 8), np.float32)}
    untied = config(tie_word_embeddings=False)
    kind = config(tie_word_embeddings=False, architectures=["LlamaForSequenceClassification"])
    said = refused(pair(tmp_path, llama(head=3), expert, untied, kind))
    assert "score.weight" in said
    assert "another kind of head" in said
    assert "ties its head" not in said


# ---- depth and configurations -----------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["error", "copy"])
def test_another_depth_is_named(tmp_path: Path, extra: str) -> None:
    path = pair(tmp_path, llama(), tuned(llama(layers=2)), theirs=config(num_hidden_layers=2), extra=extra)
    said = refused(path)
    assert "2 layers against 1" in said
    assert "extra: ignore" in said
    path = pair(tmp_path, llama(), tuned(llama(layers=2)), theirs=config(num_hidden_layers=2), extra="ignore")
    found, written = merged(path)  # the cure that is named
    assert (len(found), written["num_hidden_layers"]) == (len(llama()), 1)
    said = refused_fewer(tmp_path / "fewer")
    assert "1 layers against 2" in said


def refused_fewer(folder: Path) -> str:
    return refused(pair(folder, llama(layers=2), tuned(llama()), config(num_hidden_layers=2), config()))


def test_another_type_of_model(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()), theirs=config(model_type="gpt_neox"))
    said = refused(path)
    assert "model_type gpt_neox, expected llama" in said
    merged(pair(tmp_path, llama(), tuned(llama()), theirs=config(model_type="gpt_neox"), mismatch="ignore"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_theta", 1e6), ("rope_scaling", {"factor": 2}), ("num_attention_heads", 4),
        ("num_key_value_heads", 1), ("head_dim", 16), ("hidden_act", "gelu"), ("rms_norm_eps", 1e-6),
        ("attention_bias", True), ("sliding_window", 99), ("layer_types", ["full_attention"]),
        ("rope_parameters", {"rope_theta": 3.0}), ("id2label", {"0": "b", "1": "a"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_fields_that_change_what_weights_mean(tmp_path: Path, field: str, value: Any, nested: bool) -> None:
    theirs = config(text_config={field: value}) if nested else config(**{field: value})
    ours = config(text_config={"n": 1}) if nested else config()
    path = pair(tmp_path, llama(), tuned(llama()), ours, theirs)
    (note,) = [note for note in notes(path) if "config.json differs" in note]
    assert note.startswith("FT: ")
    shown = "rope_theta" if field == "rope_parameters" else field  # transformers 5 writes it there
    assert ("text_config." * nested + shown) in note


def test_fields_that_do_not(tmp_path: Path) -> None:
    theirs = config(
        torch_dtype="float16",
        use_cache=False,
        transformers_version="5",
        _name_or_path="x",
        attention_bias=False,
    )
    assert not [n for n in notes(pair(tmp_path, llama(), tuned(llama()), theirs=theirs)) if "differs" in n]


# ---- tokenizers and side files ----------------------------------------------------------------------------

WORDS = ["<s>", "</s>", "a", "b"]


def tokenizer(words: list[str], added: dict[int, str] | None = None) -> dict[str, Any]:
    rows = [{"id": number, "content": word} for number, word in (added or {}).items()]
    return {
        "version": "1.0",
        "added_tokens": rows,
        "model": {"type": "BPE", "vocab": {w: n for n, w in enumerate(words)}},
    }


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json", "vocab.txt"])
def test_the_same_id_for_another_token(tmp_path: Path, form: str) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    for name, words in (("BASE", WORDS), ("FT", ["<s>", "</s>", "b", "a"])):
        vocab = {word: number for number, word in enumerate(words)}
        content = {
            "tokenizer.json": tokenizer(words),
            "vocab.json": vocab,
            "vocab.txt": "\n".join(words).encode(),
        }
        put(tmp_path, {f"{name}/{form}": content[form]})
    (note,) = [note for note in notes(path) if "another tokenizer" in note]
    assert "2 ids are other tokens (2 is 'b' against 'a')" in note


def test_ids_beyond_the_rows_are_an_error(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(
        tmp_path,
        {"BASE/tokenizer.json": tokenizer(WORDS), "FT/tokenizer.json": tokenizer(WORDS, {12: "<|im_end|>"})},
    )
    said = refused(path)
    assert "1 ids without a row of model.embed_tokens.weight (12 rows): 12 is '<|im_end|>'" in said
    put(tmp_path, {"FT/tokenizer.json": tokenizer(WORDS, {11: "<|im_end|>"})})
    (note,) = [note for note in notes(path) if "another tokenizer" in note]
    assert "1 tokens more" in note


def test_other_special_tokens(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()), theirs=config(eos_token_id=3))
    put(
        tmp_path,
        {
            "BASE/tokenizer_config.json": {"eos_token": "</s>"},
            "FT/tokenizer_config.json": {"eos_token": {"content": "b"}},
        },
    )
    found = notes(path)
    assert [note for note in found if "eos_token 'b' against '</s>'" in note]
    assert [note for note in found if "eos_token_id 3 against None" in note]


def test_what_the_base_lacks_is_told(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(
        tmp_path,
        {"FT/chat_template.jinja": b"{{ x }}", "FT/generation_config.json": {"eos_token_id": [2, 7]}},
    )
    (note,) = [note for note in notes(path) if "chat_template.jinja" in note]
    assert "generation_config.json" in note
    merged(path)
    assert not (tmp_path / "out/chat_template.jinja").exists()


def test_old_files_that_contradict_are_not_shipped(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {
        "BASE/tokenizer.json": tokenizer(WORDS, {4: "<x>"}),
        "BASE/tokenizer_config.json": {"eos_token": "</s>"},
        "BASE/special_tokens_map.json": {"eos_token": "<|im_end|>"},
        "BASE/added_tokens.json": {"<y>": 4},
    })  # fmt: skip
    merged(path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out/special_tokens_map.json").exists()
    assert not (tmp_path / "out/added_tokens.json").exists()
    put(
        tmp_path,
        {
            "BASE/special_tokens_map.json": {"eos_token": {"content": "</s>"}},
            "BASE/added_tokens.json": {"<x>": 4},
        },
    )
    della.merge(path, tmp_path / "two", fsync=False)
    assert (tmp_path / "two/special_tokens_map.json").exists()
    assert (tmp_path / "two/added_tokens.json").exists()


def test_vocabularies_of_any_name_are_copied(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    names = ("spm.model", "source.spm", "target.spm", "bpe.codes", "tiktoken.model", "vocab.bpe",
             "encoder.json", "tekken.json", "LICENSE", "modules.json", "prophetnet.tokenizer",
             "qwen.tiktoken")  # fmt: skip
    put(tmp_path, {f"BASE/{name}": b"{}" for name in names})
    put(tmp_path, {"BASE/modeling_x.py": b"1", "BASE/optimizer.pt": b"1", "BASE/notes.doc": b"1"})
    told = notes(path)
    merged(path)
    assert {name for name in names if (tmp_path / "out" / name).exists()} == set(names)
    assert not (tmp_path / "out/modeling_x.py").exists()
    assert any("modeling_x.py" in note and "notes.doc" in note for note in told), "what stays behind is named"
    with pytest.raises(CheckpointError):
        open_source(str(tmp_path / "nothing"))


# ---- what a stranger found in the first version of this ---------------------------------------------------

SILENT = {"model_type": "of-nobody", "architectures": ["XForCausalLM"]}


@pytest.mark.parametrize("twice", [False, True])
def test_bytes_of_the_base_decide_where_its_type_is_not_known(tmp_path: Path, twice: bool) -> None:
    base, expert = llama(), tuned(llama())
    mine = expert | ({HEAD: expert[EMBED]} if twice else {})
    found, written = merged(pair(tmp_path, base | {HEAD: base[EMBED]}, mine, SILENT))
    assert HEAD not in found
    assert np.allclose(found[EMBED], expert[EMBED], atol=1e-6)
    assert written["tie_word_embeddings"] is True, "nobody has to guess"


def test_a_head_of_its_own_beside_a_base_of_an_unknown_type(tmp_path: Path) -> None:
    base, expert = llama(), tuned(llama()) | {HEAD: llama(head=3)[HEAD]}
    for ours in (base, base | {HEAD: base[EMBED]}):
        found, written = merged(pair(tmp_path, ours, expert, SILENT))
        assert np.allclose(found[HEAD], expert[HEAD], atol=1e-6)
        assert written["tie_word_embeddings"] is False
        __import__("shutil").rmtree(tmp_path / "out")


def test_an_untied_encoder_and_decoder_have_all_their_tables(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    names = ("model.shared.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    kind = {"model_type": "bart", "tie_word_embeddings": True}
    expert = {names[0]: table + 1, "lm_head.weight": table + 2}
    found, written = merged(pair(tmp_path, dict.fromkeys(names, table), expert, kind))
    assert written["tie_word_embeddings"] is False
    assert np.allclose(found["lm_head.weight"], table + 2, atol=1e-6)
    assert all(np.allclose(found[name], table + 1, atol=1e-6) for name in names)


def test_ids_beyond_the_rows_that_the_base_has_too(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    words = tokenizer(WORDS, {12: "<image>"})
    put(tmp_path, {"BASE/tokenizer.json": words, "FT/tokenizer.json": words})
    assert [note for note in notes(path) if note.startswith("BASE: its tokenizer has 1 ids without a row")]
    merged(path)


@pytest.mark.parametrize("stack", ["h", "transformer.h", "decoder.block", "visual.blocks"])
@pytest.mark.parametrize("kind", [{}, {"model_type": "x", "num_layers": 2}])
def test_layers_that_no_configuration_counts(tmp_path: Path, stack: str, kind: dict[str, Any]) -> None:
    base = {f"{stack}.{k}.w": np.full((4, 4), k + 1, np.float32) for k in range(2)}
    expert = tuned(base) | {f"{stack}.2.w": np.ones((4, 4), np.float32)}
    said = refused(pair(tmp_path, base, expert, kind, extra="copy"))
    assert f"3 layers of {stack} against 2" in said
    assert list(merged(pair(tmp_path, base, expert, kind, extra="ignore"))[0]) == list(base)


def test_chat_templates_wherever_they_stand(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {"FT/tokenizer_config.json": {"chat_template": "{{ x }}"}})
    assert [note for note in notes(path) if "has a chat_template in tokenizer_config.json" in note]
    put(tmp_path, {"BASE/chat_template.jinja": b"{{ y }}"})
    assert [note for note in notes(path) if note.startswith("FT: another chat template")]
    put(tmp_path, {"BASE/chat_template.jinja": b"{{ x }}"})
    assert not [note for note in notes(path) if "chat" in note]
