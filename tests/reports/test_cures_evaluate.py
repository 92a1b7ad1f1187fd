"""What messages on problems, texts and settings of an evaluation advise is done as it is written, and what
is read, or checked, is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import ADD, PEAS, lines, sums
from commands import Command
from cures import cures
from stub_server import StubServer

from della.errors import EvaluationError
from della.evaluate.backends import Model
from della.evaluate.calibration import read_texts
from della.evaluate.endpoint import key_in
from della.evaluate.evaluation import evaluate
from della.evaluate.generations import Store
from della.evaluate.options import EvaluationOptions
from della.evaluate.problems import MOST_BYTES, load
from della.evaluate.settings import check

ONE, TWO = Model("one", "one"), Model("two", "two")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path


GOOD = b"".join(json.dumps(each).encode() + b"\n" for each in (PEAS, PEAS | {"question": "4 peas?"}))
FIX = "correct the file, or take the published one"
BAD = {
    "no JSON": (GOOD[:-3], FIX),
    "no JSON array": (b"[" + GOOD, FIX),
    "no object": (GOOD + b"3\n", FIX),
    "no answer": (b'{"question": "a"}\n' + GOOD, FIX),
    "nothing": (b"\n", FIX),
}


@cures("evaluate/problems.py:_file", "evaluate/problems.py:_file", "evaluate/problems.py:_file")
@cures("evaluate/problems.py:_Record.bad", "evaluate/problems.py:load")
@pytest.mark.parametrize("kind", BAD)
def test_a_file_of_problems_is_corrected(folder: Path, kind: str) -> None:
    file = folder / "test.jsonl"
    file.write_bytes(BAD[kind][0])
    with pytest.raises(EvaluationError, match=BAD[kind][1]):
        load("gsm8k", file)
    file.write_bytes(GOOD)
    assert [item.instruction for item in load("gsm8k", file)] == [PEAS["question"], "4 peas?"]


@cures("evaluate/problems.py:read_limited")
def test_a_file_that_is_none_of_problems(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("della.evaluate.problems.MOST_BYTES", len(GOOD))
    assert MOST_BYTES > 10**8
    file = folder / "test.jsonl"
    file.write_bytes(GOOD + b" " * 9)
    with pytest.raises(EvaluationError, match=FIX):
        load("gsm8k", file)
    assert len(load("gsm8k", lines(folder / "test.jsonl", PEAS))) == 1


@cures("evaluate/problems.py:_paragraphs")
def test_texts_are_saved_as_utf8(folder: Path) -> None:
    (folder / "a.txt").write_bytes("Café\n\nTwo".encode("latin-1"))
    with pytest.raises(EvaluationError, match="save it as UTF-8"):
        load("loss", folder / "a.txt")
    (folder / "a.txt").write_bytes("Café\n\nTwo".encode())
    assert [item.reference for item in load("loss", folder / "a.txt")] == ["Café", "Two"]


@cures("evaluate/calibration.py:read_texts")
def test_texts_one_a_line(folder: Path) -> None:
    (folder / "a.txt").write_text("\n \n")
    with pytest.raises(EvaluationError, match=r"one a line, or JSON lines in a \.jsonl file"):
        read_texts(folder / "a.txt")
    (folder / "a.txt").write_text("One.\n\nTwo.\n")
    assert read_texts(folder / "a.txt") == ["One.", "Two."]
    assert read_texts(lines(folder / "a.jsonl", {"text": "One."}, {"text": "Two."})) == ["One.", "Two."]


@cures("evaluate/endpoint.py:key_in")
def test_a_key_is_set_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abc\n")
    with pytest.raises(EvaluationError, match="set it anew"):
        key_in("A_KEY")
    monkeypatch.setenv("A_KEY", "abc")
    assert key_in("A_KEY") == "abc"


LOSS: dict[str, Any] = {"tasks": ("loss",)}
SETTINGS: list[tuple[list[Model], dict[str, Any], str, list[Model], dict[str, Any]]] = [
    ([ONE, Model("one", "two")], {}, "name them: NAME=MODEL", [ONE, Model.of("other=two")], {}),
    ([ONE], {"backend": "openai"}, "give base_url=", [ONE],
     {"backend": "openai", "base_url": "http://HOST/v1"}),
    ([ONE, TWO], {"model_name": "m"}, "by the names that the server knows", [ONE, TWO], {}),
    ([ONE], {"fresh": True, "score_only": True}, "leave one out", [ONE], {"fresh": True}),
    ([ONE], {"fresh": True, "score_only": True}, "leave one out", [ONE], {"score_only": True}),
    ([ONE], LOSS | {"templates": {"loss": "chat"}}, "write the prompts out in its file", [ONE], LOSS),
    ([ONE], LOSS | {"backend": "vllm"}, "give backend=\"hf\"", [ONE], LOSS | {"backend": "hf"}),
    ([ONE], LOSS | {"backend": "vllm"}, "backend=\"numpy\"", [ONE], LOSS | {"backend": "numpy"}),
]  # fmt: skip


@cures("evaluate/settings.py:check", "evaluate/settings.py:check", "evaluate/settings.py:check")
@cures("evaluate/settings.py:check", "evaluate/settings.py:_check_loss", "evaluate/settings.py:_check_loss")
@pytest.mark.parametrize(("models", "wrong", "advice", "others", "right"), SETTINGS)
def test_settings_that_cannot_be(
    models: list[Model], wrong: dict[str, Any], advice: str, others: list[Model], right: dict[str, Any]
) -> None:
    with pytest.raises(EvaluationError) as caught:
        check(models, EvaluationOptions(**({"tasks": ("gsm8k",)} | wrong)))
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)
    check(others, EvaluationOptions(**({"tasks": ("gsm8k",)} | right)))


@cures("evaluate/evaluation.py:_Run._missing", "evaluate/generations.py:Store._record")
@cures("evaluate/generations.py:Store.__init__", "evaluate/generations.py:Store._open")
@cures("evaluate/generations.py:Store._read", "evaluate/generations.py:Store._read")
@pytest.mark.parametrize("what", ["score only", "a damaged line", "a link", "in use", "other settings"])
def test_answers_that_cannot_be_used(folder: Path, what: str) -> None:
    data = {"gsm8k": lines(folder / "gsm8k.jsonl", *sums(4))}
    file = folder / "out/m/gsm8k.jsonl"
    with StubServer(lambda request: "The answer is: 1") as server:

        def answered(out: str = "out", **more: Any) -> int:
            given: dict[str, Any] = {"tasks": ("gsm8k",), "data": data, "out": folder / out, "concurrency": 1}
            given |= more
            (result,) = evaluate(["m"], EvaluationOptions(backend="openai", base_url=server.url, **given))
            assert result.problems == 4
            assert result.score("strict").items == {str(n): float(n == 0) for n in range(4)}
            return len(server.requests)

        def refused(advice: str, **more: Any) -> None:
            with pytest.raises(EvaluationError) as caught:
                answered(**more)
            assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)

        if what == "score only":
            refused("leave out score_only", score_only=True)
            assert answered() == 4
        elif what == "a damaged line":
            assert answered() == 4
            whole = file.read_text().splitlines(keepends=True)
            file.write_text("".join([*whole[:2], "[]\n", *whole[3:]]))
            refused("delete this line")
            file.write_text("".join([*whole[:2], *whole[3:]]))
            assert answered() == 5, "and its answer is asked for again"
        elif what == "other settings":
            assert answered() == 4
            refused("choose another out, or begin anew with fresh=True", max_tokens=9)
            assert answered("other", max_tokens=9) == 8
            assert answered(max_tokens=9, fresh=True) == 12
        elif what == "a link":
            file.parent.mkdir(parents=True)
            file.symlink_to(folder / "elsewhere")
            refused("choose another out")
            assert answered("other") == 4
        else:
            held = Store(file, {})
            refused("wait for its end, or choose another out")
            assert answered("other") == 4
            held.close()
            file.unlink()
            assert answered() == 8


@cures("evaluate/options.py:_files")
def test_a_file_for_each_task(folder: Path, command: Command) -> None:
    lines(folder / "gsm8k.jsonl", PEAS)
    lines(folder / "mbpp.jsonl", ADD)
    words = ["eval", "one", "--tasks", "gsm8k,mbpp", "--score-only"]
    ended = command(None, *words, "--data", "gsm8k.jsonl")
    assert (ended.returncode, "give --data TASK=FILE" in ended.stderr) == (6, True)
    ended = command(None, *words, "--data", "gsm8k=gsm8k.jsonl", "--data", "mbpp=mbpp.jsonl")
    assert "nothing to score; leave out --score-only" in " ".join(ended.stderr.split())
