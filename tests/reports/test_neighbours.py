"""Neighbours of the cases of test_heads.py: other types, names and forms of the same faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from test_heads import EMBED, HEAD, WORDS, config, llama, merged, notes, pair, refused, tokenizer, tuned

from della.planning.heads import TIED_TYPES

SILENT = {"tie_word_embeddings": None, "architectures": None}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}


def test_types_that_tie_are_those_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    known = set(auto.CONFIG_MAPPING.keys())
    assert not [k for k in TIED_TYPES & known if not auto.CONFIG_MAPPING[k]().tie_word_embeddings]


@pytest.mark.parametrize("kind", ["falcon", "smollm3", "codegen", "none_of_these"])
@pytest.mark.parametrize("missing", ["error", "base"])
def test_a_copy_in_the_base_follows_what_is_merged(tmp_path: Path, kind: str, missing: str) -> None:
    base, cfg = llama(), config(model_type=kind, **SILENT)
    expert = tuned(base)
    found, _ = merged(pair(tmp_path, base | {HEAD: base[EMBED]}, expert, cfg, missing=missing))
    assert np.allclose(found[EMBED], expert[EMBED], atol=1e-6)
    assert np.array_equal(found[HEAD] if HEAD in found else found[EMBED], found[EMBED])


def test_a_copy_in_a_model_of_a_base_without_head(tmp_path: Path) -> None:
    expert = tuned(llama())
    cfg = config(model_type="none_of_these", **SILENT)
    found, _ = merged(pair(tmp_path, llama(), expert | {HEAD: expert[EMBED]}, cfg, extra="copy"))
    assert HEAD not in found
    assert np.allclose(found[EMBED], expert[EMBED], atol=1e-6)


def test_layers_that_the_same_configuration_does_not_count(tmp_path: Path) -> None:
    said = refused(pair(tmp_path, llama(), tuned(llama(layers=2)), extra="copy"))
    assert "2 layers of model.layers against 1" in said
    found, _ = merged(pair(tmp_path, llama(), tuned(llama(layers=2)), extra="ignore"))  # the cure
    assert found.keys() == llama().keys()


def test_experts_that_the_configuration_does_not_count(tmp_path: Path) -> None:
    base = llama() | {"model.layers.0.mlp.experts.0.w.weight": np.ones((8, 8), np.float32)}
    more = tuned(base) | {"model.layers.0.mlp.experts.1.w.weight": np.ones((8, 8), np.float32)}
    assert "an expert that the base has none of" in refused(pair(tmp_path, base, more, extra="copy"))
    found, _ = merged(
        pair(tmp_path, base, more, *[config(architectures=None)] * 2, extra="ignore")
    )  # the cure
    assert found.keys() == base.keys()


@pytest.mark.parametrize("embeddings", ["backbone.embeddings.weight", "transformer.word_embedding.weight"])
def test_other_names_of_embeddings(tmp_path: Path, embeddings: str) -> None:
    base = {(embeddings if name == EMBED else name): each for name, each in llama().items()}
    expert, cfg = tuned(base), config(model_type="mamba", **SILENT)
    found, _ = merged(pair(tmp_path, base | {HEAD: base[embeddings]}, expert, cfg, missing="base"))
    assert np.array_equal(found[HEAD] if HEAD in found else found[embeddings], found[embeddings])
    assert np.allclose(found[embeddings], expert[embeddings], atol=1e-6)


@pytest.mark.parametrize("named", [True, False])
def test_two_heads_in_one_file(tmp_path: Path, named: bool) -> None:
    both: dict[str, Any] = {"tie_word_embeddings": False}
    ours = config(**both) if named else config(**both, architectures=None)
    theirs = ours | ({"architectures": ["LlamaForSequenceClassification"]} if named else {})
    base, expert = llama(head=3), tuned(llama()) | {"score.weight": np.ones((2, 8), np.float32)}
    assert "another kind of" in refused(
        pair(tmp_path, base, expert, ours, theirs, missing="base", extra="copy")
    )
    found, _ = merged(pair(tmp_path, base, expert, ours, theirs, missing="base", extra="ignore"))  # the cure
    assert np.array_equal(found[HEAD], base[HEAD])
    assert "score.weight" not in found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"rope_theta": 1e4}, {"rope_parameters": ROPE}), ({}, {"head_dim": 4}),
        ({"num_key_value_heads": None}, {}),
        ({"rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
    ],
)  # fmt: skip
def test_other_spellings_of_the_same(tmp_path: Path, ours: Any, theirs: Any) -> None:
    for one, two in ((ours, theirs), (theirs, ours)):
        path = pair(tmp_path, llama(), tuned(llama()), config(**one), config(**two))
        assert not [note for note in notes(path) if "differs" in note]


@pytest.mark.parametrize(
    "field", ["moe_intermediate_size", "v_head_dim", "routed_scaling_factor", "ffn_dim", "encoder_layers"]
)
def test_more_fields_that_change_what_weights_mean(tmp_path: Path, field: str) -> None:
    path = pair(tmp_path, llama(), tuned(llama()), config(**{field: 8}), config(**{field: 16}))
    assert [note for note in notes(path) if f"{field} 16 against 8" in note]


@pytest.mark.parametrize("part", ["vision_config", "llm_config", "thinker_config"])
def test_another_type_of_a_part(tmp_path: Path, part: str) -> None:
    ours, theirs = (config(**{part: {"model_type": kind}}) for kind in "ab")
    assert f"{part}.model_type b, expected a" in refused(
        pair(tmp_path, llama(), tuned(llama()), ours, theirs)
    )
    found, _ = merged(pair(tmp_path, llama(), tuned(llama()), ours, theirs, mismatch="ignore"))  # the cure
    assert np.allclose(found[EMBED], tuned(llama())[EMBED], atol=1e-6)


def _with(form: str, **more: Any) -> dict[str, Any]:
    made = tokenizer(WORDS)
    return {**made, "model": {**made["model"], **more}} if form == "model" else {**made, **more}


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "said"),
    [
        ("tokenizer.model", b"a", b"b", "tokenizer.model differs"),
        ("spm.model", b"a", b"b", "spm.model differs"),
        ("tokenizer.json", _with("model", merges=["a b"]), _with("model", merges=["b a"]), "merges of"),
        ("tokenizer.json", _with(""), _with("", normalizer={"type": "Lowercase"}), "normalizer of"),
        ("special_tokens_map.json", {"eos_token": "a"}, {"eos_token": "b"}, "eos_token 'b' against 'a'"),
        ("generation_config.json", {"eos_token_id": 1}, {"eos_token_id": [1, 3]}, "[1, 3] against 1"),
        ("tokenizer_config.json", {}, {"chat_template": "x"}, "has a chat_template in"),
        ("tokenizer_config.json", {"chat_template": "y"}, {"chat_template": "x"}, "another chat template"),
    ],
)  # fmt: skip
def test_another_tokenizer(tmp_path: Path, name: str, ours: Any, theirs: Any, said: str) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {f"BASE/{name}": ours, f"FT/{name}": theirs})
    assert len([note for note in notes(path) if said in note]) == 1


def test_merges_of_either_spelling_are_the_same(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {
        "BASE/tokenizer.json": _with("model", merges=["a b"]),
        "FT/tokenizer.json": _with("model", merges=[["a", "b"]]),
    })  # fmt: skip
    assert not [note for note in notes(path) if "tokenizer" in note]


def test_added_tokens_of_the_configuration_need_rows(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {"FT/tokenizer_config.json": {"added_tokens_decoder": {"40": {"content": "<x>"}}}})
    assert "40 is '<x>'" in refused(path)


def test_old_lists_of_special_tokens_that_contradict_are_not_shipped(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    for name, file in (("<a>", "tokenizer_config.json"), ("<b>", "special_tokens_map.json")):
        put(tmp_path, {f"BASE/{file}": {"additional_special_tokens": [name]}})
    merged(path)
    assert not (tmp_path / "out/special_tokens_map.json").exists()


def test_a_special_token_that_is_null_is_none_in_any_file(tmp_path: Path) -> None:
    path = pair(tmp_path, llama(), tuned(llama()))
    put(tmp_path, {
        "BASE/tokenizer_config.json": {"pad_token": None, "eos_token": "</s>"},
        "BASE/special_tokens_map.json": {"pad_token": "<pad>", "eos_token": "</s>"},
    })  # fmt: skip
    assert any("special_tokens_map.json contradicts" in note for note in notes(path))
    put(tmp_path, {"BASE/special_tokens_map.json": {"eos_token": "</s>", "bos_token": "<s>"}})
    assert not any("contradicts" in note for note in notes(path))  # a key that is absent says nothing


WORDS_OF_FIVE = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
HOLES: list[tuple[dict[str, int], list[tuple[int, str]]]] = [
    (WORDS_OF_FIVE, [(5, "<s>"), (9, "</s>")]), (WORDS_OF_FIVE, [(5, "<s>"), (6, "</s>")]),
    (WORDS_OF_FIVE, [(7, "<s>"), (8, "</s>")]), (WORDS_OF_FIVE, [(1, "a"), (5, "<s>")]),
    ({"<unk>": 0, "a": 2, "b": 4}, [(5, "<s>"), (6, "</s>")]), (WORDS_OF_FIVE, []),
]  # fmt: skip


@pytest.mark.parametrize(("words", "added"), HOLES)
def test_holes_in_ids_are_told_as_tokenizers_fills_them(
    tmp_path: Path, words: dict[str, int], added: list[tuple[int, str]]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = pair(tmp_path, llama(), tuned(llama()))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    made = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "added_tokens": [{"id": number, "content": text, **flags} for number, text in added],
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    put(tmp_path, {"BASE/tokenizer.json": made, "FT/tokenizer.json": made})
    real = tokenizers.Tokenizer.from_file(str(tmp_path / "BASE/tokenizer.json"))
    moved = [(text, number) for number, text in added if real.token_to_id(text) != number]
    found = [note for note in notes(path) if "hole" in note]
    assert len(found) == bool(moved)
    if moved:
        text, number = moved[0]
        assert f"{len(moved)} added tokens" in found[0]
        assert f"{text!r} is {number}" in found[0]
        assert f"row {real.token_to_id(text)}" in found[0]
