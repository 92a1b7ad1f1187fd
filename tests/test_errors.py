"""What an error knows about what is wrong: location, subject, tensor, parameter, fix; all exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from hypothesis import given
from hypothesis import strategies as st
from llamas import EXPERTS, recipe, save
from typer.testing import CliRunner

import della
from della.cli.main import app
from della.errors import (
    CheckpointError,
    Collector,
    DamageError,
    DellaError,
    EvaluationError,
    Location,
    OutputError,
    Problem,
    RecipeError,
    distinct,
    suggest,
)
from della.evaluate.problems import load
from della.merging.method import ALL_PARAMETERS, METHODS
from della.recipe.reader import read_recipe
from della.recipe.text import to_yaml

HEAD = "merge_method: {}\nbase_model: b\nmodels:\n  - model: x/math\n"  # four lines
CODE = "  - model: x/code\n"
NORMALIZE = "parameters: {normalize: true}\n"
RANDOM = "parameters: {importance: wanda, rank_by: random}\n"


def told(kind: type[DellaError], call: Callable[[], object]) -> Problem:
    """The one problem that a call meets."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    (problem,) = caught.value.problems
    assert str(problem) in str(caught.value)
    return problem


# ---- the recipe (exit code 2): line and column, parameter, fix --------------------------------------------

# method, what follows the four lines, (line, column), parameter, words of the fix
MISTAKES: list[tuple[str, str, tuple[int, int], str, str]] = [
    ("della", "densty: 1\n", (5, 1), "densty", "did you mean 'density'"),
    ("della", "    parameters: {weight: high}\n", (5, 26), "weight", ""),
    ("della", "    parameters: {density: 2}\n", (5, 27), "density", ""),
    ("dela", "", (1, 15), "merge_method", "did you mean 'della'"),
    ("frankenmerge", "", (1, 15), "merge_method", "there is della"),
    ("della", "dtype: bf61\n", (5, 8), "dtype", "did you mean 'bf16'"),
    ("della", "seed: -1\n", (5, 7), "seed", ""),
    ("della", "slices: []\n", (5, 1), "slices", "keep one of"),
    ("della", "  - model: a+b\n", (5, 12), "model", "merge the adapter"),
    ("della", "name: x\nname: y\n", (6, 1), "name", "keep one"),
    ("linear", "missing: base\n", (5, 1), "missing", "remove it"),
    ("della", "parameters: {lambda: []}\n", (5, 22), "lambda", "at least one value"),
    ("della", "parameters: {weight: {filter: mlp}}\n", (5, 22), "weight", ""),
    ("della", "    input_norms: f.safetensors\n", (5, 18), "input_norms", ""),
]


