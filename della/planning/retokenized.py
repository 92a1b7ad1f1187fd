"""The files of a tokenizer that is not the base's as it was: with new tokens, or another model's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from della.checkpoint.files import is_file
from della.checkpoint.layout import read_small
from della.checkpoint.sides import TEMPLATES, checked_side_files
from della.checkpoint.source import Source
from della.checkpoint.strict import json_object
from della.checkpoint.vocabulary import MOST_BYTES, read_vocabulary
from della.errors import CheckpointError, Problem, clip
from della.planning.tokenizers import FILES

FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OF_TEXT = ("chat_template.jinja", "chat_template.json", "generation_config.json")
# All but this list stays as it is written: to read and write 150,000 tokens takes a second.
_ADDED = re.compile(r'(?<!\\)"added_tokens"\s*:\s*(?=\[)')
_IDS = ("_token_id", "_token_index")


def with_added(base: Source, new: Sequence[Mapping[str, Any]]) -> dict[str, Path | bytes | None]:
    """What stands in place of the base's files: tokenizer.json with ``new`` tokens, and no other vocabulary.

    Raises CheckpointError where the tokenizers library would give tokens other ids.
    """
    path = base.folder / FAST
    if not is_file(path):
        said = f"has no {FAST}, to which tokens could be added"
        fix = "let transformers make one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise CheckpointError(Problem(said, fix, base.reference))
    text = read_small(path, MOST_BYTES).decode()
    place = _ADDED.search(text)
    if place is None:
        said, fix = f"has no list of added tokens in its {FAST}", "save it anew with transformers"
        raise CheckpointError(Problem(said, fix, base.reference))
    listed, end = json.JSONDecoder().raw_decode(text, place.end())
    listed = sorted([*listed, *new], key=lambda row: int(row["id"]))
    raw = f"{text[: place.end()]}{json.dumps(listed, indent=2, ensure_ascii=False)}{text[end:]}".encode()
    _check(raw, {str(row["content"]): row["id"] for row in listed}, base.reference)
    made: dict[str, Path | bytes | None] = {name: None for name in FILES if is_file(base.folder / name)}
    made.pop("special_tokens_map.json", None)
    made[FAST] = raw
    if SETTINGS in made:
        made[SETTINGS] = _settings(base.folder / SETTINGS, new)
    return made


def _settings(path: Path, new: Sequence[Mapping[str, Any]]) -> Path | bytes:
    """tokenizer_config.json, which may list added tokens too."""
    config = json_object(read_small(path, MOST_BYTES), str(path))
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return path
    rows = {str(row["id"]): {key: value for key, value in row.items() if key != "id"} for row in new}
    return _json({**config, "added_tokens_decoder": {**listed, **rows}})


def _check(raw: bytes, added: Mapping[str, int], reference: str) -> None:
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_buffer(raw).token_to_id
    except Exception as error:  # of its own kind, and of no class
        said = f"its {FAST} is refused by the tokenizers library: {clip(str(error), 200)}"
        raise CheckpointError(Problem(said, "save it anew with transformers", reference)) from error
    wrong = [(number, token) for token, number in added.items() if ids(token) != number]
    if wrong:
        number, token = wrong[0]
        said = f"{len(wrong)} ids of its {FAST} are not those that the tokenizers library gives: "
        said += f"{clip(token)!r} is {number} there, and {ids(token)} when it is loaded"
        fix = "give its added tokens ids without a hole behind the last ordinary one"
        raise CheckpointError(Problem(said, fix, reference))


def other_files(base: Source, own: Path, folder: Path) -> None:
    """Gives the result the tokenizer of another ``folder``, with its special tokens and chat template.

    Raises CheckpointError.
    """
    names = {*FILES, *OF_TEXT}
    templates = f"{TEMPLATES}/"
    found = checked_side_files(folder).items()
    theirs = {name: path for name, path in found if name in names or name.startswith(templates)}
    ours, now = read_vocabulary(own), read_vocabulary(folder)
    if ours.tokens == now.tokens:
        theirs.pop("generation_config.json", None)
        keep = {"generation_config.json"}
    else:
        keep = set()
        ids = {token: number for number, token in now.tokens.items()}
        config = folder / "config.json"
        said = json_object(read_small(config, MOST_BYTES), str(config)) if is_file(config) else {}
        base.config = _renumbered(base.config, said, ours.tokens, ids)
    gone: dict[str, Path | bytes | None] = {name: None for name in names - keep if is_file(own / name)}
    gone |= {name: None for name in checked_side_files(own) if name.startswith(templates)}
    base.instead = {**gone, **theirs}


def _renumbered(
    config: Mapping[str, Any], said: Mapping[str, Any], tokens: Mapping[int, str], ids: Mapping[str, int]
) -> dict[str, Any]:
    """A configuration whose ids of tokens are those of another tokenizer: as its own configuration says, or
    of the same token."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            part = said.get(key)
            made[key] = _renumbered(value, part if isinstance(part, dict) else {}, tokens, ids)
        elif key.endswith(_IDS) and value is not None:
            made[key] = said[key] if key in said else _renamed(value, tokens, ids)
        else:
            made[key] = value
    return made


def _renamed(value: Any, tokens: Mapping[int, str], ids: Mapping[str, int]) -> Any:
    if isinstance(value, list):
        return [_renamed(each, tokens, ids) for each in value]
    return ids.get(tokens.get(value, ""), value) if type(value) is int else value


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
