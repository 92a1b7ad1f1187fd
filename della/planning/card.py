"""Side files of a merged model: config.json with the right dtype, no remote code, and the model card."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from della.checkpoint.source import HUB_ID, Source
from della.checkpoint.strict import json_object
from della.errors import OutputError, Problem
from della.output.manifest import versions
from della.planning.compatibility import CODE
from della.planning.job import Job, Plan
from della.version import __version__

_DTYPES = ("dtype", "torch_dtype")
_PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def config_json(config: Mapping[str, Any], jobs: Sequence[Job], auto_map: bool = False) -> bytes:
    """The base's config.json with the dtype that most of the merged weights have, and without the names of
    remote code unless ``auto_map``.
    """
    sizes: Counter[str] = Counter()
    for job in jobs:
        if job.dtype.is_float:
            sizes[job.dtype.torch_name] += job.nbytes
    dtype = sizes.most_common(1)[0][0] if sizes else None
    written = _rewritten(config if auto_map else _without_code(config), dtype)
    if dtype is not None and not any(key in written for key in _DTYPES):
        written["torch_dtype"] = dtype
    return _json(written)


def _rewritten(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """The parts of a model (text_config, vision_config) state their dtype too."""
    written = dict(config)
    for key, value in written.items():
        if key in _DTYPES and dtype is not None:
            written[key] = dtype
        elif isinstance(value, dict) and key.endswith("_config"):
            written[key] = _rewritten(value, dtype)
    return written


def _without_code(value: Any) -> Any:
    """JSON without the keys that name code, at any depth."""
    if isinstance(value, dict):
        return {key: _without_code(child) for key, child in value.items() if key not in CODE}
    return [_without_code(child) for child in value] if isinstance(value, list) else value


def side_file(path: Path, auto_map: bool = False) -> bytes:
    """A side file as it is, or, where it names code outside the library, its content without that (unless
    ``auto_map``).  Only configurations can name code; in a vocabulary the same keys are words.

    Raises OutputError where it cannot be read, CheckpointError for a configuration that is no JSON.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OutputError(
            Problem(f"cannot be copied to the result ({error.strerror})", subject=str(path))
        ) from error
    names_code = any(key.encode() in raw for key in (*CODE, "\\u"))  # an escape may hide a key
    if auto_map or not path.name.endswith("_config.json") or not names_code:
        return raw
    config = json_object(raw, str(path))
    kept = _without_code(config)
    return raw if kept == config else _json(kept)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan) -> bytes:
    """README.md: the recipe's name (or its models'), front matter for the Hub, how the model was made, and
    the recipe.  It does not depend on where the result is written.

    Names from recipes are data here: front matter is dumped as JSON (which is YAML), text is escaped, and the
    recipe stands in a fence longer than any in it.
    """
    recipe, made_with = plan.recipe, {"della": __version__, **versions()}
    names = list(
        dict.fromkeys(name for s in (plan.base, *(m.source for m in plan.models)) if (name := _model_name(s)))
    )
    library = "diffusers" if "_class_name" in plan.base.config else "transformers"
    front: dict[str, Any] = {"base_model": names} if names else {}
    front |= {"base_model_relation": "merge", "library_name": library}
    front |= {"tags": ["merge", "della", recipe.merge_method]}
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe.text)), default=0))
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {_plain(recipe.name or ' + '.join(model.identity for model in recipe.models))}",
        "",
        f"A merge: method `{recipe.merge_method}`, seed {recipe.seed}, made with "
        + ", ".join(f"{name} {version}" for name, version in made_with.items())
        + ".",
        "",
        *_models(plan),
        "",
        *(f"- {_plain(str(each))}" for each in plan.coverage),
        "",
        "## Recipe",
        "",
        f"{fence}yaml",
        recipe.text.rstrip("\n"),
        fence,
        "",
        *_departures(plan.departures),
        "`della.json` holds the identity of every input and a hash of every tensor; "
        "the same recipe and seed give the same weights, byte for byte.",
        "",
    ]
    return "\n".join(lines).encode(errors="replace")  # the name of a folder need not be text


def _model_name(source: Source) -> str | None:
    """owner/name of a model of the Hub; of a folder or file its last part, without the path to it, and None
    where that cannot be a model's name (the Hub would refuse the card).
    """
    match = HUB_ID.fullmatch(source.reference)
    if match and source.revision:
        return match["repo"]
    last = source.path.stem if source.path.is_file() else source.path.name
    return last if _PLAIN_NAME.fullmatch(last) else None


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
