"""A tensor as a merge sees it, wherever its numbers come from.

What plans and computes a merge knows views alone.  A new kind of tensor is a new class here, and a line in
`source.Source` that makes one of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from della.checkpoint.layout import Tensor
from della.checkpoint.pickles import copy_bytes
from della.checkpoint.weights import Weights
from della.dtypes import Array, DType, widen

PIECE_BYTES = 1 << 22


class TensorView(ABC):
    """A tensor with a name, a shape and a type, whose elements can be read from any number on, row-major.

    A view author writes one method, `read_into`.  Views compose: one that scales, turns or cuts another reads
    from that view, and gives its ``parts`` as its own.

    Args:
        name: what its model calls it.
        shape: its shape.
        dtype: the type in which its model stores it; the result has it where the recipe names none.
        parts: the stored tensors that reading it reads; none for what is in memory.
        element: the type of the elements that `read_into` gives, ``dtype`` unless said: a view that computes
            its numbers gives F32, or F64 where they need it, and is never rounded to ``dtype``.

    Example:
        >>> import numpy as np
        >>> from della.checkpoint.view import TensorView
        >>> from della.dtypes import DTYPES
        >>> class Ramp(TensorView):
        ...     def read_into(self, start, out, hashes=None):
        ...         out[:] = np.arange(start, start + out.size)
        >>> Ramp("ramp", (2, 3), DTYPES["F32"]).read()
        array([[0., 1., 2.],
               [3., 4., 5.]], dtype=float32)
    """

    def __init__(
        self, name: str, shape: Sequence[int], dtype: DType, parts: Sequence[Stored] = (),
        element: DType | None = None,
    ) -> None:  # fmt: skip
        self.name, self.shape, self.dtype = name, tuple(shape), dtype
        self.element = element or dtype
        self._parts = tuple(parts)

    @abstractmethod
    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        """Read the elements from number ``start`` on.

        Several threads may read one view at once; a merge reads from the start to the end, some of them
        several times.

        Args:
            start: the first element.
            out: flat and contiguous, of ``element.numpy``; filled with as many elements as it has.
            hashes: handed on to every view that is read; stored tensors feed it.

        Raises:
            CheckpointError: a file has changed, or cannot be read.
        """

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The stored tensors that reading it reads, each once."""
        return self._parts

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of input that one pass over it reads."""
        return sum(part.nbytes for part in self.parts)

    @property
    def key(self) -> str:
        """What its numbers depend on beyond its parts, as text; "" where that is nothing."""
        return ""

    @property
    def where(self) -> str:
        """The file of its first part, for messages."""
        return str(self.parts[0].file) if self.parts else "memory"

    @property
    def reference(self) -> str:
        """The model that its first part is of, as its user names it."""
        return self.parts[0].reference if self.parts else "memory"

    def read(self, hashes: Hashes | None = None) -> Array:
        """Read all of it.

        Returns:
            A new array of its shape, of ``element.numpy``.

        Raises:
            CheckpointError: a file has changed, or cannot be read.
        """
        out = np.empty(self.elements, self.element.numpy)
        self.read_into(0, out, hashes)
        return out.reshape(self.shape)

    def read_floats(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        """Read elements as float32, for views that compute: exact, but for float64, which is rounded.

        Args:
            start: the first element.
            out: flat float32; filled with as many elements as it has.
            hashes: as for `read_into`.

        Raises:
            CheckpointError: a file has changed, or cannot be read.
        """
        if self.element.name == "F32":
            self.read_into(start, out, hashes)
            return
        stored = np.empty(out.size, self.element.numpy)
        self.read_into(start, stored, hashes)
        if self.element.name == "F64":
            np.copyto(out, stored, casting="same_kind")
        else:
            widen(stored, out)


class Stored(TensorView):
    """A tensor as it is stored, in its own type; it is the one part of itself.

    Args:
        entry: its name, shape, type, and where in which file it lies.
        weights: the files that it is read from.
        bits: what it holds, of any strides, where its file cannot be read by offset.

    Example:
        >>> from della.checkpoint.source import open_source
        >>> with open_source("one") as model:
        ...     view = model.tensors["w"]
        ...     view.read(), view.nbytes
        (array([1., 2.], dtype=float32), 8)
    """

    def __init__(self, entry: Tensor, weights: Weights, bits: Array | None = None) -> None:
        super().__init__(entry.name, entry.shape, entry.dtype)
        self.file: Path = entry.file
        self.offset = entry.offset
        self._nbytes, self.weights, self._bits = entry.nbytes, weights, bits

    @property
    def parts(self) -> tuple[Stored, ...]:
        return (self,)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def reference(self) -> str:
        return self.weights.reference

    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        raw = out.view(np.uint8).data
        at = start * self.element.bytes
        self.read_bytes(at, raw)
        if hashes is not None:
            hashes.feed(self, at, raw)

    def read_bytes(self, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, writable) with what is stored from byte ``start`` on.

        Raises:
            CheckpointError: the file has changed, or cannot be read.
        """
        if start < 0 or start + buffer.nbytes > self.nbytes:
            raise ValueError(f"bytes {start} to {start + buffer.nbytes} of {self.name}: {self.nbytes}")
        if self._bits is None:
            self.weights.read_into(self.file, self.offset + start, buffer)
        elif buffer.nbytes:
            self.weights.check_size(self.file)
            copy_bytes(self._bits, start, buffer)

    def pieces(self, start: int = 0) -> Iterator[memoryview]:
        """The stored bytes from ``start`` on, in pieces whose buffer is reused."""
        buffer = memoryview(bytearray(min(PIECE_BYTES, self.nbytes - start)))
        for at in range(start, self.nbytes, PIECE_BYTES):
            piece = buffer[: self.nbytes - at]
            self.read_bytes(at, piece)
            yield piece


