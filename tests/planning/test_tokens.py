"""Rows follow tokens: real tokenizers, and every row of a result held against NumPy by its token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

import tokenizers
from checkpoints import put
from safetensors.numpy import save_file
from vocabularies import (
    ADDED,
    CORPORA,
    KINDS,
    TABLES,
    TEXTS,
    family,
    ids,
    loaded,
    recipe,
    rows,
    trained,
    write,
)

import della


def merge(folder: Path, **more: Any) -> Path:
    della.merge(recipe(folder, **more), folder / "out", fsync=False)
    return folder / "out"


def tokenizer_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["base", "union", "one"])
def test_each_row_is_its_token_s(tmp_path: Path, kind: str, source: str) -> None:
    tensors = family(tmp_path, kind)
    owner = tmp_path / ("base" if source == "union" else source)
    out = merge(tmp_path, tokenizer_source=str(owner) if source == "one" else source)
    found, made = loaded(out), ids(out)
    extra = ["<|a|>", "<|b|>", "<|c|>"] if source == "union" else []
    first = max(ids(owner).values()) + 1
    assert made == ids(owner) | {token: first + n for n, token in enumerate(extra)}
    for table in TABLES:
        assert len(found[table]) == len(made)
        for token, number in made.items():
            row = rows(tmp_path, tensors, table, token)
            wanted = row["base"] + 0.5 * (row["one"] - row["base"]) + 0.5 * (row["two"] - row["base"])
            np.testing.assert_allclose(found[table][number], wanted, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(made)
    ours, theirs = tokenizer_of(out), tokenizer_of(owner)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_further_chat_templates_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    family(tmp_path, KINDS[0])
    for name, files in {"base": ["tool", "rag"], "one": ["tool"]}.items():
        for file in files:
            (tmp_path / name / "additional_chat_templates").mkdir(exist_ok=True)
            (tmp_path / name / "additional_chat_templates" / f"{file}.jinja").write_text(name)
    out = merge(tmp_path, tokenizer_source=str(tmp_path / "one")) / "additional_chat_templates"
    assert {path.name: path.read_text() for path in out.iterdir()} == {"tool.jinja": "one"}
    assert della.verify(tmp_path / "out").is_well


def wanted(row: dict[str, Any]) -> Any:
    """Of task_arithmetic with weights of one half."""
    return row["base"] + 0.5 * (row["one"] - row["base"]) + 0.5 * (row["two"] - row["base"])


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_every_result(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    family(tmp_path, kind)
    out = merge(tmp_path, tokenizer={})
    ours, base = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "base"))
    assert {token: ours.convert_tokens_to_ids(token) for token in ids(out)} == ids(out)
    assert ours.eos_token == "</s>"
    for text in TEXTS[::10]:
        assert ours(text)["input_ids"] == base(text)["input_ids"]
    number = ids(out)["<|c|>"]
    assert number in ours("cat <|c|> cat")["input_ids"]
    assert ours.decode([number]) == "<|c|>"


def test_padded_rows_and_gaps_are_merged_by_number(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe", pad=5)
    for name in tensors:  # an id that no token has
        path = tmp_path / name / "tokenizer.json"
        table = json.loads(path.read_text())
        del table["model"]["vocab"]["c"]
        table["model"]["merges"] = []
        path.write_text(json.dumps(table))
    gap = trained("bpe", CORPORA["base"]).token_to_id("c")
    assert all(trained("bpe", CORPORA[name]).token_to_id("c") == gap for name in ("one", "two"))
    out = merge(tmp_path, tokenizer_source="base")
    found, first = loaded(out), max(ids(tmp_path / "base").values()) + 1
    size = len(tensors["base"][TABLES[0]])
    for table in TABLES:
        assert len(found[table]) == size
        base, one, two = (tensors[name][table] for name in ("base", "one", "two"))
        row = {"base": base[gap], "one": one[gap], "two": two[gap]}
        np.testing.assert_allclose(found[table][gap], wanted(row), atol=1e-6)
        for number in range(first, size):  # a row of another model is one of its tokens, or padding too
            row = {"base": base[number]}
            for name, own in (("one", one), ("two", two)):
                table_ = json.loads((tmp_path / name / "tokenizer.json").read_text())
                used = {*table_["model"]["vocab"].values(), *(each["id"] for each in table_["added_tokens"])}
                taken = number in used or number >= len(own)
                row[name] = base[number] if taken else own[number]
            np.testing.assert_allclose(found[table][number], wanted(row), atol=1e-6)


def test_new_tokens_take_padded_rows_first(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bytes", pad=2)
    out = merge(tmp_path, tokenizer_source="union")
    size = len(tensors["base"][TABLES[0]])
    assert [ids(out)[token] for token in ("<|a|>", "<|b|>", "<|c|>")] == [size - 2, size - 1, size]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == size + 1
    row = rows(tmp_path, tensors, TABLES[1], "<|b|>")
    np.testing.assert_allclose(loaded(out)[TABLES[1]][size - 1], wanted(row), atol=1e-6)


def test_rows_that_the_recipe_names(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    said = {
        "<|a|>": {"source": {"kind": "zero"}},
        "<|b|>": {"source": str(tmp_path / "two"), "force": True},
        "<|c|>": {"source": {"kind": "model_token", "model": str(tmp_path / "one"), "token": "<|a|>"}},
        "<|d|>": {"source": {"kind": "model_token", "model": str(tmp_path / "two"), "token_id": 1}},
        "dice": {},  # an ordinary token of two
    }
    assert (
        "dice" in ids(tmp_path / "two").keys() - ids(tmp_path / "one").keys() - ids(tmp_path / "base").keys()
    )
    out = merge(tmp_path, tokenizer={"source": "union", "tokens": said})
    made, found = ids(out), loaded(out)
    names = sorted(said, key=made.__getitem__)
    assert names == ["<|a|>", "<|b|>", "dice", "<|c|>", "<|d|>"]  # one's, two's by id, and what is in neither
    one, two = ids(tmp_path / "one"), ids(tmp_path / "two")
    for table in TABLES:
        a, b = tensors["one"][table][one["<|a|>"]], tensors["two"][table][two["<|b|>"]]
        c = tensors["two"][table][two["<|c|>"]]
        np.testing.assert_allclose(found[table][made["<|a|>"]], 0.5 * a, atol=1e-6)
        np.testing.assert_allclose(found[table][made["<|b|>"]], b, atol=1e-6)
        np.testing.assert_allclose(found[table][made["<|c|>"]], a + 0.5 * (c - a), atol=1e-6)
        np.testing.assert_allclose(found[table][made["<|d|>"]], tensors["two"][table][1], atol=1e-6)
        row = rows(tmp_path, tensors, table, "dice")
        np.testing.assert_allclose(found[table][made["dice"]], wanted(row), atol=1e-6)


def test_padding_is_the_mean_row(tmp_path: Path) -> None:
    tensors = family(tmp_path, "wordpiece")
    out = merge(tmp_path, tokenizer={"source": "base", "pad_to_multiple_of": 16})
    made, found, size = ids(out), loaded(out), len(tensors["base"][TABLES[0]])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == -(-size // 16) * 16 > size
    for table in TABLES:
        placed = {token: rows(tmp_path, tensors, table, token) for token in made}
        mean = {name: np.mean([row[name] for row in placed.values()], axis=0) for name in tensors}
        assert len(found[table]) == -(-size // 16) * 16
        for row in found[table][size:]:
            np.testing.assert_allclose(row, wanted(mean), atol=1e-6)


def test_without_a_base_two_owners_give_their_mean(tmp_path: Path) -> None:
    """linear: no base, so a token that two of three have is their mean in the third."""
    tensors = family(tmp_path, "bytes")
    listed = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in tensors]
    della.merge({"merge_method": "linear", "models": listed, "tokenizer": {}}, tmp_path / "out", fsync=False)
    one, two = (tensors[name][TABLES[0]][ids(tmp_path / name)["<|b|>"]] for name in ("one", "two"))
    found = loaded(tmp_path / "out")[TABLES[0]][ids(tmp_path / "out")["<|b|>"]]
    np.testing.assert_allclose(found, (one + two) / 2, atol=1e-6)


def test_a_tied_base_and_models_with_heads_of_their_own(tmp_path: Path) -> None:
    tensors = {
        name: write(
            tmp_path / name, trained("bpe", CORPORA[name], ADDED[name]), seed, tie_word_embeddings=not seed
        )
        for seed, name in enumerate(CORPORA)
    }
    out = merge(tmp_path, tokenizer_source="union")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    tensors["base"]["lm_head.weight"] = tensors["base"][TABLES[0]]
    for table in TABLES[:2]:
        for token, number in ids(out).items():
            row = rows(tmp_path, tensors, table, token)
            np.testing.assert_allclose(loaded(out)[table][number], wanted(row), atol=1e-6)


def test_what_is_equal_stays_byte_for_byte(tmp_path: Path) -> None:
    tokenizer = trained("bpe", CORPORA["base"])
    for seed, name in enumerate(CORPORA):
        write(tmp_path / name, tokenizer, seed, pad=3)
    for name, key in (("plain", None), ("kept", "base"), ("joined", "union")):
        della.merge(recipe(tmp_path, tokenizer_source=key), tmp_path / name, fsync=False)
    plain, *others = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "kept", "joined")
    )
    assert others == [plain, plain]


def test_no_stale_vocabulary_stays(tmp_path: Path) -> None:
    family(tmp_path, "bytes")
    stale = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
    for name in ("base", "one"):
        put(tmp_path / name, {"tokenizer.model": b"s" + name.encode(), "vocab.json": {}, "merges.txt": b""})
        put(tmp_path / name, {"added_tokens.json": {}, "chat_template.jinja": name.encode()})
    out = merge(tmp_path, tokenizer_source="union")
    assert not any((out / name).exists() for name in stale)
    assert (out / "chat_template.jinja").read_text() == "base"
    with della.plan(recipe(tmp_path, tokenizer_source="union")) as plan:
        assert any("tokenizer.model" in note and "left behind" in note for note in plan.notes)
        assert not any("tokenizer.json" in note for note in plan.notes if "left behind" in note)
    della.merge(recipe(tmp_path, tokenizer_source=str(tmp_path / "one")), tmp_path / "other", fsync=False)
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == b"sone"
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "one"
    della.merge(recipe(tmp_path, tokenizer_source="base"), tmp_path / "same", fsync=False)
    assert (tmp_path / "same" / "tokenizer.model").read_bytes() == b"sbase"


def test_ids_in_the_configuration_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    for seed, name in enumerate(CORPORA):
        made = trained("bpe", CORPORA[name], ADDED[name])
        end = made.token_to_id("</s>" if name == "base" else "<|b|>")
        write(tmp_path / name, made, seed, eos_token_id=end, text_config={"pad_token_id": 0})
        put(tmp_path / name, {"generation_config.json": {"eos_token_id": end}})
    out = merge(tmp_path, tokenizer_source=str(tmp_path / "two"))
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == ids(tmp_path / "two")["<|b|>"] == ids(out)["<|b|>"]
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": ids(out)["<|b|>"]}
    assert json.loads((merge_again(tmp_path) / "config.json").read_text())["eos_token_id"] == 1


def merge_again(folder: Path) -> Path:
    """With the base's tokenizer."""
    della.merge(recipe(folder, tokenizer_source="base"), folder / "again", fsync=False)
    return folder / "again"


