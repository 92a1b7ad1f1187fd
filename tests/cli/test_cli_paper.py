"""`della paper`: what a scale takes, what it refuses, and the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from della.cli.main import app

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
        ("--scale 13b --plan --importance size", "--importance size: expected wanda or magnitude"),
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
