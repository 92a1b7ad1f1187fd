"""From measurements to Markdown: the figures beside what they must be and what they aim at, and every run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.measure import Installation, Run

OURS, THEIRS = "della", "mergekit"
FSYNC = "della, with fsync"
IN_TURN = "della, in turn"
TARGETS = {  # wall time of mergekit / ours: (must, aim)
    "della": (20.0, 40.0),
    "ties": (20.0, 40.0),
    "dare_ties": (8.0, 12.0),
    "task_arithmetic": (2.0, 3.0),
}


def with_threads(count: int) -> str:
    """The name under which runs with a number of threads are kept."""
    return f"della, {count} thread{'s' * (count > 1)}"


@dataclass
class Measured:
    """All that was measured.

    ``runs`` by (method, who); ``compute`` by the same: the seconds that `della merge` itself reports, from
    the first read to the finished output; ``cold`` is the run of della that compiled its kernels.
    """

    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    compute: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    help: dict[str, list[Run]] = field(default_factory=dict)
    installed: dict[str, Installation] = field(default_factory=dict)
    cold: Run | None = None

    def wall(self, method: str, who: str) -> float | None:
        """Median wall seconds; None where it was not measured."""
        runs = self.runs.get((method, who))
        return median(run.wall for run in runs) if runs else None


@dataclass(frozen=True)
class Figure:
    """One line of the table: ``at_least`` says whether more is better; ``value`` None was not measured."""

    name: str
    must: float
    aim: float
    at_least: bool
    value: float | None
    unit: str = ""
    detail: str = ""

    @property
    def missed(self) -> bool:
        if self.value is None:
            return False
        return self.value < self.must if self.at_least else self.value > self.must

    def row(self) -> str:
        """The line, in Markdown."""
        sign = "≥" if self.at_least else "≤"
        bounds = (f"{sign} {bound:g}{self.unit}" for bound in (self.must, self.aim))
        text = "not measured" if self.value is None else f"{_number(self.value)}{self.unit}{self.detail}"
        return "| " + " | ".join((self.name, *bounds, text)) + " |"


def figures(m: Measured) -> list[Figure]:
    """Every figure that has a bound, in the order of the table."""
    rows = []
    for method, (must, aim) in TARGETS.items():
        rows.append(
            _ratio(
                f"`{method}`: wall, mergekit / ours",
                must,
                aim,
                True,
                m.wall(method, THEIRS),
                m.wall(method, OURS),
            )
        )
    rows.append(
        _ratio(
            "our `della` / our `linear`, wall",
            2.5,
            1.5,
            False,
            m.wall("della", IN_TURN),
            m.wall("linear", IN_TURN),
        )
    )
    rows.append(_peak({method: runs for (method, who), runs in m.runs.items() if who == OURS}))
    one, two = (_median(m.compute.get(("della", with_threads(count)))) for count in (1, 2))
    rows.append(_ratio("1 to 2 threads, compute part", 1.8, 1.95, True, one, two))
    helps = _median([run.wall for run in m.help.get(OURS, [])])
    rows.append(Figure("`--help`", 0.4, 0.2, False, helps, " s"))
    warm = m.wall("della", OURS)
    extra = m.cold.wall - warm if m.cold is not None and warm is not None else None
    rows.append(Figure("first run, extra (kernels compiled)", 10, 5, False, extra, " s"))
    own = m.installed.get(OURS)
    rows.append(Figure("installed size", 400, 350, False, own.size / 1e6 if own else None, " MB"))
    rows.append(Figure("packages", 40, 30, False, own.packages if own else None))
    return rows


def _peak(runs: Mapping[str, Sequence[Run]]) -> Figure:
    """The largest of all our runs, and the method it came from."""
    name, must, aim = "peak resident memory", 600, 400
    if not runs:
        return Figure(name, must, aim, False, None)
    value, worst = max((run.peak, method) for method, kept in runs.items() for run in kept)
    return Figure(name, must, aim, False, value / 1e6, " MB", f" (`{worst}`)")


def _ratio(
    name: str, must: float, aim: float, at_least: bool, over: float | None, under: float | None
) -> Figure:
    if over is None or under is None:
        return Figure(name, must, aim, at_least, None)
    detail = f" ({_number(over)} s / {_number(under)} s)"
    return Figure(name, must, aim, at_least, over / under, "", detail)


def _median(values: Sequence[float] | None) -> float | None:
    return median(values) if values else None


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def table(rows: Sequence[Figure]) -> str:
    """The figures as a Markdown table, and in a last line those that miss what they must be."""
    missed = [row.name for row in rows if row.missed]
    unknown = sum(row.value is None for row in rows)
    verdict = f"Not reached: {', '.join(missed)}." if missed else "Every measured figure is what it must be."
    if unknown:
        verdict += f" Not measured: {unknown}."
    return "\n".join(
        ["| figure | must | aim | measured |", "|---|---|---|---|", *(row.row() for row in rows), "", verdict]
    )


def run_table(m: Measured) -> str:
    """Every measured run: medians, and all wall times in the order in which they were taken."""
    lines = [
        "| method | who | wall, median | each | CPU user + system | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for (method, who), runs in m.runs.items():
        lines.append(f"| `{method}` | {who} " + _run_cells(runs))
    if m.cold:
        lines.append("| `della` | della, first run with no kernels on disk " + _run_cells([m.cold]))
    lines += [f"| `--help` | {who} " + _run_cells(runs) for who, runs in m.help.items()]
    text = ["\n".join(lines)]
    for (method, who), seconds in m.compute.items():
        each = ", ".join(f"{value:.2f}" for value in seconds)
        text.append(f"Compute part of `{method}`, {who}: {each} s.")
    for who, found in m.installed.items():
        text.append(
            f"Installed, {who}: {found.size / 1e6:.0f} MB, {found.packages} packages (pip not counted)."
        )
    return "\n\n".join(text)


def _run_cells(runs: Sequence[Run]) -> str:
    def middle(get: Callable[[Run], float]) -> float:
        return median(get(run) for run in runs)

    each = ", ".join(f"{run.wall:.2f}" for run in runs)
    cpu = f"{middle(lambda run: run.user):.2f} + {middle(lambda run: run.system):.2f} s"
    peak = max(run.peak for run in runs) / 1e6
    return f"| {middle(lambda run: run.wall):.2f} s | {each} | {cpu} | {peak:.0f} MB |"


def machine() -> list[tuple[str, str]]:
    """Processor, cores, memory and kernel of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("processor", _processor()),
        ("cores usable", str(cores)),
        ("memory", f"{memory / 2**30:.1f} GiB"),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def document(m: Measured, facts: Sequence[tuple[str, str]]) -> str:
    """The whole report."""
    parts = [
        "# Benchmark report",
        "\n".join(f"- {name}: {value}" for name, value in facts),
        table(figures(m)),
    ]
    return "\n\n".join([*parts, "## Every run", run_table(m)]) + "\n"
