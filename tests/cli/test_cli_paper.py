"""`della paper`: what a scale takes, what it refuses, and the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from della.cli.main import app
from della.errors import EvaluationError
from della.experiments.options import ExperimentOptions, read_file
from della.options import build

run = CliRunner().invoke


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 135", "--scale '135': expected one of mini, 135m, 13b; did you mean '135m' or '13b'?"),
        ("--scale mini --judge gpt-4", "--judge is not an option of --scale mini"),
        ("--scale mini --data folder", "--data is not an option of --scale mini"),
        ("--scale 135m --tables 1", "--tables is not an option of --scale 135m"),
        ("--scale 13b --experts folder", "--experts is not an option of --scale 13b"),
        (
            "--scale 135m",
            "--scale 135m needs --data FOLDER, a folder of TASK.SPLIT.jsonl (docs/paper.md)",
        ),
        ("--scale 135m --data d --models base", "--models base: expected ROLE=MODEL"),
        (
            "--scale 135m --data d --models math=m",
            "--models of --scale 135m: expected base=FOLDER_OR_ID; experts: --experts FOLDER",
        ),
        ("--scale 13b --plan --tables 8", "tables (8,): expected some of 1 to 7"),
        ("--scale 13b --plan --vllm-args '", "--vllm-args ': No closing quotation"),
        ("--scale 13b --plan --importance size", "--importance 'size': expected one of wanda, magnitude"),
    ],
)
def test_what_does_not_fit_a_scale_is_refused(words: str, message: str) -> None:
    result = run(app, ["paper", *words.split()])
    assert result.stderr == f"della: {message}\n"
    assert result.exit_code == 6


def test_the_plan_downloads_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(app, ["paper", "--scale", "13b", "--plan", "--json", "--judge-price", "30,60"])
    plan = json.loads(result.stdout)
    assert plan["tables"] == [1, 2, 3, 4, 5, 6, 7]
    assert plan["merges"]["validation"] > plan["merges"]["test"] > 0
    assert {"disk", "gpu_hours", "judge", "answers", "merging_hours", "assumptions"} <= plan.keys()
    without = run(app, ["paper", "--scale", "13b", "--plan", "--json", "--importance", "magnitude"])
    assert json.loads(without.stdout)["tables"] == [1, 2, 3, 4, 6, 7]
    assert list(tmp_path.iterdir()) == []


FILE = """\
scale: 13b
out: full
seeds: 2
tables: [1, 3]
lambdas: 1.1
window: 0.2
data:
  gsm8k: test.jsonl
  mbpp: mbpp.jsonl
models: [lm=me/mine]
allow_pickle: true
judge: gpt-4
"""


def test_a_file_says_what_the_command_line_does(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yml"
    path.write_text(FILE)
    found = build(ExperimentOptions, read_file(path))
    assert found == ExperimentOptions(
        scale="13b", out=Path("full"), seeds=2, tables=(1, 3), lambdas=(1.1,), window=0.2,
        data=("gsm8k=test.jsonl", "mbpp=mbpp.jsonl"), models=("lm=me/mine",), allow_pickle=True,
        judge="gpt-4",
    )  # fmt: skip


def test_the_command_takes_a_file_and_what_is_given_goes_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yml").write_text("scale: 13b\ntables: [1, 2]\nseeds: 1\n")
    said = json.loads(run(app, ["paper", "experiment.yml", "--plan", "--json"]).stdout)
    assert said["tables"] == [1, 2]
    over = json.loads(
        run(app, ["paper", "experiment.yml", "--plan", "--json", "--tables", "2", "--seeds", "3"]).stdout
    )
    assert over["tables"] == [2]
    # Table 2 with three seeds: two rows.
    assert over["merges"]["test"] == 6


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("scale: 13b\njudge-url: x\n", ["experiment.yml:2:1: ", "'judge-url'", "did you mean 'judge_url'?"]),
        ("scale: 13b\nseeds: many\n", ["experiment.yml:2:8: ", "'seeds'", "a whole number from 1 up"]),
        ("seeds: 0\nbatch: 1.5\n", ["experiment.yml:1:8: ", "'seeds'", "experiment.yml:2:8: ", "'batch'"]),
        ("allow_pickle: 1\n", ["experiment.yml:1:15: ", "true or false"]),
        ("out: [a, b]\n", ["experiment.yml:1:6: ", "'out'", "a text"]),
        ("tables: 1;3\n", ["--tables 1;3", "numbers"]),
        ("scale: mini\njudge: gpt-4\n", ["experiment.yml: judge is not an option of --scale mini"]),
        ("seeds: 2\n", ["no scale", "mini, 135m or 13b"]),
        ("- scale\n", ["expected a mapping"]),
    ],
)
def test_mistakes_of_a_file_are_told_with_their_line(
    text: str, messages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yml").write_text(text)
    result = run(app, ["paper", "experiment.yml"])
    assert result.exit_code == 6
    assert [word for word in messages if word not in result.stderr] == []


def test_a_mistake_carries_its_data(tmp_path: Path) -> None:
    path = tmp_path / "experiment.yml"
    path.write_text("scale: mini\nsedes: 3\n")
    with pytest.raises(EvaluationError) as raised:
        read_file(path)
    (problem,) = raised.value.problems
    assert problem.location is not None
    assert (problem.location.line, problem.parameter) == (2, "sedes")
