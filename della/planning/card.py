"""Side files of a merged model: config.json with the right dtype, no remote code, and the model card."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from della.checkpoint.strict import json_object
from della.errors import OutputError, Problem
from della.output.manifest import versions
from della.planning.compatibility import CODE
from della.planning.job import Job, Plan
from della.planning.published import hub_name, is_absolute, shown_references, shown_text, silent
from della.version import __version__

_DTYPES = ("dtype", "torch_dtype")
_ORIGINS = (
    "_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_file", "special_tokens_map_file",
)  # fmt: skip


def config_json(config: Mapping[str, Any], jobs: Sequence[Job], auto_map: bool = False) -> bytes:
    """The base's config.json with the dtype that most of the merged weights have, and without the names of
    remote code unless ``auto_map``.
    """
    sizes: Counter[str] = Counter()
    for job in jobs:
        if job.dtype.is_float:
            sizes[job.dtype.torch_name] += job.nbytes
    dtype = sizes.most_common(1)[0][0] if sizes else None
    written = _rewritten(_published(config, auto_map), dtype)
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


def _published(value: Any, auto_map: bool) -> Any:
    """JSON without paths of this machine and, unless ``auto_map``, the keys that name code, at any depth."""
    if isinstance(value, list):
        return [_published(child, auto_map) for child in value]
    if not isinstance(value, dict):
        return value
    kept = {key: child for key, child in value.items() if auto_map or key not in CODE}
    return {key: _published(child, auto_map) for key, child in kept.items() if not _is_local(key, child)}


def _is_local(key: str, value: Any) -> bool:
    """Whether it says where on a disk a model was loaded from; names on the Hub do not."""
    return key in _ORIGINS and isinstance(value, str) and is_absolute(value)


def side_file(path: Path, auto_map: bool = False) -> bytes:
    """A side file as it is, or, where it names code outside the library (unless ``auto_map``) or a path of
    this machine, its content without that.  Only configurations hold such; in a vocabulary these are words.

    Raises OutputError where it cannot be read, CheckpointError for a configuration that is no JSON.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OutputError(
            Problem(f"cannot be copied to the result ({error.strerror})", subject=str(path))
        ) from error
    return published(path.name, raw, auto_map, str(path))


def published(name: str, raw: bytes, auto_map: bool, shown: str) -> bytes:
    """What `side_file` gives of a file with this content; ``shown`` names it in messages."""
    says_more = any(key.encode() in raw for key in (*CODE, *_ORIGINS, "\\u"))  # an escape may hide a key
    is_config = name in ("config.json", "model_index.json") or name.endswith("_config.json")
    if not is_config or not says_more:
        return raw
    config = json_object(raw, shown)
    kept = _published(config, auto_map)
    return raw if kept == config else _json(kept)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, record_paths: bool = False) -> bytes:
    """README.md: the recipe's name (or its models'), front matter for the Hub, how the model was made, and
    the recipe.  It does not depend on where the result is written.

    Names from recipes are data here: front matter is dumped as JSON (which is YAML), text is escaped, and the
    recipe stands in a fence longer than any in it.
    """
    recipe, made_with = plan.recipe, {"della": __version__, **versions()}
    sources = (plan.base, *(model.source for model in plan.models))
    on_hub = list(dict.fromkeys(name for source in sources if (name := hub_name(source))))
    names = {} if record_paths else shown_references(recipe)
    text = recipe.text if record_paths else silent(shown_text(recipe.text, names))
    library = "diffusers" if "_class_name" in plan.base.config else "transformers"
    front: dict[str, Any] = {"base_model": on_hub} if on_hub else {}
    front |= {"base_model_relation": "merge", "library_name": library}
    front |= {"tags": list(dict.fromkeys(("merge", "della", recipe.merge_method)))}
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
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
        *_models(plan, names),
        "",
        "## Recipe",
        "",
        f"{fence}yaml",
        text.rstrip("\n"),
        fence,
        "",
        "`della.json` holds the identity of every input and a hash of every tensor; "
        "the same recipe and seed give the same weights, byte for byte.",
        "",
    ]
    return "\n".join(lines).encode(errors="replace")  # the name of a folder need not be text


def _models(plan: Plan, names: Mapping[str, str]) -> Iterable[str]:
    """A line for each model, with how much of it takes part."""
    if plan.recipe.base_model:
        yield f"- base: {_plain(shown_text(plan.recipe.base_model, names))}"
    kind = "expert" if plan.recipe.method.needs_base else "model"
    for each in plan.coverage:
        yield f"- {kind}: {_plain(shown_text(str(each), names))}"


def _plain(text: str) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    return re.sub(r"([\\`*_{}\[\]#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
