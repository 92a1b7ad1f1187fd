"""The merges of the 135 M experiment: which methods, with which settings, as recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from della.experiments.paper.climbing import inflation
from della.experiments.paper.small_items import TASKS

DROPS = (0.5, 0.8)
# The wide windows: the widest of evaluations before this one; p - e and p + e stay inside 0 .. 1.
WIDE = {0.5: 0.6, 0.8: 0.36}
NARROW = 0.14
# Lambda is searched along these, times the method's own factor, from the middle outwards.
STEPS = (0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
START = STEPS.index(1.25)


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the tables: a method of della with settings.  ``window`` is a width, or WIDE by p; ``factor``
    says at which lambda its merged delta is about as large as that of Elect + mean at lambda 1; a ``variant``
    runs at the p that is best for DELLA with a wide window, from which it differs in one setting.
    """

    name: str
    title: str
    merge_method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    window: float | None = None
    wide: bool = False
    drops: tuple[float, ...] = DROPS
    random: bool = True
    variant: bool = False
    factor: Callable[[float], float] = lambda p: 1.0


def _summed(p: float) -> float:
    """A sum of all deltas is about twice the mean of those that agree."""
    return 0.5


def _inflated(p: float) -> float:
    return inflation(p, len(TASKS))


def _wide(name: str, title: str, factor: Callable[[float], float] = lambda p: 1.0, **settings: str) -> Method:
    return Method(name, title, "paper_della", settings, wide=True, variant=True, factor=factor)


_ALL = (1.0,)  # nothing is dropped: the value is unused
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("sum", "Task arithmetic, no Elect (sum)", "task_arithmetic", drops=_ALL, random=False,
               factor=_summed),
        Method("ta", "TA + Elect + mean", "paper_ta", drops=_ALL, random=False),
        Method("ties", "TIES", "paper_ties", random=False),
        Method("breadcrumbs", "Breadcrumbs, no Elect (sum)", "breadcrumbs", drops=(0.5,), random=False,
               factor=_summed),
        Method("breadcrumbs-ties", "Breadcrumbs + Elect + sum", "breadcrumbs_ties", drops=(0.5,),
               random=False, factor=_summed),
        Method("dare", "DARE + Elect + mean", "paper_dare"),
        Method("della", "DELLA, window .14", "paper_della", window=NARROW),
        Method("della-wide", "DELLA, wide window", "paper_della", wide=True),
        _wide("ladder-paper", "DELLA wide, ladder: paper", ladder="paper"),
        Method("optimal", "DELLA, rank_by: optimal", "paper_della", {"rank_by": "optimal"}, window=0.0,
               variant=True),
        _wide("systematic", "DELLA wide, coupling: systematic", coupling="systematic"),
        _wide("calibrated", "DELLA wide, fuse: calibrated", _inflated, fuse="calibrated"),
        _wide("l1", "DELLA wide, rescale: l1 (mergekit's)", rescale="l1"),
        _wide("none", "DELLA wide, rescale: none", lambda p: 1 / (1 - p), rescale="none"),
        Method("dare-sum", "DARE, no Elect (sum)", "dare_linear", variant=True,
               factor=_summed),
        Method("della-sum", "DELLA wide, no Elect (sum)", "della_linear", wide=True, variant=True,
               factor=_summed),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """One merge: a method at a drop rate, a lambda and a seed."""

    method: str
    p: float
    lambda_: float
    seed: int = 0

    @property
    def id(self) -> str:
        """Its name in files."""
        row = METHODS[self.method]
        parts = [self.method]
        parts += [f"p{self.p:g}"] if row.drops != _ALL else []
        parts += [f"lambda{self.lambda_:g}"]
        parts += [f"seed{self.seed}"] if row.random else []
        return "-".join(parts)


def lambdas(method: str, p: float) -> list[float]:
    """The ladder of lambdas of a method, ascending."""
    return [round(step * METHODS[method].factor(p), 3) for step in STEPS]


def recipe(cell: Cell) -> str:
    """The merge as the text of a recipe; models are folders beside it: base, lm, math and code."""
    row = METHODS[cell.method]
    own = {"weight": 1.0}
    if row.drops != _ALL:
        own["density"] = round(1 - cell.p, 6)
    window = WIDE[cell.p] if row.wide else row.window
    if window is not None:
        own["window_size"] = window
    lines = [f"# {row.title}: {cell.id}", f"merge_method: {row.merge_method}", "base_model: base", "models:"]
    for task in TASKS:
        lines += [f"  - model: {task}", "    parameters:"]
        lines += [f"      {key}: {value:g}" for key, value in own.items()]
    lines += ["parameters:", f"  lambda: {cell.lambda_:g}"]
    lines += [f"  {key}: {value}" for key, value in row.settings.items()]
    lines += [f"seed: {cell.seed}", "out_dtype: float32"]
    return "\n".join(lines) + "\n"
