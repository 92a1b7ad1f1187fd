"""The full experiment from end to end, with stand-ins for the models, the judge and alpaca_eval."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_stand_in import COUNT, judge, make_data, make_options
from stub_server import Reply, Request, Status, StubServer

from della import api
from della.errors import EvaluationError
from della.experiments import full_data
from della.experiments.full import plan_full, run_full, scoring_of
from della.experiments.full_rows import GRID, rows, rows_of
from della.experiments.options import ExperimentOptions, check, pairs
from della.experiments.published import MERGES, published
from della.options import build

pytest.importorskip("openai", reason="the judge is spoken to by the package openai")
pytest.importorskip("tokenizers", reason="the stand-ins answer by the demo's tokenizer")

TWO: dict[str, Any] = {"tables": "2", "drop_rates": "0.3,0.7", "seeds": 2}
SIX: dict[str, Any] = {"tables": "6", "pruned": "0.5", "seeds": 1}


pytestmark = pytest.mark.usefixtures("sandbox")


class Judge:
    """What the stub server answers; a test may put something else in its place."""

    def __init__(self) -> None:
        self.rule: Callable[[Request], Reply] = judge

    def __call__(self, request: Request) -> Reply:
        return self.rule(request)


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer(Judge()) as server:
        yield server


def run(options: ExperimentOptions) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    return run_full(options, "della paper --scale 13b", told.append), told


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "time"}


def scores(out: Path) -> dict[str, Any]:
    """What is stored by split and cell."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()[1:]]
    return {" ".join(row["id"].split()[:2]): row["scores"] for row in rows}


def never(*_: object, **__: object) -> None:
    raise AssertionError("this was done before")


def test_what_is_chosen_on_validation_is_reported_on_test(
    tmp_path: Path, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make_options(tmp_path, server.url, **TWO)
    results, told = run(options)
    out = options.place
    assert [row["label"] for row in results["rows"]] == ["without rescale", "with rescale"]
    known = scores(out)
    for row in results["rows"]:
        rescale = "-rescale_none" if row["label"] == "without rescale" else ""
        means = {}
        for p in (0.3, 0.7):
            cell = f"math+code-della-l1-p{p}-w0.14{rescale}-s42"
            stored = known[f"validation {cell}"]
            assert set(stored["gsm8k"]) == {"strict", "flexible"}, "no judge on validation"
            means[cell] = stored["gsm8k"]["flexible"]["value"] + stored["mbpp"]["pass@1"]["value"]
        assert row["name"] == max(means, key=means.__getitem__)
        values = []
        for seed in (42, 43):
            name = f"{row['name'].removesuffix('-s42')}-s{seed}"
            stored = known[f"test {name}"]
            values.append(stored["gsm8k"]["judge"]["value"])
            recipe = (out / f"recipes/{name}.yml").read_text()
            assert f"seed: {seed}\n" in recipe
            assert f"model: {out / 'inputs/WizardMath-13B-V1.0'}\n" in recipe, "cut to the base's rows"
        score = row["tasks"]["gsm8k"]
        percents = [100 * value for value in values]
        assert (score["metric"], score["items"], score["by_seed"]) == ("judge", COUNT, percents)
        assert score["value"] == pytest.approx(sum(percents) / 2)
        assert score["low"] <= score["value"] <= score["high"]
        assert row["paper"] == published(2, "Math+Code", row["label"])
        assert row["value"]["value"] == pytest.approx((score["value"] + row["tasks"]["mbpp"]["value"]) / 2)
        assert row["over_seeds"]["value"] == pytest.approx(row["value"]["value"], abs=1e-5)
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["scale"], results["seed"]) == ("13b", 42)
    shown = (out / "tables.md").read_text()
    line = next(line for line in shown.splitlines() if line.startswith("| Math+Code | with rescale | "))
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    assert cells[:2] == [f"{row['model']['p']:g}", "1"]
    assert cells[2].startswith(f"{score['value']:.1f}")
    assert cells[3:5] == ["63.8", f"{score['value'] - 63.8:+.1f}"]
    assert (out / "index.html").read_text().count("<table>") == 1
    assert told[-1].startswith("[2/2] table 2, Math+Code, with rescale: math+code-della-l1-p0.")
    assert not list((out / "merges").iterdir()), "merges are deleted once their answers are stored"

    asked, before = len(server.requests), files(out)
    monkeypatch.setattr(api, "merge", never)
    monkeypatch.setattr("della.evaluate.numpy_backend.NumpyModel.answer", never)
    assert without_time(run(options)[0]) == without_time(results)
    assert (len(server.requests), files(out)) == (asked, before), "nothing is asked for twice"


