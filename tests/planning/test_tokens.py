"""Rows follow tokens: real tokenizers, and every row of a result held against NumPy by its token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

import tokenizers
from vocabularies import KINDS, TABLES, TEXTS, family, ids, loaded, recipe, rows

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