@pytest.mark.parametrize(("method", "more", "at", "parameter", "fix"), MISTAKES)
def test_a_mistake_in_a_recipe(
    method: str, more: str, at: tuple[int, int], parameter: str, fix: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(HEAD.format(method) + more)
    problem = told(RecipeError, lambda: read_recipe(path))
    assert problem.location == (*at, str(path))
    assert str(problem).startswith(f"{path}:{at[0]}:{at[1]}: ")
    assert (problem.parameter, problem.subject, problem.tensor) == (parameter, None, None)
    assert fix in (problem.fix or "")
    assert str(problem).endswith(problem.fix or problem.said)


# Rules that join settings point at the setting that breaks them: written for all, by a model, in a gradient,
# in a case.  What follows the four lines, (line, column), parameter, the model whose it is.
RULES: list[tuple[str, str, tuple[int, int], str, str | None]] = [
    (
        "linear",
        f"    parameters: {{weight: 1}}\n{CODE}    parameters: {{weight: -1}}\n{NORMALIZE}",
        (5, 26), "weight", None,
    ),
    ("linear", f"{CODE}    parameters: {{weight: -1}}\n{NORMALIZE}", (6, 26), "weight", None),
    ("linear", "parameters: {normalize: true, weight: 0}\n", (5, 39), "weight", None),
    ("della", "parameters: {density: 0.9}\n", (5, 23), "density", "math"),
    ("della", "    parameters: {density: 0.9}\nparameters: {epsilon: 0.2}\n", (5, 27), "density", "math"),
    ("della", CODE + "    parameters: {density: [0.5, 0.9]}\n", (6, 27), "density", "code"),
    ("della", "parameters: {density: 0.5, window_size: 0.2, epsilon: 0.1}\n", (5, 41), "window_size", "math"),
    ("della", "parameters: {fuse: sum, normalize: true}\n", (5, 36), "normalize", None),
    ("della_linear", "parameters: {fuse: calibrated}\n", (5, 20), "fuse", None),
    ("ties", "parameters: {density: 0.5, fuse: calibrated}\n", (5, 34), "fuse", None),
    ("ties", "parameters: {rescale: per_element}\n", (5, 23), "rescale", None),
    ("della", "parameters: {importance: wanda}\n", (4, 5), "input_norms", "math"),
    ("della", f"    input_norms: f\n{RANDOM}", (6, 26), "importance", None),
    ("della", "parameters: {fuse: [calibrated, calibrated], vote: none}\n", (5, 20), "fuse", None),
]  # fmt: skip


@pytest.mark.parametrize(("method", "more", "at", "parameter", "model"), RULES)
def test_a_rule_points_at_what_breaks_it(
    method: str, more: str, at: tuple[int, int], parameter: str, model: str | None
) -> None:
    problem = told(RecipeError, lambda: read_recipe(HEAD.format(method) + more))
    assert problem.location == (*at, "recipe")
    assert (problem.parameter, problem.subject) == (parameter, model)


def test_a_rule_points_at_the_case_that_breaks_it() -> None:
    more = "parameters:\n  density:\n  - {filter: mlp, value: 0.9}\n  - {value: 0.5}\n"
    made = read_recipe(HEAD.format("della") + more)
    points = [(f"model.layers.3.{part}", 0.5, "layer 3") for part in ("attn.q", "mlp.up")]
    problem = told(RecipeError, lambda: made.check(points))
    assert (problem.tensor, problem.subject) == ("model.layers.3.mlp.up", "math")
    assert problem.location == (7, 26, "recipe")
    assert "layer 3" in problem.said
    assert problem.fix == "use an epsilon of at most 0.1"


def test_an_override_is_a_location_without_a_line() -> None:
    problem = told(RecipeError, lambda: read_recipe(HEAD.format("della"), overrides=["density=2"]))
    assert problem.location is not None
    assert (str(problem.location), problem.location.column) == ("overrides density=2", 0)
    assert problem.as_dict()["location"] == {"source": "overrides density=2"}


def test_arguments_of_arrays() -> None:
    one = np.ones(3, np.float32)
    for given_, parameter in (
        ({"density": 2}, "density"),
        ({"rank_buy": 1}, "rank_buy"),
        ({"names": []}, "names"),
    ):
        problem = told(RecipeError, lambda given_=given_: della.merge_tensors(one, [one], **given_))  # type: ignore[misc]
        assert problem.parameter == parameter
    problem = told(RecipeError, lambda: della.merge_tensors(one, [one], density=0.9, names=["me"]))
    assert (problem.subject, problem.parameter) == ("me", "density")


# ---- models (3) -------------------------------------------------------------------------------------------


def models(
    folder: Path, change: Callable[[dict[str, dict[str, Any]]], None] = lambda _: None
) -> Mapping[str, Any]:
    """A recipe of the trio with two tensors each, changed for the test."""
    tensors = {
        name: {"a": np.full((2, 3), seed, np.float32), "w": np.full(4, seed, np.float32)}
        for seed, name in enumerate(("base", *EXPERTS))
    }
    change(tensors)
    return recipe(save(folder, tensors), "task_arithmetic", [{}] * 3, {})


def drop(tensors: dict[str, dict[str, Any]]) -> None:
    del tensors["code"]["w"]


def reshape(tensors: dict[str, dict[str, Any]]) -> None:
    tensors["code"]["w"] = np.ones(5, np.float32)


def retype(tensors: dict[str, dict[str, Any]]) -> None:
    tensors["code"]["w"] = np.ones(4, np.int32)


def add(tensors: dict[str, dict[str, Any]]) -> None:
    tensors["code"]["x"] = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("change", "tensor", "fix"),
    [
        (drop, "w", "fine-tunes of one base"),
        (reshape, "w", ""),
        (retype, "w", ""),
        (add, "x", "extra: ignore"),
    ],
)
def test_a_model_that_does_not_fit(
    tmp_path: Path, change: Callable[[Any], None], tensor: str, fix: str
) -> None:
    problem = told(CheckpointError, lambda: della.plan(models(tmp_path, change)))
    assert (problem.subject, problem.tensor) == (str(tmp_path / "code"), tensor)
    assert fix in (problem.fix or "")


