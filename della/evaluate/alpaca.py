"""AlpacaEval: answers in the format of alpaca_eval, whose judge compares them with those of a reference.

The package stands in an environment of its own (scripts/alpaca-venv), so it is run as another process; the
win rates are its own.  It shuffles which of two answers comes first, and keeps what the judge said: a run
that was stopped is resumed.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from della.errors import EvaluationError, Problem
from della.evaluate.endpoint import key_in, public, without_key
from della.evaluate.problems import Item
from della.output import disk
from della.report.intervals import Interval

ANNOTATOR = "alpaca_eval_gpt4"  # the paper's
_LOG, _CLIENT = "alpaca_eval.log", "judge.json"
_ALONE = {"PYTHONPATH", "PYTHONHOME"}  # of our environment, and of no use in another


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often a model's answers were preferred to the reference's, in percent, draws counting half.

    standard_error: of win_rate.  judged, total: the answers that the judge gave a preference for, of all; the
    others have no part in the rates.  length_controlled: the package's length-controlled win rate and its
    standard error, None where it was not asked for.  preferences: by instruction, 1 where the model was
    preferred, 0 where the reference was, .5 for a draw.
    """

    win_rate: float
    standard_error: float
    judged: int
    total: int
    length_controlled: tuple[float, float] | None
    preferences: Mapping[str, float]

    @property
    def interval(self) -> Interval:
        """The win rate with its 95 % interval, from the standard error."""
        half = 1.96 * self.standard_error
        return Interval(self.win_rate, max(0.0, self.win_rate - half), min(100.0, self.win_rate + half))


def write_outputs(path: Path, problems: Sequence[Item], answers: Mapping[str, str], generator: str) -> None:
    """Write the answers (by the problems' ids) of a model called ``generator`` for alpaca_eval."""
    rows = [
        {"instruction": problem.instruction, "output": answers[problem.id], "generator": generator}
        for problem in problems
    ]
    disk.put(path, (json.dumps(rows, indent=1) + "\n").encode())


def win_rate(
    outputs: Path, reference: Path, out: Path, *, command: str = "alpaca_eval", annotator: str = ANNOTATOR,
    judge_url: str | None = None, key_env: str = "OPENAI_API_KEY", length_controlled: bool = False,
) -> WinRate:  # fmt: skip
    """Let alpaca_eval compare ``outputs`` with ``reference``, both in its JSON format, and read its result.

    out: a folder for the judge's annotations, the package's leaderboard and its log.  command: the
    package's command.  annotator: a name that the package knows, or the path of a folder in its format,
    which has a / in it.  judge_url: base URL of an OpenAI-compatible judge; by default the package's own.
    length_controlled: also the length-controlled win rate, for which the package fetches a file from the
    Hub; otherwise nothing is fetched.  Raises EvaluationError.
    """
    total = _compared(outputs, reference)
    results = out if "/" in annotator else out / annotator  # as the package has it
    with disk.explained(out):
        out.mkdir(parents=True, exist_ok=True)
        (results / "leaderboard.csv").unlink(missing_ok=True)
    options: dict[str, Any] = {
        "model_outputs": str(outputs.resolve()),
        "reference_outputs": str(reference.resolve()),
        "annotators_config": str(Path(annotator).resolve()) if "/" in annotator else annotator,
        "output_path": str(out.resolve()),
        "caching_path": str(out.resolve() / f"annotations_{_judge(annotator, judge_url)}.json"),
        "annotation_kwargs": {"chunksize": 32},  # so many answers of the judge are kept at a time
        "precomputed_leaderboard": None,
        "leaderboard_mode_to_print": None,
        "fn_metric": "get_length_controlled_winrate" if length_controlled else "get_winrate",
        "metric_kwargs": {"save_weights_dir": None} if length_controlled else {},
        "sort_by": "win_rate",
    }
    environment = _environment(out, judge_url, key_env, length_controlled)
    try:
        _run([command, "evaluate", *(f"--{name}={value!r}" for name, value in options.items())],
             environment, out / _LOG)  # fmt: skip
    finally:
        (out / _CLIENT).unlink(missing_ok=True)  # its URL may hold a password
    return _result(results, total)


def check_judge(command: str, annotator: str) -> None:
    """EvaluationError where the package's command, or the folder of an annotator, is not there."""
    if shutil.which(command) is None:
        raise _not_run(command, "no such command")
    if "/" in annotator and not (Path(annotator) / "configs.yaml").is_file():
        said = "expected a folder of an annotator, with configs.yaml"
        raise EvaluationError(Problem(said, subject=annotator))


