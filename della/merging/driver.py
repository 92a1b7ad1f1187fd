"""The driver of tiles: one tensor by one method, whoever reads it: files, arrays in memory, tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from della.dtypes import Array
from della.merging.method import Method
from della.merging.tile import Passes, Subject, Tile, Workspace, cut


def merged(
    method: Method, subject: Subject, passes: Passes, last: Iterable[Tile], learnt: Any, workspace: Workspace
) -> Iterator[tuple[int, Array]]:
    """Merge a tensor tile by tile.

    Args:
        method: With the settings of this tensor.
        subject: The tensor.
        passes: Starts a pass over its tiles, for what must be known beforehand.
        last: The pass in which they are merged.
        learnt: What ``method.learn`` said of the tensor; None without.
        workspace: Buffers of this thread.

    Yields:
        (first element, merged values (rows, n) in float32); the buffer is reused for the next.
    """
    facts = method.prepare(subject, passes, learnt)
    for tile in last:
        out = workspace.array("out", tile.shape)
        method.apply(tile, facts, out)
        yield tile.start, out


def merge_arrays(
    method: Method, subject: Subject, base: Array | None, models: Sequence[Array], tile: int,
    learnt: Any = None,
) -> Array:  # fmt: skip
    """Merge arrays in memory, with the bytes of `Method.whole`.

    Args:
        method: With the settings of this tensor.
        subject: The tensor.
        base: Its values in the base: float32, C-contiguous; None for a method without.
        models: Those of each expert, in canonical order.
        tile: Elements of a tile.
        learnt: As for `merged`.

    Returns:
        The merged values: float32, of the same shape.
    """
    looks = array_tiles(method, subject, base, models, tile)
    out = np.empty(subject.size, np.float32)
    if out.size:
        for start, values in merged(method, subject, looks, looks(), learnt, Workspace()):
            out[start : start + values.size] = values.reshape(-1)
    return out.reshape(subject.shape)


def array_tiles(
    method: Method, subject: Subject, base: Array | None, models: Sequence[Array], tile: int
) -> Passes:
    """Passes over tiles of arrays; arguments as for `merge_arrays`."""
    flat, parts = None if base is None else base.reshape(-1), [model.reshape(-1) for model in models]

    def passes() -> Iterator[Tile]:
        workspace = Workspace()
        for start, rows, n in cut(method.grain, subject.name, subject.shape, tile):
            at = slice(start, start + rows * n)
            values = np.stack([part[at] for part in parts])
            if flat is not None and method.of_deltas:
                with np.errstate(all="ignore"):  # an overflow is told when the result is rounded
                    np.subtract(values, flat[at], out=values)
            own = None if flat is None else flat[at].reshape(rows, n)
            yield Tile(subject, start, own, values.reshape(-1, rows, n), workspace)

    return passes
