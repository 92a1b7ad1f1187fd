"""The problems of the full experiment in two parts: what hyperparameters are chosen on, and what is reported.

gsm8k        validation: the last 200 of the training file       test: the test file
mbpp         validation: task ids 511 to 600, its own split      test: task ids 11 to 510, as in the paper
alpaca_eval  validation: every eighth instruction                test: the other seven
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from della.errors import EvaluationError, Problem
from della.evaluate.problems import FIX, MBPP_TEST, TASKS, parsed, read_limited

FILES = ("gsm8k", "gsm8k_train", "mbpp", "alpaca_eval", "text")
GSM8K_VALIDATION = 200
MBPP_VALIDATION, MBPP_TRAIN = range(511, 601), range(601, 975)
ALPACA_EVERY = 8
CALIBRATION = 128

Records = list[dict[str, Any]]


def split(data: Mapping[str, Path], tasks: Iterable[str], out: Path) -> dict[str, dict[str, Path]]:
    """Files of problems by split and task, written into ``out`` in the benchmarks' own formats.

    Raises EvaluationError for a file that is missing or not in its format.
    """
    _check(data, tasks)
    found: dict[str, dict[str, Path]] = {"validation": {}, "test": {}}
    for task in tasks:
        for name, records in _parts(task, data).items():
            found[name][task] = _write(out / f"{name}-{task}.jsonl", records)
    return found


def calibration(data: Mapping[str, Path], role: str, out: Path) -> Path:
    """A file of an expert's calibration texts, as the paper has them: 128 samples of GSM8K (math) and of
    MBPP's training split (code); for lm the paper takes C4, and we the lines of the file ``text``.
    """
    name = {"math": "gsm8k_train", "code": "mbpp", "lm": "text"}[role]
    _need(data, name)
    if role == "lm":
        lines = read_limited(data[name]).decode("utf-8", "replace").splitlines()
        texts = [line for line in lines if line.strip()]
    elif role == "math":
        texts = [f"{r.get('question')}\n{r.get('answer')}" for r in _records(data[name])[:-GSM8K_VALIDATION]]
    else:
        training = [r for r in _records(data[name]) if r.get("task_id") in MBPP_TRAIN]
        texts = [f"{r.get('text')}\n{r.get('code')}" for r in training]
    if not texts:
        raise EvaluationError(
            Problem(f"nothing in it to calibrate {role} with", FIX, subject=str(data[name]))
        )
    return _write(out / f"calibration-{role}.jsonl", [{"text": text} for text in texts[:CALIBRATION]])


def _check(data: Mapping[str, Path], tasks: Iterable[str]) -> None:
    unknown = sorted(set(data) - set(FILES))
    if unknown:
        raise EvaluationError(
            Problem(f"--data {unknown[0]}=...: expected one of {', '.join(FILES)}", parameter="data")
        )
    for task in tasks:
        _need(data, task)
        if task == "gsm8k":
            _need(data, "gsm8k_train")


def _need(data: Mapping[str, Path], name: str) -> None:
    if name not in data:
        task = TASKS.get(name.removesuffix("_train"))
        where = f"; it is published at {task.published}" if task else ""
        where = where.replace("test.jsonl", "train.jsonl") if name.endswith("_train") else where
        raise EvaluationError(
            Problem(f"no data for {name}: give --data {name}=FILE{where}", parameter="data")
        )


def _parts(task: str, data: Mapping[str, Path]) -> dict[str, Records]:
    records = _records(data[task])
    if task == "gsm8k":
        return {"validation": _records(data["gsm8k_train"])[-GSM8K_VALIDATION:], "test": records}
    if task == "alpaca_eval":
        chosen = records[::ALPACA_EVERY]
        rest = [record for at, record in enumerate(records) if at % ALPACA_EVERY]
        return {"validation": chosen, "test": rest}
    # Only the ids of the test split are read as such, so the others are moved there.
    moved = [
        record | {"task_id": MBPP_TEST[MBPP_VALIDATION.index(record["task_id"])]}
        for record in records
        if record.get("task_id") in MBPP_VALIDATION
    ]
    return {"validation": moved, "test": [r for r in records if r.get("task_id") in MBPP_TEST]}


def _records(path: Path) -> Records:
    """JSON objects, one a line or in one array."""
    raw = read_limited(path)
    if raw.lstrip()[:1] == b"[":
        values = list(parsed(raw, str(path)))
    else:
        lines = enumerate(raw.split(b"\n"), 1)
        values = [parsed(line, f"{path}:{n}") for n, line in lines if line.strip()]
    if not values or not all(isinstance(value, dict) for value in values):
        raise EvaluationError(Problem("expected JSON objects", FIX, subject=str(path)))
    return values


def _write(path: Path, records: Records) -> Path:
    if not records:
        raise EvaluationError(Problem("its source has no problems of this split", FIX, subject=str(path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(_lines(records)), encoding="utf-8")
    return path


def _lines(records: Records) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"
