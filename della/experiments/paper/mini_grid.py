"""The merges of the miniature: which rows the tables have, and what is chosen on validation.

p is the share of deltas that is dropped.  Of each Kind and p, lambda is found by climbing its ladder until
both neighbours are worse, then DELLA's epsilon along its own grid.  What is best is merged anew with each
seed and scored on test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from della.experiments.demo import EXPERTS
from della.experiments.paper.climbing import inflation
from della.experiments.paper.published import MERGES
from della.merging.methods import METHODS

NARROW, FIRST, WIDE = 0.07, 0.15, 0.3  # 0.07: the release's window_size of 0.14

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried: p, lambda and epsilon of merges, p of tables 3 and 6, and the merges."""

    drops: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    lambdas: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
    epsilons: tuple[float, ...] = (NARROW, FIRST, WIDE, 0.5)
    pruned: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)
    pruned_more: tuple[float, ...] = (0.91, 0.92, 0.93, 0.94)
    merges: tuple[str, ...] = tuple(MERGES)


@dataclass(frozen=True, slots=True)
class Cell:
    """One model: a merge of ``experts``, or without a method a model of the trio as it is.

    ``p`` is None where nothing is dropped, ``epsilon`` where there is no range of probabilities.
    """

    experts: tuple[str, ...]
    method: str = ""
    p: float | None = None
    lambda_: float = 1.0
    epsilon: float | None = None
    settings: Settings = ()
    seed: int = 0

    @property
    def key(self) -> str:
        """A name that says all of it; without the seed where no draw has a part."""
        parts = (
            ["+".join(self.experts), self.method, f"lambda={self.lambda_:g}"]
            if self.method
            else list(self.experts)
        )
        parts += [] if self.p is None else [f"p={self.p:g}"]
        parts += [] if self.epsilon is None else [f"epsilon={self.epsilon:g}"]
        parts += [f"{name}={value}" for name, value in self.settings]
        return " ".join([*parts, f"seed={self.seed}"] if self.is_random else parts)

    @property
    def is_random(self) -> bool:
        """Whether another seed gives another model."""
        return bool(self.method) and METHODS[self.method].drop in ("magprune", "bernoulli")

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it is scored on: a merge on the tasks of its experts."""
        return self.experts if self.method else EXPERTS

    def options(self) -> dict[str, Any]:
        """The arguments of `della.merge_state_dicts`."""
        found: dict[str, Any] = {"method": self.method, "names": list(self.experts)}
        found |= {} if self.p is None else {"density": round(1 - self.p, 6)}
        found |= {} if self.epsilon is None else {"epsilon": self.epsilon}
        found |= {"lambda": self.lambda_} if METHODS[self.method].needs_base else {}
        return found | dict(self.settings) | ({"seed": self.seed} if self.is_random else {})


@dataclass(frozen=True, slots=True)
class Kind:
    """A line of a table: a method with settings.

    With ``is_free`` lambda is chosen, else it is 1.  Its ladder is multiplied by ``factor``, given p and the
    number of experts, where the merged delta is smaller or larger by that much.
    """

    label: str
    method: str
    settings: Settings = ()
    is_free: bool = True
    factor: Callable[[float, int], float] = lambda p, experts: 1.0

    def places(self, grid: Grid) -> tuple[float | None, ...]:
        """The p to choose among; None where the method drops nothing."""
        return grid.drops if METHODS[self.method].drop not in ("none", "average") else (None,)

    @property
    def has_range(self) -> bool:
        """Whether keep probabilities have a range, whose half-width is epsilon."""
        return METHODS[self.method].drop == "magprune" and ("rank_by", "optimal") not in self.settings

    def ladder(self, grid: Grid, p: float | None, experts: int) -> list[float]:
        """The values of lambda for this p, ascending."""
        factor = self.factor(0.0 if p is None else p, experts)
        return [float(f"{value * factor:.3g}") for value in grid.lambdas] if self.is_free else [1.0]

    def cell(
        self, experts: tuple[str, ...], p: float | None, lambda_: float, epsilon: float | None, seed: int = 0
    ) -> Cell:
        """Its merge; an epsilon that p has no room for becomes the widest that it has."""
        if METHODS[self.method].drop != "magprune":
            epsilon = None
        elif not self.has_range:
            epsilon = 0.0
        elif p is not None and epsilon is not None:
            epsilon = fitting(epsilon, p)
        return Cell(experts, self.method, p, lambda_, epsilon, self.settings, seed)


def fitting(epsilon: float, p: float) -> float:
    """The widest half-width up to ``epsilon`` that keeps all probabilities between 0 and 1."""
    return round(min(epsilon, p, 1 - p), 6)


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
    (Kind(f"{name} {how} rescale", method, settings), NARROW)
    for name, method in (("DARE", "paper_dare"), ("DELLA", "paper_della"))
    for how, settings in (("without", (("rescale", "none"),)), ("with", ()))
)
TABLE6 = (
    (Kind("DARE", "paper_dare"), NARROW),
    (Kind("row", "paper_della"), NARROW),
    (Kind("layer", "paper_della", (("rank_by", "tensor"),)), NARROW),
    (Kind("random row", "paper_della", (("rank_by", "random"),)), NARROW),
    (Kind("random layer", "paper_della", (("rank_by", "random_tensor"),)), NARROW),
)
FIGURE3 = (
    (Kind("row, wide", "paper_della"), WIDE),
    (Kind("layer, wide", "paper_della", (("rank_by", "tensor"),)), WIDE),
    (Kind("top-K", "paper_ties"), NARROW),
)


def stated(cell: Cell) -> Mapping[str, Any]:
    """The cell for results.json."""
    named = {"method": cell.method, "p": cell.p, "epsilon": cell.epsilon, "lambda": cell.lambda_}
    return {**named, **dict(cell.settings)}
