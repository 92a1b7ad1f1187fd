"""What messages on tokenizers advise is done as it is written, and the rows of the tokens are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

import numpy as np
from checkpoints import put
from cures import cures
from safetensors.numpy import save_file
from vocabularies import family, ids, loaded, recipe, rows

import della
from della.errors import DellaError

EMBEDDINGS = "model.embed_tokens.weight"


def refused(folder: Path, advice: str, **more: Any) -> None:
    with pytest.raises(DellaError) as caught:
        della.plan(recipe(folder, **more))
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)


def check(folder: Path, tensors: Any, **more: Any) -> None:
    """The row of "<|a|>", an added token of one alone: base + half the difference of each."""
    della.merge(recipe(folder, **more), folder / "out", fsync=False, overwrite=True)
    own = rows(folder, tensors, EMBEDDINGS, "<|a|>")
    wanted = own["base"] + 0.5 * sum(own[name] - own["base"] for name in ("one", "two"))
    found = loaded(folder / "out")[EMBEDDINGS][ids(folder / "out")["<|a|>"]]
    assert np.allclose(found, wanted, atol=1e-6)


@cures("planning/retokenized.py:with_added", "planning/retokenized.py:with_added")
@cures("planning/retokenized.py:_check", "planning/retokenized.py:_check")
@pytest.mark.parametrize("what", ["absent", "no list", "of no kind", "a hole"])
def test_a_tokenizer_that_takes_no_more_tokens(tmp_path: Path, what: str) -> None:
    tensors = family(tmp_path, "bpe", pad=4 if what == "a hole" else 0)
    path = tmp_path / "base/tokenizer.json"
    whole = path.read_bytes()
    changed = json.loads(whole)
    if what == "absent":
        path.unlink()
        put(tmp_path / "base", {"vocab.json": changed["model"]["vocab"], "merges.txt": b"#version: 0.2\n"})
        advice = "let transformers make one"
    elif what == "no list":
        del changed["added_tokens"]
        advice = "save it anew with transformers"
    elif what == "of no kind":
        changed["pre_tokenizer"] = {"type": "Nonsense"}
        advice = "save it anew with transformers"
    else:
        number = len(changed["model"]["vocab"])
        changed["added_tokens"].append({**changed["added_tokens"][0], "id": number + 3, "content": "<|h|>"})
        advice = "without a hole"
    if what != "absent":
        path.write_text(json.dumps(changed))
    refused(tmp_path, advice, tokenizer_source="union")
    path.write_bytes(whole)
    check(tmp_path, tensors, tokenizer_source="union")


@cures("planning/vocabularies.py:_Follower._wanted")
def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    put(tmp_path / "other", {"model.safetensors": tensors["one"]})
    refused(tmp_path, "put its tokenizer.json beside it", tokenizer_source=str(tmp_path / "other"))
    put(tmp_path / "other", {"tokenizer.json": (tmp_path / "one/tokenizer.json").read_bytes()})
    check(tmp_path, tensors, tokenizer_source=str(tmp_path / "other"))


@cures("planning/vocabularies.py:_Follower._view")
def test_a_model_without_a_table(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    less = {name: array for name, array in tensors["one"].items() if name != "lm_head.bias"}
    save_file(less, tmp_path / "one/model.safetensors")
    refused(tmp_path, "give a model that has it", tokenizer_source="union")
    save_file(tensors["one"], tmp_path / "one/model.safetensors")
    check(tmp_path, tensors, tokenizer_source="union")


@cures("planning/vocabularies.py:_Follower._check_named", "planning/vocabularies.py:_Follower._check_named")
def test_a_token_that_no_model_has(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    named: dict[str, Any] = {"source": "union", "tokens": {"zzzzqqqq": {}}}
    refused(tmp_path, "give it a 'source', or remove it", tokenizer=named)
    zero = named | {"tokens": {"zzzzqqqq": {"source": {"kind": "zero"}}}}
    check(tmp_path, tensors, tokenizer=zero)
    assert not loaded(tmp_path / "out")[EMBEDDINGS][ids(tmp_path / "out")["zzzzqqqq"]].any()
    check(tmp_path, tensors, tokenizer={"source": "union"})