def test_a_damaged_file_and_a_missing_one(tmp_path: Path) -> None:
    made = models(tmp_path)
    path = tmp_path / "code/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    problem = told(CheckpointError, lambda: della.plan(made))
    assert (problem.subject, problem.fix) == (str(path), "download the file again")
    path.unlink()
    assert told(CheckpointError, lambda: della.plan(made)).subject == str(tmp_path / "code")


def test_a_header_names_its_tensor(tmp_path: Path) -> None:
    made = models(tmp_path)
    path = tmp_path / "math/model.safetensors"
    header = json.dumps({"w": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    problem = told(CheckpointError, lambda: della.plan(made))
    assert (problem.subject, problem.tensor) == (str(path), "w")


def test_values_that_are_not_finite_and_results_that_are_too_large(tmp_path: Path) -> None:
    def infinite(tensors: dict[str, dict[str, Any]]) -> None:
        tensors["math"]["w"][2] = np.nan

    def large(tensors: dict[str, dict[str, Any]]) -> None:
        for name, own in tensors.items():
            own["w"] = np.full(4, 60000 * (name != "base"), np.float16)

    made = models(tmp_path / "1", infinite)
    problem = told(CheckpointError, lambda: della.merge(made, tmp_path / "out", fsync=False))
    assert (problem.subject, problem.tensor) == (str(tmp_path / "1/math/model.safetensors"), "w")
    assert "nonfinite: zero" in str(problem.fix)
    made = models(tmp_path / "2", large)
    problem = told(OutputError, lambda: della.merge(made, tmp_path / "out", fsync=False))
    assert problem.tensor == "w"
    assert "wider out_dtype" in str(problem.fix)


# ---- OUT (4), verify (5), evaluation (6) ------------------------------------------------------------------


def test_the_place_of_the_result(tmp_path: Path) -> None:
    made = models(tmp_path / "models")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/notes.txt").touch()
    for out, fix in ((tmp_path / "models/base/new", "another place"), (tmp_path / "there", "overwrite=True")):
        problem = told(OutputError, lambda out=out: della.merge(made, out, fsync=False))  # type: ignore[misc]
        assert problem.subject == str(out)
        assert fix in str(problem.fix)


def test_verify_knows_file_and_tensor(tmp_path: Path) -> None:
    out = tmp_path / "out"
    della.merge(models(tmp_path / "models"), out, fsync=False)
    path = out / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (problem,) = della.verify(out).problems
    assert (problem.subject, problem.tensor) == (str(path), "w")
    problem = told(OutputError, lambda: della.verify(tmp_path / "nothing"))
    assert problem.subject == str(tmp_path / "nothing")
    run = CliRunner().invoke(app, ["verify", str(out), "--json"])
    last = json.loads(run.stdout.splitlines()[-1])
    assert run.exit_code == DamageError.exit_code
    assert last["problems"] == [{"said": "tensor 'w' has changed", "subject": str(path), "tensor": "w"}]
    assert last["bad"] == [f"{path}: tensor 'w' has changed"]


def test_an_evaluation_names_its_parameter() -> None:
    problem = told(EvaluationError, lambda: load("gsm8", None, None))
    assert problem.parameter == "task"
    assert "gsm8k" in str(problem.fix)


def test_the_command_tells_problems_as_json(tmp_path: Path) -> None:
    path = put(tmp_path, {"r.yml": (HEAD.format("della") + "densty: 1\nname: [x]\n").encode()}) / "r.yml"
    run = CliRunner().invoke(app, ["plan", str(path), "--json"])
    event = json.loads(run.stdout.splitlines()[-1])
    assert (run.exit_code, event["event"], event["exit_code"]) == (2, "error", 2)
    assert event["message"].startswith("2 problems:")
    assert [found["location"] for found in event["problems"]] == [
        {"source": str(path), "line": 5, "column": 1}, {"source": str(path), "line": 6, "column": 7},
    ]  # fmt: skip
    assert event["problems"][0]["fix"] == "did you mean 'density'?"


# ---- every recipe error; the collector --------------------------------------------------------------------

VALUES = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=8),
    st.lists(st.floats(0, 1), max_size=3),
    st.sampled_from(["della", "ties", "mean", "wanda", "calibrated", "base"]),
)  # fmt: skip
SETTINGS = st.dictionaries(st.sampled_from([*ALL_PARAMETERS, "densty", "seed"]), VALUES, max_size=4)


