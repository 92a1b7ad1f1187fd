"""Tables with a row for each token, gathered anew: rows follow tokens, and not ids.

A map says of each row of a result where it comes from; a view reads runs of rows that lie side by side.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from della.checkpoint.view import Hashes, TensorView
from della.dtypes import DTYPES, Array, widen

ZERO, MEAN, REST = -1, -2, -3
_AT_ONCE = 1 << 20  # elements that are read together for a mean


class RowMap:
    """Where each row of a table comes from.

    Args:
        which: of each row the number of the view that it is read from; or `ZERO`; `MEAN`: the mean of a few
            rows; `REST`: the mean of all rows of this table that are not so themselves.
        row: of each row its number in that view.
        means: of each `MEAN` row the (view, row) that it is the mean of.

    Example:
        >>> import numpy as np
        >>> RowMap(np.array([0, 0, 0, -1]), np.array([4, 5, 2, 0])).runs
        [(0, 2), (2, 3), (3, 4)]
    """

    def __init__(
        self, which: Array, row: Array, means: Mapping[int, Sequence[tuple[int, int]]] | None = None
    ) -> None:
        self.which, self.row = which.astype(np.int64), row.astype(np.int64)
        self.means = dict(means or {})
        breaks = (np.diff(self.which) != 0) | (np.diff(self.row) != 1) | (self.which[1:] == MEAN)
        breaks &= ~((np.diff(self.which) == 0) & ((self.which[1:] == ZERO) | (self.which[1:] == REST)))
        starts = np.flatnonzero(np.concatenate([[True], breaks])) if self.which.size else np.zeros(0, int)
        self.runs = list(zip(starts.tolist(), [*starts[1:].tolist(), self.which.size], strict=True))
        self.starts = starts

    @property
    def computes(self) -> bool:
        """Whether a row is a mean, and not read as it is stored."""
        return bool((self.which <= MEAN).any())

    @property
    def is_identity(self) -> bool:
        """Whether each row is the one of the same number of the first view."""
        return bool((self.which == 0).all() and (self.row == np.arange(self.row.size)).all())

    @property
    def key(self) -> str:
        """Equal for equal maps alone."""
        digest = xxhash.xxh3_128(self.which.tobytes())
        digest.update(self.row.tobytes())
        digest.update(repr(sorted(self.means.items())).encode())
        return digest.hexdigest()


class Rows(TensorView):
    """A table of which each row is another table's, as a map says.

    Args:
        name: what the result calls it.
        views: the tables that rows are read from; the first is the model's own, whose type it has.
        row_map: where each row comes from.
        axis: which axis counts the rows; those before it are of length 1.

    Example:
        >>> import numpy as np
        >>> from della.checkpoint.source import open_source
        >>> with open_source("one") as model:
        ...     Rows("w", [model.tensors["w"]], RowMap(np.array([0, -1, 0]), np.array([1, 0, 0]))).read()
        array([2., 0., 1.], dtype=float32)
    """

    def __init__(self, name: str, views: Sequence[TensorView], row_map: RowMap, axis: int = 0) -> None:
        own, self.views, self.map = views[0], tuple(views), row_map
        kinds = {view.element for view in views}
        wide = DTYPES["F64" if any(kind.name == "F64" for kind in kinds) else "F32"]
        element = wide if row_map.computes or len(kinds) > 1 else own.element
        shape = (*own.shape[:axis], row_map.which.size, *own.shape[axis + 1 :])
        parts = list(dict.fromkeys(part for view in views for part in view.parts))
        super().__init__(name, shape, own.dtype, parts, element)
        self.width = math.prod(own.shape[axis + 1 :])
        self._rest: Array | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self.views[0].nbytes

    @property
    def key(self) -> str:
        return self.map.key

    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        end, width, runs = start + out.size, self.width, self.map.runs
        k = int(np.searchsorted(self.map.starts, start // width, side="right")) - 1 if out.size else len(runs)
        while k < len(runs) and runs[k][0] * width < end:
            first, last = runs[k]
            a, b = max(start, first * width), min(end, last * width)
            self._fill(first, a - first * width, out[a - start : b - start], hashes)
            k += 1

    def _fill(self, first: int, offset: int, out: Array, hashes: Hashes | None) -> None:
        """Elements of the run that begins with row ``first``, from its element ``offset`` on."""
        which = int(self.map.which[first])
        if which == ZERO:
            out[:] = 0
        elif which == REST:
            out[:] = self._mean_of_all()[np.arange(offset, offset + out.size) % self.width]
        elif which == MEAN:
            owners = self.map.means[first]
            sums, values = np.zeros(out.size), np.empty_like(out)
            for view, row in owners:
                self._read(view, row * self.width + offset, values, hashes)
                sums += values
            out[:] = sums / len(owners)
        else:
            self._read(which, int(self.map.row[first]) * self.width + offset, out, hashes)

    def _read(self, which: int, start: int, out: Array, hashes: Hashes | None) -> None:
        view = self.views[which]
        if view.element is self.element:
            view.read_into(start, out, hashes)
            return
        stored = np.empty(out.size, view.element.numpy)
        view.read_into(start, stored, hashes)
        out[:] = widen(stored)

    def _mean_of_all(self) -> Array:
        """The mean of the rows that are not this mean themselves."""
        with self._lock:
            if self._rest is None:
                sums, count = np.zeros(self.width), 0
                step = max(1, _AT_ONCE // self.width)
                for first, last in self.map.runs:
                    if self.map.which[first] == REST:
                        continue
                    for at in range(first, last, step):
                        values = np.empty((min(step, last - at), self.width), self.element.numpy)
                        self._fill(first, (at - first) * self.width, values.reshape(-1), None)
                        sums += values.sum(axis=0, dtype=np.float64)
                    count += last - first
                self._rest = (sums / max(count, 1)).astype(self.element.numpy)
            return self._rest
