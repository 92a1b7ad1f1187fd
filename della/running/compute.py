"""The tensors of a Plan, computed piece by piece: drop, elect, fuse, round; reading.py reads.

Each is a pure function of the recipe, the inputs and the seed: it does not depend on threads or tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from della.checkpoint.view import Hashes
from della.dtypes import Array, round_to, widen
from della.errors import OutputError, Problem
from della.merging import compat, reference
from della.merging.kernels import cast
from della.merging.tensor import Band, TensorMerge, Workspace, all_scores, find_bands
from della.options import TILE
from della.planning.job import Job, Plan
from della.running.reading import CURE, Reader
from della.running.workers import Stopped


class Compute:
    """Computes jobs of ``plan``; several threads may use it at once.  ``tile`` is in elements."""

    def __init__(self, plan: Plan, tile: int = TILE) -> None:
        self.plan, self.tile = plan, tile
        self.stop = threading.Event()
        self._local = threading.local()

    def pieces(self, job: Job, bands: Sequence[Band] | None, hashes: Hashes | None = None) -> Iterator[Array]:
        """The merged tensor in its storage dtype, piece by piece, in a buffer that is reused.

        Args:
            job: the tensor.
            bands: its thresholds, where they are of the whole model.
            hashes: fed the bytes of every input.

        Raises:
            CheckpointError: an input is damaged.
            OutputError: values do not fit the storage dtype.
        """
        overflow = _Overflow(job, self.plan.recipe.nonfinite)
        for values, start in self._computed(job, bands, self._reader(job, hashes)):
            if self.stop.is_set():
                raise Stopped
            yield values if start is None else overflow.checked(*self._narrow(job, values), start)
        overflow.raise_any()

    def _computed(
        self, job: Job, bands: Sequence[Band] | None, reader: Reader
    ) -> Iterator[tuple[Array, int | None]]:
        """(values, their first element); None instead of the element for what is copied as it is stored."""
        if job.elements == 0:
            return
        if job.choice is None:
            yield from reader.copied()
        elif job.choice.compat is not None or job.exact_double:
            yield self._whole(job, reader), 0
        elif job.choice.drop == "average":
            yield from self._averaged(job, reader)
        else:
            yield from self._merged(job, bands, reader)

    # ---- the kinds of job ----

    def _merged(self, job: Job, bands: Sequence[Band] | None, reader: Reader) -> Iterator[tuple[Array, int]]:
        assert job.choice is not None
        merge = TensorMerge(
            job.name, job.elements, job.choice, reader.experts(), self.plan.recipe.seed, bands
        )
        merge.prepare(lambda: self._reader(job).tiles(self.tile))
        for tile in reader.tiles(self.tile):
            out = self._workspace.array("out", tile.base.shape)
            merge.apply(tile, out, self._workspace)
            yield out, tile.start

    def _averaged(self, job: Job, reader: Reader) -> Iterator[tuple[Array, int]]:
        """reference.average, tile by tile."""
        assert job.choice is not None
        total_weight = sum((np.float32(e.weight) for e in job.experts), np.float32(0))
        for start in range(0, job.elements, self.tile):
            count = min(self.tile, job.elements - start)
            total = self._workspace.array("out", (count,))
            total.fill(0)
            for each in job.operands:
                values = reader.floats(each.view, start, count, "values")
                cast.accumulate(total, np.float32(each.expert.weight), values)
            if job.choice.fuse != "sum":
                np.divide(total, total_weight, out=total)
            yield total, start

    def _whole(self, job: Job, reader: Reader) -> Array:
        """A tensor by the reference or by mergekit's rules, all at once: float64 inputs and compat are
        rare.
        """
        assert job.choice is not None
        real = np.float64 if job.exact_double else np.float32
        average = job.choice.drop == "average"
        arrays: list[Array] = []
        for view in job.weights:
            arrays.append(reader.whole(view, real, None if average or not arrays else arrays[0]))
        base, models = (arrays[0], arrays) if average else (arrays[0], arrays[1:])
        seed, experts = self.plan.recipe.seed, reader.experts()
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
            reader = self._reader(job)
            experts = reader.experts()
            return (all_scores(experts, tile) for tile in reader.tiles(self.tile))

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

    def _reader(self, job: Job, hashes: Hashes | None = None) -> Reader:
        return Reader(job, self.plan.recipe.nonfinite, self._workspace, self.stop, hashes)

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
            said = f"{self.first}{more} when it is rounded to {self.job.dtype.torch_name}"
            fix = f"choose a wider out_dtype, or a smaller lambda; or {CURE}"
            raise OutputError(Problem(said, fix, self.job.name, self.job.name))


def needs_bands(job: Job) -> bool:
    """Whether the thresholds of the whole model have a part in this tensor."""
    choice = job.choice
    return choice is not None and choice.scope == "model" and choice.drop == "top" and job.elements > 0
