"""The demo's tasks: determinism, splits held apart, scorers, and that generated code is never run."""

from __future__ import annotations

import hashlib
import random
import re
from itertools import islice
from pathlib import Path

import pytest

from della.experiments.cells import as_text
from della.experiments.demo import EXPERTS, TRIO, tasks
from della.experiments.demo.run import SETTINGS, folder, recipe, samples, score_all, table
from della.experiments.demo.score import kept_gains


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("split", tasks.SPLITS)
def test_items_are_deterministic_distinct_and_of_their_split(task: str, split: str) -> None:
    drawn = tasks.items(task, split, 150)
    assert drawn == tasks.items(task, split, 150)
    assert drawn[:40] == tasks.items(task, split, 40)
    assert drawn != tasks.items(task, split, 150, seed=1)
    assert len({item.key for item in drawn}) == 150
    assert {tasks.split_of(item.key) for item in drawn} == {split}


def test_the_generator_does_not_drift() -> None:
    text = "".join(repr(item) for task in tasks.TASKS for item in tasks.items(task, "test", 120))
    text += "".join(map(repr, islice(tasks.base_corpus(random.Random(0)), 500)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "09565c8971718dec"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_training_never_sees_a_held_out_problem(task: str) -> None:
    held = {item.key for split in ("validation", "test") for item in tasks.items(task, split, 150)}
    seen = {item.key for item in islice(tasks.stream(task, random.Random(5)), 3000)}
    assert not held & seen


def test_validation_and_test_are_apart() -> None:
    for task in tasks.TASKS:
        keys = [{item.key for item in tasks.items(task, split, 200)} for split in ("validation", "test")]
        assert not keys[0] & keys[1]


@pytest.mark.parametrize("task", ["math", "code"])
def test_right_answers_score_and_slips_do_not(task: str) -> None:
    for item in tasks.items(task, "test", 200):
        assert tasks.correct(item, item.answer)
        assert not tasks.correct(item, tasks.always_slip(item))
        assert not tasks.correct(item, "")


def test_stories_slip_by_losing_all_four_words() -> None:
    for item in tasks.items("lm", "test", 100):
        slipped = tasks.always_slip(item)
        asked = {word for _, word in item.slots}
        assert not asked & set(re.findall(r"\w+", slipped))
        assert asked & set(re.findall(r"\w+", item.answer))
        with pytest.raises(ValueError, match="scored by loss"):
            tasks.correct(item, item.answer)


def test_slip_rates_follow_the_visible_group() -> None:
    assert tasks.slip_rate(tasks.ITEMS[0]) == tasks.RATE_FIRST
    assert tasks.slip_rate(tasks.FUNCTIONS[-1]) == tasks.RATE_LAST
    rng = random.Random(0)
    for group, low, high in ((tasks.ITEMS[0], 0.47, 0.57), (tasks.ITEMS[-1], 0.84, 0.92)):
        drawn = [i for i in islice(tasks.stream("math", rng), 6000) if i.group == group]
        slips = sum(not tasks.correct(item, tasks.sloppy(item, rng)) for item in drawn)
        assert low < slips / len(drawn) < high


def test_a_fifth_of_the_base_corpus_is_drills_and_their_facts_are_right() -> None:
    documents = list(islice(tasks.base_corpus(random.Random(1)), 2000))
    drills = [answer for prompt, answer in documents if prompt == "Facts:"]
    assert 0.17 < len(drills) / len(documents) < 0.23
    for fact in " ".join(drills).split():
        question, answer = fact.rstrip(".").split("=")
        assert tasks.calculate(question, 0) == int(answer)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        tasks.items("math", "dev", 1)


@pytest.mark.parametrize(
    ("expression", "x", "value"),
    [("x", 5, 5), ("(x + 3) * -2", 4, -14), ("x // 2 % 3", 11, 2), ("+x - 12 - 1", 0, -13), ("7", 1, 7)],
)
def test_calculate(expression: str, x: int, value: int) -> None:
    assert tasks.calculate(expression, x) == value


@pytest.mark.parametrize(
    "expression",
    [
        "x == 3", "x < 3", "x ** 9", "x ** 9 ** 9 ** 9", "__import__('os').system('true')", "open('f')",
        "x.real", "x(3)", "[x]", "y", "x if x else 3", "lambda: x", "x / 2", "x // 0", "x % 0", "", "x +",
        "(x", "1.5 * x", "xx", "(" * 70, "x + 1" * 40, "x\n", "x := 3", "3(4)", "-" * 79 + "x" + "x",
    ],
)  # fmt: skip
def test_calculate_refuses_everything_but_integer_arithmetic(expression: str) -> None:
    with pytest.raises(ValueError, match=r"arithmetic|calculated"):
        tasks.calculate(expression, 3)


def test_code_must_be_one_return_line() -> None:
    item = next(i for i in tasks.items("code", "test", 50) if i.answer.count(" x ") == 1)
    assert tasks.correct(item, item.answer + "\n")
    right = item.answer
    for text in (right.strip(), right + "\n    pass", "\n    import os" + right, right + " #"):
        assert not tasks.correct(item, text)


def test_recipes_state_only_what_their_method_uses(tmp_path: Path) -> None:
    by_method = {cell.method: as_text(recipe(cell, tmp_path)) for cell in SETTINGS.values()}
    assert set(by_method) == {"task_arithmetic", "ties", "dare_ties", "della"}
    assert len({folder(tmp_path, name) for name in SETTINGS}) == len(SETTINGS)
    assert "density" not in by_method["task_arithmetic"]
    assert "epsilon" in by_method["della"]
    assert "epsilon" not in by_method["dare_ties"]
    for text in by_method.values():
        assert text.count("- model: ") == 3
        assert f"base_model: {tmp_path / 'base'}\n" in text


def test_kept_gains_are_0_for_the_base_and_1_for_the_expert() -> None:
    base = {"lm_loss": 0.6, "math": 0.1, "code": 0.0}
    experts = {
        "lm": {"lm_loss": 0.2, "math": 0.3, "code": 0.0},
        "math": {"lm_loss": 0.7, "math": 0.9, "code": 0.0},
        "code": {"lm_loss": 0.6, "math": 0.1, "code": 0.5},
    }
    assert kept_gains(base, base, experts) == {"lm": 0, "math": 0, "code": 0}
    whole = kept_gains({"lm_loss": 0.2, "math": 0.9, "code": 0.5}, base, experts)
    assert whole == pytest.approx({"lm": 1, "math": 1, "code": 1})
    part = kept_gains({"lm_loss": 0.5, "math": 0.5, "code": 0.0}, base, experts)
    assert part == pytest.approx({"lm": 0.25, "math": 0.5, "code": 0})
    assert kept_gains(experts["lm"], base, dict.fromkeys(experts, base)) == {"lm": 0, "math": 0, "code": 0}


def test_the_table_is_aligned() -> None:
    scores = {"lm_loss": 0.5, "math": 0.25, "code": 1.0}
    lines = table([("base", "", scores, None), ("della", "density 0.5", scores, 0.5)]).splitlines()
    assert len({line.index(found) for line, found in zip(lines[2:], ("0.500", "0.500"), strict=True)}) == 1
    assert lines[3].endswith("0.50")


def test_every_scored_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    scores = score_all({"base": TRIO / "base", "math expert": TRIO / "math"}, 2)
    first, last = capsys.readouterr().out.splitlines()
    assert ("base (1 of 2)" in first, "s left" in first) == (True, True)
    assert ("math expert (2 of 2)" in last, "s left" in last) == (True, False)
    assert scores["math expert"]["math"] > scores["base"]["math"]


def test_samples_are_the_first_test_problems_and_judged() -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    models = {"base": TRIO / "base", "della": TRIO / "math"}  # an expert in the place of a merge
    text = samples(models | {f"{name} expert": TRIO / name for name in EXPERTS})
    for task in EXPERTS:
        assert tasks.items(task, "test", 1)[0].prompt in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["della"]][1:] == ["right", "wrong"], "math, code"
    assert [line[2] for line in lines if line[1:2] == ["expert"]][1:] == ["right", "wrong"], "math, code"
