"""What a merge will do: a Plan, one Job for each output tensor, and what it will cost.

A Plan can be printed, hashed and tested without weights; planning.py makes it, run.py executes it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from della.checkpoint.layout import Tensor
from della.checkpoint.source import Source
from della.dtypes import DType
from della.merging.methods import OF_TENSOR, Choice, Drop, Expert
from della.merging.reference import row_length
from della.recipe.reader import Recipe

TILE = 1 << 18  # elements of a tile: large enough to forget Python's overhead, small enough for the caches
# Rough costs for the estimate, measured on one core of a 2-core server: nanoseconds per element and expert.
_NANOSECONDS = {"magprune": 3.5, "bernoulli": 1.2, "top": 3.2, "band": 3.5, "none": 0.8, "average": 0.6}
_BYTES_PER_SECOND, _START_SECONDS, _START_MEMORY = 2.0e9, 0.8, 150 << 20


class Input(NamedTuple):
    """A tensor that stands for one model: usually that model's own of this name, in its ``source``.

    ``model`` is the model's place in Plan.models, ``expert`` what the stages do with it.  ``norms`` is where
    the input norms lie that rank its deltas.
    """

    model: int
    source: Source
    tensor: Tensor
    expert: Expert
    norms: tuple[Source, Tensor] | None = None


@dataclass(frozen=True)
class Job:
    """One output tensor.  ``choice`` is None where ``base`` (a tensor of ``source``) is copied.

    ``inputs`` are in canonical order; ``values`` are the resolved settings of every model in the recipe's
    order, and ``shared`` the others, for display.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    source: Source
    base: Tensor
    choice: Choice | None
    inputs: tuple[Input, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)
    values: tuple[dict[str, Any], ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.bytes

    @property
    def experts(self) -> list[Expert]:
        """The experts in canonical order."""
        return [each.expert for each in self.inputs]

    @property
    def reads_base(self) -> bool:
        """Whether the base's tensor is read: for a plain average it is not."""
        return self.choice is None or self.choice.drop != "average"

    @property
    def weights(self) -> list[tuple[Source, Tensor]]:
        """The tensors that are merged, the base's first."""
        own = [(self.source, self.base)] if self.reads_base else []
        return own + [(each.source, each.tensor) for each in self.inputs]

    @property
    def reads(self) -> list[tuple[Source, Tensor]]:
        """Every tensor that is read: the weights, then input norms."""
        return self.weights + [each.norms for each in self.inputs if each.norms]

    @property
    def bytes_read(self) -> int:
        """Bytes of input that one pass over this tensor reads."""
        return sum(tensor.nbytes for _, tensor in self.reads)

    @property
    def exact_double(self) -> bool:
        """Whether an input is float64: then arithmetic is float64, by the reference itself."""
        return any(t.dtype.name == "F64" for t in (self.base, *(each.tensor for each in self.inputs)))


@dataclass
class Plan:
    """What a merge will do.  A context manager that closes the inputs.

    ``base`` is the template of the output: names, shapes and side files (the first model where the method
    needs no base).  ``models`` are in the order of the recipe, as are ``norms``, each one's file of them.
    """

    recipe: Recipe
    base: Source
    models: tuple[Source, ...]
    norms: tuple[Source | None, ...]
    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    departures: tuple[str, ...]
    opened: ExitStack = field(repr=False, compare=False)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

    @property
    def sources(self) -> list[Source]:
        """The base, the models and their files of input norms, each once."""
        return list(dict.fromkeys((self.base, *self.models, *filter(None, self.norms))))

    @property
    def bytes_read(self) -> int:
        """Bytes that one pass over the inputs reads (some methods look at a tensor two or three times)."""
        return sum(job.bytes_read for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    def memory(self, threads: int) -> int:
        """Estimated peak resident bytes."""
        largest = max((_working_bytes(job) for job in self.jobs), default=0)
        return _START_MEMORY + threads * largest

    def seconds(self, threads: int) -> float:
        """Estimated wall time, with the inputs in memory or on a fast disk."""
        work = [
            (job.choice.drop, job.elements * max(len(job.inputs), 1))
            for job in self.jobs
            if job.choice is not None
        ]
        return estimated_seconds(work, self.bytes_read + self.bytes_written, threads)


def estimated_seconds(work: Iterable[tuple[Drop, int]], nbytes: int, threads: int) -> float:
    """Wall time for ``work`` of (kind of Drop, elements times experts), ``nbytes`` being read or written."""
    compute = sum(_NANOSECONDS[drop] * 1e-9 * elements for drop, elements in work)
    return _START_SECONDS + compute / threads + nbytes / _BYTES_PER_SECOND


def _working_bytes(job: Job) -> int:
    """Buffers of one thread: base, result, raw bytes, and deltas of every expert, in float32."""
    if job.choice is None:
        return 1 << 20
    if job.exact_double or job.choice.compat:
        return job.elements * 8 * (3 * len(job.inputs) + 6)
    tile = min(max(TILE, row_length(job.name, job.shape)), job.elements)
    arrays = len(job.inputs) * (3 if job.choice.fuse == "calibrated" else 1) + 5
    arrays += len(job.inputs) * (job.choice.importance == "wanda")
    ranks_all = job.choice.drop == "magprune" and job.choice.rank_by in OF_TENSOR
    table = job.elements * 12 if ranks_all else 0
    return tile * 4 * arrays + table


def default_threads() -> int:
    """As many threads as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
