"""What a job reads, as arithmetic wants it: float32 tiles in reused buffers, or a whole tensor at once.

Values that are not finite are treated here, as the recipe's `nonfinite` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import numpy as np

from della.checkpoint.norms import read_norms
from della.checkpoint.view import Hashes, TensorView
from della.dtypes import Array, widen
from della.errors import CheckpointError, Problem
from della.merging.kernels import cast
from della.merging.tile import Subject, Tile, Workspace, cut
from della.planning.job import Job, Operand
from della.running.measure import Probe
from della.running.workers import Stopped

CURE = "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"
_COPY_BYTES = 1 << 22
_COUNTED = 1 << 21  # elements that are looked at together when a damaged tensor is counted through


class Held:
    """What was read of a job's views, for its next pass: whole tensors, from their start on."""

    def __init__(self) -> None:
        self._stored: dict[TensorView, tuple[Array, int]] = {}

    def read(self, view: TensorView, start: int, count: int, hashes: Hashes | None) -> Array:
        """``count`` elements of a view in its own type, not to be written to."""
        stored, known = self._stored.get(view) or (np.empty(view.elements, view.element.numpy), 0)
        wanted, end = stored[start : start + count], start + count
        if end > known:  # a pass reads in order
            view.read_into(start, wanted, hashes)
            self._stored[view] = stored, end
        elif hashes is not None:
            size = view.element.bytes
            for part in view.parts:
                hashes.feed(part, start * size, wanted.view(np.uint8).data)
        return wanted


