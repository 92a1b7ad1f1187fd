"""The tensors of a Plan, computed piece by piece: read, drop, elect, fuse, round.

Each is a pure function of the recipe, the inputs and the seed: it does not depend on threads or tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import xxhash

from della.checkpoint.layout import Tensor
from della.checkpoint.norms import read_norms
from della.checkpoint.source import Source
from della.dtypes import Array, round_to, widen
from della.errors import CheckpointError, OutputError
from della.merging import compat, reference
from della.merging.kernels import cast
from della.merging.methods import Expert
from della.merging.tensor import Band, TensorMerge, Tile, Workspace, all_scores, cut, find_bands
from della.planning.job import TILE, Input, Job, Plan

Digests = Sequence[Any]  # of xxh3_128; one for each of Job.reads, or none

_COPY_BYTES = 1 << 22
_CURE = "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"


class Stopped(Exception):
    """Another job failed, or the user interrupted."""


class Compute:
    """Computes jobs of ``plan``; several threads may use it at once.  ``tile`` is in elements."""

    def __init__(self, plan: Plan, tile: int = TILE) -> None:
        self.plan, self.tile = plan, tile
        self.stop = threading.Event()
        self._local = threading.local()

    def pieces(self, job: Job, bands: Sequence[Band] | None, digests: Digests = ()) -> Iterator[Array]:
        """The merged tensor in its storage dtype, piece by piece; each is void when the next one is asked
        for.  ``digests`` are fed the bytes of every input.

        Raises CheckpointError for damaged inputs, OutputError for values that do not fit the storage dtype.
        """
        overflow = _Overflow(job, self.plan.recipe.nonfinite)
        for values, start in self._computed(job, bands, digests):
            if self.stop.is_set():
                raise Stopped
            yield values if start is None else overflow.checked(*self._narrow(job, values), start)
        overflow.raise_any()

    def _computed(
        self, job: Job, bands: Sequence[Band] | None, digests: Digests
    ) -> Iterator[tuple[Array, int | None]]:
        """(values, their first element); None instead of the element for bytes that are copied."""
        if job.elements == 0:
            return
        if job.choice is None:
            for piece in self._copied(job, digests):
                yield piece, None
        elif job.choice.compat is not None or job.exact_double:
            yield self._whole(job, digests), 0
        elif job.choice.drop == "average":
            yield from self._averaged(job, digests)
        else:
            yield from self._merged(job, bands, digests)

    # ---- the kinds of job ----

    def _copied(self, job: Job, digests: Digests) -> Iterator[Array]:
        buffer = np.empty(min(_COPY_BYTES, job.nbytes), np.uint8)
        for start in range(0, job.nbytes, buffer.size):
            piece = buffer[: job.nbytes - start]
            job.source.read_into(job.base, start, piece.data)
            for digest in digests:
                digest.update(piece.data)
            yield piece

    def _merged(
        self, job: Job, bands: Sequence[Band] | None, digests: Digests
    ) -> Iterator[tuple[Array, int]]:
        assert job.choice is not None
        experts = _experts(job, digests)
        merge = TensorMerge(job.name, job.elements, job.choice, experts, self.plan.recipe.seed, bands)
        merge.prepare(lambda: self._tiles(job))
        for tile in self._tiles(job, digests):
            out = self._workspace.array("out", tile.base.shape)
            merge.apply(tile, out, self._workspace)
            yield out, tile.start

    def _averaged(self, job: Job, digests: Digests) -> Iterator[tuple[Array, int]]:
        """reference.average, tile by tile."""
        assert job.choice is not None
        total_weight = sum((np.float32(e.weight) for e in job.experts), np.float32(0))
        for start in range(0, job.elements, self.tile):
            count = min(self.tile, job.elements - start)
            total = self._workspace.array("out", (count,))
            total.fill(0)
            for t, each in enumerate(job.inputs):
                digest = digests[t] if digests else None
                values = self._read(each.source, each.tensor, start, count, "values", digest, None)
                cast.accumulate(total, np.float32(each.expert.weight), values)
            if job.choice.fuse != "sum":
                np.divide(total, total_weight, out=total)
            yield total, start

    def _whole(self, job: Job, digests: Digests) -> Array:
        """A tensor by the reference or by mergekit's rules, all at once: float64 inputs and compat are
        rare.
        """
        assert job.choice is not None
        real = np.float64 if job.exact_double else np.float32
        average = job.choice.drop == "average"
        arrays: list[Array] = []
        for t, (source, tensor) in enumerate(job.weights):
            stored = source.read(tensor.name)
            if digests:
                digests[t].update(stored.reshape(-1).view(np.uint8).data)
            values = widen(stored).astype(real)
            if not np.isfinite(values).all():
                values = self._cured(source, tensor, values, None if average or not arrays else arrays[0])
            arrays.append(values)
        base, models = (arrays[0], arrays) if average else (arrays[0], arrays[1:])
        seed, experts = self.plan.recipe.seed, _experts(job, digests)
        with np.errstate(all="ignore"):  # infinities are told when the result is rounded
            if job.choice.compat is not None:
                return compat.merge(job.choice, base, models, experts, seed, job.name)
            if average:
                return reference.average(models, experts, job.choice.fuse != "sum")
            return reference.merge(job.choice, base, models, experts, seed, job.name)

    # ---- thresholds of the whole model (ties, scope: model) ----

    def model_bands(self) -> dict[str, list[Band]]:
        """TIES' thresholds where one is chosen for the whole model, as a band for every tensor and expert.

        Equal magnitudes at the threshold are kept in output order, so each tensor needs to know how many of
        them the tensors before it hold: a third pass counts those.
        """
        jobs = [job for job in self.plan.jobs if needs_bands(job)]
        if not jobs or jobs[0].choice is None:
            return {}
        size = sum(job.elements for job in jobs)

        def sizes(job: Job) -> Iterator[list[Array]]:
            experts = _experts(job)
            return (all_scores(experts, tile) for tile in self._tiles(job))

        whole = find_bands(
            jobs[0].choice, jobs[0].experts, size, lambda: chain.from_iterable(map(sizes, jobs))
        )
        left = [band.take for band in whole]
        bands: dict[str, list[Band]] = {}
        for job in jobs:
            bands[job.name] = [Band(b.high, b.skip, b.low, n) for b, n in zip(whole, left, strict=True)]
            for piece in sizes(job):
                for t, band in enumerate(whole):
                    bits = piece[t].view(np.uint32) & np.uint32(0x7FFFFFFF)
                    left[t] -= int(np.count_nonzero(bits == band.low))
            left = [max(n, 0) for n in left]
        return bands

    # ---- reading and rounding ----

    @property
    def _workspace(self) -> Workspace:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        return workspace

    def _tiles(self, job: Job, digests: Digests = ()) -> Iterator[Tile]:
        """Tiles in reused buffers: each is void when the next one is asked for."""
        assert job.choice is not None
        feeds = digests[: len(job.weights)] or [None] * len(job.weights)
        for start, rows, n in cut(job.choice, job.name, job.shape, self.tile):
            if self.stop.is_set():
                raise Stopped
            count = rows * n
            base = self._read(job.source, job.base, start, count, "base", feeds[0], None)
            deltas = self._workspace.array("tile", (len(job.inputs), count))
            for each, feed, delta in zip(job.inputs, feeds[1:], deltas, strict=True):
                self._subtract(each, start, base, feed, delta)
            yield Tile(start, base.reshape(rows, n), deltas.reshape(-1, rows, n))

    def _subtract(self, each: Input, start: int, base: Array, digest: Any, delta: Array) -> None:
        """delta = expert - base; of bfloat16 in one pass, without the widened values in between."""
        if each.tensor.dtype.name == "BF16":
            raw = self._raw(each.source, each.tensor, start, base.size, digest).view(np.uint16)
            if cast.subtract_bf16(raw, base, delta, delta.view(np.uint32)):
                return
            values = self._workspace.array("values", base.shape)
            cast.widen_bf16(raw, values.view(np.uint32))
            values = self._cured(each.source, each.tensor, values, base)
        else:
            values = self._read(each.source, each.tensor, start, base.size, "values", digest, base)
        with np.errstate(all="ignore"):  # an overflow is told when the result is rounded
            np.subtract(values, base, out=delta)

    def _raw(self, source: Source, tensor: Tensor, start: int, count: int, digest: Any) -> Array:
        """The bytes of ``count`` elements of a tensor from ``start`` on."""
        size = tensor.dtype.bytes
        raw = self._workspace.array("raw", (count * size,), np.uint8)
        source.read_into(tensor, start * size, raw.data)
        if digest is not None:
            digest.update(raw.data)
        return raw

    def _read(
        self, source: Source, tensor: Tensor, start: int, count: int, name: str, digest: Any,
        base: Array | None,
    ) -> Array:  # fmt: skip
        """``count`` elements of a tensor from ``start`` on, as float32 in the buffer ``name``."""
        raw = self._raw(source, tensor, start, count, digest)
        values = self._workspace.array(name, (count,))
        if tensor.dtype.name == "BF16":
            finite = cast.widen_bf16(raw.view(np.uint16), values.view(np.uint32))
        else:
            finite = cast.all_finite(widen(raw.view(tensor.dtype.numpy), values), "F32")
        return values if finite else self._cured(source, tensor, values, base)

    def _cured(self, source: Source, tensor: Tensor, values: Array, base: Array | None) -> Array:
        """``values``, not all finite, as the recipe's nonfinite wants them: zero makes no change of such a
        value, by the ``base``'s; without a base it is 0.
        """
        if self.plan.recipe.nonfinite == "error":
            raise self._damaged(source, tensor)
        if self.plan.recipe.nonfinite == "zero":
            np.copyto(values, 0 if base is None else base, where=~np.isfinite(values))
        return values

    def _damaged(self, source: Source, tensor: Tensor) -> CheckpointError:
        """Counts what is wrong with a tensor, all over it."""
        found, first = 0, ""
        each = max(1, (1 << 22) // tensor.dtype.bytes)
        for start in range(0, tensor.nbytes // tensor.dtype.bytes, each):
            count = min(each, tensor.nbytes // tensor.dtype.bytes - start)
            raw = np.empty(count * tensor.dtype.bytes, np.uint8)
            source.read_into(tensor, start * tensor.dtype.bytes, raw.data)
            values = widen(raw.view(tensor.dtype.numpy))
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size and not found:
                first = f"the first is element {start + int(bad[0])}: {values[bad[0]]}"
            found += bad.size
        return CheckpointError(
            f"{tensor.file}: tensor {tensor.name} of {source.reference} holds {found:,} "
            f"value{'s' * (found != 1)} that {'are' if found != 1 else 'is'} NaN or infinite ({first}); "
            f"such a model is damaged: get it again, or {_CURE}"
        )

    def _narrow(self, job: Job, values: Array) -> tuple[Array, bool]:
        """Rounded to the storage dtype of the output; whether all of it is finite then."""
        name = job.dtype.name
        if name == "BF16" and values.dtype == np.float32:
            stored = self._workspace.array("stored", (values.size,), np.uint16)
            return stored, bool(cast.round_bf16(values.reshape(-1).view(np.uint32), stored))
        stored = round_to(values.reshape(-1), job.dtype)
        finite = cast.all_finite(stored, name) if name in cast.MAGNITUDE else bool(np.isfinite(stored).all())
        return stored, finite


class _Overflow:
    """Values of one output tensor that are not finite once they are rounded."""

    def __init__(self, job: Job, policy: str) -> None:
        self.job, self.policy = job, policy
        self.count, self.first = 0, ""

    def checked(self, stored: Array, finite: bool, start: int) -> Array:
        """``stored`` (flat, from element ``start`` on), with zeros where the recipe wants them."""
        if not finite and self.policy != "keep":
            values = stored.view(self.job.dtype.numpy)
            wide = widen(values)
            bad = np.flatnonzero(~np.isfinite(wide))
            if not self.count:
                self.first = f"element {start + int(bad[0])} becomes {wide[bad[0]]}"
            self.count += bad.size
            values[bad] = 0
        return stored

    def raise_any(self) -> None:
        if self.count and self.policy == "error":
            more = f", and {self.count - 1:,} more do so," if self.count > 1 else ""
            raise OutputError(
                f"{self.job.name}: {self.first}{more} when it is rounded to {self.job.dtype.torch_name}; "
                f"choose a wider out_dtype, or a smaller lambda; or {_CURE}"
            )


def _experts(job: Job, digests: Digests = ()) -> list[Expert]:
    """The experts of a job in canonical order, with their input norms."""
    feeds = iter(digests[len(job.weights) :])
    return [
        replace(each.expert, norms=read_norms(*each.norms, next(feeds, None))) if each.norms else each.expert
        for each in job.inputs
    ]


def needs_bands(job: Job) -> bool:
    """Whether the thresholds of the whole model have a part in this tensor."""
    choice = job.choice
    return choice is not None and choice.scope == "model" and choice.drop == "top" and job.elements > 0


def digests_of(job: Job) -> list[Any]:
    """A fresh digest for each tensor that a job reads."""
    return [xxhash.xxh3_128() for _ in job.reads]
