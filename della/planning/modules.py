"""Modules of a model by the prefixes of their tensors: text, vision, projector, or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from della.errors import Collector, RecipeError
from della.recipe.models import Part

# Modules by the names that mergekit gives them, and the prefixes that they have.
MODULES = {
    "text_decoder": ("language_model", "text_model"),
    "multi_modal_projector": (
        "multi_modal_projector", "visual.merger", "visual.deepstack_merger_list", "connector", "mm_projector",
    ),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "vision_model": ("vision_tower", "vision_model", "visual"),
    "audio_tower": ("audio_tower", "audio_model"),
}  # fmt: skip
REST = "text_decoder"  # has what no prefix claims
_WRAPPER = "model"  # stands before the prefixes of some models
WHOLE = "default"  # mergekit's name of the module of a model that has one


def owners(names: Sequence[str], parts: Sequence[Part]) -> dict[str, tuple[str, ...]]:
    """The prefixes of each module that ``parts`` have, found in ``names``.

    Raises RecipeError for a module of which there is no tensor.
    """
    found: dict[str, tuple[str, ...]] = {}
    problems = Collector(RecipeError)
    for part in parts:
        tried = (part.module, f"model.{part.module}")
        aliases = [f"{before}{x}" for x in MODULES.get(part.module, ()) for before in ("", "model.")]
        literal = [prefix for prefix in tried if any(n.startswith(f"{prefix}.") for n in names)]
        known = literal or [prefix for prefix in aliases if any(n.startswith(f"{prefix}.") for n in names)]
        found[part.module] = tuple(known)
        if not known and part.module not in (REST, WHOLE):
            there = sorted({prefix_of(name) for name in names})
            said = f"module {part.module} has no tensor in the model: no name begins with {part.module!r}"
            fix = f"write one of {', '.join(there[:12])}"
            problems.add(said, fix, location=part.location, parameter="modules")
    problems.raise_any()
    return found


def prefix_of(name: str) -> str:
    """The first part of a name, or the first two where models only wrap all else in it."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == _WRAPPER and len(rest) > 1 else first


def owner(name: str, prefixes: Mapping[str, tuple[str, ...]]) -> str | None:
    """The module of a tensor: that of the longest prefix; the text decoder has what no other claims.

    What is of another module that mergekit names, and the recipe does not, is of none; but a prefix that the
    recipe itself writes has all that begins with it.
    """
    plain = name.removeprefix(f"{_WRAPPER}.")
    fits = [(len(p), m) for m, own in prefixes.items() for p in own if name.startswith(f"{p}.")]
    longest, module = max(fits, default=(0, ""))
    if module and module not in MODULES:
        return module
    unnamed = (p for m, own in MODULES.items() if m not in prefixes for p in own)
    length = max(longest - len(f"{_WRAPPER}.") * (plain != name), 0)
    if any(len(p) > length and plain.startswith(f"{p}.") for p in unnamed):
        return None
    return module or (REST if REST in prefixes else WHOLE if WHOLE in prefixes else None)
