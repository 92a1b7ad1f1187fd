"""What a merge will do: a Plan, one Job for each output tensor, and what it will cost.

A Plan can be printed, hashed and tested without weights; planning.py makes it, run.py executes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.view import Stored, TensorView
from della.dtypes import DType
from della.merging.methods import OF_TENSOR, Choice, Drop, Expert
from della.merging.reference import row_length
from della.options import TILE
from della.recipe.reader import ModelEntry, Recipe

# Rough costs for the estimate, measured on one core of a 2-core server: nanoseconds per element and expert.
_NANOSECONDS = {"magprune": 3.5, "bernoulli": 1.2, "top": 3.2, "band": 3.5, "none": 0.8, "average": 0.6}
_BYTES_PER_SECOND, _START_SECONDS, _START_MEMORY = 2.0e9, 0.8, 150 << 20


@dataclass(frozen=True, eq=False)
class Model:
    """A model of the recipe, opened; ``norms`` is its file of input norms, if it has one."""

    entry: ModelEntry
    source: Source
    norms: Source | None = None


@dataclass(frozen=True)
class Operand:
    """A view that stands for one model in a job: usually that model's own tensor of this name.

    ``expert`` is what the stages do with it, ``norms`` the input norms that rank its deltas.  ``values`` are
    its settings as the recipe resolves them, for display.
    """

    model: Model
    view: TensorView
    expert: Expert
    norms: TensorView | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One output tensor.  ``choice`` is None where ``base`` is copied.

    ``operands`` are in canonical order; ``shared`` are the resolved settings of no one model, for display.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    base: TensorView
    choice: Choice | None
    operands: tuple[Operand, ...] = ()
    shared: Mapping[str, Any] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.bytes

    @property
    def experts(self) -> list[Expert]:
        """What the stages do with each operand."""
        return [each.expert for each in self.operands]

    @property
    def reads_base(self) -> bool:
        """Whether the base is read: for a plain average it is not."""
        return self.choice is None or self.choice.drop != "average"

    @property
    def weights(self) -> list[TensorView]:
        """What is merged, the base first."""
        return [self.base] * self.reads_base + [each.view for each in self.operands]

    @property
    def views(self) -> list[TensorView]:
        """All that is read: the weights, then input norms."""
        return self.weights + [each.norms for each in self.operands if each.norms]

    @property
    def parts(self) -> list[Stored]:
        """The stored tensors that are read, each once."""
        return list(dict.fromkeys(part for view in self.views for part in view.parts))

    @property
    def bytes_read(self) -> int:
        """Bytes of input that one pass over this tensor reads."""
        return sum(view.nbytes for view in self.views)

    @property
    def exact_double(self) -> bool:
        """Whether a view gives float64: then arithmetic is float64, by the reference itself."""
        return any(view.element.name == "F64" for view in (self.base, *self.weights))


@dataclass
class Plan:
    """What a merge will do.  A context manager that closes the inputs.

    ``base`` is the template of the output: names, shapes and side files (the first model where the method
    needs no base).  ``models`` are in the order of the recipe.
    """

    recipe: Recipe
    base: Source
    models: tuple[Model, ...]
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
        norms = (model.norms for model in self.models)
        return list(dict.fromkeys((self.base, *(m.source for m in self.models), *filter(None, norms))))

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
            (job.choice.drop, job.elements * max(len(job.operands), 1))
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
        return job.elements * 8 * (3 * len(job.operands) + 6)
    tile = min(max(TILE, row_length(job.name, job.shape)), job.elements)
    arrays = len(job.operands) * (3 if job.choice.fuse == "calibrated" else 1) + 5
    arrays += len(job.operands) * (job.choice.importance == "wanda")
    ranks_all = job.choice.drop == "magprune" and job.choice.rank_by in OF_TENSOR
    table = job.elements * 12 if ranks_all else 0
    return tile * 4 * arrays + table
