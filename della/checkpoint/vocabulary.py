"""Vocabularies of tokenizers, as far as a merge must know them: which token an id is, and special tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from della.checkpoint.files import is_file
from della.checkpoint.layout import read_small
from della.errors import CheckpointError

MOST_BYTES = 200_000_000
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True)
class Vocabulary:
    """``tokens`` by id, ``special`` tokens by kind, and ``rules`` of tokenizer.json by which text is cut
    (of its merges a hash).

    ``added`` are the tokens that no model of the tokenizer makes of text, each as tokenizer.json has it;
    ``moved`` those that the tokenizers library gives another id than the file does.
    """

    tokens: dict[int, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)
    rules: dict[str, Any] = field(default_factory=dict)
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    moved: list[tuple[str, int, int]] = field(default_factory=list)


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a folder; an empty one where there is none, or none that can be read."""
    tokens: dict[int, str] = {}
    fast = _json(folder / "tokenizer.json")
    model = fast.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if words is None:
        words = _json(folder / "vocab.json") or _lines(folder / "vocab.txt")
    if isinstance(words, dict):
        tokens |= {number: word for word, number in words.items() if type(number) is int}
    elif isinstance(words, list):  # Unigram: [token, score]
        tokens |= {number: row[0] for number, row in enumerate(words) if isinstance(row, list) and row}
    config, listed = _json(folder / "tokenizer_config.json"), fast.get("added_tokens")
    decoder = config.get("added_tokens_decoder")
    extra: list[Any] = list(listed) if isinstance(listed, list) else []
    if not fast:
        extra += [{"id": n, "content": w} for w, n in _json(folder / "added_tokens.json").items()]
        rows = decoder.items() if isinstance(decoder, dict) else ()
        extra += [{**row, "id": int(n)} for n, row in rows if n.isdecimal() and isinstance(row, dict)]
    added = {}
    for row in extra:
        if isinstance(row, dict) and type(row.get("id")) is int:
            tokens[row["id"]] = str(row.get("content"))
            added[tokens[row["id"]]] = row
    special = _special(_json(folder / "special_tokens_map.json")) | _special(config)
    return Vocabulary(tokens, special, _rules(fast) if fast else {}, added, _moved(fast))


Read = Callable[[Path], Vocabulary]


def _moved(fast: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(token, id, the id that it gets) of the added tokens of tokenizer.json whose ids follow a hole.

    tokenizers 0.23, and so transformers 5, gives an added token the next id that is free, whatever the file
    says.
    """
    model = fast.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(words, dict | list):
        return []
    known = (
        words if isinstance(words, dict) else {str(row[0]) for row in words if isinstance(row, list) and row}
    )
    added = fast.get("added_tokens")
    rows = [row for row in (added if isinstance(added, list) else ()) if isinstance(row, dict)]
    last, moved = len(words) - 1, []
    for row in rows:
        number, text = row.get("id"), str(row.get("content"))
        if type(number) is not int or text in known:
            continue
        last += 1
        moved += [(text, number, last)] if number != last else []
    return moved


def read_eos(folder: Path) -> Any:
    """The eos_token_id of generation_config.json; None where it names none."""
    return _json(folder / "generation_config.json").get("eos_token_id")


def _rules(fast: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: fast.get(key) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    model = fast.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    pairs = merges if isinstance(merges, list) else []  # "a b" once, ["a", "b"] now
    try:
        joined = "\n".join(pairs if isinstance(pairs[0], str) else map(" ".join, pairs)) if pairs else ""
    except TypeError:
        joined = json.dumps(pairs)
    return {**found, "merges": xxhash.xxh3_128_hexdigest(joined.encode(errors="replace"))}


def contradicting(folder: Path) -> list[str]:
    """Old files that name other special tokens, or ids, than tokenizer_config.json and tokenizer.json do.

    transformers 5 reads them, and they win: what it then loads is another tokenizer than the one beside it.
    """
    config = _json(folder / "tokenizer_config.json")
    found = []
    old, now = _special(_json(folder / "special_tokens_map.json")), _special(config)
    lists = [_listed(_json(folder / "special_tokens_map.json")), _listed(config)]
    said = now | {key: "" for key in SPECIAL if key in config and config[key] is None}
    if any(said.get(key, text) != text for key, text in old.items()) or (all(lists) and len(set(lists)) > 1):
        found.append("special_tokens_map.json")
    added = _json(folder / "added_tokens.json")
    if added and is_file(folder / "tokenizer.json"):
        tokens = read_vocabulary(folder).tokens
        if any(tokens.get(number) != word for word, number in added.items() if type(number) is int):
            found.append("added_tokens.json")
    return found


def chat_template(folder: Path) -> tuple[str, str] | None:
    """(file, text) of the chat template that transformers 5 takes: a file of its own goes before the key in a
    configuration; None where there is none."""
    plain = folder / "chat_template.jinja"
    if is_file(plain):
        return plain.name, plain.read_text(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        if found:
            return name if name == "chat_template.json" else f"a chat_template in {name}", str(found)
    return None


def _listed(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Additional special tokens, sorted."""
    found = table.get("additional_special_tokens")
    rows = found if isinstance(found, list) else []
    return tuple(sorted(str(row.get("content")) if isinstance(row, dict) else str(row) for row in rows))


def _special(table: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in SPECIAL:
        value = table.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


def _json(path: Path) -> dict[str, Any]:
    try:  # it is only looked at, and large: not read as strictly as what is believed
        found = json.loads(read_small(path, MOST_BYTES)) if is_file(path) else {}
    except (CheckpointError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> dict[str, int]:
    try:
        text = read_small(path, MOST_BYTES).decode() if is_file(path) else ""
    except (CheckpointError, OSError, UnicodeError):
        return {}
    return {line: number for number, line in enumerate(text.split("\n")) if line}
