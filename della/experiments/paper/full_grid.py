"""What the paper's tables ask for at full size: which merges, and what is chosen among on validation.

A table is a list of Rows.  A Row has candidates; the best of them on validation is merged once more with each
seed and reported on test.  The same Cell may stand in several rows: it is merged and scored once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from della.errors import EvaluationError
from della.experiments.paper.full_models import BASE_OF, TASK_OF
from della.experiments.paper.published import MERGES

METHODS = {"TA": "paper_ta", "DARE": "paper_dare", "TIES": "paper_ties", "DELLA": "paper_della"}
STOCHASTIC = ("paper_dare", "paper_della")
TABLES = (1, 2, 3, 4, 5, 6, 7)
PRUNED = (0.3, 0.5, 0.7, 0.8, 0.9)
PRUNED_MORE = (*PRUNED, 0.91, 0.92, 0.93, 0.94)
ALONE = {"lm": ("alpaca_eval", "gsm8k", "mbpp"), "math": ("gsm8k",), "code": ("mbpp",)}
FIRST_SEED = 42

Settings = tuple[tuple[str, str], ...]
NO_RESCALE: Settings = (("rescale", "none"),)


@dataclass(frozen=True)
class Grid:
    """What is tried.  ``drop_rates`` and ``lambdas`` make the candidates; ``pruned`` are the drop rates of
    tables 3 and 6 (None: the paper's).  ``window`` is the range of drop probabilities, 2 * epsilon.
    """

    tables: tuple[int, ...] = TABLES
    drop_rates: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    lambdas: tuple[float, ...] = (0.8, 1.0, 1.1, 1.3)
    pruned: tuple[float, ...] | None = None
    window: float = 0.14
    seeds: int = 3

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tables) - set(TABLES))
        if unknown or not self.tables:
            raise EvaluationError(f"tables {self.tables}: expected some of 1 to 7")
        for p in (*self.drop_rates, *(self.pruned or ())):
            if not 0 < p < 1:
                raise EvaluationError(f"drop rate {p}: expected a number between 0 and 1")
        if not self.drop_rates or not self.lambdas or self.seeds < 1:
            raise EvaluationError("expected at least one drop rate, one lambda and one seed")
        if not 0 <= self.window < 1:
            raise EvaluationError(f"window {self.window}: expected a number from 0 up to 1")


@dataclass(frozen=True)
class Cell:
    """One merge; with an empty method, an expert as it is.

    ``settings`` are further parameters of the recipe as (name, value) pairs.  ``drop`` is None where nothing
    is dropped, ``window`` where there is no range of probabilities.
    """

    experts: tuple[str, ...]
    method: str = ""
    lambda_: float = 1.0
    drop: float | None = None
    window: float | None = None
    settings: Settings = ()
    seed: int = FIRST_SEED

    @property
    def name(self) -> str:
        """A name for files, the same in every run."""
        parts = ["+".join(self.experts)]
        if self.method:
            parts += [self.method.removeprefix("paper_"), f"l{self.lambda_:g}"]
        parts += [] if self.drop is None else [f"p{self.drop:g}"]
        parts += [] if self.window is None else [f"w{self.window:g}"]
        parts += [f"{name}_{value}" for name, value in self.settings]
        parts += [f"s{self.seed}"] if self.is_random else []
        return "-".join(parts)

    @property
    def is_random(self) -> bool:
        """Whether another seed would give another model."""
        return self.method in STOCHASTIC

    @property
    def uses_norms(self) -> bool:
        """Whether it needs the calibrated input norms of its experts."""
        return ("importance", "wanda") in self.settings

    @property
    def base(self) -> str:
        """The role of the base of its experts."""
        return BASE_OF[self.experts[0]]

    def with_seed(self, seed: int) -> Cell:
        return replace(self, seed=seed)

    def recipe(self, models: Mapping[str, str], norms: Mapping[str, str]) -> str:
        """The recipe as YAML text; ``models`` and ``norms`` are references and files by role."""
        own: dict[str, object] = {"weight": 1.0}
        own |= {} if self.drop is None else {"density": round(1 - self.drop, 6)}
        own |= {} if self.window is None else {"window_size": self.window}
        lines = ["models:"]
        for role in self.experts:
            lines += [f"  - model: {json.dumps(models[role])}"]
            lines += [f"    input_norms: {json.dumps(norms[role])}"] if self.uses_norms else []
            lines += ["    parameters:", *_stated(own, 6)]
        lines += [f"base_model: {json.dumps(models[self.base])}", f"merge_method: {self.method}"]
        lines += ["parameters:", *_stated({"lambda": self.lambda_} | dict(self.settings), 2)]
        return "\n".join([*lines, f"seed: {self.seed}"]) + "\n"


@dataclass(frozen=True)
class Row:
    """One line of a table: ``candidates`` to choose among, the ``tasks`` that are scored."""

    table: int
    models: str
    label: str
    candidates: tuple[Cell, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in results: table, models and label."""
        return f"{self.table}/{self.models}/{self.label}"

    def reported(self, chosen: Cell) -> list[Cell]:
        """The cells whose test scores make the row."""
        return [chosen.with_seed(seed) for seed in self.seeds]


def rows(grid: Grid) -> list[Row]:
    """The rows of the tables that are asked for, in the paper's order, after the experts alone."""
    makers = {1: _table1, 2: _table2, 3: _table3, 4: _table4, 5: _table5, 6: _table6, 7: _table7}
    found = []
    if {1, 4, 5} & set(grid.tables):
        found = [
            Row(1, role, "alone", (Cell((role,)),), tasks, (FIRST_SEED,)) for role, tasks in ALONE.items()
        ]
    for table in sorted(set(grid.tables)):
        found += makers[table](grid)
    return found


def _make(
    grid: Grid, experts: tuple[str, ...], method: str, drop: float, lambda_: float = 1.0,
    settings: Settings = (),
) -> Cell:  # fmt: skip
    """A cell of the grid; the range of probabilities is as wide as the drop rate lets it be."""
    if method == "paper_ta":
        return Cell(experts, method, lambda_, settings=settings)
    window = min(grid.window, 2 * drop, 2 * (1 - drop)) if method == "paper_della" else None
    window = None if window is None else round(window, 6)
    return Cell(experts, method, lambda_, drop, window, settings)


def _candidates(
    grid: Grid, experts: tuple[str, ...], method: str, lambdas: Iterable[float], settings: Settings = ()
) -> tuple[Cell, ...]:
    cells = (_make(grid, experts, method, p, x, settings) for p in grid.drop_rates for x in lambdas)
    return tuple(dict.fromkeys(cells))


def _row(grid: Grid, table: int, models: str, label: str, candidates: tuple[Cell, ...]) -> Row:
    first = candidates[0]
    seeds = grid.seeds if first.is_random else 1
    tasks = tuple(TASK_OF[role] for role in first.experts)
    return Row(table, models, label, candidates, tasks, tuple(range(FIRST_SEED, FIRST_SEED + seeds)))


def _table1(grid: Grid, table: int = 1, settings: Settings = ()) -> Iterator[Row]:
    for models, experts in MERGES.items():
        for label, method in METHODS.items():
            yield _row(grid, table, models, label, _candidates(grid, experts, method, grid.lambdas, settings))


def _table2(grid: Grid) -> Iterator[Row]:
    for label, settings in (("without rescale", NO_RESCALE), ("with rescale", ())):
        cells = _candidates(grid, MERGES["Math+Code"], "paper_della", (1.0,), settings)
        yield _row(grid, 2, "Math+Code", label, cells)


def _table3(grid: Grid) -> Iterator[Row]:
    """The paper does not name the expert; only WizardCoder, on its own task, is not ruled out by table 1."""
    for p in grid.pruned or PRUNED:
        for name in ("DARE", "DELLA"):
            for label, settings in (("without rescale", NO_RESCALE), ("with rescale", ())):
                cell = _make(grid, ("coder",), METHODS[name], p, settings=settings)
                yield _row(grid, 3, f"p={p:g}", f"{name} {label}", (cell,))


def _table4(grid: Grid) -> Iterator[Row]:
    return _table1(grid, 4, (("vote", "none"),))


def _table5(grid: Grid) -> Iterator[Row]:
    wanda = (("importance", "wanda"),)
    kinds = {
        "WANDA, top-K": ("paper_ties", wanda),
        "WANDA, p by rank": ("paper_della", wanda),
        "DELLA": ("paper_della", ()),
    }
    for models, experts in MERGES.items():
        for label, (method, settings) in kinds.items():
            yield _row(grid, 5, models, label, _candidates(grid, experts, method, grid.lambdas, settings))


def _table6(grid: Grid) -> Iterator[Row]:
    kinds: dict[str, tuple[str, Settings]] = {
        "DARE": ("paper_dare", ()),
        "row": ("paper_della", ()),
        "layer": ("paper_della", (("rank_by", "tensor"),)),
        "random row": ("paper_della", (("rank_by", "random"),)),
        "random layer": ("paper_della", (("rank_by", "random_tensor"),)),
    }
    for p in grid.pruned or PRUNED_MORE:
        for label, (method, settings) in kinds.items():
            cell = _make(grid, ("math",), method, p, settings=settings)
            yield _row(grid, 6, f"p={p:g}", label, (cell,))


def _table7(grid: Grid) -> Iterator[Row]:
    for models, experts in MERGES.items():
        for p in grid.drop_rates:
            cells = tuple(_make(grid, experts, "paper_della", p, x) for x in grid.lambdas)
            yield _row(grid, 7, models, f"p={p:g}", cells)


def _stated(values: Mapping[str, object], indent: int) -> Iterator[str]:
    for name, value in values.items():
        yield f"{' ' * indent}{name}: {value if isinstance(value, str) else json.dumps(value)}"
