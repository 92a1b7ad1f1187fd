"""config.json of a model whose layers are those of several: counts, and lists with an entry a layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from della.checkpoint.source import Source
from della.errors import CheckpointError, Problem
from della.planning.configs import DEPTH

COUNTS = (
    *DEPTH, "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth",
)  # fmt: skip
# Lists that are of no layer, however long; lists of the numbers of layers; numbers by which layers are of one
# kind or another.
NO_LAYERS = re.compile(
    r"^(_.*|architectures|.*_tokens?|.*_token_ids?|.*tokens_ids|.*labels?|languages|model_type|bad_words.*"
    r"|.*_section|image_.*|.*_token_weights)$"
)
MEMBERS = re.compile(
    r"^(mlp_only_layers|moe_layers|cross_attention_layers|.*layer_(idxs?|ids?|indices)|.*_idxs)$"
)
BY_NUMBER = re.compile(
    r"^(first_k_dense_replace|.*_layer_(interval|step|period|offset|freq)|full_attention_interval"
    r"|decoder_sparse_step|moe_(layer_freq|every_n_layers)|sliding_window_pattern|num_kv_shared_layers)$"
)
_IDLE = (None, False, 0, 1)


class Cut(NamedTuple):
    """Layers ``first`` to before ``end`` of the ``total`` that a model has, and its configuration."""

    source: Source
    total: int
    first: int
    end: int


def _tables(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A configuration and those of its parts, each with the keys that lead to it."""
    yield path, config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _tables(value, (*path, key))


def _kind(name: str) -> str:
    return next((kind for kind, sign in (("vision", "vis"), ("audio", "audio")) if sign in name), "text")


def _counts(config: Mapping[str, Any], stack: str) -> list[tuple[tuple[str, ...], str, int]]:
    """(path, key, value) of what may be the count of a stack's layers."""
    found = [
        (path, key, table[key])
        for path, table in _tables(config)
        for key in COUNTS
        if isinstance(table.get(key), int)
    ]
    if len({_kind(".".join(path)) for path, _, _ in found}) > 1:
        found = [each for each in found if _kind(".".join(each[0])) == _kind(stack)]
    sides = {"decoder" in key for _, key, _ in found}
    if len(sides) > 1:
        found = [each for each in found if ("decoder" in each[1]) == ("decoder" in stack)]
    return found


def counted(config: Mapping[str, Any], stack: str) -> set[int]:
    """How many layers a configuration says that a stack has: one number, or none, or several."""
    return {value for _, _, value in _counts(config, stack)}


def check_count(source: Source, stack: str, count: int) -> None:
    """Raises CheckpointError where the configuration counts other layers than there are."""
    said = counted(source.config, stack)
    if said and said != {count}:
        numbers = " and ".join(map(str, sorted(said)))
        text = f"config.json counts {numbers} layers, and its tensors have {count} of {stack}"
        fix = "layers of it cannot be cut out: give the model as it was saved by transformers"
        raise CheckpointError(Problem(text, fix, source.reference))


def _lists(table: Mapping[str, Any], count: int) -> Iterator[str]:
    """The keys whose values have an entry for each of ``count`` layers."""
    for key, value in table.items():
        is_text = isinstance(value, str) and key.endswith("pattern")
        if (isinstance(value, list) or is_text) and len(value) == count and not NO_LAYERS.match(key):
            yield key


def _is_members(key: str, value: Any) -> bool:
    return bool(MEMBERS.match(key)) and isinstance(value, list) and all(type(x) is int for x in value)


def without_layers(config: Mapping[str, Any], stack: str, count: int) -> dict[str, Any]:
    """A configuration without what a cut changes, to be held against another."""
    made = dict(config)
    paths = {path for path, _, _ in _counts(config, stack)} or {()}
    for path in paths:
        table = made
        for key in path:
            table[key] = dict(table[key])
            table = table[key]
        for key in [k for k in table if k in COUNTS or _is_members(k, table[k])] + list(_lists(table, count)):
            table.pop(key, None)
    return made


def joined(
    config: Mapping[str, Any], stack: str, cuts: Sequence[Cut]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The configuration of a model whose ``stack`` is made of ``cuts``.

    Args:
        config: Of the model that gives all else.
        stack: What stands before the number of a layer.
        cuts: The layers, in their order.

    Returns:
        The configuration, notes, and the names of the lists that were cut and joined.
    """
    made, notes, changed = dict(config), list[str](), list[str]()
    targets = _counts(config, stack)
    for path in dict.fromkeys([path for path, _, _ in targets] or [()]):
        table = made
        for key in path:
            table[key] = dict(table[key])
            table = table[key]
        tables = [_at(cut.source.config, path) for cut in cuts]
        for key in list(table):
            if _is_members(key, table[key]):
                table[key] = _members(key, cuts, tables)
                changed.append(key)
        listed = dict.fromkeys(k for cut, own in zip(cuts, tables) for k in _lists(own, cut.total))
        for key in (key for key in listed if not _is_members(key, table.get(key))):
            lacking = [c.source.reference for c, own in zip(cuts, tables) if key not in _lists(own, c.total)]
            if lacking:
                table.pop(key, None)
                said = f"config.json has no {key} with an entry for each layer, so the result's has none"
                notes.append(f"{lacking[0]}: {said}")
                continue
            pieces = [own[key][cut.first : cut.end] for cut, own in zip(cuts, tables)]
            table[key] = (
                "".join(pieces) if isinstance(pieces[0], str) else [x for piece in pieces for x in piece]
            )
            changed.append(key)
        for _, key, _ in (each for each in targets if each[0] == path):
            table[key] = sum(cut.end - cut.first for cut in cuts)
        moved = [key for key in table if BY_NUMBER.match(key) and table[key] not in _IDLE]
        if moved and _has_moved(cuts):
            said = (
                f"config.json says by the number of a layer: {', '.join(f'{k}: {table[k]}' for k in moved)}"
            )
            notes.append(f"{said}; layers have other numbers now, so see whether that holds for the result")
    return made, notes, changed


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    table: Any = config
    for key in path:
        table = table.get(key) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else {}


def _members(key: str, cuts: Sequence[Cut], tables: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of the layers of the result whose number in their own model ``key`` lists."""
    found, offset = [], 0
    for cut, own in zip(cuts, tables):
        listed = own.get(key) or []
        found += [offset + n - cut.first for n in range(cut.first, cut.end) if n in listed]
        offset += cut.end - cut.first
    return found


def _has_moved(cuts: Sequence[Cut]) -> bool:
    ends = [0]
    for cut in cuts:
        if cut.first != ends[-1]:
            return True
        ends.append(cut.end)
    return False
