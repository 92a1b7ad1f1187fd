"""What the paper's tables ask for at full size: rows, each with the cells to choose among on validation.

The same cell may stand in several rows: it is merged and scored once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from della.errors import EvaluationError, Problem
from della.experiments import tables
from della.experiments.cells import NARROW, Cell, Kind
from della.experiments.full_models import TASK_OF
from della.experiments.options import ExperimentOptions, stated
from della.experiments.published import MERGES
from della.experiments.rows import Row
from della.experiments.tables import Grid

TABLES = (1, 2, 3, 4, 5, 6, 7)
GRID = Grid(lambdas=(0.8, 1.0, 1.1, 1.3), epsilons=(NARROW,))
ALONE = {"lm": ("alpaca_eval", "gsm8k", "mbpp"), "math": ("gsm8k",), "code": ("mbpp",)}
FIRST_SEED = 42


def tasks_of(cell: Cell) -> tuple[str, ...]:
    """What a cell is scored on."""
    return tuple(TASK_OF[role] for role in cell.experts) if cell.method else ALONE[cell.experts[0]]


def rows_of(options: ExperimentOptions) -> list[Row]:
    """The rows that are asked for; the paper's, where nothing is said."""
    every = TABLES if options.importance == "wanda" else tuple(table for table in TABLES if table != 5)
    more = {"pruned": options.pruned, "pruned_more": ()} if options.pruned else {}
    given = stated(drops=options.drop_rates or None, lambdas=options.lambdas or None, **more)
    epsilons = GRID.epsilons if options.window is None else (options.window / 2,)
    return rows(
        options.tables or every, replace(GRID, epsilons=epsilons, **given), **stated(seeds=options.seeds)
    )


def rows(numbers: Sequence[int] = TABLES, grid: Grid = GRID, seeds: int = 3) -> list[Row]:
    """The rows of tables 1 to 7 that are asked for, in the paper's order, after the experts alone.

    Raises EvaluationError for what no experiment can be.
    """
    if set(numbers) - set(TABLES) or not numbers:
        raise EvaluationError(
            Problem(f"tables {tuple(numbers)}: expected some of 1 to 7", parameter="tables")
        )
    for p in (*grid.drops, *grid.pruned):
        if not 0 < p < 1:
            raise EvaluationError(
                Problem(f"drop rate {p}: expected a number between 0 and 1", parameter="drop_rates")
            )
    if not grid.drops or not grid.lambdas or seeds < 1:
        raise EvaluationError("expected at least one drop rate, one lambda and one seed")
    if not 0 <= 2 * grid.epsilons[0] < 1:
        raise EvaluationError(
            Problem(f"window {2 * grid.epsilons[0]:g}: expected a number from 0 up to 1", parameter="window")
        )
    found = []
    if {1, 4, 5} & set(numbers):
        found = [Row("1", role, "alone", (Cell((role,), seed=FIRST_SEED),)) for role in ALONE]
    for number in sorted(set(numbers)):
        found += [Row(str(number), *row, seeds) for row in _rows(number, grid)]
    return found


_Drawn = tuple[str, str, tuple[Cell, ...]]  # group, label, candidates


def _rows(number: int, grid: Grid) -> Iterator[_Drawn]:
    merged = {
        1: tables.TABLE1, 2: tables.TABLE2, 4: tables.TABLE4, 5: (*tables.TABLE5, tables.DELLA),
        7: (tables.DELLA,),
    }  # fmt: skip
    if (
        number == 3
    ):  # the paper does not name the expert; only WizardCoder, on its own task, is left by table 1
        yield from _alone("coder", tables.TABLE3, grid.pruned, grid)
    elif number == 6:
        yield from _alone("math", tables.TABLE6, (*grid.pruned, *grid.pruned_more), grid)
    else:
        for merge in ("Math+Code",) if number == 2 else MERGES:
            for kind in merged[number]:
                if number == 7:
                    for p in grid.drops:
                        yield merge, f"p={p:g}", _cells(kind, MERGES[merge], (p,), grid)
                else:
                    yield merge, kind.label, _cells(kind, MERGES[merge], kind.places(grid.drops), grid)


def _alone(role: str, kinds: Iterable[Kind], drops: Sequence[float], grid: Grid) -> Iterator[_Drawn]:
    for p in drops:
        for kind in kinds:
            yield f"p={p:g}", kind.label, (kind.cell((role,), p, 1.0, grid.epsilons[0], FIRST_SEED),)


def _cells(
    kind: Kind, experts: tuple[str, ...], drops: Sequence[float | None], grid: Grid
) -> tuple[Cell, ...]:
    lambdas = grid.lambdas if kind.is_free else (1.0,)
    cells = (kind.cell(experts, p, x, grid.epsilons[0], FIRST_SEED) for p in drops for x in lambdas)
    return tuple(dict.fromkeys(cells))