class Renamed(TensorView):
    """A tensor under another name, such as one without a prefix.

    Args:
        name: the new one.
        view: the tensor.
    """

    def __init__(self, name: str, view: TensorView) -> None:
        super().__init__(name, view.shape, view.dtype, view.parts, view.element)
        self.view = view

    @property
    def key(self) -> str:
        return self.view.key

    def read_into(self, start: int, out: Array, hashes: Hashes | None = None) -> None:
        self.view.read_into(start, out, hashes)


class Hashes:
    """xxh3_128 of stored tensors, taken while they are read, when their bytes are in the cache.

    Every byte is hashed once and in order, in whatever order a view reads: bytes that come again are passed
    over, and what nobody has read in its turn is read by `of`.  For one thread.

    Example:
        >>> from della.checkpoint.source import open_source
        >>> with open_source("one") as model:
        ...     view, hashes = model.tensors["w"], Hashes()
        ...     _ = view.read(hashes)
        ...     [hashes.of(part) for part in view.parts]
        ['4533ce61c4655ba3c3e077b25dd1d769']
    """

    def __init__(self) -> None:
        self._begun: dict[Stored, tuple[Any, int]] = {}  # the digest, and how many bytes it has seen

    def feed(self, stored: Stored, start: int, raw: memoryview) -> None:
        """``raw`` are the bytes of a tensor from byte ``start`` on."""
        digest, seen = self._begun.get(stored) or (xxhash.xxh3_128(), 0)
        end = start + raw.nbytes
        if start <= seen < end:
            digest.update(raw[seen - start :])
            self._begun[stored] = digest, end

    def of(self, stored: Stored) -> str:
        """The hash of all bytes of a tensor, in hexadecimal.

        Raises:
            CheckpointError: what was not read yet cannot be.
        """
        digest, seen = self._begun.get(stored) or (xxhash.xxh3_128(), 0)
        for piece in stored.pieces(seen):
            digest.update(piece)
        self._begun[stored] = digest, stored.nbytes
        found: str = digest.hexdigest()
        return found
