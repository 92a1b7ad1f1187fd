"""Beside mergekit itself: every row of a merge with a tokenizer, by its token.

Needs an installed mergekit 0.1.5 (scripts/compare makes one) and is skipped without; all of its merges run in
one process.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

from safetensors.numpy import load_file, save_file
from vocabularies import CORPORA, KINDS, family, ids

import della

PYTHON = os.environ.get("DELLA_MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs mergekit: scripts/compare")
RUNNER = Path(__file__).parent / "mergekit_runner.py"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
INNER = {f"self_attn.{part}_proj": (4, 4) for part in "qkvo"} | {
    **{f"mlp.{part}_proj": (6, 4) for part in ("gate", "up")},
    **{"mlp.down_proj": (4, 6), "input_layernorm": (4,), "post_attention_layernorm": (4,)},
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "intermediate_size": 6}
PICKED = {
    "<|a|>": {"source": {"kind": "zero"}},
    "<|b|>": {"source": "one", "force": True},
    "<|c|>": {"source": {"kind": "model_token", "model": "one", "token": "<|a|>"}},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "base": {"tokenizer_source": "base"},
    "union": {"tokenizer_source": "union"},
    "model": {"tokenizer_source": "two"},
    "rows": {"tokenizer": {"source": "union", "tokens": PICKED}},
    "padded": {"tokenizer": {"source": "base", "pad_to_multiple_of": 16}},
    "linear": {"tokenizer": {}, "merge_method": "linear"},
}
CASES = [(kind, name) for kind in KINDS for name in SETTINGS]


def recipe(name: str) -> dict[str, Any]:
    """Of base, one and two, with paths from where the models lie."""
    listed = [{"model": model, "parameters": {"weight": w}} for model, w in (("one", 0.5), ("two", 0.75))]
    made = {"merge_method": "task_arithmetic", "base_model": "base", "models": listed, "dtype": "float32"}
    if name == "linear":
        listed.insert(0, {"model": "base", "parameters": {"weight": 1.0}})
    return made | SETTINGS[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders KIND with models, and KIND/mergekit-NAME of each setting."""
    root, merges = tmp_path_factory.mktemp("tokens"), []
    for kind in KINDS:
        for seed, (name, tensors) in enumerate(family(root / kind, kind).items()):
            rng = np.random.default_rng(seed)
            del tensors["lm_head.bias"]
            for part, shape in INNER.items():
                tensors[f"model.layers.0.{part}.weight"] = rng.standard_normal(shape).astype(np.float32)
            save_file(tensors, root / kind / name / "model.safetensors")
            path = root / kind / name / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | LLAMA | {"num_key_value_heads": 2}))
        for setting in SETTINGS:
            path = root / kind / f"{setting}.json"
            text = json.dumps(recipe(setting))
            for name in CORPORA:
                text = text.replace(f'"{name}"', json.dumps(str(root / kind / name)))
            text = text.replace(f'"tokenizer_source": "{root / kind / "base"}"', '"tokenizer_source": "base"')
            path.write_text(text.replace(f'"source": "{root / kind / "base"}"', '"source": "base"'))
            merges.append((str(path), str(root / kind / f"mergekit-{setting}")))
    (root / "tasks.json").write_text(json.dumps({"merges": merges}))
    subprocess.run([str(PYTHON), str(RUNNER), str(root / "tasks.json")], check=True, timeout=600)
    return root


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_rows_by_token(results: Path, kind: str, setting: str) -> None:
    out, theirs = results / kind / f"ours-{setting}", results / kind / f"mergekit-{setting}"
    text = (results / kind / f"{setting}.json").read_text()
    della.merge(json.loads(text) | {"compat": "mergekit"}, out, fsync=False)
    mine, yours = load_file(out / "model.safetensors"), load_file(theirs / "model.safetensors")
    here, there = ids(out), ids(theirs)
    assert here.keys() == there.keys()
    for table in TABLES:
        assert mine[table].shape == yours[table].shape
        for token, number in there.items():
            np.testing.assert_allclose(mine[table][here[token]], yours[table][number], rtol=1e-5, atol=1e-6)
        extra = yours[table][max(there.values()) + 1 :]
        np.testing.assert_allclose(mine[table][max(here.values()) + 1 :], extra, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_leaves_out_what_its_tokenizer_never_makes(results: Path, kind: str) -> None:
    out, theirs = results / kind / "own", results / kind / "mergekit-union"
    della.merge(json.loads((results / kind / "union.json").read_text()), out, fsync=False)
    here, there = ids(out), ids(theirs)
    base = ids(results / kind / "base")
    assert here.keys() == base.keys() | {"<|a|>", "<|b|>", "<|c|>"} < there.keys()
    mine, yours = load_file(out / "model.safetensors"), load_file(theirs / "model.safetensors")
    for token, number in here.items():
        np.testing.assert_allclose(
            mine[TABLES[0]][number], yours[TABLES[0]][there[token]], rtol=1e-5, atol=1e-6
        )
