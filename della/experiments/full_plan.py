"""What the full experiment will take, before anything is downloaded: merges, disk, GPU hours, judge calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della.experiments.cells import Cell
from della.experiments.full_models import BASE_OF, MODELS
from della.experiments.full_rows import tasks_of
from della.experiments.rows import Row
from della.merging.registry import METHODS
from della.planning.job import estimated_seconds

SPLITS = ("validation", "test")
ITEMS = {
    "validation": {"gsm8k": 200, "mbpp": 90, "alpaca_eval": 101},
    "test": {"gsm8k": 1319, "mbpp": 500, "alpaca_eval": 704},
}
# Assumptions, not measurements: new tokens an answer, and tokens that a judge reads and writes an item.
NEW_TOKENS = {"gsm8k": 170, "mbpp": 120, "alpaca_eval": 300}
MOST_NEW_TOKENS = 512
JUDGE_TOKENS = {"gsm8k": (600, 200), "alpaca_eval": (900, 60)}
JUDGED = {"validation": ("alpaca_eval",), "test": ("gsm8k", "alpaca_eval")}
# LambdaLabsML/vllm-benchmark measured 1,278 tokens/s for Mistral-Nemo 12B on one A100 80 GB, 320 requests at
# once, vLLM 0.5.4.
TOKENS_PER_SECOND = 1300.0
LOAD_SECONDS = 60.0  # an assumption: a server that starts, and 26 GB read into it
BYTES_PER_PARAMETER = 2


@dataclass(frozen=True)
class Rates:
    """What the estimate rests on.  ``judge_price`` is dollars per million tokens (read, written)."""

    tokens_per_second: float = TOKENS_PER_SECOND
    load_seconds: float = LOAD_SECONDS
    threads: int = 1
    judge_price: tuple[float, float] | None = None


@dataclass(frozen=True)
class Work:
    """One model to make, and to score on a split."""

    cell: Cell
    split: str

    @property
    def tasks(self) -> tuple[str, ...]:
        return tasks_of(self.cell)


def work_of(rows: Sequence[Row]) -> list[Work]:
    """Everything that is merged and scored, each once.

    Which candidate validation will choose is not known: the first stands for it.  Rows that choose among the
    same candidates share their tests; where others choose the same cell, less is done than is listed here.
    """
    found: dict[object, Work] = {}
    for row in rows:
        if len(row.candidates) > 1:
            for cell in row.candidates:
                found.setdefault(cell, Work(cell, "validation"))
        for cell in row.cells:
            found.setdefault((row.candidates, cell.seed), Work(cell, "test"))
    return list(found.values())


def plan_json(
    rows: Sequence[Row], found: Mapping[str, str], limit: int | None, rates: Rates
) -> dict[str, Any]:
    """The plan; ``found``: the models' references by role; ``limit``: most problems of a task and split."""
    work = work_of(rows)
    items = {s: {t: min(n, limit or n) for t, n in ITEMS[s].items()} for s in SPLITS}
    answers = Counter(dict.fromkeys(ITEMS["test"], 0))
    for each in work:
        answers.update({task: items[each.split][task] for task in each.tasks})
    tokens = sum(count * NEW_TOKENS[task] for task, count in answers.items())
    most = sum(answers.values()) * MOST_NEW_TOKENS
    loading = len(work) * rates.load_seconds
    return {
        "tables": sorted({int(row.table) for row in rows}),
        "rows": len(rows),
        "merges": {s: sum(w.split == s and bool(w.cell.method) for w in work) for s in SPLITS},
        "models_scored": len(work),
        "problems": items,
        "answers": dict(answers),
        "disk": _disk(found),
        "merging_hours": sum(_merge_seconds(w.cell, found, rates.threads) for w in work) / 3600,
        "gpu_hours": (loading + tokens / rates.tokens_per_second) / 3600,
        "gpu_hours_at_most": (loading + most / rates.tokens_per_second) / 3600,
        "judge": _judge(work, items, rates),
        "assumptions": _assumptions(rates),
    }


def _merge_seconds(cell: Cell, found: Mapping[str, str], threads: int) -> float:
    if not cell.method:
        return 0.0
    base = _nbytes(BASE_OF[cell.experts[0]], found)
    read = base + sum(_nbytes(role, found) for role in cell.experts)
    deltas = round(base / BYTES_PER_PARAMETER) * len(cell.experts)
    return estimated_seconds([(METHODS[cell.method].nanoseconds, deltas)], round(read + base), threads)


