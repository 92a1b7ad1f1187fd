"""The problems of the benchmarks, from local files or the Hub: GSM8K, MBPP, AlpacaEval; and texts for loss.

A file may come from anywhere: every line is checked, and every complaint names file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from della.checkpoint.strict import json_value
from della.errors import CheckpointError, EvaluationError, Problem, either, unknown

MOST_BYTES = 256_000_000
MBPP_TEST = range(11, 511)  # the task ids of the test split, by MBPP's own README
FIX = "correct the file, or take the published one"
FORM = "expected a JSON object a line, with 'text', or with 'prompt' and 'response'; or texts in a .txt file"
RESPONSES = ("response", "answer", "completion")

_NUMBER = re.compile(r"-?\$?\d[\d,]*(\.\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Item:
    """One problem of a benchmark.  ``reference`` is the solution to compare with ("" where there is none),
    ``tests`` and ``setup`` are the asserts of a programming problem and what must run before them.  Of
    loss the response, or the whole text, is the reference, and the prompt, if any, the instruction.
    """

    id: str
    task: str
    instruction: str
    reference: str
    tests: tuple[str, ...] = ()
    setup: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """Where a benchmark is published, and how a record of it is read: (record, its position) -> Item, or
    None for one of another split.  ``fix`` is what to do about a bad one.
    """

    name: str
    read: Callable[[_Record, int], Item | None]
    published: str
    hub: tuple[str, str | None, str] | None  # the arguments of load_dataset: path, name or file, split
    fix: str = FIX


@dataclass(frozen=True, slots=True)
class _Record:
    """A JSON object, and where it stands."""

    where: str
    values: Mapping[str, Any]
    fix: str = FIX

    def bad(self, what: str) -> EvaluationError:
        return EvaluationError(Problem(what, self.fix, self.where))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            found = f"found {_shown(value)}" if key in self.values else "found none"
            raise self.bad(f"expected a text as {key!r}, {found}")
        return value


def load(task: str, path: Path | None = None, limit: int | None = None) -> list[Item]:
    """The problems of a task in their published order, of the test split; at most the first ``limit``.

    path: a local file in the published format; None: from the Hub, by the package datasets.
    Raises EvaluationError.
    """
    known = TASKS.get(task)
    if known is None:
        raise EvaluationError(unknown("task", task, TASKS))
    found: dict[str, Item] = {}
    for position, record in enumerate(_file(path, known) if path else _hub(known)):
        problem = known.read(record, position)
        if problem is None:
            continue
        if problem.id in found:
            raise record.bad(f"the problem {problem.id} stands twice")
        found[problem.id] = problem
    if not found:
        said = f"no test problem of {task} in it" if known.hub else "no text in it"
        raise EvaluationError(Problem(said, known.fix, str(path or (known.hub or [task])[0])))
    return list(islice(found.values(), limit))


def parsed(raw: bytes, where: str, fix: str = FIX) -> Any:
    """Strict JSON; EvaluationError, with ``fix`` as its advice, for everything else."""
    try:
        return json_value(raw, where)
    except CheckpointError as error:
        raise EvaluationError(*(replace(problem, fix=fix) for problem in error.problems)) from None


def read_limited(path: Path) -> bytes:
    """A file of at most MOST_BYTES; EvaluationError where it cannot be read."""
    try:
        if not path.is_file():
            said = "not a plain file" if path.exists() else "no such file"
            raise EvaluationError(Problem(said, subject=str(path)))
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        said = f"cannot be read ({error.strerror or error})"
        raise EvaluationError(Problem(said, subject=str(path))) from error
    if len(raw) > MOST_BYTES:
        said = f"larger than {MOST_BYTES:,} bytes: not a file of problems"
        raise EvaluationError(Problem(said, FIX, str(path)))
    return raw


def _file(path: Path, task: Task) -> Iterator[_Record]:
    """JSON Lines, or one JSON array of objects; of loss, a .txt file too, whose texts blank lines divide."""
    raw = read_limited(path).removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".txt" and task.hub is None:
        yield from (_Record(str(path), {"text": text}) for text in _paragraphs(raw, path))
        return
    if raw.lstrip()[:1] == b"[":
        values = ((f"{path}: item {n}", value) for n, value in enumerate(parsed(raw, str(path), task.fix), 1))
    else:
        lines = ((f"{path}:{n}", line) for n, line in enumerate(raw.split(b"\n"), 1) if line.strip())
        values = ((where, parsed(line, where, task.fix)) for where, line in lines)
    for where, value in values:
        if not isinstance(value, dict):
            raise EvaluationError(Problem(f"expected a JSON object, found {_shown(value)}", task.fix, where))
        yield _Record(where, value, task.fix)


def _paragraphs(raw: bytes, path: Path) -> list[str]:
    try:
        text = raw.decode()
    except UnicodeError as error:
        raise EvaluationError(
            Problem(f"text is not UTF-8 ({error})", "save it as UTF-8", str(path))
        ) from None
    parts = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n"))
    return [part.strip("\n") for part in parts if part.strip()]


def _hub(task: Task) -> Iterator[_Record]:
    option = either(f"--data {task.name}=FILE", f'data={{"{task.name}": FILE}}')
    if task.hub is None:
        raise EvaluationError(Problem("needs a file of texts", f"give {option}", task.name))
    path, name, split = task.hub
    give = f"give a local file with {option}; it is published at {task.published}"
    try:
        import datasets
    except ModuleNotFoundError as error:
        said = (
            "no file was given, and the package datasets, which would fetch it from the Hub, is not "
            "installed (pip install '.[hub]' in della's checkout)"
        )
        raise EvaluationError(Problem(said, give, task.name)) from error
    try:
        rows = datasets.load_dataset(path, name, split=split)
        for number, row in enumerate(rows, 1):
            yield _Record(f"{path} of the Hub: item {number}", dict(row))
    except EvaluationError:
        raise
    except Exception as error:  # the package raises what its own libraries do
        said = f"cannot be fetched from the Hub ({type(error).__name__}: {error})"
        raise EvaluationError(Problem(said, give, path)) from error


def _gsm8k(record: _Record, position: int) -> Item:
    question, answer = record.text("question"), record.text("answer")
    last = answer.rstrip().rpartition("#### ")
    if not last[1] or not _NUMBER.fullmatch(last[2]):
        raise record.bad(f"expected an 'answer' that ends in '#### ' and a number, found {_shown(answer)}")
    return Item(str(position), "gsm8k", question, answer)


def _mbpp(record: _Record, _: int) -> Item | None:
    number = record.values.get("task_id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise record.bad(f"expected a number as 'task_id', found {_shown(number)}")
    text, code, setup = record.text("text"), record.text("code"), record.text("test_setup_code", "")
    tests = record.values.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
        raise record.bad(f"expected a list of asserts as 'test_list', found {_shown(tests)}")
    if number not in MBPP_TEST:
        return None
    return Item(str(number), "mbpp", text, code, tuple(tests), setup)


def _alpaca_eval(record: _Record, position: int) -> Item:
    return Item(str(position), "alpaca_eval", record.text("instruction"), record.text("output", ""))


def _loss(record: _Record, position: int) -> Item:
    keys = [key for key in ("text", "prompt", *RESPONSES) if key in record.values]
    if keys == ["text"]:
        return Item(str(position), "loss", "", record.text("text"))
    if len(keys) != 2 or keys[0] != "prompt":
        raise record.bad(f"cannot tell text, prompt and response by its keys {_shown(list(record.values))}")
    return Item(str(position), "loss", record.text("prompt", ""), record.text(keys[1]))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"...{text[-77:]}" if isinstance(value, str) else f"{text[:77]}..."


TASKS = {
    task.name: task
    for task in (
        Task(
            "gsm8k", _gsm8k,
            "https://github.com/openai/grade-school-math (grade_school_math/data/test.jsonl)",
            ("openai/gsm8k", "main", "test"),
        ),
        Task(
            "mbpp", _mbpp, "https://github.com/google-research/google-research (mbpp/mbpp.jsonl)",
            ("google-research-datasets/mbpp", "full", "test"),
        ),
        Task(
            "alpaca_eval", _alpaca_eval,
            "https://huggingface.co/datasets/tatsu-lab/alpaca_eval (alpaca_eval.json)",
            ("tatsu-lab/alpaca_eval", "alpaca_eval", "eval"),
        ),
        Task("loss", _loss, "", None, FORM),
    )
}  # fmt: skip
