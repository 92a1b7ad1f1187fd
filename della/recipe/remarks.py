"""What deserves a word about a recipe that can be carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from della.errors import Location
from della.merging.method import Method
from della.recipe.dialect import WITHOUT_EFFECT
from della.recipe.models import ModelEntry
from della.recipe.references import same
from della.recipe.tree import Leaf


def told_twice(experts: Sequence[ModelEntry]) -> list[str]:
    """A note on each model that is listed a second time."""
    first: dict[tuple[str, object], ModelEntry] = {}
    notes = []
    for entry in experts:
        earlier = first.setdefault((entry.reference.rstrip("/\\"), entry.layers), entry)
        if earlier is not entry:
            at = f", first in line {earlier.line}" if earlier.line else ""
            said = f"{entry.reference} is listed twice{at}; it counts as two experts"
            notes.append(f"{entry.location}: {said}")
    return notes


def without_effect(
    method: type[Method], unused: Mapping[str, Sequence[Location]], base: Leaf | None,
    models: Sequence[ModelEntry],
) -> list[str]:  # fmt: skip
    """A note on each parameter that the method does not use, on a base that has no part in it, and on what
    hardly anyone expects of it."""
    notes = [method.remark] if method.remark else []
    for key, locations in unused.items():
        more = f" (it is set in {len(locations)} locations)" if len(locations) > 1 else ""
        where = f"with merge_method {method.name}{more}"
        where = f"here: {WITHOUT_EFFECT[key]}" if key in WITHOUT_EFFECT else where
        notes.append(f"{locations[0]}: {key!r} has no effect {where}")
    if base is not None and not method.needs_base and not any(same(m.reference, base.text) for m in models):
        said = f"base_model has no part in merge_method {method.name} unless 'models' lists it too"
        notes.append(f"{base.location}: {said}")
    return notes
