"""An evaluation as a whole: answers, resumed, then scores, items, differences; and what it refuses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import ADD, COMMAND, HELLO, lines, number_in, records, sums
from stand_ins import TABLE, stand_in
from stub_server import Request, Slow, StubServer

from della.errors import EvaluationError
from della.evaluate import evaluation
from della.evaluate.evaluation import Result, evaluate
from della.evaluate.options import EvaluationOptions
from della.evaluate.scoring import Score
from della.experiments.demo import TRIO
from della.report.intervals import Interval, wilson

Make = Callable[..., EvaluationOptions]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Settings of an evaluation of ten sums by a server at ``url``."""
    file = lines(tmp_path / "gsm8k.jsonl", *sums(10))

    def made(url: str, **more: Any) -> EvaluationOptions:
        plain: dict[str, Any] = {
            "tasks": ("gsm8k",), "data": {"gsm8k": file}, "out": tmp_path / "out", "backend": "openai",
            "base_url": url, "concurrency": 1,
        }  # fmt: skip
        return EvaluationOptions(**(plain | more))

    return made


# ---- answers ----------------------------------------------------------------------------------------------


def test_answers_are_stored_with_their_settings_and_scored(make: Make) -> None:
    """Odd ones are right; every third says so in the strict form."""

    def rule(request: Request) -> str:
        n = number_in(request)
        value = n + 1 if n % 2 else 0
        return f"So. The answer is: {value}. Q: And" if n % 3 == 0 else f"I say {value} Q: no 99"

    notes: list[evaluation.Progress] = []
    with StubServer(rule) as server:
        settings = make(server.url)
        (result,) = evaluate(["m"], settings, progress=notes.append)
    header, first, *_ = records(settings.out / "m/gsm8k.jsonl")
    assert header["settings"] == {
        "task": "gsm8k", "model": "m", "backend": "openai", "template": "alpaca", "prompt": "fixed",
        "max_tokens": 512, "seed": 42, "base_url": settings.base_url, "model_name": None,
    }  # fmt: skip
    assert (first["id"], first["answer"]) == ("0", "So. The answer is: 0. ")
    assert [note.done for note in notes] == list(range(1, 11))
    assert (result.model, result.task, result.problems, result.answered) == ("m", "gsm8k", 10, 10)
    assert result.score("strict").interval == wilson(2, 10)
    assert result.score("flexible").interval == wilson(5, 10)
    assert result.score("strict").items == {str(n): float(n in (3, 9)) for n in range(10)}
    items = records(settings.out / "m/gsm8k.items.jsonl")
    assert items[3] == {
        "id": "3", "strict": True, "strict_answer": "4.", "flexible": True, "flexible_answer": "4.",
    }  # fmt: skip
    assert items[1]["strict_answer"] is None


def test_a_password_in_the_url_is_not_stored(make: Make) -> None:
    with StubServer(lambda request: "The answer is: 1") as server:
        settings = make(server.url.replace("//", "//ann:secret@"))
        evaluate(["m"], settings)
        evaluate(["m"], make(server.url))
        assert len(server.requests) == 10, "the server is the same"
    assert [path for path in settings.out.rglob("*.json*") if "secret" in path.read_text()] == []


def test_each_answer_is_on_the_disk_before_the_next_is_asked_for(make: Make) -> None:
    """Seen from the server: a request comes when the store holds all that it has answered."""
    seen: list[list[str]] = []

    def rule(request: Request) -> str:
        stored = records(settings.out / "m/gsm8k.jsonl")[1:]
        seen.append([record["answer"] for record in stored])
        return f"answer {request.number}"

    with StubServer(rule) as server:
        settings = make(server.url)
        evaluate(["m"], settings)
    assert seen == [[f"answer {n}" for n in range(count)] for count in range(10)]


