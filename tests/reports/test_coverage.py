"""How much of each model takes part: in plan, merge, manifest and card; no merge that silently is none."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

import della
from della.cli.main import app
from della.errors import CheckpointError, RecipeError
from della.running.measure import Probe, sampled

Tensors = dict[str, Any]


def llama(seed: int = 0, dtype: Any = np.float32) -> Tensors:
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (64, 32), "a.weight": (32, 48), "b.weight": (48, 32), "norm.weight": (32,)}
    return {name: (rng.standard_normal(shape) * 0.1).astype(dtype) for name, shape in shapes.items()}


def tuned(base: Tensors, seed: int, size: float = 0.01) -> Tensors:
    rng = np.random.default_rng(seed)
    return {k: (v + size * rng.standard_normal(v.shape)).astype(v.dtype) for k, v in base.items()}


def made(folder: Path, models: dict[str, Tensors], method: str = "task_arithmetic", **more: Any) -> Path:
    for name, tensors in models.items():
        put(folder, {f"{name}/model.safetensors": tensors})
    recipe: dict[str, Any] = {"merge_method": method}
    recipe |= {} if method == "linear" else {"base_model": "base"}
    own = more.pop("own", {})
    recipe["models"] = [{"model": n, "parameters": own.get(n, {})} for n in models if n != "base" or n in own]
    path = folder / "recipe.yml"
    path.write_text(json.dumps(recipe | more))
    return path


def trio(folder: Path, change: Callable[[Tensors], Any] = lambda t: None, **more: Any) -> Path:
    base = llama()
    two = tuned(base, 2)
    change(two)
    return made(folder, {"base": base, "one": tuned(base, 1), "two": two}, **more)


# ---- what is told -----------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_tensors(tmp_path: Path) -> None:
    def change(two: Tensors) -> None:
        two["b.weight"] = llama()["b.weight"]
        two["extra.weight"] = np.ones((2, 2), np.float32)

    recipe = trio(tmp_path, change, extra="ignore")
    with della.plan(recipe) as plan:
        one, two = plan.coverage
    assert (one.merged, one.of, one.changed, one.left_out) == (4, 4, 4, ())
    assert (two.merged, two.of, two.changed) == (4, 5, 4)
    assert two.left_out == (("extra.weight", "not in the result"),)
    found = della.merge(recipe, tmp_path / "out", fsync=False).manifest["coverage"]
    assert found == json.loads((tmp_path / "out/della.json").read_text())["coverage"]
    assert (found["one"]["changed"], found["two"]["changed"]) == (4, 3)
    assert found["two"]["left_out"] == ["extra.weight: not in the result"]
    base, expert = llama(), tuned(llama(), 1)
    delta = math.sqrt(sum(float(np.sum((expert[k].astype(float) - base[k]) ** 2)) for k in base))
    size = math.sqrt(sum(float(np.sum(base[k].astype(float) ** 2)) for k in base))
    assert found["one"]["relative_delta"] == pytest.approx(delta / size, rel=0.01)
    assert 0.99 < found["one"]["cosine"] < 1
    card = (tmp_path / "out/README.md").read_text()
    assert "4 of 4 tensors" in card
    assert "4 of 5 tensors" in card


def test_text_json_and_a_single_file_have_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trio(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(app, ["plan", "recipe.yml"]).stdout
    assert "one: 4 of 4 tensors take part, 4 of the result change" in text
    found = json.loads(CliRunner().invoke(app, ["plan", "recipe.yml", "--json"]).stdout)
    wanted = {"merged": 4, "of": 4, "left_out": [], "changed": 4}
    assert found["coverage"] == {"one": wanted, "two": wanted}
    told = CliRunner().invoke(app, ["merge", "recipe.yml", "out.safetensors"])
    assert "two: 4 of 4 tensors take part" in told.stderr
    with safe_open("out.safetensors", "np") as file:
        manifest = json.loads(file.metadata()["della"])
    assert manifest["coverage"]["two"].items() >= wanted.items()
    assert della.verify("out.safetensors", sources=1.0).is_well


def test_what_is_measured_depends_on_no_tile_thread_or_part(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    base = {"w": rng.standard_normal((300, 400)).astype(np.float32), "v": rng.standard_normal(7)}
    recipe = made(tmp_path, {"base": base, "one": tuned(base, 1), "two": tuned(base, 2)})
    first = della.merge(recipe, tmp_path / "a", fsync=False, threads=1).manifest
    for tile in (1000, 4096, 33_333):
        assert della.merge(recipe, tmp_path / f"b{tile}", fsync=False, tile=tile).manifest == first
    for number in (1, 2):
        della.merge(recipe, tmp_path / "c", fsync=False, part=(number, 2), shard_bytes=300_000)
    whole = della.merge(recipe, tmp_path / "d", fsync=False, shard_bytes=300_000).manifest
    assert (
        della.merge(recipe, tmp_path / "c", fsync=False, finish=True, shard_bytes=300_000).manifest == whole
    )
    assert whole["coverage"] == first["coverage"]


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "della", "dare_linear", "breadcrumbs", "linear"]
)
def test_a_weight_of_zero_is_no_merge(tmp_path: Path, method: str) -> None:
    base = llama()
    models = {"one": tuned(base, 1), "two": tuned(base, 2)} | ({"base": base} if method != "linear" else {})
    recipe = made(tmp_path, models, method, own={"two": {"weight": 0}})
    with pytest.raises(
        RecipeError, match=r"two: takes no part in the merge: .*\(weight: 0\).*allow.idle"
    ) as told:
        della.plan(recipe)
    assert told.value.problems[0].parameter == "weight"
    assert told.value.problems[0].location is not None
    with pytest.raises(RecipeError):
        della.merge(recipe, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()
    assert (
        della.merge(recipe, tmp_path / "out", fsync=False, allow_idle=True).manifest["coverage"]["two"][
            "changed"
        ]
        == 0
    )
    assert della.verify(tmp_path / "out", sources=1.0, base_dir=tmp_path).is_well
    assert CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "x")]).exit_code == 2
    assert CliRunner().invoke(app, ["merge", str(recipe), str(tmp_path / "x"), "--allow-idle"]).exit_code == 0


@pytest.mark.parametrize(("parameter", "value"), [("lambda", 0), ("density", 0), ("weight", [0, 0])])
def test_parameters_that_leave_nothing(tmp_path: Path, parameter: str, value: Any) -> None:
    recipe = trio(tmp_path, method="della", parameters={parameter: value, "epsilon": 0})
    with pytest.raises(RecipeError, match=rf"{parameter}: 0") as told:
        della.plan(recipe)
    assert len(told.value.problems) == 2
    with della.plan(recipe, allow_idle=True) as plan:
        assert [each.changed for each in plan.coverage] == [0, 0]


def test_a_weight_that_is_zero_for_some_tensors_is_told(tmp_path: Path) -> None:
    weight = [{"filter": "a.weight", "value": 0}, {"value": 1}]
    with della.plan(trio(tmp_path, own={"two": {"weight": weight}})) as plan:
        two = plan.coverage[1]
    assert (two.merged, two.changed) == (3, 3)
    assert two.left_out == (("a.weight", "without effect (weight: 0)"),)


def test_a_model_that_shares_no_tensor(tmp_path: Path) -> None:
    base = llama()
    models = {"base": base, "one": tuned(base, 1), "two": {"other": np.ones((3, 3), np.float32)}}
    recipe = made(tmp_path, models, missing="base", extra="ignore")
    with pytest.raises(CheckpointError, match="two: against base: 0 of 4 names in common"):
        della.plan(recipe)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "dare_ties", "paper_della"])
def test_a_copy_of_the_base_changes_nothing(tmp_path: Path, method: str) -> None:
    wide = llama(dtype=ml_dtypes.bfloat16)
    base = {name: values.astype(np.float32) for name, values in wide.items()}  # other bytes, the same values
    recipe = made(tmp_path, {"base": base, "one": tuned(base, 1), "copy": wide}, method)
    with della.plan(recipe) as plan:
        assert [each.changed for each in plan.coverage] == [4, 4]
    with pytest.raises(
        CheckpointError, match=r"copy: changes nothing.*equal to those of base.*are kept"
    ) as told:
        della.merge(recipe, tmp_path / "out", fsync=False)
    assert told.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.della-staging*"))
    result = della.merge(recipe, tmp_path / "out", fsync=False, allow_idle=True)
    assert result.resumed == 4
    assert result.manifest["coverage"]["copy"]["changed"] == 0


def test_the_base_among_the_models_is_no_fault(tmp_path: Path) -> None:
    recipe = trio(tmp_path, own={"base": {}})
    found = della.merge(recipe, tmp_path / "out", fsync=False).manifest["coverage"]
    assert found["one"]["changed"] == 4


def test_a_result_that_is_the_base_again(tmp_path: Path) -> None:
    base = llama(dtype=ml_dtypes.bfloat16)
    one = {name: values.astype(np.float32) * np.float32(1 + 1e-5) for name, values in base.items()}
    recipe = made(tmp_path, {"base": base, "one": one})
    with pytest.raises(CheckpointError, match="base: the result is this model, byte for byte"):
        della.merge(recipe, tmp_path / "out", fsync=False)
    recipe = made(tmp_path, {"base": base, "one": one}, dtype="float32")  # the cure that is named
    assert della.merge(recipe, tmp_path / "out", fsync=False).manifest["coverage"]["one"]["changed"] == 4


def test_a_soup_that_is_one_of_its_models(tmp_path: Path) -> None:
    one = llama(dtype=ml_dtypes.bfloat16)
    two = tuned(one, 1, 0.1)
    recipe = made(tmp_path, {"one": one, "two": two}, "linear", own={"two": {"weight": 1e-6}})
    with pytest.raises(CheckpointError, match="one: the result is this model"):
        della.merge(recipe, tmp_path / "out", fsync=False)
    recipe = made(tmp_path, {"one": one, "two": two}, "linear")
    della.merge(recipe, tmp_path / "out", fsync=False)


# ---- models that are no fine-tunes ------------------------------------------------------------------------

STRANGERS: dict[str, Callable[[Tensors], Tensors]] = {
    "another seed": lambda base: llama(9),
    "reversed": lambda base: {name: values[::-1].copy() for name, values in base.items()},
    "other rows": lambda base: {n: np.random.default_rng(1).permutation(v, axis=0) for n, v in base.items()},
    "other columns": lambda base: {n: np.roll(v, 7, axis=-1) for n, v in base.items()},
    "negated": lambda base: {name: -values for name, values in base.items()},
}


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("method", ["task_arithmetic", "della"])
def test_a_stranger_of_the_same_shapes(tmp_path: Path, kind: str, method: str) -> None:
    base = llama()
    recipe = made(tmp_path, {"base": base, "one": tuned(base, 1), "two": STRANGERS[kind](base)}, method)
    lines: list[str] = []
    found = della.merge(recipe, tmp_path / "out", fsync=False, tell=lines.append).manifest["coverage"]
    (line,) = [line for line in lines if "does not look like a fine-tune of base" in line]
    assert line.startswith("two: ")
    assert found["two"]["unlike"] == 3
    assert (found["one"]["unlike"], found["one"]["cosine"] > 0.9) == (0, True)
    assert found["two"]["relative_delta"] > 1.2


def test_a_vocabulary_in_another_order_is_found_by_its_one_tensor(tmp_path: Path) -> None:
    def change(two: Tensors) -> None:
        two["embed.weight"] = np.random.default_rng(3).permutation(two["embed.weight"], axis=0)

    lines: list[str] = []
    della.merge(trio(tmp_path, change), tmp_path / "out", fsync=False, tell=lines.append)
    (line,) = [line for line in lines if "does not look like" in line]
    assert "embed.weight (" in line


@pytest.mark.parametrize("size", [1e-4, 0.01, 0.05])
def test_a_fine_tune_is_not_suspected(tmp_path: Path, size: float) -> None:
    base = llama()
    lines: list[str] = []
    recipe = made(tmp_path, {"base": base, "one": tuned(base, 1, size), "two": tuned(base, 2, size)})
    della.merge(recipe, tmp_path / "out", fsync=False, tell=lines.append)
    assert not [line for line in lines if "look like" in line]


def test_before_the_merge(tmp_path: Path) -> None:
    recipe = trio(tmp_path, lambda two: two.update(llama(9)))
    done = CliRunner().invoke(app, ["plan", str(recipe), "--sample"])
    assert done.exit_code == 0
    assert "two: does not look like a fine-tune of base" in done.stdout
    found = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--sample", "--json"]).stdout)
    assert found["coverage"]["two"]["unlike"] == 3
    assert found["coverage"]["one"]["cosine"] > 0.9
    assert any("two: does not look" in note for note in found["notes"])
    with della.plan(recipe) as plan:
        merged = della.merge(recipe, tmp_path / "out", fsync=False).manifest["coverage"]
        assert {each.reference: each.as_dict for each in sampled(plan)} == merged


def test_a_sample_without_a_change_does_not_say_that_there_is_none(tmp_path: Path) -> None:
    base = {"w": np.ones((1000, 1000), np.float32)}
    one = {"w": base["w"].copy()}
    one["w"][-1, -1] = 2  # the sample is of every thirtieth element or so
    recipe = made(tmp_path, {"base": base, "one": one})
    with della.plan(recipe) as plan:
        (found,) = sampled(plan)
    assert (found.relative, found.changed) == (0, 1)


# ---- the sample -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300_000), cuts=st.lists(st.integers(1, 299_999), max_size=4))
def test_a_sample_has_the_same_elements_however_they_come(size: int, cuts: list[int]) -> None:
    class Job:
        elements, operands, exact_double = size, (1,), False

    values = np.arange(1, size + 1, dtype=np.float32)
    whole, pieces = Probe(Job), Probe(Job)  # type: ignore[arg-type]
    whole.operand(0, 0, values)
    edges = [0, *sorted({cut for cut in cuts if cut < size}), size]
    for start, end in itertools.pairwise(edges):
        pieces.operand(0, start, values[start:end])
    assert np.array_equal(whole.samples, pieces.samples)
    assert whole.samples[1].all()
    assert len(np.unique(whole.samples[1])) == whole.samples.shape[1] == min(size, 32_768)


def test_a_single_change_is_seen_wherever_it_is(tmp_path: Path) -> None:
    base = {"w": np.zeros((400, 500), np.float32), "v": np.ones(3, np.float32)}
    one = {name: values.copy() for name, values in base.items()}
    one["w"][399, 498] = 1
    recipe = made(tmp_path, {"base": base, "one": one})
    found = della.merge(recipe, tmp_path / "out", fsync=False, tile=5_000).manifest["coverage"]["one"]
    assert (found["merged"], found["changed"]) == (2, 1)


def test_a_model_of_which_little_takes_part_is_told_in_a_sentence(tmp_path: Path) -> None:
    base = llama()
    path = made(tmp_path, {"base": base, "one": tuned(base, 2)}, missing="base", extra="ignore")
    with della.plan(path) as plan:
        assert not [note for note in plan.notes if "fewer than half" in note]
    odd = {"q.weight": np.ones((5, 7), np.float32), "r.weight": np.ones((3, 2), np.float32)}
    part = odd | {"norm.weight": base["norm.weight"] + 1}
    path = made(tmp_path, {"base": base, "one": part}, missing="base", extra="ignore")
    with della.plan(path) as plan:
        (note,) = [note for note in plan.notes if "fewer than half" in note]
    assert "only 1 of its 3 tensors" in note
    assert "fine-tune of base" in note
    whole = base | {f"vision.{k}": np.ones((3, 3), np.float32) for k in range(9)}
    with della.plan(made(tmp_path, {"base": base, "one": whole}, extra="ignore")) as plan:
        assert not [note for note in plan.notes if "fewer than half" in note]  # all of the base, and more