class Reader:
    """Reads the views of one job, in one thread.

    Args:
        job: what is read.
        nonfinite: the recipe's rule: "error", "keep" or "zero".
        workspace: the thread's buffers.
        stop: ends the reading (Stopped) at the next tile when it is set.
        held: bytes of views that a pass before has read, or that this one keeps; None where none does.
        hashes: fed the bytes of every part; None while a pass is only for looking.
        probe: shown every tile, as the method gets it.
    """

    def __init__(
        self, job: Job, nonfinite: str, workspace: Workspace, stop: Event,
        hashes: Hashes | None = None, probe: Probe | None = None, held: Held | None = None,
    ) -> None:  # fmt: skip
        self.job, self.nonfinite, self.workspace = job, nonfinite, workspace
        self.stop, self.hashes, self.probe, self.held = stop, hashes, probe, held

    def subject(self, seed: int) -> Subject:
        """What the method is told of the job: its experts have their input norms."""
        experts = [
            replace(each.expert, norms=read_norms(each.norms, self.hashes)) if each.norms else each.expert
            for each in self.job.operands
        ]
        return replace(self.job.subject, experts=tuple(experts), seed=seed)

    def tiles(self, size: int, subject: Subject) -> Iterator[Tile]:
        """The base and the experts' values, in tiles of about ``size`` elements whose buffers are reused."""
        job, operands = self.job, self.job.operands
        assert job.method is not None
        for start, rows, n in cut(job.method.grain, job.name, job.shape, size):
            if self.stop.is_set():
                raise Stopped
            base = None
            if job.reads_base:
                base = self._floats(job.base, start, self.workspace.array("base", (rows * n,)))
                if self.probe:
                    self.probe.base(start, base)
            own = None if base is None else base.reshape(rows, n)
            if job.method.one_by_one:
                none = np.empty((0, rows, n), np.float32)
                yield Tile(subject, start, own, none, self.workspace, self._stream(start, (rows, n), base))
                continue
            values = self.workspace.array("tile", (len(operands), rows * n))
            for t, mine in enumerate(values):
                self._values(t, start, base, mine)
            yield Tile(subject, start, own, values.reshape(-1, rows, n), self.workspace)

    def _stream(self, start: int, shape: tuple[int, int], base: Array | None) -> Iterator[Array]:
        """The values of one operand after the other, in one buffer."""
        for t in range(len(self.job.operands)):
            values = self.workspace.array("tile", (shape[0] * shape[1],))
            self._values(t, start, base, values)
            yield values.reshape(shape)

    def _values(self, t: int, start: int, base: Array | None, out: Array) -> None:
        """What the method takes of operand ``t``: its delta, or its weights."""
        assert self.job.method is not None
        operand = self.job.operands[t]
        if base is not None and self.job.method.of_deltas:
            self._subtract(operand, start, base, out)
        else:
            self._floats(operand.view, start, out, base)
        if self.probe:
            self.probe.operand(t, start, out)

    def _floats(self, view: TensorView, start: int, values: Array, base: Array | None = None) -> Array:
        """Elements of a view from ``start`` on into ``values`` (flat float32), which is returned."""
        name = view.element.name
        if name == "F32":
            view.read_into(start, values, self.hashes)
            is_finite = cast.all_finite(values, name)
        elif name == "BF16":
            stored = self._stored(view, start, values.size).view(np.uint16)
            is_finite = bool(cast.widen_bf16(stored, values.view(np.uint32)))
        else:
            is_finite = cast.all_finite(widen(self._stored(view, start, values.size), values), "F32")
        return values if is_finite else self._cured(view, values, base)

    def whole(self, view: TensorView, dtype: Any, base: Array | None) -> Array:
        """A view all at once, in the arithmetic type ``dtype``."""
        values = widen(view.read(self.hashes)).astype(dtype)
        return values if np.isfinite(values).all() else self._cured(view, values, base)

    def copied(self) -> Iterator[tuple[Array, int | None]]:
        """What is copied in pieces whose buffer is reused: as it is stored, with None; or, where the view
        computes it, or the result has another type, as values to be rounded, with the first element's number.
        """
        view = self.job.copied
        assert view is not None
        most = _COPY_BYTES // view.element.bytes
        for start in range(0, view.elements, most):
            stored = self._stored(view, start, min(most, view.elements - start))
            if view.element is self.job.dtype:
                yield stored, None
            else:
                values = widen(stored)
                yield values if np.isfinite(values).all() else self._cured(view, values, None), start

    def _stored(self, view: TensorView, start: int, count: int) -> Array:
        """``count`` elements of a view in its own type."""
        if self.held is not None and view.parts == (view,):
            return self.held.read(view, start, count, self.hashes)
        stored = self.workspace.array("stored in", (count,), view.element.numpy)
        view.read_into(start, stored, self.hashes)
        return stored

    def _subtract(self, each: Operand, start: int, base: Array, delta: Array) -> None:
        """delta = expert - base; of bfloat16 in one pass, without the widened values in between."""
        view = each.view
        if view.element.name == "BF16":
            stored = self._stored(view, start, base.size).view(np.uint16)
            if cast.subtract_bf16(stored, base, delta, delta.view(np.uint32)):
                return
            values = self.workspace.array("values", base.shape)
            cast.widen_bf16(stored, values.view(np.uint32))
            values = self._cured(view, values, base)
        else:
            values = self._floats(view, start, self.workspace.array("values", base.shape), base)
        with np.errstate(all="ignore"):  # an overflow is told when the result is rounded
            np.subtract(values, base, out=delta)

    def _cured(self, view: TensorView, values: Array, base: Array | None) -> Array:
        """``values``, not all finite, as the recipe's nonfinite wants them: zero makes no change of such a
        value, by the ``base``'s; without a base it is 0.
        """
        if self.nonfinite == "error":
            raise damaged(view)
        if self.nonfinite == "zero":
            np.copyto(values, 0 if base is None else base, where=~np.isfinite(values))
        return values


def damaged(view: TensorView) -> CheckpointError:
    """What is wrong with a view that is not all finite, counted all over it."""
    found, first = 0, ""
    for start in range(0, view.elements, _COUNTED):
        stored = np.empty(min(_COUNTED, view.elements - start), view.element.numpy)
        view.read_into(start, stored)
        values = widen(stored)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size and not found:
            first = f"the first is element {start + int(bad[0])}: {values[bad[0]]}"
        found += bad.size
    said = (
        f"tensor {view.name} of {view.reference} holds {found:,} value{'s' * (found != 1)} that "
        f"{'are' if found != 1 else 'is'} NaN or infinite ({first})"
    )
    fix = f"such a model is damaged: get it again, or {CURE}"
    return CheckpointError(Problem(said, fix, view.where, view.name))