@given(
    st.sampled_from([*METHODS, "x"]),
    st.lists(st.fixed_dictionaries({"parameters": SETTINGS}, optional={"model": VALUES}), max_size=3),
    SETTINGS,
    st.dictionaries(
        st.sampled_from(["dtype", "seed", "base_model", "missing", "modles"]), VALUES, max_size=3
    ),
)
def test_every_recipe_error_says_where(
    method: str, entries: list[Any], shared: dict[str, Any], more: dict[str, Any]
) -> None:
    made = {"merge_method": method, "models": entries, "parameters": shared, **more}
    try:
        text = to_yaml(made)
        read_recipe(text)
    except RecipeError as error:
        for problem in error.problems:
            assert problem.location is not None or problem.subject
            assert problem.said
            assert str(problem).count("\n  - ") == 0


def test_a_collector_sorts_and_tells_each_problem_once() -> None:
    problems = Collector(CheckpointError)
    problems.add("damaged", subject="file")
    with problems:
        raise RecipeError(
            Problem("second", location=Location(2, 1, "r")), Problem("first", location=Location(1, 9, "r"))
        )
    problems.add("damaged", subject="file")
    with pytest.raises(RecipeError) as caught:
        problems.raise_any()
    assert [str(problem) for problem in caught.value.problems] == [
        "r:1:9: first",
        "r:2:1: second",
        "file: damaged",
    ]
    assert isinstance(caught.value.__cause__, RecipeError)


def test_of_very_many_problems_the_first_are_shown_and_all_are_counted_and_kept() -> None:
    problems = Collector(OutputError)
    problems.extend(Problem(f"number {n}") for n in range(1_017))
    with pytest.raises(OutputError) as caught:
        problems.raise_any()
    lines = str(caught.value).splitlines()
    shown = len(lines) - 2
    assert (lines[0], lines[1], lines[-1]) == (
        "1017 problems:", "  - number 0", f"  - and {1_017 - shown} more",
    )  # fmt: skip
    assert [problem.said for problem in caught.value.problems] == [f"number {n}" for n in range(1_017)]
    Collector(OutputError).raise_any()


def test_sentences_hold_nothing_that_commands_a_terminal() -> None:
    problem = Problem("tensor \x1b[2J", subject="file", tensor="\x1b[2J")
    assert "\x1b" not in str(problem)
    assert "\x1b" not in str(CheckpointError(problem))
    assert problem.tensor == "\x1b[2J", "data are as they are"


def test_suggestions_and_distinct_names() -> None:
    assert suggest("Model.Nrom", ["model.norm", "model.head"]) == "did you mean 'model.norm'?"
    assert suggest("gsm-8k", ["gsm_8k"]) == "did you mean 'gsm_8k'?"
    assert suggest("zzz", ["density"]) is None
    assert distinct(["x", "x", "x#2", "x"]) == ["x", "x#2", "x#2#2", "x#3"]
