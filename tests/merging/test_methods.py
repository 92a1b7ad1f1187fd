"""The seam: methods of the test's own are read, planned, run, resumed, verified and shown like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from llamas import EXPERTS, as_stored, load, recipe, trio
from recipes import recipe_of, told

import della
from della.dtypes import of_array, round_to, widen
from della.errors import RecipeError
from della.merging import method as seam
from della.merging.method import Asking, Method, Parameter, WholeModel, register
from della.merging.tile import Grain, Passes, Subject, Tile
from della.planning.describe import plan_json
from della.running.compute import Compute

Array = np.ndarray[Any, np.dtype[Any]]
TENSORS = trio()


class Median(Method):
    """The elementwise median of the deltas."""

    name, source = "median", "this test"
    formula = "base + lambda * the median of the deltas"
    takes = (Parameter("lambda", "shared", float, 1.0, "factor on the merged delta"),)

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        middle = np.median(np.stack([model - base for model in models]), axis=0)
        return np.asarray(base + base.dtype.type(self.shared["lambda"]) * middle)

    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        out[:] = tile.base + np.float32(self.shared["lambda"]) * np.median(tile.values, axis=0)


class Clipped(Median):
    """The same, with no delta larger than a share of the largest one of its expert in the whole model."""

    name = "clipped_median"
    formula = "base + the median of the deltas, clipped at share * the largest of the model"
    takes = (Parameter("share", "model", float, 0.5, "how large a delta may be", (), 0.0, 1.0),)
    whole_model = WholeModel(
        Asking("merge_method", "clipped_median"), "compares deltas", ("share",), "median"
    )

    def learn(self, tensors: Sequence[tuple[Subject, Passes]]) -> dict[str, Any]:
        largest = np.zeros(len(tensors[0][0].experts))
        for _, passes in tensors:
            for tile in passes():
                largest = np.maximum(largest, np.abs(tile.values).max(axis=(1, 2)))
        return {subject.name: {"largest": [float(x) for x in largest]} for subject, _ in tensors}

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> Any:
        return np.array(learnt["largest"], np.float32) * np.array(subject.column("share"), np.float32)

    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        ends = facts[:, None, None]
        out[:] = tile.base + np.median(np.clip(tile.values, -ends, ends), axis=0)


class Longest(Method):
    """The model whose tensor is longest: looks at a tensor at once, and at weights, not deltas."""

    name, source, formula = "longest", "this test", "the model with the largest norm of the tensor"
    of_deltas, grain = False, Grain.TENSOR

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        return max(models, key=lambda values: float(np.linalg.norm(values)))

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> int:
        (tile,) = passes()
        return int(np.argmax([np.linalg.norm(values) for values in tile.values]))

    def apply(self, tile: Tile, facts: int, out: Array) -> None:
        out[:] = tile.values[facts]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = {name: dict(getattr(seam, name)) for name in ("METHODS", "ALL_PARAMETERS")}
    for each in (Median, Clipped, Longest):
        register(each)
    yield
    for name, table in known.items():
        getattr(seam, name).clear()
        getattr(seam, name).update(table)


def by_numpy(merge: Callable[[Array, list[Array]], Array]) -> dict[str, Any]:
    """The trio merged tensor by tensor, by a function of float32 arrays."""
    made = {}
    for name, value in TENSORS["base"].items():
        made[name] = value
        if of_array(value).is_float and value.size:
            models = [widen(TENSORS[expert][name]) for expert in EXPERTS]
            made[name] = round_to(np.asarray(merge(widen(value), models), np.float32), of_array(value))
    return as_stored(made)


def medians(base: Array, models: list[Array]) -> Array:
    return np.asarray(base + np.float32(0.5) * np.median([m - base for m in models], axis=0))


def clipped(share: float) -> Callable[[Array, list[Array]], Array]:
    floats = [name for name, value in TENSORS["base"].items() if of_array(value).is_float and value.size]
    ends = [
        max(np.abs(widen(TENSORS[e][n]) - widen(TENSORS["base"][n])).max() for n in floats) for e in EXPERTS
    ]
    ends = [np.float32(end) * np.float32(share) for end in ends]

    def merge(base: Array, models: list[Array]) -> Array:
        return np.asarray(base + np.median([np.clip(m - base, -e, e) for m, e in zip(models, ends)], axis=0))

    return merge


@pytest.mark.parametrize(
    ("name", "shared", "wanted"),
    [
        ("median", {"lambda": 0.5}, medians),
        ("clipped_median", {"share": 0.3}, clipped(0.3)),
        ("longest", {}, lambda base, models: max(models, key=np.linalg.norm)),
    ],
)
def test_it_is_planned_run_and_verified(
    models: Path, tmp_path: Path, name: str, shared: Mapping[str, Any], wanted: Any
) -> None:
    made = recipe(models, name, [{}] * 3, shared)
    with della.plan(made) as plan:
        table = plan_json(plan, 1)["tensors"]
        floats = [each for each in table if each["method"] == name]
        assert len(floats) == sum(of_array(v).is_float for v in TENSORS["base"].values())
        values = {**floats[0]["parameters"], **next(iter(floats[0]["models"].values()))}
        assert values == shared
        assert plan.memory(1) > 0
    della.merge(made, tmp_path / "out", tile=300, threads=2, fsync=False)
    expected = by_numpy(wanted)
    found = load(tmp_path / "out")
    assert {key: found[key] for key in expected} == expected
    della.merge(made, tmp_path / "again", fsync=False)
    assert load(tmp_path / "again") == found
    assert della.verify(tmp_path / "out", sources=1, inputs=True, base_dir=models).is_well


def test_what_it_learnt_of_the_model_is_kept_for_a_resumed_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(models, "clipped_median", [{}] * 3, {"share": 0.3})
    real, calls = Compute.pieces, []

    def pieces(self: Compute, job: Any, *more: Any) -> Iterator[Array]:
        calls.append(job.name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, job, *more)

    monkeypatch.setattr(Compute, "pieces", pieces)
    with pytest.raises(KeyboardInterrupt, match="4 finished tensors are kept"):
        della.merge(made, tmp_path / "out", threads=1, fsync=False)
    assert '{"facts": {"' in (tmp_path / ".out.della-staging/journal-1-of-1").read_text()
    monkeypatch.setattr(Clipped, "learn", None)  # is not asked again
    result = della.merge(made, tmp_path / "out", threads=1, fsync=False)
    assert result.resumed == 4
    expected, found = by_numpy(clipped(0.3)), load(tmp_path / "out")
    assert {key: found[key] for key in expected} == expected


def test_its_parameters_are_read_like_any_other() -> None:
    assert "'share' must lie between 0 and 1, found 2" in told(
        recipe_of("clipped_median", parameters={"share": 2})
    )
    said = told(recipe_of("clipped_median", parameters={"shaer": 1}))
    assert "did you mean 'share'" in said
    assert "did you mean 'median'" in told(recipe_of("medain"))


def test_what_must_be_the_same_for_the_whole_model_is(models: Path, tmp_path: Path) -> None:
    made = recipe(models, "clipped_median", [{}] * 3, {"share": [0.1, 0.9]})
    with pytest.raises(RecipeError, match="share must be the same for all tensors"):
        della.merge(made, tmp_path / "out")


def test_arrays_are_merged_by_it_too() -> None:
    base = np.array([1, 1, 1], np.float32)
    models = [np.array(values, np.float32) for values in ([1, 2, 9], [3, 2, 0], [2, 0, 1])]
    merged = della.merge_tensors(base, models, method="median", lambda_=0.5)
    np.testing.assert_array_equal(merged, [1.5, 1.5, 1])
    double = [model.astype(np.float64) for model in models]
    merged = della.merge_tensors(base.astype(np.float64), double, method="median", lambda_=0.5)
    np.testing.assert_array_equal(merged, [1.5, 1.5, 1])
    merged = della.merge_tensors(base, models, method="longest")
    np.testing.assert_array_equal(merged, models[0])
    by_weight = della.merge_tensors(base, models, method="linear", weight=[1, 0, 1])
    np.testing.assert_array_equal(by_weight, [1.5, 1, 5])
    with pytest.raises(RecipeError, match="whole model"):
        della.merge_tensors(base, models, method="clipped_median")


def test_della_methods_shows_it(command: Command) -> None:
    everything = command(None, "methods")
    assert everything.returncode == 0
    for name in seam.METHODS:
        assert f"\n{name}  (" in f"\n{everything.stdout}"
    assert Median.formula in everything.stdout
    one = command(None, "methods", "clipped_median")
    assert "share: 0 to 1, default 0.5" in one.stdout
    told_json = json.loads(command(None, "methods", "clipped_median", "--json").stdout)
    assert told_json["formula"] == Clipped.formula
    assert told_json["parameters"] == [
        {
            "name": "share", "scope": "model", "default": 0.5, "choices": [], "bool": False, "low": 0.0,
            "high": 1.0, "doc": "how large a delta may be",
        }
    ]  # fmt: skip
    table = json.loads(command(None, "methods", "--json").stdout)
    assert [row["name"] for row in table] == list(seam.METHODS)
    for row in table:
        assert row["formula"]
        assert row["source"]
        assert {p["name"] for p in row["parameters"]} == set(seam.METHODS[row["name"]].parameters)
    wrong = command(None, "methods", "medain")
    assert (wrong.returncode, "did you mean 'median'" in wrong.stderr) == (2, True)


def test_a_method_must_say_what_it_is() -> None:
    class Silent(Median):
        name, formula = "silent", ""

    class Twice(Median):
        name = "ties"

    class Elsewhere(Median):
        name = "elsewhere"
        takes = (Parameter("lambda", "model", float, 1.0, "of each model"),)

    for wrong, said in ((Silent, "no formula"), (Twice, "there is such a method"), (Elsewhere, "lambda is")):
        with pytest.raises(ValueError, match=said):
            register(wrong)
    assert not {"silent", "elsewhere"} & set(seam.METHODS)
