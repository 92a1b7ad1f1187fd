"""Models are made fit for a merge: pickles and extended vocabularies are copied once, others are left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import put
from llamas import CONFIG, HIDDEN, VOCABULARY, Tensors, as_stored, load, shapes, weights

import della
from della.errors import CheckpointError, EvaluationError
from della.experiments.full_models import prepare

HEADS = ("model.embed_tokens.weight", "lm_head.weight")


def extended(tensors: Tensors, rows: int) -> Tensors:
    """The same model with rows of padding tokens."""
    more = np.full((rows, HIDDEN), 7.0)
    return {
        name: np.concatenate([value, more.astype(value.dtype)]) if name in HEADS else value
        for name, value in tensors.items()
    }


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base, an expert with one token more, and one that fits."""
    base = weights(shapes(), 0, np.float16)
    math, code = (weights(shapes(), seed, np.float32, base) for seed in (1, 2))
    found = {}
    for role, folder, tensors in (
        ("base", "Llama-2", base), ("math", "WizardMath", extended(math, 1)), ("code", "Code", code),
    ):  # fmt: skip
        found[role] = tmp_path / folder
        config = CONFIG | {"vocab_size": len(tensors[HEADS[0]]), "rms_norm_eps": 1e-5}
        side = {"tokenizer.json": {"of": role}, "added_tokens.json": {"<pad>": 32000}}
        put(found[role], {"model.safetensors": tensors, "config.json": config})
        put(found[role], {"tokenizer.json": side["tokenizer.json"]} if role == "base" else side)
    return found


def prepared(
    models: dict[str, Path], role: str, out: Path, allow_pickle: bool = False
) -> tuple[str, list[str]]:
    told: list[str] = []
    found = {name: str(path) for name, path in models.items()}
    return prepare(role, found, out, allow_pickle, told.append), told


def test_a_model_that_fits_is_used_as_it_is(models: dict[str, Path], tmp_path: Path) -> None:
    assert prepared(models, "code", tmp_path / "out") == (str(models["code"]), [])
    assert prepared(models, "base", tmp_path / "out") == (str(models["base"]), [])
    assert not (tmp_path / "out").exists()


def test_rows_beyond_the_bases_are_left_out_of_a_copy(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "merge_method": "paper_della", "base_model": str(models["base"]),
        "models": [{"model": str(models["math"]), "parameters": {"density": 0.5}}],
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="vocabulary is larger: merge a version of it without"):
        della.merge(recipe, tmp_path / "refused")
    folder, told = prepared(models, "math", tmp_path / "out")
    assert Path(folder) == tmp_path / "out/WizardMath"
    assert told == [
        f"{models['math']}: copied as safetensors, with the {VOCABULARY} rows of its base, to {folder}"
    ]
    expected = load(models["math"])
    for name in HEADS:
        dtype, _, raw = expected[name]
        expected[name] = (dtype, (VOCABULARY, HIDDEN), raw[: VOCABULARY * HIDDEN * 4])
    assert load(Path(folder)) == expected
    assert json.loads((Path(folder) / "config.json").read_text()) == CONFIG | {
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    assert json.loads((Path(folder) / "tokenizer.json").read_text()) == {"of": "base"}
    assert not (Path(folder) / "added_tokens.json").exists(), "the base's tokenizer is the one that fits"
    recipe["models"] = [{"model": folder, "parameters": {"density": 0.5}}]
    della.merge(recipe, tmp_path / "merged")
    assert prepared(models, "math", tmp_path / "out") == (folder, []), "copied once"


def test_a_copy_of_something_else_is_not_used(models: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = prepared(models, "math", tmp_path / "out")
    put(models["math"], {"model.safetensors": extended(weights(shapes(), 9, np.float32), 2)})
    with pytest.raises(EvaluationError) as raised:
        prepared(models, "math", tmp_path / "out")
    assert str(raised.value) == f"{folder}: not a copy of {models['math']}; move it away"


def test_pickles_become_safetensors_where_they_are_allowed(models: dict[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = weights(shapes(), 3, np.float32)
    folder = tmp_path / "Pickled"
    put(folder, {"config.json": CONFIG})
    torch.save(
        {name: torch.from_numpy(value) for name, value in values.items()}, folder / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match="a pickle, which can run any code when it is loaded"):
        prepared(models | {"code": folder}, "code", tmp_path / "out")
    copy, told = prepared(models | {"code": folder}, "code", tmp_path / "out", allow_pickle=True)
    assert copy == str(tmp_path / "out/Pickled")
    assert len(told) == 1
    assert load(Path(copy)) == as_stored(values)
