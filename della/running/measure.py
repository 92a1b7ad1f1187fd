"""What a merge learns of its models while it reads them: whether a model changes a tensor at all, and how far
it is from the base, from a sample of the elements.

A fine-tune's deltas are small, and its weights point where the base's do.  A model that is none, or whose
rows or vocabulary have another order, has a cosine near 0 with the base and |delta| near 1.4 |base|.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from della.checkpoint.source import Source
from della.dtypes import Array
from della.errors import CheckpointError, Collector, some
from della.output.journal import Done
from della.planning.coverage import cure
from della.planning.job import Coverage, Job, Plan

WINDOWS, WIDTH = 8, 4096  # of each tensor: so many windows of so many elements, or all of a smaller one
LEAST_COSINE = 0.5
LEAST_ELEMENTS = 256  # of a matrix whose cosine says something

Measured = tuple[float, ...]
"""Of one operand: 1 if its delta is not zero throughout, then |delta|^2, |base|^2 and delta . base."""


class Probe:
    """A sample of the base and the operands of one job, taken while it is read.

    Which elements it has depends on the shape alone: not on tiles, threads or parts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        size = job.elements
        step = size // WINDOWS
        whole = size <= WINDOWS * WIDTH
        self.starts = [0] if whole else [k * step for k in range(WINDOWS)]
        self.width = size if whole else WIDTH
        real = np.float64 if job.exact_double else np.float32
        self.samples = np.zeros((1 + len(job.operands), len(self.starts) * self.width), real)
        self.changed = [False] * len(job.operands)
        self.compared: Array | None = None  # where tiles hold weights, the base's at the same elements

    def base(self, start: int, values: Array) -> None:
        """``values`` (flat) are the base's from element ``start`` on."""
        self._take(self.samples[0], start, values)
        if self.job.method is not None and not self.job.method.of_deltas:
            self.compared = values

    def operand(self, t: int, start: int, values: Array) -> None:
        """``values`` (flat) are the deltas, or the weights, of operand ``t``."""
        self._take(self.samples[1 + t], start, values)
        if not self.changed[t]:
            self.changed[t] = self._differs(values)

    def _differs(self, values: Array) -> bool:
        """Whether not all are zero, or the base's; most tiles show it by their first elements."""
        if self.compared is None:
            return bool(values[:WIDTH].any()) or bool(values.any())
        return not np.array_equal(values[:WIDTH], self.compared[:WIDTH]) or not np.array_equal(
            values, self.compared
        )

    def _take(self, sample: Array, start: int, values: Array) -> None:
        """What a sample has of ``values``."""
        end = start + values.size
        k = max(bisect_right(self.starts, start) - 1, 0)
        while k < len(self.starts) and self.starts[k] < end:
            a, b = max(self.starts[k], start), min(self.starts[k] + self.width, end)
            if a < b:
                piece = values[a - start : b - start]
                at = k * self.width + a - self.starts[k]
                sample[at : at + piece.size] = piece
            k += 1

    def measured(self) -> tuple[Measured, ...]:
        """Of each operand; the first number alone where what is sampled is not finite."""
        assert self.job.method is not None
        base, *deltas = self.samples.astype(np.float64)
        scale, found = self.job.elements / max(base.size, 1), []
        with np.errstate(all="ignore"):
            for changed, values in zip(self.changed, deltas, strict=True):
                delta = values if self.job.method.of_deltas else values - base
                sums = [
                    scale * float(np.sum(x * y)) for x, y in ((delta, delta), (base, base), (delta, base))
                ]
                # Fewer digits than processors may differ by; what is not finite says nothing.
                found.append((float(changed), *(float(f"{x:.9g}") for x in sums)))
        return tuple(each if all(map(math.isfinite, each)) else each[:1] for each in found)


def sampled(plan: Plan) -> tuple[Coverage, ...]:
    """The coverage of each model with what a sample of its tensors says, before any merge.

    Raises CheckpointError where a file cannot be read.
    """
    found: dict[str, tuple[Measured, ...]] = {}
    for job in plan.jobs:
        if job.method is None or not job.reads_base or not job.elements:
            continue
        probe = Probe(job)
        base, values = np.empty((2, probe.width), np.float32)
        for start in probe.starts:
            job.base.read_floats(start, base)
            probe.base(start, base)
            for t, each in enumerate(job.operands):
                each.view.read_floats(start, values)
                probe.operand(t, start, values - base if job.method.of_deltas else values)
        # That a sample shows no change does not say that there is none.
        found[job.name] = tuple((1.0, *of[1:]) for of in probe.measured())
    return told(plan, found, plan.coverage)