def test_a_result_verifies_by_its_sources(tmp_path: Path) -> None:
    family(tmp_path, "unigram")
    out = merge(tmp_path, tokenizer_source="union")
    verdict = della.verify(out, sources=1.0, inputs=True)
    assert not verdict.problems


def test_what_mergekit_does_otherwise_is_told(tmp_path: Path) -> None:
    family(tmp_path, "bpe", pad=5)
    with della.plan(recipe(tmp_path, tokenizer_source="union")) as plan:
        told = [line for line in plan.departures if "mergekit:" in line]
    for words in ("mergekit: another order", "mergekit: rows for them", "mergekit: cut"):
        assert sum(words in line for line in told) == 1
    with della.plan(recipe(tmp_path, tokenizer_source="base")) as plan:
        assert sum("mergekit: cut" in line for line in plan.departures) == 1
        assert not any("another order" in line for line in plan.departures)


def test_slices_of_models_with_other_tokenizers(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    for name, held in tensors.items():
        held |= {f"model.layers.{n}.w": np.full(2, n + len(name), np.float32) for n in range(2)}
        save_file(held, tmp_path / name / "model.safetensors")
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    slices = [
        {"sources": [{"model": str(tmp_path / name), "layer_range": [n, n + 1]}]}
        for n, name in enumerate(("base", "two"))
    ]
    made = {"merge_method": "passthrough", "base_model": str(tmp_path / "base"), "slices": slices}
    della.merge(made | {"tokenizer_source": "union"}, tmp_path / "out", fsync=False)
    found = loaded(tmp_path / "out")
    assert (found["model.layers.0.w"].tolist(), found["model.layers.1.w"].tolist()) == ([4, 4], [4, 4])
    inputs = {name: tensors[name] for name in ("base", "two")}
    for table, name in ((TABLES[0], "base"), (TABLES[1], "two")):
        for token, number in ids(tmp_path / "out").items():
            row = rows(tmp_path, inputs, table, token)[name]
            np.testing.assert_allclose(found[table][number], row, atol=1e-6)


def test_a_model_of_other_prefixes_and_nested_configurations(tmp_path: Path) -> None:
    tensors = family(tmp_path, "wordpiece")
    save_file({f"module.{n}": t for n, t in tensors["one"].items()}, tmp_path / "one/model.safetensors")
    path, size = tmp_path / "base" / "config.json", len(tensors["base"][TABLES[0]])
    nested = {"text_config": {"vocab_size": size}, "audio_config": {"vocab_size": size + 7}}
    path.write_text(json.dumps(json.loads(path.read_text()) | nested))
    out = merge(tmp_path, tokenizer_source="union", mismatch="ignore")
    config = json.loads((out / "config.json").read_text())
    assert [config["vocab_size"], config["text_config"]["vocab_size"]] == [size + 3] * 2
    assert config["audio_config"]["vocab_size"] == size + 7
    number = ids(out)["<|a|>"]
    np.testing.assert_allclose(
        loaded(out)[TABLES[1]][number], wanted(rows(tmp_path, tensors, TABLES[1], "<|a|>")), atol=1e-6
    )


def test_a_model_under_another_path_is_itself(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe", pad=4)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    out = merge(tmp_path, tokenizer_source=str(tmp_path / "link"))
    assert len(loaded(out)[TABLES[0]]) == len(tensors["one"][TABLES[0]])  # its padding too
