"""The tensors of a Plan, computed piece by piece: merged by their method, and rounded; reading.py reads.

Each is a pure function of the recipe, the inputs and the seed: it does not depend on threads or tiles.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from della.checkpoint.view import Hashes
from della.dtypes import Array, round_to, widen
from della.errors import OutputError, Problem
from della.merging.driver import merged
from della.merging.kernels import cast
from della.merging.method import Method
from della.merging.tile import MOST_HELD, Passes, Subject, Tile, Workspace
from della.options import TILE
from della.planning.job import Job, Plan
from della.running.measure import Probe
from della.running.reading import CURE, Held, Reader
from della.running.workers import Stopped


class Compute:
    """Computes jobs of ``plan``; several threads may use it at once.  ``tile`` is in elements."""

    def __init__(self, plan: Plan, tile: int = TILE) -> None:
        self.plan, self.tile = plan, tile
        self.stop = threading.Event()
        self._local = threading.local()

    def pieces(
        self, job: Job, learnt: Any = None, hashes: Hashes | None = None, probe: Probe | None = None
    ) -> Iterator[Array]:
        """The merged tensor in its storage dtype, piece by piece, in a buffer that is reused.

        Args:
            job: the tensor.
            learnt: what `learn` says of it, where the method learns of the whole model.
            hashes: fed the bytes of every input.
            probe: shown the values of every operand.

        Raises:
            CheckpointError: an input is damaged.
            OutputError: values do not fit the storage dtype.
        """
        overflow = _Overflow(job, self.plan.recipe.nonfinite)
        for values, start in self._computed(job, learnt, self._reader(job, hashes, probe)):
            if self.stop.is_set():
                raise Stopped
            yield values if start is None else overflow.checked(*self._narrow(job, values), start)
        overflow.raise_any()

    def _computed(self, job: Job, learnt: Any, reader: Reader) -> Iterator[tuple[Array, int | None]]:
        """(values, their first element); None instead of the element for what is copied as it is stored."""
        if job.elements == 0:
            return
        if job.method is None or job.copied is not None:
            yield from reader.copied()
            return
        subject = reader.subject(self.plan.recipe.seed)
        if job.method.compat is not None or job.exact_double:
            yield self._whole(job, job.method, subject, reader), 0
            return
        held = Held() if sum(view.nbytes for view in job.weights) <= MOST_HELD else None

        def passes() -> Iterable[Tile]:
            reader.held = held  # for the last pass: nothing is kept where it is the only one
            return self._reader(job, held=held).tiles(self.tile, subject)

        tiles = reader.tiles(self.tile, subject)
        for start, values in merged(job.method, subject, passes, tiles, learnt, self._workspace):
            yield values, start

    def _whole(self, job: Job, method: Method, subject: Subject, reader: Reader) -> Array:
        """A tensor by the reference or by mergekit's rules, all at once: float64 inputs and compat are
        rare.
        """
        real = np.float64 if job.exact_double else np.float32
        base = reader.whole(job.base, real, None) if job.reads_base else None
        models = [reader.whole(each.view, real, base) for each in job.operands]
        if reader.probe and base is not None:
            reader.probe.base(0, base.reshape(-1))
        for t, values in enumerate(models):
            if reader.probe:
                delta = values if base is None or not method.of_deltas else values - base
                reader.probe.operand(t, 0, delta.reshape(-1))
        return method.whole(subject, base, models)

    def learn(self) -> dict[str, Any]:
        """What the method learns of the whole model, by tensor: JSON; {} where it learns nothing.

        Raises:
            CheckpointError: an input is damaged.
        """
        jobs = [job for job in self.plan.jobs if job.of_whole_model]
        if not jobs or jobs[0].method is None:
            return {}
        subjects = [self._reader(job).subject(self.plan.recipe.seed) for job in jobs]
        return jobs[0].method.learn([(s, self._passes(job, s)) for job, s in zip(jobs, subjects)])

    # ---- reading and rounding ----

    @property
    def _workspace(self) -> Workspace:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        return workspace

    def _passes(self, job: Job, subject: Subject) -> Passes:
        return lambda: self._reader(job).tiles(self.tile, subject)

    def _reader(
        self, job: Job, hashes: Hashes | None = None, probe: Probe | None = None, held: Held | None = None
    ) -> Reader:
        return Reader(job, self.plan.recipe.nonfinite, self._workspace, self.stop, hashes, probe, held)

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