@pytest.mark.slow
def test_kill_9_again_and_again_and_nothing_is_asked_for_twice(make: Make, tmp_path: Path) -> None:
    """What the store holds when an evaluation is killed is never asked for again; of the rest, only what was
    in flight.
    """
    count, at_once, kills = 36, 3, 3
    file = lines(tmp_path / "many.jsonl", *sums(count))
    rng = random.Random(42)
    store = tmp_path / "out/m/gsm8k.jsonl"
    held: list[tuple[int, set[int]]] = []  # when killed: requests so far, and who was answered
    with StubServer(lambda request: Slow(0.01, f"number {request.number}")) as server:
        command = [
            *COMMAND, "m", "--tasks", "gsm8k", "--data", str(file), "--backend", "openai", "--base-url",
            server.url, "--concurrency", str(at_once), "--out", str(tmp_path / "out"), "--quiet",
        ]  # fmt: skip
        for kill in range(kills):
            until = 10 * kill + rng.randint(1, 9)
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
                while len(server.requests) < until:
                    assert run.poll() is None
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.01)
                os.kill(run.pid, signal.SIGKILL)
            time.sleep(0.05)  # requests that were sent arrive
            whole = store.read_bytes().rpartition(b"\n")[0].splitlines()[1:]
            held.append((len(server.requests), {int(json.loads(line)["id"]) for line in whole}))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        requests = [number_in(request) for request in server.requests]
        for so_far, answered in held:
            assert not answered & set(requests[so_far:]), "an answer that had come back was asked for again"
        assert 0 < len(held[-1][1]) < count
        assert len(requests) - count <= kills * at_once, "no more than what was in flight"
        stored = records(store)[1:]
        assert Counter(record["id"] for record in stored) == {str(n): 1 for n in range(count)}
        for record in stored:
            number = int(record["answer"].removeprefix("number "))
            assert requests[number] == int(record["id"]), "each has the answer to its own prompt"
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        assert len(server.requests) == len(requests), "the second run only scores"


def test_a_batch_that_was_finished_is_not_computed_again_and_answers_are_the_same(tmp_path: Path) -> None:
    file = lines(tmp_path / "gsm8k.jsonl", *sums(7))
    settings = EvaluationOptions(
        tasks=("gsm8k",), data={"gsm8k": file}, out=tmp_path / "whole", backend="numpy", batch=2, max_tokens=4
    )
    evaluate([str(TRIO / "math")], settings)
    whole = records(tmp_path / "whole/math/gsm8k.jsonl")

    class Enough(Exception):
        pass

    def stop(progress: evaluation.Progress) -> None:
        if progress.done == 4:
            raise Enough

    import dataclasses

    cut = dataclasses.replace(settings, out=tmp_path / "cut")
    with pytest.raises(Enough):
        evaluate([str(TRIO / "math")], cut, progress=stop)
    assert len(records(tmp_path / "cut/math/gsm8k.jsonl")) == 5
    (result,) = evaluate([str(TRIO / "math")], cut)
    assert result.answered == 3
    assert records(tmp_path / "cut/math/gsm8k.jsonl") == whole


def test_a_larger_limit_asks_only_for_the_rest(make: Make) -> None:
    with StubServer(lambda request: "The answer is: 1") as server:
        evaluate(["m"], make(server.url, limit=4))
        (result,) = evaluate(["m"], make(server.url, limit=6))
        assert (result.problems, result.answered) == (6, 2)
        assert [number_in(request) for request in server.requests] == [0, 1, 2, 3, 4, 5]
        (result,) = evaluate(["m"], make(server.url, limit=2))
        assert (result.problems, result.answered) == (2, 0)


def test_other_settings_and_other_problems_are_refused_or_begun_anew(make: Make, tmp_path: Path) -> None:
    with StubServer(lambda request: "The answer is: 1") as server:
        evaluate(["m"], make(server.url))
        store = tmp_path / "out/m/gsm8k.jsonl"
        with pytest.raises(EvaluationError) as error:
            evaluate(["m"], make(server.url, max_tokens=9, templates={"gsm8k": "chat"}))
        assert str(error.value) == (
            f'{store}: its answers are of other settings: template "alpaca", now "chat"; max_tokens 512, '
            "now 9; choose another out, or begin anew with fresh=True"
        )
        lines(tmp_path / "gsm8k.jsonl", *sums(10)[::-1])
        with pytest.raises(EvaluationError) as error:
            evaluate(["m"], make(server.url))
        assert str(error.value) == (
            f"{store}: problem 0 was put otherwise than now: the data, the template or della's version has "
            "changed; choose another out, or begin anew with fresh=True"
        )
        assert len(server.requests) == 10
        (result,) = evaluate(["m"], make(server.url, fresh=True))
        assert result.answered == 10


