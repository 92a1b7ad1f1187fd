"""Side files of a merged model: config.json with the right dtype, and the model card README.md."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from della.planning import Job, Plan
from della.version import __version__

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def config_json(config: Mapping[str, Any], jobs: Sequence[Job]) -> bytes:
    """The base's config.json with the dtype that most of the merged weights have, and without remote code."""
    written = {key: value for key, value in config.items() if key != "auto_map"}
    sizes: Counter[str] = Counter()
    for job in jobs:
        if job.dtype.is_float:
            sizes[job.dtype.torch_name] += job.nbytes
    if sizes:
        key = "dtype" if "dtype" in written else "torch_dtype"
        written[key] = sizes.most_common(1)[0][0]
    return (json.dumps(written, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, title: str) -> bytes:
    """README.md: front matter for the Hub, how the model was made, and the recipe.

    Names from recipes are data here: front matter is dumped as JSON (which is YAML), text is escaped, and the
    recipe stands in a fence longer than any in it.
    """
    recipe = plan.recipe
    references = list(
        dict.fromkeys(
            ([recipe.base_model] if recipe.base_model else []) + [m.reference for m in recipe.models]
        )
    )
    on_hub = [r.partition("@")[0] for r in references if _HUB_ID.fullmatch(r.partition("@")[0])]
    front: dict[str, Any] = {"base_model": on_hub} if on_hub else {}
    front |= {"base_model_relation": "merge"} if on_hub else {}
    front |= {"library_name": "transformers", "tags": ["merge", "della", recipe.merge_method]}
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe.text)), default=0))
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {_plain(title)}",
        "",
        f"A merge made with della {__version__}: method `{recipe.merge_method}`, seed {recipe.seed}.",
        "",
        *_models(plan),
        "",
        "## Recipe",
        "",
        f"{fence}yaml",
        recipe.text.rstrip("\n"),
        fence,
        "",
        *_departures(plan.departures),
        "`della.json` holds the versions, the identity of every input and a hash of every tensor; "
        "the same recipe and seed give the same weights, byte for byte.",
        "",
    ]
    return "\n".join(lines).encode()


def _models(plan: Plan) -> Iterable[str]:
    if plan.recipe.base_model:
        yield f"- base: {_plain(plan.recipe.base_model)}"
    for model in plan.recipe.models:
        yield f"- {'expert' if plan.recipe.method.needs_base else 'model'}: {_plain(model.reference)}"


def _departures(departures: Sequence[str]) -> Iterable[str]:
    if departures:
        yield "## What mergekit would have done otherwise"
        yield ""
        yield from (f"- {_plain(text)}" for text in departures)
        yield ""


def _plain(text: str) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
