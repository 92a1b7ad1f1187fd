"""The options of the full experiment as a command line gives them: words and lists of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from della.errors import EvaluationError
from della.evaluate.settings import Settings
from della.experiments.full import FullOptions
from della.experiments.full_plan import Rates
from della.experiments.full_rows import GRID, TABLES

Number = TypeVar("Number", int, float)


def full_options(
    scoring: Settings, *, tables: str = "", drop_rates: str = "", lambdas: str = "", pruned: str = "",
    window: float | None = None, seeds: int | None = None, models: Sequence[str] = (),
    models_dir: Path | None = None, data: Sequence[str] = (), allow_pickle: bool = False,
    keep_merges: bool = False, threads: int | None = None, tokens_per_second: float | None = None,
    judge_price: str = "",
) -> FullOptions:  # fmt: skip
    """Read them; what is empty or None is as by default.

    tables, drop_rates, lambdas, pruned: numbers with commas between them.  models: ROLE=REFERENCE each.
    data: NAME=FILE each.  judge_price: READ,WRITTEN.  Raises EvaluationError.
    """
    grid = GRID
    if drop_rates:
        grid = replace(grid, drops=_numbers("--drop-rates", drop_rates, float))
    if lambdas:
        grid = replace(grid, lambdas=_numbers("--lambdas", lambdas, float))
    if pruned:
        grid = replace(grid, pruned=_numbers("--pruned", pruned, float), pruned_more=())
    grid = grid if window is None else replace(grid, epsilons=(window / 2,))
    rates = Rates() if tokens_per_second is None else Rates(tokens_per_second=tokens_per_second)
    if rates.tokens_per_second <= 0:
        raise EvaluationError(f"--tokens-per-second {rates.tokens_per_second:g}: expected a number above 0")
    if judge_price:
        prices = _numbers("--judge-price", judge_price, float)
        if len(prices) != 2:
            raise EvaluationError(f"--judge-price {judge_price}: expected READ,WRITTEN, such as 30,60")
        rates = replace(rates, judge_price=(prices[0], prices[1]))
    files = {name: Path(file) for name, file in _pairs("--data", data, "NAME=FILE").items()}
    return FullOptions(
        out=scoring.out, scoring=scoring, grid=grid, seeds=3 if seeds is None else seeds,
        models=_pairs("--models", models, "ROLE=MODEL"),
        models_dir=models_dir, data=files, allow_pickle=allow_pickle, keep_merges=keep_merges,
        threads=threads, rates=rates, tables=_numbers("--tables", tables, int) if tables else TABLES,
    )  # fmt: skip


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise EvaluationError(f"{option} {text}: expected numbers with commas between them") from None


def _pairs(option: str, values: Sequence[str], form: str) -> Mapping[str, str]:
    found = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise EvaluationError(f"{option} {text}: expected {form}")
        found[name] = value
    return found