def test_what_is_wrong_with_the_last_model_is_told_before_the_first_is_asked(make: Make) -> None:
    with StubServer(lambda request: "The answer is: 1") as server:
        evaluate(["z"], make(server.url, max_tokens=9))
        asked = len(server.requests)
        with pytest.raises(
            EvaluationError, match=r"z/gsm8k\.jsonl: its answers are of other settings: max_tok"
        ):
            evaluate(["a", "z"], make(server.url))
        assert len(server.requests) == asked
    with pytest.raises(
        EvaluationError, match=r"^none: no such folder, and no model of the Hub \(owner/name\)$"
    ):
        evaluate([f"a={TRIO / 'base'}", "none"], make("", backend="numpy", max_tokens=1))


def test_score_only_takes_what_is_there_and_never_asks(make: Make, tmp_path: Path) -> None:
    with StubServer(lambda request: "The answer is: 1.") as server:
        evaluate(["m"], make(server.url, limit=4))
    (result,) = evaluate(["m"], make("", limit=4, score_only=True, backend="hf"))
    assert result.score("strict").interval == wilson(1, 4)
    (answers,) = json.loads((tmp_path / "out/scores.json").read_text())["answers"]
    made = answers["settings"]
    assert (made["backend"], made["base_url"]) == ("openai", server.url), "what they were made with, not hf"
    with pytest.raises(EvaluationError, match=r"6 of 10 answers are missing; leave out score_only$"):
        evaluate(["m"], make("", score_only=True))
    with pytest.raises(EvaluationError, match=r"n/gsm8k\.jsonl: no such file, so there is nothing to score"):
        evaluate(["n"], make("", score_only=True))
    assert not (tmp_path / "out/n").exists()


# ---- scores -----------------------------------------------------------------------------------------------


def test_several_models_are_compared_with_the_first(make: Make) -> None:
    """The second model is right in one sum more: noise.  The third is right in all: not noise."""
    right = {"a": 1, "b": 2, "c": 10}

    def rule(request: Request) -> str:
        n = number_in(request)
        return f"The answer is: {n + 1 if n < right[request.body['model']] else -1}."

    with StubServer(rule) as server:
        settings = make(server.url)
        results = evaluate(["a", "b", "c"], settings)
    found = [str(d) for d in evaluation.differences(results) if d.metric == "strict"]
    assert found == [
        "gsm8k, strict: a and b differ by 10.0 points, which is within noise (95 % interval +0.0 to +30.0, "
        "10 items, 1 differ)",
        "gsm8k, strict: c is 90.0 points above a (95 % interval +70.0 to +100.0, 10 items, 9 differ)",
    ]
    report = json.loads((settings.out / "scores.json").read_text())
    assert report == evaluation.report(results, settings)
    assert report["results"][0] == {
        "model": "a", "task": "gsm8k", "metric": "strict", "value": 0.1,
        "low": pytest.approx(0.0179, abs=1e-4), "high": pytest.approx(0.4042, abs=1e-4), "items": 10,
        "problems": 10,
    }  # fmt: skip
    assert [d["within_noise"] for d in report["differences"]] == [True, True, False, False]


def test_a_difference_downwards_is_told_as_such() -> None:
    scores = [Score.of("pass@1", {str(n): bool(value) for n in range(50)}) for value in (1, 0)]
    results = [Result(name, "mbpp", 50, 0, (score,)) for name, score in zip("ab", scores, strict=True)]
    (difference,) = evaluation.differences(results)
    assert str(difference) == (
        "mbpp, pass@1: b is 100.0 points below a (95 % interval -100.0 to -100.0, 50 items, 50 differ)"
    )
    assert difference.interval == Interval(-1.0, -1.0, -1.0)


@pytest.mark.parametrize(("items", "noise"), [(1, True), (5, True), (6, False)])
def test_a_few_items_show_no_difference(items: int, noise: bool) -> None:
    """All that differ do so to one side, so the bootstrap sees no spread at all: of five that is chance."""
    scores = [Score.of("strict", {str(n): bool(value) for n in range(items)}) for value in (0, 1)]
    results = [Result(name, "gsm8k", items, 0, (score,)) for name, score in zip("ab", scores, strict=True)]
    (difference,) = evaluation.differences(results)
    assert (difference.interval.holds_zero, difference.differing) == (False, items)
    assert difference.within_noise == noise
    assert ("within noise" in str(difference)) == noise