def _nbytes(role: str, found: Mapping[str, str]) -> float:
    """Bytes of the weights: as they lie here, else as known of the paper's models."""
    folder = Path(found.get(role, ""))
    if role in found and folder.is_dir():
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
        return float(sum(path.stat().st_size for path in files))
    return MODELS[role].nbytes


def _disk(found: Mapping[str, str]) -> dict[str, Any]:
    """Peak: inputs, a prepared copy of every expert that may need one, and one merged model."""
    sizes = {role: _nbytes(role, found) for role in found}
    downloads = {found[role]: size for role, size in sizes.items() if not Path(found[role]).is_dir()}
    copies = sum(size for role, size in sizes.items() if "base" not in role)
    merged = max((size for role, size in sizes.items() if "base" in role), default=0.0)
    return {
        "downloads": downloads,
        "inputs": sum(sizes.values()),
        "copies_at_most": copies,
        "one_merge": merged,
        "peak": sum(sizes.values()) + copies + merged,
    }


def _judge(work: Iterable[Work], items: Mapping[str, Mapping[str, int]], rates: Rates) -> dict[str, Any]:
    calls: Counter[str] = Counter()
    for each in work:
        judged = [task for task in each.tasks if task in JUDGED[each.split]]
        calls.update({task: items[each.split][task] for task in judged})
    read, written = (sum(n * JUDGE_TOKENS[task][i] for task, n in calls.items()) for i in (0, 1))
    price = rates.judge_price
    cost = None if price is None else (read * price[0] + written * price[1]) / 1e6
    return {"calls": dict(calls), "tokens_read": read, "tokens_written": written, "dollars": cost}


def _assumptions(rates: Rates) -> list[str]:
    lengths = ", ".join(f"{task} {count}" for task, count in NEW_TOKENS.items())
    judged = ", ".join(f"{task} {read} read and {out} written" for task, (read, out) in JUDGE_TOKENS.items())
    return [
        f"{rates.tokens_per_second:g} new tokens a second on one 80 GB GPU, many requests at once "
        "(--tokens-per-second); measured by others: 1,278 for a 12B model on an A100 with vLLM 0.5.4 "
        "(LambdaLabsML/vllm-benchmark)",
        f"{rates.load_seconds:g} s to start the server with each model",
        f"new tokens an answer: {lengths}; at most {MOST_NEW_TOKENS}",
        f"tokens of the judge an item: {judged}; GSM8K is judged on test alone",
        f"merging: della's measured costs per element on {rates.threads} threads, files at 2 GB/s",
        "merged models are deleted once their answers are stored (unless --keep-merges)",
    ]


def plan_text(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    disk, judge, merges = plan["disk"], plan["judge"], plan["merges"]
    lines = [
        f"tables {', '.join(map(str, plan['tables']))}: {plan['rows']} rows",
        f"  merges      {sum(merges.values()):,} ({merges['validation']:,} to choose on validation, "
        f"{merges['test']:,} for test); about {plan['merging_hours']:.1f} hours on this CPU",
        f"  answers     {sum(plan['answers'].values()):,} by {plan['models_scored']:,} models: "
        + ", ".join(f"{task} {count:,}" for task, count in plan["answers"].items()),
        f"  GPU         about {plan['gpu_hours']:.1f} hours of one GPU, at most "
        f"{plan['gpu_hours_at_most']:.1f} if every answer is as long as it may be",
        f"  disk        {_gigabytes(disk['peak'])} at the peak: inputs {_gigabytes(disk['inputs'])}, copies "
        f"at most {_gigabytes(disk['copies_at_most'])}, one merge {_gigabytes(disk['one_merge'])}",
    ]
    for reference, size in disk["downloads"].items():
        lines.append(f"  download    {_gigabytes(size):>8}  {reference}")
    calls = ", ".join(f"{task} {count:,}" for task, count in judge["calls"].items()) or "none"
    lines.append(f"  judge       calls: {calls}; about {judge['tokens_read']:,} tokens read and "
                 f"{judge['tokens_written']:,} written")  # fmt: skip
    if judge["dollars"] is None:
        lines.append("  cost        give --judge-price READ,WRITTEN in dollars per million tokens")
    else:
        lines.append(f"  cost        about {judge['dollars']:,.0f} dollars for the judge")
    return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in plan["assumptions"])])


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
