"""`della eval`, as a user meets it: the table, JSON lines, exit codes, a stand-in for vLLM."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import COMMAND, HELLO, lines, number_in, sums
from commands import LISTENING, Command
from stand_ins import VLLM
from stub_server import Request, Slow, StubServer
from typer.main import get_command

from della.cli.main import app
from della.evaluate import evaluation
from della.evaluate.backends import Model
from della.evaluate.options import EvaluationOptions
from della.evaluate.scoring import Score
from della.evaluate.settings import check
from della.experiments.demo import TRIO


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with ten sums and one instruction."""
    lines(tmp_path / "gsm8k.jsonl", *sums(10))
    lines(tmp_path / "alpaca.jsonl", HELLO)
    return tmp_path


def rule(request: Request) -> str:
    """Model b is right three times, a twice."""
    n = number_in(request)
    return f"The answer is: {n + 1 if n < {'a': 2, 'b': 3}[request.body['model']] else -1}."


def test_the_table_and_the_differences(command: Command, site: Path) -> None:
    with StubServer(rule) as server:
        served = ("--backend", "openai", "--base-url", server.url, "--out", "out")
        ended = command(site, "eval", "a", "b", "--tasks", "gsm8k", "--data", "gsm8k.jsonl", *served)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (
        "model  task   metric    score  95 % interval     items\n"
        "a      gsm8k  strict     20.0    5.7 to 51.0  10 of 10\n"
        "a      gsm8k  flexible   20.0    5.7 to 51.0  10 of 10\n"
        "b      gsm8k  strict     30.0   10.8 to 60.3  10 of 10\n"
        "b      gsm8k  flexible   30.0   10.8 to 60.3  10 of 10\n"
        "gsm8k, strict: a and b differ by 10.0 points, which is within noise (95 % interval +0.0 to +30.0, "
        "10 items, 1 differ)\n"
        "gsm8k, flexible: a and b differ by 10.0 points, which is within noise (95 % interval +0.0 to +30.0, "
        "10 items, 1 differ)\n"
    )
    ends = [line for line in ended.stderr.splitlines() if ": 10 of" in line]  # slow machines tell more
    assert ends == ["a, gsm8k: 10 of 10 answers", "b, gsm8k: 10 of 10 answers"]


def test_json_lines_and_several_tasks(command: Command, site: Path) -> None:
    with StubServer(lambda request: "The answer is: 1.") as server:
        ended = command(
            site, "eval", "a", "--tasks", "alpaca_eval,gsm8k", "--data", "gsm8k=gsm8k.jsonl", "--data",
            "alpaca_eval=alpaca.jsonl", "--template", "chat", "--template", "gsm8k=vicuna", "--limit", "4",
            "--backend", "openai", "--base-url", server.url, "--json",
        )  # fmt: skip
        assert {request.path.rpartition("/")[2] for request in server.requests} == {"completions"}
        assert sum("chat" in request.path for request in server.requests) == 1
    events = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [event["event"] for event in events] == ["progress", "progress", "note", "evaluated"]
    assert events[1] == {"event": "progress", "model": "a", "task": "gsm8k", "done": 4, "of": 4}
    made = {answers["task"]: answers["settings"] for answers in events[3]["answers"]}
    assert {task: settings["template"] for task, settings in made.items()} == {
        "alpaca_eval": "chat", "gsm8k": "vicuna",
    }  # fmt: skip
    assert [result["value"] for result in events[3]["results"]] == [0.25, 0.25]
    assert (site / "eval-out/a/alpaca_eval.json").exists()


