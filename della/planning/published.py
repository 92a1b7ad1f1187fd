"""What others may read of a plan: models by their names on the Hub or the last part of their path, the recipe
without paths of this machine.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PureWindowsPath

from della.checkpoint.source import HUB_ID, Source
from della.planning.job import Plan

_CACHE = re.compile(r"models--(?P<owner>[^/\\]+?)--(?P<name>[^/\\]+)")


def hub_name(source: Source) -> str | None:
    """owner/name of a model of the Hub: as it was named, by its folder in a hub cache, or as config.json says
    where it was loaded from; None where nothing tells."""
    match = HUB_ID.fullmatch(source.reference)
    if match and source.revision:
        return match["repo"]
    for part in source.path.parts:
        if cache := _CACHE.fullmatch(part):
            return f"{cache['owner']}/{cache['name']}"
    said = source.config.get("_name_or_path")
    is_name = isinstance(said, str) and HUB_ID.fullmatch(said) is not None and not os.path.lexists(said)
    return str(said).split("@")[0] if is_name else None


def shown_references(plan: Plan) -> dict[str, str]:
    """What each reference to a place of this machine is called elsewhere: the end of its path, as long as it
    needs to be one's own."""
    recipe = plan.recipe
    norms = (model.input_norms for model in recipe.models)
    references = filter(None, (recipe.base_model, *(m.reference for m in recipe.models), *norms))
    local = [reference for reference in dict.fromkeys(references) if _is_absolute(reference)]
    names: dict[str, str] = {}
    for reference in local:
        parts = re.split(r"[/\\]", reference.rstrip("/\\"))
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            if name not in names.values():
                break
        names[reference] = name
    return names


def shown_text(text: str, names: dict[str, str]) -> str:
    """A text with each reference of ``names`` as it is called elsewhere, also where YAML escapes it."""
    for reference in sorted(names, key=len, reverse=True):
        for written in dict.fromkeys((reference, json.dumps(reference)[1:-1], reference.replace("'", "''"))):
            folded = r"\s+".join(map(re.escape, written.split(" ")))  # YAML breaks lines at spaces
            text = re.sub(folded, lambda _, name=names[reference]: name, text)  # type: ignore[misc]
    return text


def _is_absolute(reference: str) -> bool:
    windows = PureWindowsPath(reference)
    return Path(reference).is_absolute() or windows.is_absolute() or reference.startswith(("~", "file:"))