def test_a_judge_gives_both_denominators(make: Make) -> None:
    """It finds four right and two wrong, and does not say so of four."""

    def judge(request: Request) -> str:
        n = int(request.prompt.partition("What is ")[2].partition(" ")[0])
        return "[[correct]]" if n < 4 else "[[wrong]]" if n < 6 else "I cannot say."

    with StubServer(lambda _: "It is 1") as server, StubServer(judge) as bench:
        settings = make(server.url, judge="gpt", judge_url=bench.url)
        (result,) = evaluate(["m"], settings)
        assert bench.requests[0].body["model"] == "gpt"
        assert result.score("judge").interval == wilson(4, 10)
        assert result.score("judge_judged").interval == wilson(4, 6)
        asked = len(bench.requests)
        (result,) = evaluate(["m"], settings)
        assert (len(bench.requests), len(server.requests)) == (asked, 10)
        assert result.score("judge").interval == wilson(4, 10)
    items = records(settings.out / "m/gsm8k.items.jsonl")
    assert [item["judge"] for item in items] == ["correct"] * 4 + ["wrong"] * 2 + [None] * 4


def test_mbpp_runs_the_programs_in_the_sandbox(tmp_path: Path) -> None:
    from della.sandbox.walls import open_sandbox

    try:
        open_sandbox()
    except EvaluationError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    programs = (
        "```python\ndef add(a, b):\n    return a + b\n```\nIt adds.", "def add(a, b):\n    return a - b",
        "I cannot.", "import os\nos._exit(0)",
    )  # fmt: skip
    file = lines(tmp_path / "mbpp.jsonl", *(ADD | {"task_id": 11 + n} for n in range(4)))
    with StubServer(lambda request: programs[request.number]) as server:
        settings = EvaluationOptions(
            tasks=("mbpp",), data={"mbpp": file}, out=tmp_path / "out", backend="openai", base_url=server.url,
            concurrency=1,
        )  # fmt: skip
        (result,) = evaluate(["m"], settings)
        assert "\nTest examples:\nassert add(1, 2) == 3\n" in server.requests[0].prompt
    assert result.score("pass@1").interval == wilson(1, 4)
    items = records(settings.out / "m/mbpp.items.jsonl")
    assert [(item["id"], item["pass@1"]) for item in items] == [
        ("11", True), ("12", False), ("13", False), ("14", False),
    ]  # fmt: skip
    assert items[0]["reason"] == "passed"
    assert items[1]["reason"].startswith("wrong answer")


def test_without_a_sandbox_mbpp_is_refused_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from della.sandbox import walls as sandbox

    def none(name: str | None = None) -> None:
        raise EvaluationError("no sandbox")

    monkeypatch.setattr(sandbox, "open_sandbox", none)
    with StubServer(lambda request: "") as server:
        settings = EvaluationOptions(
            tasks=("mbpp",), data={"mbpp": lines(tmp_path / "mbpp.jsonl", ADD)}, out=tmp_path / "out",
            backend="openai", base_url=server.url,
        )  # fmt: skip
        with pytest.raises(EvaluationError, match=r"^no sandbox$"):
            evaluate(["m"], settings)
        assert server.requests == []
    assert not settings.out.exists()


def test_alpaca_evals_answers_are_written_for_the_package(tmp_path: Path) -> None:
    file = lines(tmp_path / "alpaca_eval.json", [HELLO, {"instruction": "Say bye."}])
    notes: list[str] = []
    with StubServer(lambda request: f" Hello {request.number} USER: more") as server:
        settings = EvaluationOptions(
            tasks=("alpaca_eval",), data={"alpaca_eval": file}, out=tmp_path / "out", backend="openai",
            base_url=server.url, concurrency=1,
        )  # fmt: skip
        (result,) = evaluate(["m"], settings, tell=notes.append)
        assert server.requests[0].prompt.endswith("USER: Say hello. ASSISTANT:")
    written = tmp_path / "out/m/alpaca_eval.json"
    assert result.scores == ()
    assert notes == [f"{written} holds the answers for alpaca_eval; annotator=NAME has them judged"]
    assert json.loads(written.read_text()) == [
        {"instruction": "Say hello.", "output": " Hello 0 ", "generator": "m"},
        {"instruction": "Say bye.", "output": " Hello 1 ", "generator": "m"},
    ]
    with pytest.raises(EvaluationError) as error:
        evaluate(["m"], EvaluationOptions(**{**as_dict(settings), "annotator": "alpaca_eval_gpt4"}))
    assert str(error.value) == (
        "alpaca_eval: 1 of 2 instructions have no reference 'output', such as number 1; take "
        "a file that has them, or leave out annotator"
    )