def _not_run(command: str, why: str) -> EvaluationError:
    fix = (
        "AlpacaEval needs the package alpaca_eval, in an environment of its own: scripts/alpaca-venv makes "
        "it, and .venv-alpaca/bin/alpaca_eval is the command to name"
    )
    return EvaluationError(Problem(f"cannot be run ({why})", fix, command))


def _judge(annotator: str, judge_url: str | None) -> str:
    """Tells apart judges of one name: the package itself takes what any of them has said for another's."""
    told = [annotator, public(judge_url) if judge_url else ""]
    try:
        files = sorted(Path(annotator).rglob("*")) if "/" in annotator else []
        told += [
            f"{file.name}:{xxhash.xxh3_128_hexdigest(file.read_bytes())}" for file in files if file.is_file()
        ]
    except OSError as error:
        said = f"cannot be read ({error.strerror or error})"
        raise EvaluationError(Problem(said, subject=annotator)) from error
    return xxhash.xxh3_64_hexdigest(json.dumps(told).encode())


def _compared(outputs: Path, reference: Path) -> int:
    """The number of answers; each instruction must be in the reference, or the package would leave it out."""
    known = {row["instruction"] for row in _rows(reference)}
    asked = [row["instruction"] for row in _rows(outputs)]
    lacking = [text for text in asked if text not in known]
    if lacking:
        said = (
            f"lacks {len(lacking)} of the {len(asked)} instructions of {outputs}, such as {lacking[0][:60]!r}"
        )
        fix = "give the reference outputs of the same instructions"
        raise EvaluationError(Problem(said, fix, str(reference)))
    return len(asked)


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EvaluationError(Problem(f"cannot be read as JSON ({error})", subject=str(path))) from error
    rows = rows if isinstance(rows, list) else [None]
    texts = [row.get(key) for row in rows if isinstance(row, dict) for key in ("instruction", "output")]
    if not rows or len(texts) < 2 * len(rows) or not all(isinstance(text, str) for text in texts):
        said = "expected what alpaca_eval reads, a list of objects with instruction and output"
        raise EvaluationError(Problem(said, subject=str(path)))
    return rows


def _environment(out: Path, judge_url: str | None, key_env: str, online: bool) -> dict[str, str]:
    """The key goes by the environment, so that no file holds it."""
    environment = {name: value for name, value in os.environ.items() if name not in _ALONE}
    environment["OPENAI_API_KEY"] = key_in(key_env)
    if not online:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if judge_url is not None:
        client = out.resolve() / _CLIENT
        server = {"default": [{"base_url": judge_url, "timeout": 120, "max_retries": 5}]}
        disk.put(client, (json.dumps(server) + "\n").encode())
        environment["OPENAI_CLIENT_CONFIG_PATH"] = str(client)
    return environment


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    with disk.explained(log):
        told = log.open("wb")
    with told:
        try:
            ended = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=told, stderr=told, check=False
            )
        except OSError as error:
            raise _not_run(command[0], error.strerror or str(error)) from error
    said = without_key(log.read_text(encoding="utf-8", errors="replace"), environment["OPENAI_API_KEY"])
    disk.put(log, said.encode())
    if ended.returncode:
        last = (said.strip().splitlines() or ["no word"])[-1][:300]
        said = f"failed with exit code {ended.returncode} ({last})"
        fix = f"see {log}, then run again: most of what the judge has said is kept"
        raise EvaluationError(Problem(said, fix, command[0]))


def _result(results: Path, total: int) -> WinRate:
    try:
        with (results / "leaderboard.csv").open(encoding="utf-8", newline="") as table:
            (row,) = csv.DictReader(table)
        annotations = json.loads((results / "annotations.json").read_bytes())
        if not int(float(row["n_total"])):
            said = "the judge gave no preference that alpaca_eval could read"
            fix = "see what it said, preference_raw_completion in annotations.json"
            raise EvaluationError(Problem(said, fix, str(results)))
        controlled = row.get("length_controlled_winrate")
        preferences = {
            str(one["instruction"]): float(one["preference"]) - 1
            for one in annotations
            if one["preference"] is not None
        }
        return WinRate(
            float(row["win_rate"]), float(row["standard_error"] or "nan"), int(float(row["n_total"])), total,
            (float(controlled), float(row["lc_standard_error"])) if controlled else None, preferences,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = f"not the results that alpaca_eval 0.6.6 writes ({type(error).__name__}: {error})"
        raise EvaluationError(Problem(said, subject=str(results))) from error
