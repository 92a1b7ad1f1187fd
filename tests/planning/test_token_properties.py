"""Random vocabularies, with holes and padding: each row is its token's, or a sentence tells why."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

from checkpoints import put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import ids

import della
from della.errors import DellaError

NAMES = ("base", "one", "two")
TABLE = "model.embed_tokens.weight"
WORDS = [f"w{n}" for n in range(8)]
ADDED = [f"<{n}>" for n in range(4)]


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, tuple[dict[str, int], dict[str, int], int]]:
    """Of each model: ids of ordinary tokens, of added ones, and how many rows it has."""
    found = {}
    for name in NAMES:
        words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6, unique=True))
        holes = draw(st.integers(0, 1)) if draw(st.integers(0, 3)) == 0 else 0
        numbers = draw(st.permutations(range(len(words) + holes)))[: len(words)]
        added = draw(st.lists(st.sampled_from(ADDED), max_size=3, unique=True))
        first = len(words) + holes
        rows = first + len(added) + draw(st.sampled_from([0, 0, 1, 3, -1]))
        extra = {token: first + n for n, token in enumerate(added)}
        found[name] = dict(zip(words, numbers)), extra, max(rows, 1)
    return found


def write(folder: Path, found: dict[str, tuple[dict[str, int], dict[str, int], int]]) -> dict[str, Any]:
    tensors = {}
    for seed, (name, (words, added, rows)) in enumerate(found.items()):
        listed = [{"id": n, "content": token, "special": True} for token, n in added.items()]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model = {"type": "WordLevel", "vocab": words, "unk_token": next(iter(words))}
        fast: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [each | flags for each in listed],
            "model": model,
        }
        fast |= dict.fromkeys(
            ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation")
        )
        table = np.random.default_rng(seed).standard_normal((rows, 2)).astype(np.float32)
        tensors[name] = table
        files = {
            "model.safetensors": {TABLE: table},
            "tokenizer.json": fast,
            "config.json": {"vocab_size": rows},
        }
        put(folder / name, files)
    return tensors


def expected(token: str | None, number: int, found: Any, tensors: Any) -> dict[str, Any] | None:
    """The row of each model, by the rule; None where there is none."""
    own = {}
    for name, (words, added, rows) in found.items():
        known = {n: word for word, n in (words | added).items()}
        at = number if token is None else (words | added).get(token)
        if at is not None and at < rows and not (token is None and at in known):
            own[name] = tensors[name][at].astype(np.float64)
    if not own:
        return None
    rest = own.get("base", np.mean(list(own.values()), axis=0))
    return {name: own.get(name, rest) for name in NAMES}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(vocabularies(), st.sampled_from(["base", "union", "one"]))
def test_every_row_or_a_sentence(found: Any, source: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensors = write(folder, found)
        listed = [{"model": str(folder / model), "parameters": {"weight": 0.5}} for model in NAMES[1:]]
        made = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": listed}
        made["tokenizer_source"] = str(folder / "one") if source == "one" else source
        try:
            della.merge(made, folder / "out", fsync=False, allow_idle=True)
        except DellaError as error:
            said = str(error)
            assert "no row in any model" in said or "without a hole" in said
            return
        from safetensors.numpy import load_file

        result = load_file(folder / "out/model.safetensors")[TABLE]
        owner = "one" if source == "one" else "base"
        tokens = {n: word for word, n in (found[owner][0] | found[owner][1]).items()}
        if source == "union" and len(ids(folder / "out")) > len(tokens):
            tokens = {n: word for word, n in ids(folder / "out").items()}
            for word, n in (found["base"][0] | found["base"][1]).items():
                assert tokens[n] == word
        assert json.loads((folder / "out/config.json").read_text())["vocab_size"] == len(result)
        for number, row in enumerate(result):
            wanted = expected(tokens.get(number), number, found, tensors)
            if wanted is not None:
                value = wanted["base"] + sum(0.5 * (wanted[model] - wanted["base"]) for model in NAMES[1:])
                np.testing.assert_allclose(row, value, atol=1e-5)
            else:
                assert number not in tokens
