"""From a recipe and headers to a Plan: one job per output tensor.  Nothing is read but headers.

A Plan can be printed, hashed and tested without weights; run.py executes it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from della.checkpoint.layout import Tensor
from della.checkpoint.source import Source, open_source
from della.dtypes import DType
from della.errors import CheckpointError, RecipeError, listing
from della.merging.methods import Choice, Expert, choice, expert
from della.merging.reference import row_length
from della.recipe import Recipe

TILE = 1 << 18  # elements of a tile: large enough to forget Python's overhead, small enough for the caches
CODE = ("auto_map", "custom_pipelines")  # keys of config.json that name code outside the library
_LAYER = re.compile(r"(.*?)\.(\d+)\.")
# Settings that mergekit does not know, at what it does.
_USUAL = {
    "rank_by": "row",
    "ladder": "symmetric",
    "coupling": "independent",
    "scope": "tensor",
    "lambda_scaling": "constant",
}
# Rough costs for the estimate, measured on one core of a 2-core server: nanoseconds per element and expert.
_NANOSECONDS = {"magprune": 3.5, "bernoulli": 1.2, "top": 3.2, "band": 3.5, "none": 0.8, "average": 0.6}
_BYTES_PER_SECOND, _START_SECONDS, _START_MEMORY = 2.0e9, 0.8, 150 << 20


@dataclass(frozen=True)
class Job:
    """One output tensor.  ``choice`` is None where the base's tensor is copied.

    ``inputs`` are (index into Plan.models, that model's tensor, what the stages do with it), in canonical
    order; ``values`` are the resolved settings of every model in the recipe's order, and ``shared`` the
    others, for display.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    base: Tensor
    choice: Choice | None
    inputs: tuple[tuple[int, Tensor, Expert], ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)
    values: tuple[dict[str, Any], ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of input that one pass over this tensor reads."""
        needs_base = self.choice is None or self.choice.drop != "average"
        return (self.base.nbytes if needs_base else 0) + sum(t.nbytes for _, t, _ in self.inputs)

    @property
    def exact_double(self) -> bool:
        """Whether an input is float64: then arithmetic is float64, by the reference itself."""
        return any(t.dtype.name == "F64" for t in (self.base, *(t for _, t, _ in self.inputs)))


@dataclass
class Plan:
    """What a merge will do.  A context manager that closes the inputs.

    ``base`` is the template of the output: names, shapes and side files (the first model where the method
    needs no base).  ``models`` are in the order of the recipe.
    """

    recipe: Recipe
    base: Source
    models: tuple[Source, ...]
    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    departures: tuple[str, ...]
    opened: ExitStack = field(repr=False, compare=False)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *exception: object) -> None:
        self.opened.close()

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
        compute = 0.0
        for job in self.jobs:
            if job.choice is not None:
                compute += job.elements * max(len(job.inputs), 1) * _NANOSECONDS[job.choice.drop] * 1e-9
        moving = (self.bytes_read + self.bytes_written) / _BYTES_PER_SECOND
        return _START_SECONDS + compute / threads + moving


def _working_bytes(job: Job) -> int:
    """Buffers of one thread: base, result, raw bytes, and deltas of every expert, in float32."""
    if job.choice is None:
        return 1 << 20
    if job.exact_double or job.choice.compat:
        return job.elements * 8 * (3 * len(job.inputs) + 6)
    tile = min(max(TILE, row_length(job.name, job.shape)), job.elements)
    arrays = len(job.inputs) * (3 if job.choice.fuse == "calibrated" else 1) + 5
    table = job.elements * 12 if job.choice.rank_by == "tensor" and job.choice.drop == "magprune" else 0
    return tile * 4 * arrays + table


def default_threads() -> int:
    """As many threads as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_plan(recipe: Recipe, *, weights: bool = True) -> Plan:
    """Open the inputs of ``recipe`` and decide about every output tensor.

    ``weights=False`` is enough for looking: models of the Hub are then opened by their headers alone.  Raises
    RecipeError and CheckpointError, with all problems of one kind listed at once.
    """
    folder = recipe.path.parent if recipe.path else None
    with ExitStack() as stack:
        opened: dict[str, Source] = {}

        def source(reference: str) -> Source:
            if reference not in opened:
                opened[reference] = stack.enter_context(
                    open_source(reference, base_dir=folder, weights=weights)
                )
            return opened[reference]

        problems = []
        references = [m.reference for m in recipe.models]
        has_part = recipe.method.needs_base or recipe.base_model in references
        template = recipe.base_model if recipe.base_model and has_part else references[0]
        for reference in dict.fromkeys([template, *references]):
            try:
                source(reference)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError(listing(problems))
        models = tuple(source(r) for r in references)
        base = source(template)
        depths = _depths(base.tensors)
        recipe.check((name, *depths[name]) for name in base.tensors)
        notes = [*recipe.notes, *_check_fit(base, models)]
        jobs = tuple(_job(recipe, name, depths[name][0], base, models) for name in base.tensors)
        _check_scope(jobs)
        _check_compat(recipe, jobs)
        notes += [*_storage(models, jobs), *_code(base)]
        plan = Plan(
            recipe, base, models, jobs, tuple(notes), tuple(_departures(recipe, jobs)), stack.pop_all()
        )
    return plan


def _depths(names: Sequence[str] | dict[str, Any]) -> dict[str, tuple[float, str]]:
    """(t, label) of each tensor: its layer's place in its own stack of layers, by the first number in its
    name.

    As in mergekit, t is 0 for what stands outside the layers (embeddings, final norm, head) and 1 where a
    stack has a single layer.
    """
    layers = {name: _LAYER.match(name) for name in names}
    last: dict[str, int] = {}
    for match in layers.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    depths = {}
    for name, match in layers.items():
        if match is None:
            depths[name] = (0.0, "")
        else:
            index, top = int(match[2]), last[match[1]]
            depths[name] = (index / top if top else 1.0, f"layer {index}")
    return depths


def _check_fit(base: Source, models: Sequence[Source]) -> list[str]:
    """Refuse models that do not have the base's tensors in the base's shapes; notes on what they have
    beyond.
    """
    problems, notes = [], []
    for model in dict.fromkeys(models):
        if model is base:
            continue
        where = f"{model.reference}: against {base.reference}"
        missing = [n for n in base.tensors if n not in model.tensors]
        extra = [n for n in model.tensors if n not in base.tensors]
        if missing == ["lm_head.weight"]:
            problems.append(
                f"{where}: ties its head to the embeddings where the base has a lm_head.weight of its own; "
                "untie this model: save it with tie_word_embeddings: false"
            )
        elif missing:
            problems.append(f"{where}: lacks {_some(missing)}; all models must be fine-tunes of one base")
        if "lm_head.weight" in extra and any("embed_tokens" in n for n in base.tensors):
            problems.append(
                f"{where}: has a head of its own (lm_head.weight) where the base ties it to the embeddings; "
                "untie the base (save it with tie_word_embeddings: false) or tie this model"
            )
        elif extra:
            notes.append(f"{model.reference}: {_some(extra)} not in the base, and left out of the result")
        problems += [f"{where}: {text}" for text in _misfits(base, model)]
    if problems:
        raise CheckpointError(listing(problems))
    return notes


def _misfits(base: Source, model: Source) -> Iterator[str]:
    for name, ours in base.tensors.items():
        theirs = model.tensors.get(name)
        if theirs is None:
            continue
        if theirs.shape != ours.shape:
            hint = ""
            rows_alone = len(ours.shape) == 2 and theirs.shape[1:] == ours.shape[1:]
            if rows_alone and ("embed" in name or "lm_head" in name):
                hint = "; if the vocabulary was extended, merge a version of it without the added rows"
            yield f"{name} has shape {list(theirs.shape)}, expected {list(ours.shape)}{hint}"
        elif theirs.dtype.is_float != ours.dtype.is_float:
            yield f"{name} is stored as {theirs.dtype.name}, expected {ours.dtype.name}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensors ({shown}, ...)" if len(names) > 3 else shown


def _job(recipe: Recipe, name: str, t: float, base: Source, models: Sequence[Source]) -> Job:
    tensor = base.tensors[name]
    dtype = recipe.out_dtype or recipe.dtype or tensor.dtype
    if not tensor.dtype.is_float:
        return Job(name, tensor.shape, tensor.dtype, tensor, None)
    shared, values = recipe.resolve(name, t)
    experts = [expert(m.identity, own) for m, own in zip(recipe.models, values, strict=True)]
    order = sorted(range(len(experts)), key=lambda k: experts[k].identity)
    inputs = tuple((k, models[k].tensors[name], experts[k]) for k in order)
    picked = choice(recipe.method, shared, (recipe.dtype or tensor.dtype) if recipe.compat else None)
    return Job(name, tensor.shape, dtype, tensor, picked, inputs, shared, values)


def _check_scope(jobs: Sequence[Job]) -> None:
    """With scope: model there is one threshold for the model: each expert has one density, and one type."""
    whole = [job for job in jobs if job.choice and job.choice.drop == "top" and job.choice.scope == "model"]
    if len({tuple(e.density for _, _, e in job.inputs) for job in whole}) > 1:
        raise RecipeError(
            "scope: model chooses one threshold for the whole model, so density must be the same for all "
            "tensors; use scope: tensor, or a density without gradient and filter"
        )
    double = [job.name for job in whole if job.exact_double]
    if double:
        raise RecipeError(
            f"scope: model compares all tensors in float32, and {_some(double)} of an input is float64; "
            "use scope: tensor, or save that model in float32 first"
        )


def _check_compat(recipe: Recipe, jobs: Sequence[Job]) -> None:
    """mergekit's rules cannot be followed where it has no such option; nothing is ignored in silence."""
    for job in jobs if recipe.compat else ():
        found = [f"{k}: {v}" for k, usual in _USUAL.items() if (v := getattr(job.choice, k, usual)) != usual]
        if job.choice and job.choice.fuse == "calibrated":
            found.append("fuse: calibrated")
        if job.choice and job.choice.vote == "unweighted":
            found.append("vote: unweighted")
        if recipe.method.defaults.get("vote") == "unweighted":
            found = [f"merge_method {recipe.merge_method}"]
        if found:
            raise RecipeError(
                f"compat: mergekit has no {', '.join(found)}; remove it, or do without compat (--compat)"
            )


def _storage(models: Sequence[Source], jobs: Sequence[Job]) -> list[str]:
    """A note for each model that is stored in another type than the base."""
    found: dict[str, None] = {}
    for job in jobs:
        for k, tensor, _ in job.inputs:
            if tensor.dtype is not job.base.dtype:
                theirs, ours = tensor.dtype.torch_name, job.base.dtype.torch_name
                result = f"the result is stored in {job.dtype.torch_name}"
                found[f"{models[k].reference}: stored in {theirs}, the base in {ours}; {result}"] = None
    return list(found)


def _code(base: Source) -> list[str]:
    found = [key for key in CODE if key in base.config]
    said = f"{base.reference}: config.json names code of its own ({', '.join(found)})"
    return [f"{said}; it is never run, and left out of the result"] if found else []


# ---- departures from mergekit ------------------------------------------------------------------------------


def _departures(recipe: Recipe, jobs: Sequence[Job]) -> list[str]:
    """What this recipe computes otherwise than mergekit 0.1.5 does, a line each."""
    merged = [(job, job.choice) for job in jobs if job.choice is not None and job.elements]
    random = recipe.method.drop in ("magprune", "bernoulli") and any(
        0 < e.density < 1 for job, _ in merged for _, _, e in job.inputs
    )
    if recipe.compat:
        same = "compat mergekit: mergekit's own rules, but with seeded draws instead of an unseeded generator"
        return [same] if random else []
    ranked = [
        job.shape
        for job, choice in merged
        if choice.drop == "magprune" and choice.rank_by in ("row", "tensor")
        if any(0 < e.density < 1 and e.epsilon > 0 for _, _, e in job.inputs)
    ]
    lines = {
        "rescale: each survivor is divided by its keep probability (mergekit: one l1 factor, biased)": (
            random and any(choice.rescale == "per_element" for _, choice in merged)
        ),
        "ranks are exact integers with ties averaged (mergekit: ranks in the dtype of the tensor)": (
            bool(ranked)
        ),
        "a row of a tensor with three or more axes is what feeds one output (mergekit: the second axis)": (
            any(len(shape) > 2 for shape in ranked)
        ),
        "a density that leaves a tensor less than one delta leaves it none (mergekit: one)": any(
            choice.drop == "top" and 0 < e.density * job.elements < 1
            for job, choice in merged
            for _, _, e in job.inputs
        ),
        "a tied sign vote elects nothing (mergekit: the positive sign)": any(
            choice.vote != "none" and len(job.inputs) > 1 for job, choice in merged
        ),
        _ARITHMETIC: any(_rounds(recipe, job) for job, _ in merged),
        f"draws come from seed {recipe.seed}, the same on every machine (mergekit: unseeded)": random,
    }
    return [line for line, applies in lines.items() if applies]


_ARITHMETIC = "arithmetic is float32 (or float64, as an input) and rounds once (mergekit: in the merge dtype)"


def _rounds(recipe: Recipe, job: Job) -> bool:
    """Whether mergekit would compute this tensor in another type, or round its inputs to the merge dtype."""
    ours = "F64" if job.exact_double else "F32"
    if recipe.method.needs_base:
        return (recipe.dtype or job.base.dtype).name != ours
    # linear: float32 sums of inputs in the merge dtype
    if recipe.dtype is None:
        return False
    theirs = "F64" if recipe.dtype.name == "F64" else "F32"
    kept = all(t.dtype is recipe.dtype or t.dtype.bits < recipe.dtype.bits for _, t, _ in job.inputs)
    return theirs != ours or not kept
