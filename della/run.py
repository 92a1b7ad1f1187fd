"""Execute a Plan: read, drop, elect, fuse and write, tile by tile, a tensor per job, several jobs at a time.

The bytes do not depend on threads or tiles: each tensor is a pure function of the recipe, the inputs and the
seed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from della.card import config_json, model_card, without_code
from della.checkpoint.layout import STEMS, Tensor
from della.checkpoint.manifest import NAME, build_manifest, dump
from della.checkpoint.source import Source
from della.checkpoint.writer import StagedOutput
from della.dtypes import Array, round_to, widen
from della.errors import CheckpointError, OutputError
from della.merging import cast, compat, reference
from della.merging.tensor import Band, TensorMerge, Tile, Workspace, cut, find_bands
from della.planning import TILE, Job, Plan

_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Progress:
    """How far a run is: bytes read and written of their totals, tensors finished of all."""

    done: int
    total: int
    tensors: int
    of_tensors: int
    name: str


@dataclass(frozen=True)
class Result:
    """A finished merge: where it is, its manifest, the seconds of wall time it took, and those of them in
    which tensors were merged (without staging, side files and the wait for the disk).
    """

    out: Path
    manifest: dict[str, Any]
    seconds: float
    merging_seconds: float


class _Stopped(Exception):
    """Another job failed, or the user interrupted."""


def run(
    plan: Plan, out: Path, *, threads: int, overwrite: bool = False, fsync: bool = True,
    shard_bytes: int = 5_000_000_000, tile: int = TILE, progress: Callable[[Progress], None] | None = None,
) -> Result:  # fmt: skip
    """Merge into ``out``: a folder, or a single file where its name ends in .safetensors.

    Until the last step ``out`` is what it was.  Raises CheckpointError and OutputError.
    """
    started = time.monotonic()
    single = out.suffix == ".safetensors"
    sources = dict.fromkeys((plan.base, *plan.models))
    inputs = [path for s in sources for path in (s.place, *(f.path for f in s.files))]
    tensors = [(job.name, job.dtype, job.shape) for job in plan.jobs]
    stem = next((s for s in STEMS if plan.base.files[0].name.startswith(s)), STEMS[0])
    with StagedOutput(
        out, tensors, shard_bytes, overwrite, single, fsync, inputs=inputs, stem=stem
    ) as staged:
        cast.widen_bf16(np.zeros(0, np.uint16), np.zeros(0, np.uint32))  # Numba's own start takes 0.1 s
        staged_at = time.monotonic()
        hashes = _Run(plan, staged, tile, progress).all(threads)
        merging = time.monotonic() - staged_at
        manifest = build_manifest(
            recipe=plan.recipe.text,
            method=plan.recipe.merge_method,
            seed=plan.recipe.seed,
            base=plan.base,
            models=plan.models,
            identities=[m.identity for m in plan.recipe.models],
            hashes={job.name: hashes[job.name] for job in plan.jobs},
            departures=plan.departures,
        )
        if not single:
            _add_side_files(plan, staged, out.name, manifest)
        staged.commit()
    return Result(out, manifest, time.monotonic() - started, merging)


def _add_side_files(plan: Plan, staged: StagedOutput, title: str, manifest: dict[str, Any]) -> None:
    if plan.base.config:
        staged.add_file("config.json", config_json(plan.base.config, plan.jobs))
    for path in plan.base.side_files():
        staged.add_file(path.name, without_code(path))
    staged.add_file("README.md", model_card(plan, title))
    staged.add_file(NAME, dump(manifest))


class _Run:
    def __init__(
        self, plan: Plan, staged: StagedOutput, tile: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self.plan, self.staged, self.tile, self.progress = plan, staged, tile, progress
        self.total = plan.bytes_read + plan.bytes_written
        self.done = self.finished = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.local = threading.local()
        self.hashes: dict[str, str] = {}

    def all(self, threads: int) -> dict[str, str]:
        """Run every job; the hash of every tensor.  The largest go first, so that no thread ends much
        later.
        """
        bands = self._model_bands()
        jobs = sorted(self.plan.jobs, key=lambda job: -job.elements)
        with ThreadPoolExecutor(threads, thread_name_prefix="della") as pool:
            futures = [pool.submit(self._one, job, bands.get(job.name)) for job in jobs]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
            failures = [f.exception() for f in futures if not f.cancelled() and f.exception()]
        for failure in sorted(failures, key=lambda e: isinstance(e, _Stopped)):
            raise failure if failure is not None else AssertionError
        return self.hashes

    def _one(self, job: Job, bands: list[Band] | None) -> None:
        digest = xxhash.xxh3_128()
        start = told = 0
        for stored in self._stored(job, bands):
            if self.stop.is_set():
                raise _Stopped
            raw = stored.reshape(-1).view(np.uint8).data
            self.staged.write(job.name, start, raw)
            digest.update(raw)
            start += raw.nbytes
            now = (job.bytes_read + job.nbytes) * start // job.nbytes
            self._advance(job, now - told)
            told = now
        self.hashes[job.name] = digest.hexdigest()
        self._advance(job, 0, finished=1)

    def _advance(self, job: Job, count: int, finished: int = 0) -> None:
        with self.lock:
            self.done += count
            self.finished += finished
            if self.progress is not None:
                self.progress(Progress(self.done, self.total, self.finished, len(self.plan.jobs), job.name))

    def _stored(self, job: Job, bands: list[Band] | None) -> Iterator[Array]:
        """The merged tensor in its storage dtype, piece by piece."""
        if job.elements == 0:
            return
        if job.choice is None:
            yield from self._copied(job)
        elif job.choice.compat is not None or job.exact_double:
            yield self._narrow(job, self._whole(job))
        elif job.choice.drop == "average":
            yield from self._averaged(job)
        else:
            yield from self._merged(job, bands)

    # ---- the kinds of job ----

    def _copied(self, job: Job) -> Iterator[Array]:
        buffer = np.empty(min(_COPY_BYTES, job.nbytes), np.uint8)
        for start in range(0, job.nbytes, buffer.size):
            piece = buffer[: job.nbytes - start]
            self.plan.base.read_into(job.base, start, piece.data)
            yield piece

    def _merged(self, job: Job, bands: list[Band] | None) -> Iterator[Array]:
        assert job.choice is not None
        experts = [e for _, _, e in job.inputs]
        merge = TensorMerge(job.name, job.elements, job.choice, experts, self.plan.recipe.seed, bands)
        merge.prepare(lambda: self._tiles(job))
        for tile in self._tiles(job):
            out = self._workspace.array("out", tile.base.shape)
            merge.apply(tile, out, self._workspace)
            yield self._narrow(job, out, tile.start)

    def _averaged(self, job: Job) -> Iterator[Array]:
        """reference.average, tile by tile."""
        assert job.choice is not None
        total_weight = sum((np.float32(e.weight) for _, _, e in job.inputs), np.float32(0))
        for start in range(0, job.elements, self.tile):
            count = min(self.tile, job.elements - start)
            total = self._workspace.array("out", (count,))
            total.fill(0)
            for k, tensor, expert in job.inputs:
                values = self._read(self.plan.models[k], tensor, start, count, "values")
                cast.accumulate(total, np.float32(expert.weight), values)
            if job.choice.fuse != "sum":
                np.divide(total, total_weight, out=total)
            yield self._narrow(job, total, start)

    def _whole(self, job: Job) -> Array:
        """A tensor by the reference or by mergekit's rules, all at once: float64 inputs and compat are
        rare.
        """
        assert job.choice is not None
        real = np.float64 if job.exact_double else np.float32
        experts = [e for _, _, e in job.inputs]
        models = [widen(self._array(self.plan.models[k], t)).astype(real) for k, t, _ in job.inputs]
        average = job.choice.drop == "average"
        base = models[0] if average else widen(self._array(self.plan.base, job.base)).astype(real)
        seed = self.plan.recipe.seed
        with np.errstate(all="ignore"):  # infinities are told when the result is rounded
            if job.choice.compat is not None:
                return compat.merge(job.choice, base, models, experts, seed, job.name)
            if average:
                return reference.average(models, experts, job.choice.fuse != "sum")
            return reference.merge(job.choice, base, models, experts, seed, job.name)

    # ---- thresholds of the whole model (ties, scope: model) ----

    def _model_bands(self) -> dict[str, list[Band]]:
        """TIES' thresholds where one is chosen for the whole model, as a band for every tensor and expert.

        Equal magnitudes at the threshold are kept in output order, so each tensor needs to know how many of
        them the tensors before it hold: a third pass counts those.
        """
        jobs = [
            j for j in self.plan.jobs if j.choice and j.choice.scope == "model" and j.choice.drop == "top"
        ]
        jobs = [j for j in jobs if j.choice and j.choice.compat is None and j.elements and not j.exact_double]
        if not jobs or jobs[0].choice is None:
            return {}
        experts = [e for _, _, e in jobs[0].inputs]
        size = sum(job.elements for job in jobs)

        def deltas() -> Iterator[Array]:
            return (tile.deltas for job in jobs for tile in self._tiles(job))

        whole = find_bands(jobs[0].choice, experts, size, deltas)
        left = [band.take for band in whole]
        bands: dict[str, list[Band]] = {}
        for job in jobs:
            bands[job.name] = [Band(b.high, b.skip, b.low, n) for b, n in zip(whole, left, strict=True)]
            for tile in self._tiles(job):
                bits = tile.deltas.view(np.uint32) & np.uint32(0x7FFFFFFF)
                for t, band in enumerate(whole):
                    left[t] -= int(np.count_nonzero(bits[t] == band.low))
            left = [max(n, 0) for n in left]
        return bands

    # ---- reading and rounding ----

    @property
    def _workspace(self) -> Workspace:
        if not hasattr(self.local, "workspace"):
            self.local.workspace = Workspace()
        workspace: Workspace = self.local.workspace
        return workspace

    def _tiles(self, job: Job) -> Iterator[Tile]:
        """Tiles in reused buffers: each is void when the next one is asked for."""
        assert job.choice is not None
        for start, rows, n in cut(job.choice, job.name, job.shape, self.tile):
            if self.stop.is_set():
                raise _Stopped
            count = rows * n
            base = self._read(self.plan.base, job.base, start, count, "base")
            deltas = self._workspace.array("tile", (len(job.inputs), count))
            for t, (k, tensor, _) in enumerate(job.inputs):
                values = self._read(self.plan.models[k], tensor, start, count, "values")
                np.subtract(values, base, out=deltas[t])
            yield Tile(start, base.reshape(rows, n), deltas.reshape(-1, rows, n))

    def _read(self, source: Source, tensor: Tensor, start: int, count: int, name: str) -> Array:
        """``count`` elements of a tensor from ``start`` on, as float32 in the buffer ``name``."""
        size = tensor.dtype.bytes
        raw = self._workspace.array("raw", (count * size,), np.uint8)
        source.read_into(tensor, start * size, raw.data)
        values = self._workspace.array(name, (count,))
        if tensor.dtype.name == "BF16":
            finite = cast.widen_bf16(raw.view(np.uint16), values.view(np.uint32))
        else:
            widen(raw.view(tensor.dtype.numpy), values)
            finite = cast.all_clear(values.view(np.uint32), cast.SPECIAL["F32"])
        if not finite:
            raise _nonfinite(source, tensor, values, start)
        return values

    def _array(self, source: Source, tensor: Tensor) -> Array:
        values = source.read(tensor.name)
        if not np.isfinite(wide := widen(values)).all():
            raise _nonfinite(source, tensor, wide.reshape(-1), 0)
        return values

    def _narrow(self, job: Job, values: Array, start: int = 0) -> Array:
        """Rounded to the storage dtype of the output; refused where that makes an infinity or a NaN."""
        if job.dtype.name == "BF16" and values.dtype == np.float32:
            stored = self._workspace.array("stored", (values.size,), np.uint16)
            cast.round_bf16(values.reshape(-1).view(np.uint32), stored)
            bits = stored
        else:
            stored = round_to(values.reshape(-1), job.dtype)
            bits = (
                stored.view(cast.SPECIAL[job.dtype.name].dtype) if job.dtype.name in cast.SPECIAL else stored
            )
        special = cast.SPECIAL.get(job.dtype.name)
        clear = cast.all_clear(bits, special) if special is not None else np.isfinite(stored).all()
        if not clear:
            wide = widen(stored.view(job.dtype.numpy))
            first = int(np.flatnonzero(~np.isfinite(wide))[0])
            raise OutputError(
                f"{job.name}: element {start + first} becomes {wide[first]} when it is rounded to "
                f"{job.dtype.torch_name}; choose a wider out_dtype, or a smaller lambda"
            )
        return stored


def _nonfinite(source: Source, tensor: Tensor, values: Array, start: int) -> CheckpointError:
    bad = np.flatnonzero(~np.isfinite(values))
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name} of {source.reference} holds NaN or infinity "
        f"(element {start + int(bad[0])} is {values[bad[0]]}); such a model is damaged: get it again"
    )