def test_answers_outlive_a_judge_that_fails(
    tmp_path: Path, server: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make_options(tmp_path, server.url, **SIX, keep_merges=True)
    rule = server.rule
    assert isinstance(rule, Judge)
    rule.rule = lambda request: Status(400, "no credit")
    with pytest.raises(EvaluationError, match="HTTP 400: no credit"):
        run(options)
    dare, row = "math-dare-l1-p0.5-s42", "math-della-l1-p0.5-w0.14-s42"
    assert len((options.place / f"answers/test/{dare}/gsm8k.jsonl").read_text().splitlines()) == 1 + COUNT
    assert f"test {dare}" not in scores(options.place)
    rule.rule, made, merge = judge, [], api.merge

    def noted(recipe: Path, *rest: Any, **more: Any) -> Any:
        made.append(recipe.stem)
        return merge(recipe, *rest, **more)

    monkeypatch.setattr(api, "merge", noted)
    results, _ = run(options)
    assert made[0] == row, "the first merge, and its answers, were there"
    assert [row["label"] for row in results["rows"]] == ["DARE", "row", "layer", "random row", "random layer"]
    assert sorted(path.name for path in (options.place / "merges").iterdir()) == sorted([dare, *made])


@pytest.mark.slow
def test_a_run_that_is_killed_is_resumed_where_it_was(tmp_path: Path, server: StubServer) -> None:
    program = (
        "import os, sys; from pathlib import Path; sys.path[:0] = sys.argv[1].split(os.pathsep);"
        "import test_paper_full as t;"
        "t.run(t.make_options(Path(sys.argv[2]), sys.argv[3], **t.TWO))"
    )
    homes = os.pathsep.join(map(str, Path(__file__).parents[:2]))
    command = [sys.executable, "-c", program, homes, str(tmp_path / "a"), server.url]
    answers = tmp_path / "a/out/answers/validation"
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not len(list(answers.glob("*/mbpp.jsonl"))) >= 2:  # in the second of four
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.read_bytes() for path in answers.glob("*/*.jsonl")}
    shutil.rmtree(tmp_path / "a/out/merges")  # merged again, it is the same model to the byte
    killed, whole = (run(make_options(tmp_path / name, server.url, **TWO))[0] for name in "ab")
    assert without_time(killed) == without_time(whole)
    for path, content in kept.items():
        if path.name in ("gsm8k.jsonl", "mbpp.jsonl"):
            assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1]), (
                "no answer is made again"
            )


def test_the_other_expert_of_table_3_has_a_base_of_its_own(tmp_path: Path, server: StubServer) -> None:
    options = make_options(tmp_path, server.url, tables="3", pruned="0.9", seeds=1)
    results, _ = run(options)
    labels = [f"{name} {how} rescale" for name in ("DARE", "DELLA") for how in ("without", "with")]
    assert [row["label"] for row in results["rows"]] == labels
    assert [row["paper"]["mbpp"] for row in results["rows"]] == [0, 46.4, 0.3, 49.1]
    recipe = (options.place / "recipes/coder-della-l1-p0.9-w0.14-s42.yml").read_text()
    assert "codellama/CodeLlama-13b-Python-hf" in recipe


@pytest.mark.slow
def test_wanda_ranks_by_norms_of_calibration_texts(tmp_path: Path, server: StubServer) -> None:
    options = make_options(
        tmp_path, server.url, tables="5", drop_rates="0.5", lambdas="1", seeds=1, keep_merges=True
    )
    results, _ = run(options)
    assert len(results["rows"]) == 3 + 4 * 3
    out = options.place
    assert sorted(path.name for path in (out / "norms").iterdir()) == [
        "WizardLM-13B-V1.2.safetensors", "WizardMath-13B-V1.0.safetensors",
        "llama-2-13b-code-alpaca.safetensors",
    ]  # fmt: skip
    recipe = (out / "recipes/math+code-della-l1-p0.5-w0.14-importance_wanda-s42.yml").read_text()
    assert f"input_norms: {out}/norms/WizardMath-13B-V1.0.safetensors\n" in recipe
    merged = [
        (out / f"merges/math+code-della-l1-p0.5-w0.14{kind}-s42/model.safetensors").read_bytes()
        for kind in ("", "-importance_wanda")
    ]
    assert merged[0] != merged[1]


def test_what_is_missing_is_told_before_the_first_merge(tmp_path: Path, server: StubServer) -> None:
    options = make_options(tmp_path, server.url, **TWO)
    lacking = replace(options, data=tuple(one for one in options.data if one.startswith("mbpp=")))
    with pytest.raises(EvaluationError) as raised:
        run(lacking)
    assert str(raised.value) == (
        "no data for gsm8k: give --data gsm8k=FILE; it is published at "
        "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)"
    )
    assert not (options.place / "merges").exists()


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path, server: StubServer) -> None:
    options = make_options(tmp_path, server.url, **SIX)
    run(options)
    other = replace(options, prompt="published")
    with pytest.raises(EvaluationError) as raised:
        run(other)
    assert str(raised.value) == (
        f"{options.place}: begun with other settings: prompt fixed, now published; choose another --out"
    )
    results, _ = run(replace(options, pruned=(0.5, 0.7)))
    assert len(results["rows"]) == 10, "more of the grid is no other setting"


