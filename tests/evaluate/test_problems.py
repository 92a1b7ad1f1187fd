"""The problems of the benchmarks: what is read from files of the published formats, and what is refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import ADD, HELLO, PEAS, lines

from della.errors import EvaluationError
from della.evaluate.problems import Item, load


def test_gsm8k_is_read_in_its_order(tmp_path: Path) -> None:
    big = {"question": "Café?", "answer": "Many.\n#### -1,234.5"}
    file = lines(tmp_path / "test.jsonl", PEAS, big)
    assert load("gsm8k", file) == [
        Item("0", "gsm8k", "2 peas and 3 peas?", "2 + 3 = <<2+3=5>>5\n#### 5"),
        Item("1", "gsm8k", "Café?", "Many.\n#### -1,234.5"),
    ]
    assert load("gsm8k", file, limit=1) == load("gsm8k", file)[:1]


def test_of_mbpp_only_the_test_split_is_read(tmp_path: Path) -> None:
    file = lines(tmp_path / "mbpp.jsonl", *(ADD | {"task_id": n} for n in (10, 510, 511, 11)))
    assert [problem.id for problem in load("mbpp", file)] == ["510", "11"]
    assert load("mbpp", file)[1] == Item(
        "11", "mbpp", ADD["text"], ADD["code"], tuple(ADD["test_list"]), "import math"
    )


@pytest.mark.parametrize("form", ["array", "lines"])
def test_alpaca_eval_is_an_array_or_lines_and_the_reference_may_lack(tmp_path: Path, form: str) -> None:
    records = [HELLO, {"instruction": "Say bye."}]
    file = lines(tmp_path / "alpaca_eval.json", *([records] if form == "array" else records))
    assert load("alpaca_eval", file) == [
        Item("0", "alpaca_eval", "Say hello.", "Hello."),
        Item("1", "alpaca_eval", "Say bye.", ""),
    ]


FIX = "; correct the file, or take the published one"
BAD: dict[str, tuple[str, bytes, str, str]] = {
    "no JSON": ("gsm8k", b"{}x\n", ":1", "invalid JSON: Extra data: line 1 column 3 (char 2)"),
    "a key twice": (
        "gsm8k", b'{"question": "a", "question": "b"}', ":1",
        "invalid JSON: the key 'question' stands twice",
    ),
    "not UTF-8": (
        "gsm8k", b'{"question": "\xff"}',
        ":1", "text is not UTF-8 ('utf-8' codec can't decode byte 0xff in position 14: invalid start byte)",
    ),
    "nested": ("gsm8k", b'{"question": ' + b"[" * 200_000, ":1", "JSON is nested too deeply"),
    "a number": ("gsm8k", b"7", ":1", "expected a JSON object, found 7"),
    "no question": ("gsm8k", b'{"answer": "#### 5"}', ":1", "expected a text as 'question', found none"),
    "empty question": (
        "gsm8k", b'{"question": " ", "answer": "#### 5"}', ":1",
        "expected a text as 'question', found \" \"",
    ),
    "no number at the end": (
        "gsm8k", b'\n{"question": "a", "answer": "five"}',
        ":2", "expected an 'answer' that ends in '#### ' and a number, found \"five\"",
    ),
    "an id that is true": (
        "mbpp", json.dumps(ADD | {"task_id": True}).encode(), ":1",
        "expected a number as 'task_id', found true",
    ),
    "an id twice": (
        "mbpp", b"\n".join([json.dumps(ADD).encode()] * 2), ":2", "the problem 11 stands twice",
    ),
    "the sanitized file": (
        "mbpp", json.dumps([{**{k: v for k, v in ADD.items() if k != "text"}, "prompt": "Add."}]).encode(),
        ": item 1", "expected a text as 'text', found none",
    ),
    "tests that are no texts": (
        "mbpp", json.dumps(ADD | {"test_list": [1]}).encode(),
        ":1", "expected a list of asserts as 'test_list', found [1]",
    ),
    "no tests": (
        "mbpp", json.dumps(ADD | {"test_list": []}).encode(),
        ":1", "expected a list of asserts as 'test_list', found []",
    ),
    "another split": (
        "mbpp", json.dumps(ADD | {"task_id": 601}).encode(), "", "no test problem of mbpp in it",
    ),
    "an output that is no text": (
        "alpaca_eval", b'[{"instruction": "a"}, {"instruction": "b", "output": 1}]',
        ": item 2", "expected a text as 'output', found 1",
    ),
    "nothing": ("alpaca_eval", b"[]", "", "no test problem of alpaca_eval in it"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "raw", "where", "what"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_with_file_and_line(
    tmp_path: Path, task: str, raw: bytes, where: str, what: str
) -> None:
    file = tmp_path / "problems"
    file.write_bytes(raw)
    with pytest.raises(EvaluationError) as error:
        load(task, file)
    assert str(error.value) == f"{file}{where}: {what}{FIX}"


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"none\.jsonl: no such file$"):
        load("gsm8k", tmp_path / "none.jsonl")
    with pytest.raises(EvaluationError, match=r": not a plain file$"):
        load("gsm8k", tmp_path)


def test_an_unknown_task_is_told_with_the_nearest() -> None:
    with pytest.raises(EvaluationError) as error:
        load("gsmk8")
    assert str(error.value) == (
        "task 'gsmk8': expected one of gsm8k, mbpp, alpaca_eval, loss; did you mean 'gsm8k'?"
    )


def test_without_a_file_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((path, name, split))
        return [PEAS]

    hub: Any = types.ModuleType("datasets")
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert [problem.instruction for problem in load("gsm8k")] == ["2 peas and 3 peas?"]
    assert asked == [("openai/gsm8k", "main", "test")]
    with pytest.raises(
        EvaluationError, match=r"^google-research-datasets/mbpp of the Hub: item 1: expected a n"
    ):
        load("mbpp")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    hub.load_dataset = fail
    with pytest.raises(EvaluationError) as error:
        load("gsm8k")
    assert str(error.value) == (
        "openai/gsm8k: cannot be fetched from the Hub (ConnectionError: no route); give a local file with "
        'data={"gsm8k": FILE}; it is published at https://github.com/openai/grade-school-math '
        "(grade_school_math/data/test.jsonl)"
    )


def test_without_a_file_and_the_package_it_is_said_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError) as error:
        load("mbpp")
    assert str(error.value) == (
        "mbpp: no file was given, and the package datasets, which would fetch it from the Hub, is not "
        "installed (pip install '.[hub]' in della's checkout); give a local file with "
        'data={"mbpp": FILE}; it '
        "is published at "
        "https://github.com/google-research/google-research (mbpp/mbpp.jsonl)"
    )