def test_an_annotator_gives_win_rates(tmp_path: Path) -> None:
    """With a stand-in for the package, which prefers a, not b, is even on c and has no view of d."""
    table = TABLE.replace("n_total", "n_total,length_controlled_winrate,lc_standard_error")
    command = stand_in(tmp_path, table=table.replace(",3\n", ",3,47.5,9.5\n"))
    file = lines(tmp_path / "a.json", [{"instruction": word, "output": word * 2} for word in "abcd"])
    notes: list[str] = []
    with StubServer(lambda _: "yes") as server:
        settings = EvaluationOptions(
            tasks=("alpaca_eval",), data={"alpaca_eval": file}, out=tmp_path / "out", backend="openai",
            base_url=server.url, annotator="alpaca_eval_gpt4", alpaca_command=command, length_controlled=True,
        )  # fmt: skip
        (result,) = evaluate(["m"], settings, tell=notes.append)
    won, controlled = result.score("win_rate"), result.score("length_controlled_win_rate")
    assert (won.interval, won.items) == (Interval(0.5, 0.0, 1.0), {"0": 1.0, "1": 0.0, "2": 0.5})
    assert controlled.interval.value == 0.475
    assert controlled.interval.low == pytest.approx(0.475 - 1.96 * 0.095)
    assert notes == ["alpaca_eval: 1 of 4 answers could not be judged"]
    reference = json.loads((tmp_path / "out/m/alpaca_eval.reference.json").read_text())
    assert reference[0] == {"instruction": "a", "output": "aa", "generator": "reference"}
    assert records(settings.out / "m/alpaca_eval.items.jsonl")[2:] == [
        {"id": "2", "preference": 0.5},
        {"id": "3"},
    ]


def as_dict(settings: EvaluationOptions) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


# ---- what is refused before anything is done --------------------------------------------------------------

REFUSED: dict[str, tuple[Mapping[str, Any], str]] = {
    "no task": ({"tasks": ()}, "nothing to score: expected at least one model and one task"),
    "task": (
        {"tasks": ("gsm",)},
        "task 'gsm': expected one of gsm8k, mbpp, alpaca_eval, loss; did you mean 'gsm8k'?",
    ),
    "backend": (
        {"backend": "vlm"}, "backend 'vlm': expected one of hf, vllm, openai, numpy; did you mean 'vllm'?",
    ),
    "dtype": (
        {"dtype": "bf16"}, "dtype 'bf16': expected one of bfloat16, float16, float32; did you mean "
        "'bfloat16'?",
    ),
    "template": ({"templates": {"gsm8k": "x"}}, "template 'x': expected one of alpaca, vicuna, chat"),
    "limit": ({"limit": 0}, "limit 0: expected at least 1"),
    "batch": ({"batch": -1}, "batch -1: expected at least 1"),
    "seed": ({"seed": -1}, "seed -1: expected at least 0"),
    "no address": ({}, 'the backend openai needs the server\'s address; give base_url="http://HOST/v1"'),
    "fresh scores": (
        {"fresh": True, "score_only": True},
        "fresh forgets the answers that score_only is to score; leave one out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("more", "message"), REFUSED.values(), ids=REFUSED)
def test_a_setting_that_cannot_be_is_told(make: Make, more: Mapping[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError) as error:
        evaluate(["m"], make("", **more))
    assert str(error.value) == message


def test_models_must_be_told_apart(make: Make) -> None:
    with pytest.raises(EvaluationError, match=r"^two models are called m; .*NAME=MODEL$"):
        evaluate(["a/m", "b/m"], make("http://localhost/v1"))
    with pytest.raises(EvaluationError, match=r"^model_name is of one model; give several by the names that"):
        evaluate(["a", "b"], make("http://localhost/v1", model_name="x"))
