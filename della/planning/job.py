"""What a merge will do: a Plan, one Job for each output tensor, and what it will cost.

A Plan can be printed, hashed and tested without weights; planning.py makes it, run.py executes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.view import Stored, TensorView
from della.dtypes import DType
from della.errors import some
from della.merging.method import Method
from della.merging.tile import Expert, Subject, row_length
from della.options import TILE, size_text
from della.output.place import space_needed
from della.recipe.reader import ModelEntry, Recipe

# Rough costs for the estimate, measured on a 2-core server.
_BYTES_PER_SECOND, _START_SECONDS, _START_MEMORY = 2.0e9, 0.8, 167_000_000


@dataclass(frozen=True, eq=False)
class Model:
    """A model of the recipe, opened; ``norms`` is its file of input norms, if it has one."""

    entry: ModelEntry
    source: Source
    norms: Source | None = None


@dataclass(frozen=True)
class Operand:
    """A view that stands for one model in a job: usually that model's own tensor of this name.

    Args:
        model: The model.
        view: What is read.
        expert: What the method is told of it.
        norms: The input norms that rank its deltas.

    >>> import della
    >>> with della.plan("recipe.yml") as plan:
    ...     [(each.view.reference, each.expert["weight"]) for each in plan.jobs[0].operands]
    [('./one', 1.0), ('./two', 3.0)]
    """

    model: Model
    view: TensorView
    expert: Expert
    norms: TensorView | None = None


@dataclass(frozen=True)
class Job:
    """One output tensor.

    Args:
        name: Its name.
        shape: Its shape.
        dtype: The type in which it is stored.
        base: The tensor of the base.
        method: The method with its settings; None where ``base`` is copied.
        operands: The models, in canonical order.

    >>> import della
    >>> with della.plan("recipe.yml") as plan:
    ...     [(job.name, job.shape, job.dtype.name, job.bytes_read) for job in plan.jobs]
    [('w', (2,), 'F32', 16)]
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    base: TensorView
    method: Method | None
    operands: tuple[Operand, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.bytes

    @property
    def experts(self) -> list[Expert]:
        """What the method is told of each operand."""
        return [each.expert for each in self.operands]

    @property
    def reads_base(self) -> bool:
        """Whether the base is read; some methods need none."""
        return self.method is None or self.method.needs_base

    @property
    def copied(self) -> TensorView | None:
        """What is copied byte for byte, or only rounded; None where there is something to compute."""
        if self.method is None:
            return self.base
        return self.operands[0].view if self.method.copies(self.experts) else None

    @property
    def subject(self) -> Subject:
        """What the method is told of it; without input norms, which are not read yet."""
        return Subject(self.name, self.shape, tuple(self.experts))

    @property
    def of_whole_model(self) -> bool:
        """Whether the method must look at all tensors before it merges this one."""
        return self.method is not None and self.method.whole_model is not None and self.elements > 0

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


@dataclass(frozen=True)
class Coverage:
    """How much of a model takes part in a merge.

    Args:
        reference: The model, as the recipe names it.
        merged: How many of its floating tensors take part.
        of: Of how many that it has.
        changed: How many tensors of the result it changes: before the merge as far as parameters tell, after
            it those where its delta is not zero throughout.
        left_out: (tensor, why) of the others.
        relative: |delta| / |base| of all that was merged, from a sample; None where nothing was measured.
        cosine: Of model and base, alike.
        unlike: Names of matrices that do not look like a fine-tune's of the base: of a cosine below one half.

    >>> import della
    >>> with della.plan("recipe.yml") as plan:
    ...     [(each.reference, each.merged, each.of, each.changed) for each in plan.coverage]
    [('./one', 1, 1, 1), ('./two', 1, 1, 1)]
    """

    reference: str
    merged: int
    of: int
    changed: int
    left_out: tuple[tuple[str, str], ...] = ()
    relative: float | None = None
    cosine: float | None = None
    unlike: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """What is left out, and why, in words."""
        reasons: dict[str, list[str]] = {}
        for tensor, why in self.left_out:
            reasons.setdefault(why, []).append(tensor)
        return "; ".join(f"{some(names)} {why}" for why, names in reasons.items())

    def __str__(self) -> str:
        line = f"{self.reference}: {self.merged} of {self.of} tensors take part"
        line += f", {self.changed} of the result change"
        line += f"; left out: {self.why}" if self.left_out else ""
        return line if self.relative is None else f"{line}; |delta| is {self.relative:.2g} of |base|"

    @property
    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        left = [f"{tensor}: {why}" for tensor, why in self.left_out]
        found = {"merged": self.merged, "of": self.of, "left_out": left, "changed": self.changed}
        if self.relative is not None:
            found |= {"relative_delta": self.relative, "cosine": self.cosine, "unlike": len(self.unlike)}
        return found


@dataclass(frozen=True)
class Section:
    """What is planned as one merge: all of a model, or a slice or module of it.

    Args:
        label: "slice 2"; "" for all of a model.
        recipe: What is merged in it, and how.
        base: The template of its tensors, by their names in the result.
        models: The models, which have its tensors alone.
        depths: (depth, label) of each tensor.
        layers: Of a slice the stack, its first layer in the result, and how many there are.
        lists_base: Whether a slice lists its base.
    """

    label: str
    recipe: Recipe
    base: Source
    models: tuple[Model, ...]
    depths: Mapping[str, tuple[float, str]]
    layers: tuple[str, int, int] | None = None
    lists_base: bool = False

    @property
    def floats(self) -> list[str]:
        """The tensors that are merged."""
        return [name for name, view in self.base.tensors.items() if view.dtype.is_float]


@dataclass
class Plan:
    """What a merge will do.  A context manager that closes the inputs.

    Args:
        recipe: The recipe.
        base: The template of the output: names, shapes and side files (the first model where the method needs
            no base).
        models: The models, in the order of the recipe.
        jobs: A Job for each tensor of the output.
        notes: What the user should know.
        departures: What is computed otherwise than by mergekit.
        coverage: How much of each model takes part, in the order of ``models``.
        sections: What is planned as one merge: all of it, or a slice or module each.
        opened: What is closed at the end.
        before: Plans of the documents that lead to this one, in their order.

    >>> import della
    >>> with della.plan("recipe.yml") as plan:
    ...     plan.bytes_read, plan.bytes_written
    (16, 8)
    """

    recipe: Recipe
    base: Source
    models: tuple[Model, ...]
    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    departures: tuple[str, ...]
    coverage: tuple[Coverage, ...]
    sections: tuple[Section, ...]
    opened: ExitStack = field(repr=False, compare=False)
    before: tuple[Plan, ...] = ()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the inputs."""
        self.opened.close()

    def __repr__(self) -> str:
        merged = f"{len(self.models)} models, {len(self.jobs)} tensors"
        return f"<Plan: {self.recipe.merge_method}, {merged}, {size_text(self.bytes_written)}>"

    def _repr_html_(self) -> str:
        """For notebooks: a row for each model."""
        rows = [
            (each.reference, f"{each.merged} of {each.of}", each.changed, each.why) for each in self.coverage
        ]
        heads = ("model", "tensors that take part", "of the result changed", "left out")
        return f"<p>{html.escape(repr(self))}</p>{html_table(heads, rows)}"

    @property
    def sources(self) -> list[Source]:
        """The base, the models and their files of input norms, each once."""
        norms = (model.norms for model in self.models)
        merged = (self.base, *(m.source for m in self.models), *self.others)
        return list(dict.fromkeys((*merged, *filter(None, norms))))

    @property
    def others(self) -> list[Source]:
        """The bases of slices and modules that are neither the base nor a model, as far as they are read."""
        known = {self.base.reference, *(model.source.reference for model in self.models)}
        found: dict[str, Source] = {}
        for base in (section.base for section in self.sections):
            if base.reference not in known:
                held = found[base.reference].tensors if base.reference in found else {}
                found[base.reference] = base.changed({**held, **base.tensors})
        return list(found.values())

    @property
    def bytes_read(self) -> int:
        """Bytes that one pass over the inputs reads (some methods look at a tensor two or three times)."""
        return sum(job.bytes_read for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def disk(self) -> int:
        """Bytes that must be free beside OUT."""
        return space_needed(self.bytes_written)

    def memory(self, threads: int) -> int:
        """Estimated peak resident bytes."""
        largest = max((_working_bytes(job) for job in self.jobs), default=0)
        return _START_MEMORY + threads * largest

    def seconds(self, threads: int) -> float:
        """Estimated wall time, with the inputs in memory or on a fast disk."""
        work = [
            (job.method.nanoseconds, job.elements * max(len(job.operands), 1))
            for job in self.jobs
            if job.method is not None
        ]
        return estimated_seconds(work, self.bytes_read + self.bytes_written, threads)


def html_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in HTML, its cells as text."""
    lines = [("th", heads), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(str(x))}</{tag}>" for x in row) for tag, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def estimated_seconds(work: Iterable[tuple[float, int]], nbytes: int, threads: int) -> float:
    """Wall time for ``work`` of (nanoseconds, elements times experts), ``nbytes`` being read or written."""
    compute = sum(nanoseconds * 1e-9 * elements for nanoseconds, elements in work)
    return _START_SECONDS + compute / threads + nbytes / _BYTES_PER_SECOND


def _working_bytes(job: Job) -> int:
    """Buffers of one thread."""
    if job.method is None or job.copied is not None:
        return 1 << 20
    if job.exact_double or job.method.compat:
        return job.elements * 8 * (3 * len(job.operands) + 6)
    tile = min(max(TILE, row_length(job.name, job.shape)), job.elements)
    return job.method.memory(len(job.operands), tile, job.elements)
