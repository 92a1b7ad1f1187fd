"""What a plan computes otherwise than mergekit 0.1.5 does."""

from __future__ import annotations

from collections.abc import Sequence

from della.planning.job import Job
from della.recipe.reader import Recipe


def departures(recipe: Recipe, jobs: Sequence[Job]) -> list[str]:
    """What this recipe computes otherwise than mergekit 0.1.5 does, a line each."""
    merged = [(job, job.choice) for job in jobs if job.choice is not None and job.elements]
    random = recipe.method.drop in ("magprune", "bernoulli") and any(
        0 < e.density < 1 for job, _ in merged for e in job.experts
    )
    if recipe.compat:
        same = "compat mergekit: mergekit's own rules, but with seeded draws instead of an unseeded generator"
        return [same] if random else []
    ranked = [
        job.shape
        for job, choice in merged
        if choice.drop == "magprune" and choice.rank_by in ("row", "tensor")
        if any(0 < e.density < 1 and e.epsilon > 0 for e in job.experts)
    ]
    lines = {
        "rescale: each survivor is divided by its keep probability (mergekit: one l1 factor, biased)": (
            random and any(choice.rescale == "per_element" for _, choice in merged)
        ),
        "ranks are exact integers with ties averaged (mergekit: ranks in the dtype of the tensor)": (
            bool(ranked)
        ),
        "importance: wanda ranks |delta| times input norms (mergekit: |delta|)": any(
            choice.importance == "wanda" for _, choice in merged
        ),
        "a row of a tensor with three or more axes is what feeds one output (mergekit: the second axis)": (
            any(len(shape) > 2 for shape in ranked)
        ),
        "a density that leaves a tensor less than one delta leaves it none (mergekit: one)": any(
            choice.drop == "top" and 0 < e.density * job.elements < 1
            for job, choice in merged
            for e in job.experts
        ),
        "a tied sign vote elects nothing (mergekit: the positive sign)": any(
            choice.vote != "none" and len(job.operands) > 1 for job, choice in merged
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
    kept = all(
        view.dtype is recipe.dtype or view.dtype.bits < recipe.dtype.bits
        for view in (each.view for each in job.operands)
    )
    return theirs != ours or not kept