def test_the_plan_writes_nothing(tmp_path: Path, server: StubServer) -> None:
    options = make_options(tmp_path, server.url, **TWO)
    before = files(tmp_path)
    plan = plan_full(options)
    assert plan["merges"] == {"validation": 4, "test": 4}
    assert plan["answers"] == {"gsm8k": 8 * COUNT, "mbpp": 8 * COUNT, "alpaca_eval": 0}
    assert plan["disk"]["downloads"] == {}
    assert files(tmp_path) == before


def test_the_splits_share_no_problem(tmp_path: Path) -> None:
    data = make_data(tmp_path, count=5)
    found = full_data.split(data, ("gsm8k", "mbpp", "alpaca_eval"), tmp_path / "split")
    read = {
        (name, task): [json.loads(line) for line in path.read_text().splitlines()]
        for name, paths in found.items()
        for task, path in paths.items()
    }
    assert len(read["validation", "gsm8k"]) == 200
    assert read["validation", "gsm8k"][0]["question"] == "What is 16 plus 2?", "the end of the training file"
    assert [record["task_id"] for record in read["test", "mbpp"]] == [11, 12, 13, 14, 15]
    assert [record["task_id"] for record in read["validation", "mbpp"]] == [11, 12, 13, 14, 15]
    assert read["validation", "mbpp"][0]["text"] == "Write a function to add 511."
    said = {name: [r["instruction"] for r in read[name, "alpaca_eval"]] for name in found}
    assert said["validation"] == [f"Name {n} things." for n in range(0, 40, 8)]
    assert len(said["test"]) == 35
    assert not set(said["test"]) & set(said["validation"])
    texts = [
        full_data.calibration(data, role, tmp_path).read_text().splitlines()
        for role in ("code", "math", "lm")
    ]
    assert json.loads(texts[0][0]) == {"text": "Write a function to add 601.\ndef f(x):\n    return x + 601"}
    assert len(texts[1]) == 16, "without what is chosen on"
    assert json.loads(texts[2][0]) == {"text": "The 0 foxes went to the park with a kite."}


def test_the_papers_averages_are_those_of_its_columns_but_one() -> None:
    labels: dict[int, tuple[str, ...]] = dict.fromkeys((1, 4), ("TA", "DARE", "TIES", "DELLA"))
    labels |= {5: ("WANDA, top-K", "WANDA, p by rank", "DELLA")}
    labels |= {7: tuple(f"p={p}" for p in (0.1, 0.3, 0.5, 0.7, 0.9))}
    wrong = []
    for table in (1, 4, 5, 7):
        for models in MERGES:
            for label in labels[table]:
                scores = dict(published(table, models, label))
                average = scores.pop("average")
                if abs(sum(scores.values()) / len(scores) - average) > 0.16:
                    wrong.append((table, models, label))
    assert wrong == [(4, "all three", "TA")]
    mean = {
        label: sum(published(1, models, label)["average"] for models in MERGES) / 4 for label in labels[1]
    }
    gains = [mean["DELLA"] - mean[label] for label in ("TA", "TIES", "DARE")]
    assert gains == pytest.approx([11.15, 3.6, 1.2]), "the headline"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tables": "1;3"}, "--tables 1;3: expected numbers with commas between them"),
        ({"judge_price": "30"}, "--judge-price 30: expected READ,WRITTEN, such as 30,60"),
        ({"tokens_per_second": 0.0}, "--tokens-per-second 0: expected a number above 0"),
        ({"models": ["lm"]}, "--models lm: expected ROLE=MODEL"),
        ({"data": ["mbpp="]}, "--data mbpp=: expected NAME=FILE"),
    ],
)
def test_options_that_cannot_be_are_told(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    def asked() -> None:
        options = build(ExperimentOptions, {"scale": "13b", "out": tmp_path} | wrong)
        check(options, {})
        run(options)

    with pytest.raises(EvaluationError) as raised:
        asked()
    assert str(raised.value) == message


def test_options_are_the_papers_where_nothing_is_said(tmp_path: Path) -> None:
    said = {"out": tmp_path, "tables": "1,3,1", "lambdas": "1", "window": 0.2, "judge_price": "30,60"}
    options = build(ExperimentOptions, said)
    assert rows_of(options) == rows((1, 3), replace(GRID, lambdas=(1.0,), epsilons=(0.1,)), 3)
    assert rows_of(ExperimentOptions()) == rows()
    assert (options.judge_price, pairs("--models", ["lm=a=b"], "")) == ((30.0, 60.0), {"lm": "a=b"})
    scoring = scoring_of(options)
    assert (scoring.backend, scoring.max_tokens, scoring.out) == ("vllm", 512, tmp_path)