def told(
    plan: Plan, measured: Mapping[str, Sequence[Measured]], planned: Sequence[Coverage]
) -> tuple[Coverage, ...]:
    """``planned`` with what was ``measured`` of each tensor's operands."""
    sums = {model: np.zeros(3) for model in plan.models}
    unlike: dict[object, list[str]] = {model: [] for model in plan.models}
    missed = dict.fromkeys(plan.models, 0)
    for job in plan.jobs:
        for each, of in zip(job.operands, measured.get(job.name, ()), strict=False):
            if job.method is None or not job.elements or job.method.idle_by(each.expert):
                continue
            missed[each.model] += job.reads_base and not of[0] and each.view is not job.base
            if len(of) > 1:
                sums[each.model] += of[1:]
                if _is_unlike(job, of):
                    unlike[each.model].append(f"{job.name} ({_cosine(*of[1:]):.2f})")
    found = []
    for model, was in zip(plan.models, planned, strict=True):
        now = replace(was, changed=was.changed - missed[model], unlike=tuple(unlike[model]))
        delta, base, dot = sums[model]
        if base > 0 and model.source is not plan.base:
            cosine = round(_cosine(delta, base, dot), 4)
            now = replace(now, relative=float(f"{math.sqrt(delta / base):.3g}"), cosine=cosine)
        found.append(now)
    return tuple(found)


def _cosine(delta: float, base: float, dot: float) -> float:
    """Of base and base + delta, from |delta|^2, |base|^2 and delta . base."""
    expert = max(base + 2 * dot + delta, 0.0)
    return float((base + dot) / math.sqrt(base * expert)) if base > 0 and expert > 0 else 1.0


def _is_unlike(job: Job, of: Measured) -> bool:
    is_matrix = len(job.shape) > 1 and min(job.shape[:2]) > 1 and job.elements >= LEAST_ELEMENTS
    return is_matrix and of[2] > 0 and _cosine(*of[1:]) < LEAST_COSINE


def warnings(plan: Plan, coverage: Sequence[Coverage]) -> Iterator[str]:
    """A line for each model of which some matrices do not look like a fine-tune's of the base."""
    for each in coverage:
        if each.unlike:
            many = (
                f"{len(each.unlike)} matri{'ces' if len(each.unlike) > 1 else 'x'} of {each.merged} tensors"
            )
            yield (
                f"{each.reference}: does not look like a fine-tune of {plan.base.reference}: the cosine with "
                f"the base's is below {LEAST_COSINE} for {many}: {some(each.unlike)}; another model, or rows "
                "or a vocabulary in another order"
            )


def check_changes(plan: Plan, coverage: Sequence[Coverage], done: Mapping[str, Done]) -> None:
    """Refuses what is no merge: a model that changes nothing, or a result that is one of the models.

    Raises CheckpointError.
    """
    check = Collector(CheckpointError)
    for model, each in zip(plan.models, coverage, strict=True):
        if not each.changed and model.source is not plan.base:
            base = plan.base.reference
            said = f"changes nothing: its {each.merged} merged tensors are equal to those of {base}"
            check.add(said, cure(each, coverage), each.reference)
    check.raise_any()
    for source in _alike(plan, done):
        said = f"the result is this model, byte for byte: {len(plan.models)} models change nothing in it"
        check.add(said, "give larger weights, or a wider dtype", source.reference)
    check.raise_any()


def _alike(plan: Plan, done: Mapping[str, Done]) -> Iterator[Source]:
    """The base, or with several models one of them, where every merged tensor is as it has it."""
    merged = [job for job in plan.jobs if job.method is not None and job.elements]
    hashes = {job.name: dict(zip(job.parts, done[job.name].inputs, strict=True)) for job in merged}
    several = [model.source for model in plan.models] if len(plan.models) > 1 else []
    for source in dict.fromkeys([plan.base, *several] if plan.recipe.method.needs_base else several):
        own = ((job, source.tensors.get(job.name)) for job in merged)
        if merged and all(
            view is not None
            and view.dtype is job.dtype
            and [hashes[job.name].get(part) for part in view.parts] == [done[job.name].hash]
            for job, view in own
        ):
            yield source
            return