def test_what_is_wrong_is_one_sentence_and_exit_code_6(command: Command, site: Path) -> None:
    both = ("m", "--tasks", "gsm8k,alpaca_eval", "--backend", "numpy")
    ended = command(site, "eval", *both, "--data", "gsm8k.jsonl")
    assert (ended.returncode, ended.stderr) == (
        6, "della: --data gsm8k.jsonl: names no task; give --data TASK=FILE\n",
    )  # fmt: skip
    ended = command(site, "eval", "owner/m", "--tasks", "gsm8k", "--data", "none", "--json")
    assert (ended.returncode, ended.stdout.count("\n")) == (6, 1)
    event = json.loads(ended.stdout)
    assert (event["event"], event["exit_code"], event["message"]) == ("error", 6, "none: no such file")
    ended = command(site, "eval", "owner/m", "--tasks", "gsm8k", "--data", "gsm8k.jsonl", "--vllm-args", "'")
    assert (ended.returncode, ended.stderr) == (6, "della: --vllm-args ': No closing quotation\n")
    assert [path.name for path in site.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "mbpp=x"), "--data mbpp=x: mbpp is not among --tasks gsm8k"),
        (("--data", "x", "--data", "gsm8k.jsonl"), "--data gsm8k.jsonl: one was given before: x"),
        (
            ("--template", "chat", "--template", "alpaca"),
            "--template alpaca: one was given before: chat",
        ),
        (("--annotator", "x"), "--annotator x: is of alpaca_eval, which is not among --tasks gsm8k"),
    ],
)
def test_an_option_that_would_not_count_is_refused(
    command: Command, site: Path, options: tuple[str, ...], message: str
) -> None:
    ended = command(site, "eval", "m", "--tasks", "gsm8k", "--backend", "numpy", *options)
    assert (ended.returncode, ended.stderr) == (6, f"della: {message}\n")


def test_ctrl_c_says_that_the_same_command_goes_on(site: Path) -> None:
    slow = [0.5]
    with StubServer(lambda request: Slow(slow[0], "The answer is: 1")) as server:
        served = ("--backend", "openai", "--base-url", server.url, "--out", "out", "--concurrency", "1")
        command = [*LISTENING, "eval", "m", "--tasks", "gsm8k", "--data", "gsm8k.jsonl", *served]
        with subprocess.Popen(command, cwd=site, stderr=subprocess.PIPE, text=True) as first:
            while not server.requests:
                assert first.poll() is None
                time.sleep(0.001)
            first.send_signal(signal.SIGINT)
            said = first.communicate(timeout=60)[1]  # behind a line of progress, if it took seconds
        assert said.splitlines()[-1].startswith("della: stopped; out keeps what is answered; ")
        assert first.returncode == 130
        assert len(server.requests) < 10
        slow[0] = 0.0
        assert subprocess.run(command, cwd=site, capture_output=True, check=False).returncode == 0
        assert len(server.requests) == 10, "what was in flight was waited for and kept"


def test_numpy_end_to_end(command: Command, site: Path) -> None:
    model = f"math={TRIO / 'math'}"
    ended = command(
        site, "eval", model, "--tasks", "gsm8k", "--data", "gsm8k.jsonl", "--backend", "numpy",
        "--limit", "2", "--max-tokens", "4", "--quiet", "--out", "out",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.startswith(
        "model  task   metric    score  95 % interval   items\nmath   gsm8k  strict "
    )


def test_vllm_end_to_end_with_a_stand_in(site: Path) -> None:
    (site / "vllm.py").write_text(VLLM)
    ended = run(
        f"five={TRIO / 'base'}", "--tasks", "gsm8k", "--data", "gsm8k.jsonl", "--backend", "vllm",
        "--vllm-command", shlex.join([sys.executable, "vllm.py"]), "--vllm-args", "--enforce-eager", "--out",
        "out", "--limit", "5", cwd=site, env=os.environ | {"TOLD": "told.json"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    told = json.loads((site / "told.json").read_text())
    assert told["arguments"][:2] == ["serve", str(TRIO / "base")]
    assert told["arguments"][-1] == "--enforce-eager"
    stored = [json.loads(line) for line in (site / "out/five/gsm8k.jsonl").read_text().splitlines()]
    assert [record["answer"] for record in stored[1:]] == ["The answer is: five"] * 5
    assert stored[0]["settings"]["vllm_arguments"] == ["--enforce-eager"]
    assert (site / "out/five/vllm.log").exists()


PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_page_names_only_options_that_exist() -> None:
    ours = PAGE.partition("## The sandbox")[0]
    command = get_command(app).commands["eval"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) - {"--tensor-parallel-size"}
    assert {"--tasks", "--data", "--backend", "--judge", "--limit", "--seed", "--out"} <= named <= known


def test_the_pages_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With results of the two models that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

    def evaluate(models: list[Model], settings: EvaluationOptions) -> list[evaluation.Result]:
        check(models, settings)
        right = Score.of("strict", {"0": True})
        return [
            evaluation.Result(model.name, task, 1, 1, (right,)) for model in models for task in settings.tasks
        ]

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    exec(compile(program, "docs/evaluation.md", "exec"), {})
    assert capsys.readouterr().out.startswith(
        "gsm8k, strict: base and merged differ by 0.0 points, which is "
    )
