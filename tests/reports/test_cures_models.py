"""What messages on models that do not fit advise is done as a user would, and gives the merge that it should;
none of it, alone or with the next, leads to a merge that is none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from cures import cures

import della
from della.checkpoint.source import open_source
from della.errors import DellaError

Tensors = dict[str, Any]
BASE: Tensors = {
    "model.embed_tokens.weight": np.arange(32, dtype=np.float32).reshape(8, 4) / 8,
    "model.layers.0.mlp.up_proj.weight": np.ones((4, 4), np.float32),
    "model.layers.1.mlp.up_proj.weight": np.full((4, 4), 2, np.float32),
    "lm_head.weight": np.arange(32, dtype=np.float32).reshape(8, 4) / 4,
}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "num_hidden_layers": 2}


def plus(tensors: Tensors, by: float) -> Tensors:
    return {name: array + np.float32(by) for name, array in tensors.items()}


ONE, TWO = plus(BASE, 2), plus(BASE, -1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, tensors in {"base": BASE, "one": ONE, "two": TWO}.items():
        model(tmp_path / name, tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(folder: Path, tensors: Tensors, **config: Any) -> None:
    put(folder, {"model.safetensors": tensors, "config.json": CONFIG | config})


def merged(models: str = "one", method: str = "task_arithmetic", **top: Any) -> Tensors:
    options = {"allow_idle": top.pop("allow_idle")} if "allow_idle" in top else {}
    own = top.pop("own", {})
    recipe: Tensors = {"merge_method": method, "base_model": "base"} | top
    recipe["models"] = [{"model": name, "parameters": own.get(name, {})} for name in models.split()]
    Path("recipe.yml").write_text(json.dumps(recipe))
    della.merge("recipe.yml", "out", fsync=False, overwrite=True, **options)
    with open_source("out") as source:
        return {name: view.read().astype(np.float32) for name, view in source.tensors.items()}


def refused(*advice: str, **given: Any) -> str:
    with pytest.raises(DellaError) as caught:
        merged(**given)
    told = " | ".join(problem.fix or "" for problem in caught.value.problems)
    assert all(word in told for word in advice), str(caught.value)
    return told


def check(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.allclose(found[name], array, atol=1e-6), name


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {name: array for name, array in tensors.items() if not any(part in name for part in parts)}


EXTRA = {"model.gate.weight": np.full((2, 2), 5, np.float32)}


@cures("planning/compatibility.py:check_fit")
@pytest.mark.parametrize("policy", ["ignore", "copy"])
def test_a_tensor_beyond_the_base(policy: str) -> None:
    model(Path("one"), ONE | EXTRA)
    refused("'extra: ignore'", "'extra: copy'")
    check(merged(extra=policy), ONE | (EXTRA if policy == "copy" else {}))


@cures("planning/compatibility.py:check_fit", "planning/compatibility.py:check_fit")
def test_another_depth() -> None:
    """'extra: ignore' is advised, and gives the layers in common."""
    deeper = ONE | {"model.layers.2.mlp.up_proj.weight": np.ones((4, 4), np.float32)}
    model(Path("one"), deeper, num_hidden_layers=3)
    assert "extra: copy" not in refused("fine-tunes of one base; 'extra: ignore'")
    refused("write 'extra: ignore'", extra="copy")
    check(merged(extra="ignore"), ONE)


@cures("planning/compatibility.py:_claimed_twice")
def test_a_tensor_of_two_models() -> None:
    for name, tensors in (("one", ONE), ("two", TWO)):
        model(Path(name), tensors | EXTRA)
    refused("write 'extra: ignore'", models="one two", extra="copy")
    check(merged("one two", extra="ignore"), plus(BASE, 1))


@cures("planning/compatibility.py:_lacking", "planning/compatibility.py:_lacking")
@pytest.mark.parametrize("cure", ["untie", "missing"])
def test_a_tied_head(cure: str) -> None:
    tied = without(ONE, "lm_head")
    model(Path("one"), tied, tie_word_embeddings=True)
    refused("save it with tie_word_embeddings: false", "'missing: base'")
    if cure == "untie":
        head = {"lm_head.weight": tied["model.embed_tokens.weight"]}
        model(Path("one"), tied | head, tie_word_embeddings=False)
        check(merged(), tied | head)
    else:
        check(merged(missing="base"), tied | {"lm_head.weight": BASE["lm_head.weight"]})


@cures("planning/compatibility.py:_lacking", "planning/compatibility.py:_lacking")
@pytest.mark.parametrize("cure", ["another model", "missing"])
def test_a_model_that_lacks_a_tensor(cure: str) -> None:
    model(Path("one"), without(ONE, "layers.1"))
    refused("fine-tunes of one base", "'missing: base'")
    if cure == "missing":
        check(merged(missing="base"), ONE | {n: BASE[n] for n in BASE if "layers.1" in n})
    else:
        check(merged("two"), TWO)


@cures("planning/compatibility.py:_misfits")
@pytest.mark.parametrize("grown", ["one", "base"])
def test_a_larger_vocabulary(grown: str) -> None:
    """The rows that were added are taken away again."""
    own = ONE if grown == "one" else BASE
    model(Path(grown), {n: np.vstack([a, a[:2]]) if len(a) == 8 else a for n, a in own.items()})
    said = refused("without the added rows")
    assert ("this model's" in said) == (grown == "one")
    model(Path(grown), own)
    check(merged(), ONE)


@cures("planning/configs.py:other_type")
def test_another_type() -> None:
    model(Path("one"), ONE, model_type="mistral")
    refused("'mismatch: ignore'")
    check(merged(mismatch="ignore"), ONE)
    check(merged("two"), TWO)


@cures(
    *["planning/alignment.py:strangers", "planning/alignment.py:strangers", "planning/alignment.py:strangers"]
)
@pytest.mark.parametrize("kind", ["empty", "stranger", "fused"])
def test_another_kind_of_model(kind: str) -> None:
    experts = {f"layers.0.experts.{k}.down_proj.weight": np.ones((4, 4), np.float32) for k in range(3)}
    fused = {"layers.0.experts.down_proj": np.ones((3, 4, 4), np.float32)}
    if kind == "fused":
        model(Path("base"), experts)
        model(Path("one"), fused)
        refused("same version of transformers")
        model(Path("one"), plus(experts, 1))
        check(merged(), plus(experts, 1))
        return
    model(Path("one"), {} if kind == "empty" else {f"h.{k}.w": np.ones(3, np.float32) for k in range(9)})
    said = refused("with weights" if kind == "empty" else "fine-tunes of one base")
    assert "missing" not in said
    assert "extra" not in said
    check(merged("two"), TWO)


STRANGERS: Tensors = {
    "a prefix that does not fit": {f"other.{n}": np.ones((3, 3), np.float32) for n in BASE},
    "nothing in common": {f"h.{k}.w": np.ones(3, np.float32) for k in range(9)},
    "another type": {f"h.{k}.w": np.ones(3, np.float32) for k in range(9)} | without(ONE, "lm_head"),
    "only the embeddings": {"model.embed_tokens.weight": ONE["model.embed_tokens.weight"]},
    "factors": {f"{n}.lora_{k}.weight": np.ones((2, 4), np.float32) for n in BASE for k in "AB"},
}


@pytest.mark.parametrize("policies", [*itertools.product(["error", "base"], ["error", "ignore", "copy"])])
@pytest.mark.parametrize("kind", STRANGERS)
def test_no_policies_lead_to_the_base(kind: str, policies: tuple[str, str]) -> None:
    """Whatever is written of what messages on this model name: refused, or the result is not the base."""
    model(Path("one"), STRANGERS[kind])
    for mismatch in ("error", "ignore"):
        found, said = BASE, ""
        try:
            found = merged(missing=policies[0], extra=policies[1], mismatch=mismatch)
        except DellaError as error:
            said = str(error)
        assert "allow" not in said, "which would let the base pass"
        assert said or any(not np.array_equal(found[name], BASE[name]) for name in BASE)


@cures("planning/alignment.py:differing_buffers")
def test_a_table_of_complex_numbers() -> None:
    table = {"spectral": np.ones((2, 3), np.complex64)}
    model(Path("base"), BASE | table)
    model(Path("one"), ONE | {"spectral": table["spectral"] * 2})
    refused("the spectral of base")
    model(Path("one"), ONE | table)
    della.merge("recipe.yml", "out", fsync=False)
    with open_source("out") as source:
        assert np.allclose(source.tensors["lm_head.weight"].read(), ONE["lm_head.weight"])


@cures("planning/planner.py:_fp8")
@pytest.mark.parametrize("cure", ["bf16", "plain"])
def test_float8(cure: str) -> None:
    narrow = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in ONE.items()}
    model(Path("one"), narrow)
    refused("BF16", "'plain_fp8: true'")
    values = {name: array.astype(np.float32) for name, array in narrow.items()}
    if cure == "bf16":
        model(Path("one"), {name: array.astype(ml_dtypes.bfloat16) for name, array in values.items()})
    check(merged(plain_fp8=cure == "plain"), values)


@cures("planning/planner.py:_without_base")
def test_only_the_base() -> None:
    refused("at least one expert", models="./base")
    check(merged("./base one"), ONE)


@cures("planning/tokenizers.py:_beyond_rows")
@pytest.mark.parametrize("cure", ["rows", "tokenizer"])
def test_ids_without_rows(cure: str) -> None:
    def tokenizer(count: int) -> dict[str, Any]:
        return {"tokenizer.json": {"model": {"vocab": {f"t{k}": k for k in range(count)}}}}

    for name in ("base", "one"):
        put(Path(name), tokenizer(8))
    put(Path("one"), tokenizer(9))
    refused("resize its embeddings", "its own tokenizer")
    if cure == "tokenizer":
        put(Path("one"), tokenizer(8))
        check(merged(), ONE)
        return
    for name, own in (("base", BASE), ("one", ONE)):  # and then the base's alike, as the next message says
        if name == "base":
            model(Path("one"), {n: np.vstack([a, a[:1]]) if len(a) == 8 else a for n, a in ONE.items()})
            refused("write 'tokenizer_source: union'")  # or as follows, which keeps every row
        model(Path(name), {n: np.vstack([a, a[:1]]) if len(a) == 8 else a for n, a in own.items()})
    assert len(merged()["lm_head.weight"]) == 9


# ---- models that take no part, and merges that change nothing --------------------------------------------


@cures("planning/coverage.py:check_idle", "planning/coverage.py:check_idle")
@pytest.mark.parametrize("cause", ["weight", "names"])
def test_an_idle_model(cause: str) -> None:
    given: Tensors = {"models": "one two", "missing": "base"}
    if cause == "weight":
        given["own"] = {"one": {"weight": 0}}
    else:
        model(Path("one"), {"model.layers.0.mlp.up_proj.weight": BASE["model.layers.0.mlp.up_proj.weight"]})
        given |= {"own": {"one": {"weight": [{"filter": "embed", "value": 1}, {"value": 0}]}}}
    refused("take it out", "allow_idle=True", **given)
    check(merged(**given, allow_idle=True), TWO)
    check(merged("two"), TWO)
    said = refused("nothing would be merged", **given | {"models": "one"})
    assert "allow" not in said, "the base would come out"


@cures(
    "running/measure.py:check_changes",
    "running/measure.py:check_changes",
    "running/run.py:run",
    "running/run.py:run",
)
def test_a_model_that_is_the_base() -> None:
    model(Path("one"), BASE)
    said = refused("take it out", "allow_idle=True", "kept in", "not computed again", models="one two")
    assert "--" not in said
    recipe = Path("recipe.yml")
    again = della.merge(recipe, "out", fsync=False, allow_idle=True)
    assert again.resumed == len(BASE), "nothing is computed twice"
    check(merged("two"), TWO)
    assert "allow" not in refused("nothing would be merged", models="one")


@cures("running/measure.py:check_changes")
@pytest.mark.parametrize("cure", ["weights", "dtype"])
def test_changes_that_are_rounded_away(cure: str) -> None:
    half = {name: (array + 1).astype(np.float16) for name, array in BASE.items()}
    model(Path("base"), half)
    for name in ("one", "two"):
        model(Path(name), {n: (a * np.float16(1 + 2**-9)).astype(np.float16) for n, a in half.items()})
    small: Tensors = {"models": "one two", "own": {n: {"weight": 1e-3} for n in ("one", "two")}}
    said = refused("larger weights, or a wider dtype", **small)
    assert "allow" not in said, "the base would come out"
    given: Tensors = small | dict([("own", {}) if cure == "weights" else ("dtype", "float32")])
    found = merged(**given)
    with open_source("one") as source:
        wide = {n: source.tensors[n].read().astype(np.float32) for n in half}
    times = 2 if cure == "weights" else 2e-3
    for name, array in half.items():
        expected = array.astype(np.float32) + times * (wide[name] - array.astype(np.float32))
        assert np.allclose(found[name], expected, rtol=2e-3 if cure == "weights" else 1e-6), name
        assert not np.array_equal(found[name], array.astype(np.float32))
