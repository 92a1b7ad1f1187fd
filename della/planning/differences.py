"""What a plan computes otherwise than mergekit 0.1.5 does."""

from __future__ import annotations

from collections.abc import Sequence

from della.merging.method import Method
from della.planning.job import Job
from della.recipe.reader import Recipe

_SAME = "compat mergekit: mergekit's own rules, but with seeded draws instead of an unseeded generator"
_ARITHMETIC = "arithmetic is float32 (or float64, as an input) and rounds once (mergekit: in the merge dtype)"


def departures(recipe: Recipe, jobs: Sequence[Job]) -> list[str]:
    """What this recipe computes otherwise than mergekit 0.1.5 does, a line each."""
    merged = [(job, job.method) for job in jobs if job.method is not None and job.elements]
    random = any(method.draws(job.subject) for job, method in merged)
    if recipe.compat:
        warnings = [line for job, method in merged for line in method.compat_warnings(job.subject)]
        return [*([_SAME] if random else []), *dict.fromkeys(warnings)]
    lines: dict[str, bool] = {}
    for job, method in merged:
        for line, applies in method.departures(job.subject).items():
            lines[line] = lines.get(line, False) or applies
    lines[_ARITHMETIC] = any(_rounds(recipe, job, method) for job, method in merged)
    lines[f"draws come from seed {recipe.seed}, the same on every machine (mergekit: unseeded)"] = random
    return [line for line, applies in lines.items() if applies]


def _rounds(recipe: Recipe, job: Job, method: Method) -> bool:
    """Whether mergekit would compute this tensor in another type, or round its inputs to the merge dtype."""
    ours = "F64" if job.exact_double else "F32"
    if not method.is_wide_in_mergekit:
        return (recipe.dtype or job.base.dtype).name != ours
    if recipe.dtype is None:
        return False
    theirs = "F64" if recipe.dtype.name == "F64" else "F32"
    kept = all(
        view.dtype is recipe.dtype or view.dtype.bits < recipe.dtype.bits
        for view in (each.view for each in job.operands)
    )
    return theirs != ours or not kept
