"""What a campaign is given, and what it reports: cases, counts, times, failures."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

from della.checkpoint.source import open_source

MOST_SHOWN = 20
SHORT = 100  # so many bytes are printed as hex, more are saved to a file

T = TypeVar("T")


@dataclass
class Job:
    """One run of one campaign.

    ``folder`` is an empty scratch folder, ``bar`` the most CPU seconds a case may take (None: not held), and
    ``failures_to`` the folder that keeps the input of each failing case.
    """

    name: str
    seed: int
    sample: bool
    folder: Path
    failures_to: Path
    bar: float | None = None
    only: int | None = None
    cases: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    worst: float = 0.0
    seconds: float = 0.0

    def numbers(self, most: int) -> Iterator[int]:
        """The numbers of the cases to run, from 0 to ``most`` - 1, or the only one that was asked for."""
        yield from range(most) if self.only is None else [self.only]

    def rng(self, case: int) -> Random:
        """The random numbers of one case: the same on every machine, whatever ran before."""
        return Random(f"{self.name}:{self.seed}:{case}")

    def timed(self, case: int, raw: bytes, action: Callable[[], T]) -> T:
        """The result of ``action``, which is held to the bar.

        Time is the thread's own CPU time, and a slow case gets two more chances: a busy machine is no defect.
        """
        self.cases += 1
        took, result = _clocked(action)
        if self.bar is not None and took > self.bar:
            took = min(took, _clocked(action)[0], _clocked(action)[0])
            if took > self.bar:
                self.fail(case, f"took {took * 1000:.1f} ms, and {self.bar * 1000:.0f} is the most", raw)
        self.worst = max(self.worst, took)
        return result

    def fail(self, case: int, said: str, raw: bytes) -> None:
        """Record that a case failed, with the input that did it."""
        if len(raw) <= SHORT:
            kept = f"bytes {raw.hex()}"
        else:
            self.failures_to.mkdir(parents=True, exist_ok=True)
            path = self.failures_to / f"{self.name}-{self.seed}-{case}"
            path.write_bytes(raw)
            kept = f"bytes in {path}"
        self.failures.append(f"seed {self.seed}, case {case}: {said}; {kept}")

    def told(self) -> str:
        """Everything in one plain line, and a line for each of the first failures."""
        counts = "".join(f", {count:,} {what}" for what, count in self.counts.items())
        verdict = "passed" if self.passed else f"{len(self.failures):,} FAILED"
        took = f"{self.seconds:.1f} s, worst {self.worst_case}"
        lines = [f"{self.name}: {self.cases:,} cases{counts}; {took}: {verdict}"]
        lines += [f"  {failure}" for failure in self.failures[:MOST_SHOWN]]
        if len(self.failures) > MOST_SHOWN:
            lines.append(f"  and {len(self.failures) - MOST_SHOWN:,} more")
        return "\n".join(lines)

    @property
    def passed(self) -> bool:
        return not self.failures and self.cases > 0

    @property
    def worst_case(self) -> str:
        return f"{self.worst * 1000:.1f} ms" + (f" (bar {self.bar * 1000:.0f})" if self.bar else "")


def attempt(action: Callable[[], object]) -> Exception | None:
    """What ``action`` raises, if anything."""
    try:
        action()
    except Exception as error:
        return error
    return None


def refusal(path: Path) -> Exception | None:
    """What opening the model at ``path`` raises, if anything."""
    return attempt(lambda: open_source(str(path)).close())


def _clocked(action: Callable[[], T]) -> tuple[float, T]:
    start = time.thread_time()
    result = action()
    return time.thread_time() - start, result


def table(jobs: list[Job]) -> str:
    """What was run, as a Markdown table."""
    lines = [
        "| campaign | cases | failed | seconds | worst case, CPU | of these |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for job in jobs:
        counts = ", ".join(f"{count:,} {what}" for what, count in job.counts.items())
        cells = (job.name, f"{job.cases:,}", f"{len(job.failures):,}", f"{job.seconds:.1f}", job.worst_case)
        lines.append(f"| {' | '.join((*cells, counts))} |")
    return "\n".join(lines)
