"""What a method is given: experts, the tensor that is merged, and tiles of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from della.dtypes import Array
from della.merging.random import DEFAULT_SEED, stream_key


class Grain(Enum):
    """Of what a method must see all at once, so from what tiles are cut: anything, whole rows, a tensor."""

    ELEMENT = 1
    ROW = 2
    TENSOR = 3


@dataclass(frozen=True)
class Expert:
    """One model of a merge.

    Args:
        identity: Its name, which keys its random stream.
        values: Its own parameters as they take effect.
        norms: Of the tensor's input features: float32, one a column; None where there are none.

    >>> Expert("math", {"weight": 0.5})["weight"]
    0.5
    """

    identity: str
    values: Mapping[str, Any] = field(default_factory=dict)
    norms: Array | None = field(default=None, compare=False, repr=False)

    def __getitem__(self, parameter: str) -> float:
        value: float = self.values[parameter]
        return value


def canonical(experts: Sequence[Expert]) -> list[int]:
    """The positions of ``experts`` in the order in which all sums run: sorted by identity, so that the order
    of a recipe changes no byte.

    >>> canonical([Expert("math"), Expert("code")])
    [1, 0]
    """
    return sorted(range(len(experts)), key=lambda t: experts[t].identity)


@dataclass(frozen=True)
class Subject:
    """The tensor that is merged.

    Args:
        name: Its name.
        shape: Its shape.
        experts: The models, in canonical order.
        seed: Of the random draws.

    >>> Subject("w", (2, 3), (Expert("math", {"weight": 0.5}),)).column("weight")
    [0.5]
    """

    name: str
    shape: tuple[int, ...]
    experts: tuple[Expert, ...]
    seed: int = DEFAULT_SEED

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def column(self, parameter: str) -> list[float]:
        """A parameter of every expert."""
        return [expert[parameter] for expert in self.experts]

    def key(self, t: int | None, purpose: str = "drop") -> int:
        """The key of the random stream of expert ``t``, or (None) of the one that all share."""
        return stream_key(self.seed, "" if t is None else self.experts[t].identity, self.name, purpose)


class Workspace:
    """Buffers of one thread, reused from tile to tile."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """An uninitialised C-contiguous array of this shape; the buffer of the last one of the same name is
        reused."""
        wanted = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < wanted:
            buffer = self._buffers[name] = np.empty(wanted, np.uint8)
        return np.asarray(buffer[:wanted].view(dtype).reshape(shape))


@dataclass(frozen=True)
class Tile:
    """A piece of a tensor.  A row is whole but for Grain.ELEMENT, which has one row of any length; a tile of
    Grain.TENSOR is the tensor.

    Args:
        subject: The tensor.
        start: Its first element.
        base: float32 (rows, n); None without a base.
        values: float32 (experts, rows, n): deltas, or for a method with ``of_deltas = False`` the experts'
            weights themselves; they may be overwritten.  Of no experts for a method that is `one_by_one`.
        workspace: Buffers for what a method needs beside.
        stream: What `each` gives to a method that is `one_by_one`.

    >>> import numpy as np
    >>> zeros = np.zeros((2, 3, 4), np.float32)
    >>> Tile(Subject("w", (3, 4), ()), 0, zeros[0], zeros, Workspace()).shape
    (3, 4)
    """

    subject: Subject
    start: int
    base: Array | None
    values: Array
    workspace: Workspace
    stream: Iterator[Array] | None = None

    @property
    def each(self) -> Iterable[Array]:
        """The values (rows, n) of one expert after the other, to be asked for once; for a method that is
        `one_by_one` they are read meanwhile, into one buffer."""
        return self.values if self.stream is None else self.stream

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, n)"""
        return self.values.shape[1], self.values.shape[2]


MOST_HELD = 48_000_000  # bytes of a tensor's inputs that a thread keeps from one pass to the next
Passes = Callable[[], Iterable[Tile]]
"""Each call starts a pass over the tiles of a tensor, in order; the buffers of a tile are reused for the
next."""


def row_length(name: str, shape: Sequence[int]) -> int:
    """How many values feed one output node: the last axis of a matrix or of stacked experts (E, out, in);
    everything behind the first axis of a convolution (out, in, k...); all of a vector; 1 for a scalar."""
    if len(shape) <= 1:
        return shape[0] if shape else 1
    if len(shape) == 2 or (len(shape) == 3 and not _is_convolution(name, shape)):
        return shape[-1]
    return math.prod(shape[1:])


def _is_convolution(name: str, shape: Sequence[int]) -> bool:
    """A 3-D tensor is a 1-D convolution by name or by its small kernel, else a stack of matrices."""
    if "expert" in name:
        return False
    return "conv" in name or shape[-1] <= 16


def as_rows(name: str, values: Array) -> Array:
    """The tensor as (rows, row length); an empty tensor as (0, 1)."""
    if values.size == 0:
        return values.reshape(0, 1)
    return values.reshape(-1, row_length(name, values.shape))


def cut(grain: Grain, name: str, shape: Sequence[int], target: int) -> list[tuple[int, int, int]]:
    """The tiles of a tensor as (start, rows, n), of about ``target`` elements each.

    >>> cut(Grain.ROW, "w", (5, 100), 250)
    [(0, 2, 100), (200, 2, 100), (400, 1, 100)]
    """
    size = math.prod(shape)
    if grain is Grain.ELEMENT:
        return [(start, 1, min(target, size - start)) for start in range(0, size, target)]
    n = row_length(name, shape)
    rows = size // max(n, 1) if grain is Grain.TENSOR else max(1, target // max(n, 1))
    return [(start, min(rows, (size - start) // n), n) for start in range(0, size, rows * n)] if size else []
