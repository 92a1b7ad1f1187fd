"""The rule by which rows are placed: where a model takes the rows of tokens from that it lacks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from della.checkpoint.rows import MEAN, REST, RowMap
from della.dtypes import Array


def placed(
    k: int, found: Array, base: int | None, named: Mapping[int, tuple[int, int]]
) -> tuple[Array, Array]:
    """Where model ``k`` takes each row of the result from.

    Args:
        k: the model.
        found: of each model the row that it has for each row of the result; -1 where it has none.
        base: the number of the base, if it has a part in the merge.
        named: by row of the result what the recipe says: (model, row), or (ZERO, 0).

    Returns:
        The model (or `MEAN`, of all that have it; `REST`, where none has) and its row, for each row of the
        result.

    >>> found = np.array([[0, -1, -1, -1], [1, 0, 2, -1], [-1, 1, -1, -1]])
    >>> [each.tolist() for each in placed(0, found, None, {})]
    [[0, -2, 1, -3], [0, -1, 2, -1]]
    """
    rows, has = found[k].copy(), found >= 0
    which = np.where(rows >= 0, k, REST)
    owners = has.sum(axis=0)
    by_base = has[base] if base is not None else np.zeros(rows.size, bool)
    giver = np.where(by_base, base or 0, has.argmax(axis=0))
    single = (rows < 0) & ((owners == 1) | by_base)
    several = (rows < 0) & (owners > 1) & ~by_base
    which[single], rows[single] = giver[single], found[giver, np.arange(rows.size)][single]
    which[several] = MEAN
    for number, source in named.items():
        which[number], rows[number] = source
    return which, rows


def row_map(k: int, which: Array, rows: Array, found: Array) -> tuple[RowMap, list[int]]:
    """The map of model ``k``, and the models that it reads, itself first, by which it counts them."""
    means = {
        int(i): [(int(j), int(found[j, i])) for j in np.flatnonzero(found[:, i] >= 0)]
        for i in np.flatnonzero(which == MEAN)
    }
    used = {*np.unique(which[which >= 0]).tolist(), *(j for each in means.values() for j, _ in each)}
    order = [k, *sorted(used - {k})]
    local = {j: n for n, j in enumerate(order)}
    numbers = np.array([local.get(j, 0) for j in range(len(found))])
    counted = np.where(which >= 0, numbers[np.maximum(which, 0)], which)
    return RowMap(
        counted, rows, {i: [(local[j], row) for j, row in each] for i, each in means.items()}
    ), order
