"""What is tried: the grids, and the lines of the tables as kinds of cells, shared by all scales.

p is the share of deltas that is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from della.experiments.cells import FIRST, NARROW, WIDE, Kind, Settings
from della.experiments.choice import inflation
from della.experiments.published import MERGES


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried: p, lambda and epsilon of merges, p of tables 3 and 6 and more p of table 6, and the
    merges.
    """

    drops: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    lambdas: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    epsilons: tuple[float, ...] = (NARROW, FIRST, WIDE, 0.5)
    pruned: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)
    pruned_more: tuple[float, ...] = (0.91, 0.92, 0.93, 0.94)
    merges: tuple[str, ...] = tuple(MERGES)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything an experiment has, unless it is told otherwise.

    seed: the first of ``seeds``, with which each chosen merge is made.  Problems a task: ``items`` on test,
    ``validation`` for the first choice, ``final`` for the last one, among the best.
    """

    seeds: int
    seed: int
    items: int
    validation: int
    final: int = 0
    grid: Grid = Grid()

    @property
    def sweep(self) -> int:
        """Seeds of each point of a curve, and where one expert is pruned."""
        return max(1, self.seeds // 2)


MINI = Scale(seeds=10, seed=42, items=120, validation=48, final=120)
# Lambda is climbed to along these, times the kind's own factor, from the middle outwards.
REAL = Scale(5, 0, items=200, validation=40, grid=Grid(
    drops=(0.5, 0.8), lambdas=(0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0),
))  # fmt: skip


def _one(p: float, experts: int) -> float:
    return 1.0


def _wide(p: float) -> float:
    return WIDE


def _by_number(p: float, experts: int) -> float:
    return float(experts)


_NO_ELECT: Settings = (("vote", "none"),)
_WANDA: Settings = (("importance", "wanda"),)
DELLA = Kind("DELLA", "paper_della")
TABLE1 = (Kind("TA", "paper_ta"), Kind("DARE", "paper_dare"), Kind("TIES", "paper_ties"), DELLA)
TABLE2 = tuple(
    Kind(f"{name} rescale", "paper_della", settings, is_free=False)
    for name, settings in (("without", (("rescale", "none"),)), ("with", ()))
)
# The mean over all experts of what few of them have is smaller by their number.
TABLE4 = tuple(replace(kind, settings=_NO_ELECT, factor=_by_number) for kind in TABLE1)
TABLE5 = (Kind("WANDA, top-K", "paper_ties", _WANDA), Kind("WANDA, p by rank", "paper_della", _WANDA))
ADAPTIVE = tuple(
    Kind(name, "paper_della", (("lambda_scaling", name),), is_free=False)
    for name in ("row", "row_inverse", "tensor")
)
BESIDE = (
    Kind("DELLA, rescale: l1 (mergekit's)", "paper_della", (("rescale", "l1"),)),
    Kind("DELLA, rank_by: optimal", "paper_della", (("rank_by", "optimal"),)),
    Kind("DELLA, coupling: systematic", "paper_della", (("coupling", "systematic"),)),
    Kind("DELLA, fuse: calibrated", "paper_della", (("fuse", "calibrated"),), factor=inflation),
    Kind("DELLA, ladder: paper", "paper_della", (("ladder", "paper"),)),
    Kind("DELLA, rank_by: magnitude", "paper_della", (("rank_by", "magnitude"),)),
    Kind("DARE, coupling: systematic", "paper_dare", (("coupling", "systematic"),)),
    Kind("TIES, scope: row", "paper_ties", (("scope", "row"),)),
    Kind("dare_ties (sum)", "dare_ties"),
    Kind("della_linear", "della_linear"),
    Kind("dare_linear", "dare_linear"),
    Kind("task_arithmetic (sum)", "task_arithmetic"),
    Kind("breadcrumbs", "breadcrumbs"),
    Kind("breadcrumbs_ties", "breadcrumbs_ties"),
    Kind("linear", "linear", is_free=False),
)

# ---- one expert alone, at lambda 1 -----------------------------------------------------------------------

TABLE3 = tuple(
    Kind(f"{name} {how} rescale", method, settings)
    for name, method in (("DARE", "paper_dare"), ("DELLA", "paper_della"))
    for how, settings in (("without", (("rescale", "none"),)), ("with", ()))
)
TABLE6 = (
    Kind("DARE", "paper_dare"),
    Kind("row", "paper_della"),
    Kind("layer", "paper_della", (("rank_by", "tensor"),)),
    Kind("random row", "paper_della", (("rank_by", "random"),)),
    Kind("random layer", "paper_della", (("rank_by", "random_tensor"),)),
)
FIGURE3 = (
    Kind("row, wide", "paper_della", epsilon=_wide),
    Kind("layer, wide", "paper_della", (("rank_by", "tensor"),), epsilon=_wide),
    Kind("top-K", "paper_ties"),
)


# ---- the real model ---------------------------------------------------------------------------------------

SMALL_START = REAL.grid.lambdas.index(1.25)
STEPS = ("ta", "dare", "della", "della-wide")  # in the order of a first look; these also run at lambda 1


def _widest(p: float) -> float:
    """The widest of the evaluations before this one: p - epsilon and p + epsilon stay inside 0 .. 1."""
    return {0.5: 0.3, 0.8: 0.18}[p]


def _halved(p: float, experts: int) -> float:
    """A sum of all deltas is about twice the mean of those that agree."""
    return 0.5


def _shrunk(p: float, experts: int) -> float:
    return 1 / (1 - p)


def _variant(title: str, *settings: tuple[str, str], factor: Callable[[float, int], float] = _one) -> Kind:
    return Kind(title, "paper_della", settings, factor=factor, epsilon=_widest)


SMALL = {
    "sum": Kind("Task arithmetic, no Elect (sum)", "task_arithmetic", factor=_halved),
    "ta": Kind("TA + Elect + mean", "paper_ta"),
    "ties": Kind("TIES", "paper_ties"),
    "breadcrumbs": Kind("Breadcrumbs, no Elect (sum)", "breadcrumbs", factor=_halved, drops=(0.5,)),
    "breadcrumbs-ties": Kind("Breadcrumbs + Elect + sum", "breadcrumbs_ties", factor=_halved, drops=(0.5,)),
    "dare": Kind("DARE + Elect + mean", "paper_dare"),
    "della": Kind("DELLA, window .14", "paper_della"),
    "della-wide": _variant("DELLA, wide window"),
}
# These differ from DELLA with a wide window in one setting, and have the p that is best for it.
SMALL_VARIANTS = {
    "ladder-paper": _variant("DELLA wide, ladder: paper", ("ladder", "paper")),
    "optimal": Kind("DELLA, rank_by: optimal", "paper_della", (("rank_by", "optimal"),)),
    "systematic": _variant("DELLA wide, coupling: systematic", ("coupling", "systematic")),
    "calibrated": _variant("DELLA wide, fuse: calibrated", ("fuse", "calibrated"), factor=inflation),
    "l1": _variant("DELLA wide, rescale: l1 (mergekit's)", ("rescale", "l1")),
    "none": _variant("DELLA wide, rescale: none", ("rescale", "none"), factor=_shrunk),
    "dare-sum": Kind("DARE, no Elect (sum)", "dare_linear", factor=_halved),
    "della-sum": Kind("DELLA wide, no Elect (sum)", "della_linear", factor=_halved, epsilon=_widest),
}
