"""How the command tells a run's story: a live bar on a terminal, plain lines in a pipe, JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from della.errors import printable
from della.options import Share, option, size_text

if TYPE_CHECKING:
    from della.planning.job import Plan
    from della.running.run import Progress, Result
    from della.running.verify import Verdict

P = TypeVar("P")
PACE = 5.0  # seconds between two lines of progress


def print_json(**fields: Any) -> None:
    """One JSON object on a line of stdout."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def tell(line: str) -> None:
    """A line on stderr, in one piece whatever other threads write."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Speech:
    """How much a command says, and to whom."""

    quiet: bool = option("Say nothing but errors.", False, "--quiet", "-q")
    as_json: bool = option("Progress and result as JSON lines.", False, "--json")
    debug: bool = option("Show the traceback of an error.", False)


class Speaker:
    """Tells what a command does; ``quiet`` says nothing but errors, ``as_json`` writes JSON lines."""

    def __init__(self, speech: Speech) -> None:
        self.quiet, self.as_json = speech.quiet, speech.as_json
        self.has_compiled = False
        self.bytes_of_all = 0

    def planned(self, plan: Plan) -> None:
        """What is to be known before a merge begins."""
        self.bytes_of_all = plan.bytes_written
        for earlier in plan.before:
            self._planned(earlier)
        self._planned(plan)

    def _planned(self, plan: Plan) -> None:
        if self.as_json:
            coverage = {each.reference: each.as_dict for each in plan.coverage}
            print_json(event="plan", coverage=coverage, departures=list(plan.departures))
        elif not self.quiet:
            for each in plan.coverage:
                tell(str(each))
        told, count = plan.departures, len(plan.departures)
        if count and not plan.recipe.compat:
            told = (f"{count} departure{'s' * (count > 1)} from mergekit's rules: `della plan` lists them",)
        for text in (*plan.notes, *(() if self.as_json else told)):
            self.note(text)

    def note(self, text: str) -> None:
        """Something that the user should know."""
        if self.as_json:
            print_json(event="note", message=text)
        elif not self.quiet:
            tell(f"note: {text}")

    def compiling(self) -> None:
        """Tell, once, that kernels are compiled on the first run."""
        if not self.has_compiled:
            self.has_compiled = True
            self.note("compiling kernels for this processor; later runs find them on disk")

    def lines(
        self, text: Callable[[P], str], fields: Callable[[P], dict[str, Any]], is_last: Callable[[P], bool],
        *, pace: float = PACE, at_once: bool = False,
    ) -> Callable[[P], None] | None:  # fmt: skip
        """What to call with each progress: lines of ``text``, or with --json of ``fields``, every few seconds
        and at the last one; ``pace`` and ``at_once``, with --json, as of `paced`.
        """
        if self.as_json:
            return paced(pace, lambda p: print_json(event="progress", **fields(p)), is_last, at_once=at_once)
        return None if self.quiet else paced(PACE, lambda p: tell(text(p)), is_last)

    @contextmanager
    def progress(
        self, doing: str = "merging", counted: str = "tensors"
    ) -> Iterator[Callable[[Progress], None] | None]:
        """What to call with each Progress: a bar on a terminal; ``counted`` is what its numbers count."""
        if sys.stderr.isatty() and not self.quiet and not self.as_json:
            with _bar(doing) as update:
                yield update
            return
        yield self.lines(
            lambda p: (
                f"{100 * p.done / max(p.total, 1):3.0f} %  {size_text(p.done)} of {size_text(p.total)}  "
                f"{p.tensors} of {p.of_tensors} {counted}"
            ),
            lambda p: {
                "bytes": p.done, "total": p.total, "tensors": p.tensors, "of": p.of_tensors, "tensor": p.name,
            },
            _is_last,
            pace=1.0, at_once=True,
        )  # fmt: skip

    def merged(self, result: Result, part: Share) -> None:
        """The end of a merge, or of one part of it."""
        if self.as_json:
            fields = {} if part.is_whole else {"part": str(part)}
            print_json(
                event="done",
                out=str(result.out),
                seconds=round(result.seconds, 3),
                merging_seconds=round(result.merging_seconds, 3),
                bytes_read=result.bytes_read,
                bytes_written=result.bytes_written,
                resumed=result.resumed,
                coverage=result.manifest.get("coverage", {}),
                **fields,
            )
        elif not self.quiet and not part.is_whole:
            tell(f"{result.out}: part {part} in {result.seconds:.1f} s; when all parts are done: --finish")
        elif not self.quiet:
            tell(f"{result.out}: {size_text(self.bytes_of_all)} in {result.seconds:.1f} s")

    def verified(self, verdict: Verdict) -> None:
        """What `della verify` found: each fault on a line of its own."""
        if self.as_json:
            print_json(
                event="verified", out=str(verdict.out), well=verdict.is_well, bad=verdict.bad,
                problems=[problem.as_dict() for problem in verdict.problems],
                notes=verdict.notes, tensors=verdict.tensors, files=verdict.files, bytes=verdict.nbytes,
                recomputed=verdict.recomputed, inputs=verdict.inputs,
            )  # fmt: skip
            return
        for text in verdict.notes if not self.quiet else ():
            tell(f"note: {text}")
        for text in verdict.bad:
            tell(f"della: {text}")
        if not verdict.is_well:
            count = len(verdict.bad)
            fix = "merge again, or get the files again"
            tell(f"della: {verdict.out}: {count} fault{'s' * (count != 1)}; {fix}")
        elif not self.quiet:
            more = f"; {_tensors(verdict.recomputed)} computed again: the same" if verdict.recomputed else ""
            more += f"; {_tensors(verdict.inputs)} of the inputs: as they were" if verdict.inputs else ""
            print(printable(
                f"{verdict.out}: all is well: {_tensors(verdict.tensors)} ({size_text(verdict.nbytes)}) in "
                f"{verdict.files} file{'s' * (verdict.files != 1)}, as they were merged{more}"
            ))  # fmt: skip


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' * (count != 1)}"


def paced(
    seconds: float, tell: Callable[[P], None], is_last: Callable[[P], bool], *, at_once: bool = False
) -> Callable[[P], None]:
    """``tell`` at most every so many seconds, and at the last; with ``at_once`` also at the first."""
    last: float | None = None

    def update(progress: P) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None:
            last = now - (seconds if at_once else 0)
        if is_last(progress) or now - last >= seconds:
            last = now
            tell(progress)

    return update


def _is_last(progress: Progress) -> bool:
    return progress.tensors == progress.of_tensors


@contextmanager
def _bar(doing: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(doing, total=None)

    def show(progress: Progress) -> None:
        bar.start()  # with the first progress: until then notes may be written
        bar.update(task, completed=progress.done, total=progress.total)

    try:
        yield paced(0.1, show, _is_last, at_once=True)
    finally:
        bar.stop()
