"""Changes to a safetensors header as JSON: what is said changes, and it stays JSON most of the time.

An object is read as `Pairs`, a list of [key, value], so that a key can stand twice.  `Raw` is text that is
written as it is.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from della.dtypes import DTYPES

NUMBERS = (
    *(
        "0",
        "1",
        "2",
        "3",
        "4",
        "8",
        "-1",
        "-0",
        "00",
        "01",
        "1.0",
        "1e0",
        "1E400",
        "+1",
        "0x1",
        "true",
        "null",
    ),
    *(str(2**n + more) for n in (31, 32, 53, 63, 64) for more in (-1, 0, 1)),
    *("9" * 19, "9" * 20, "1" + "0" * 20, "9" * 400, "9" * 5000, "NaN", "Infinity", "-Infinity", '"4"', "[]"),
)
NAMES = ("", "w", "a\0b", "\0", "__metadata__", "é", "名前", "\ud800", "a" * 5000, "dtype", "\u202ex", "\n")
DEPTHS = (1, 2, 5, 20, 100, 127, 128, 900, 20_000)


class Pairs(list[Any]):
    """An object: a list of [key, value]."""


class Raw(str):
    """A piece of text that stands for itself."""


def read(raw: bytes) -> Pairs | None:
    """The object in ``raw``, or None where it holds none, or one too deep to be written again."""
    if b"[" * 50 in raw or b'{"a":' * 50 in raw:
        return None
    try:
        value = json.loads(raw, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Pairs) else None


def write(value: Any, gap: str = "") -> str:
    """JSON text, with ``gap`` behind every comma and colon."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + f",{gap}".join(f"{write(k)}:{gap}{write(v, gap)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + f",{gap}".join(write(child, gap) for child in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def edit(rng: Random, table: Pairs) -> None:
    """Make one random change to the header ``table``, in place."""
    rng.choice(_EDITS)(rng, table)


def _tensors(table: Pairs) -> list[Any]:
    """The [name, Pairs of fields] that are tensors."""
    return [pair for pair in table if pair[0] != "__metadata__" and isinstance(pair[1], Pairs)]


def _field(rng: Random, table: Pairs, *names: str) -> list[Any] | None:
    """One random [field, list] among the fields ``names`` of the tensors, or None."""
    tensors = _tensors(table)
    fields = rng.choice(tensors)[1] if tensors else []
    found = [pair for pair in fields if pair[0] in names and type(pair[1]) is list]
    return rng.choice(found) if found else None


def _any_object(rng: Random, table: Pairs) -> Pairs:
    inner = [pair[1] for pair in table if isinstance(pair[1], Pairs)]
    return rng.choice([table, table, *rng.sample(inner, min(2, len(inner)))])


def _number(rng: Random, table: Pairs) -> None:
    field = _field(rng, table, "shape", "data_offsets")
    if field and field[1]:
        field[1][rng.randrange(len(field[1]))] = Raw(rng.choice(NUMBERS))


def _longer(rng: Random, table: Pairs) -> None:
    field = _field(rng, table, "shape", "shape", "data_offsets")
    if field:
        count = rng.choice((1, 1, 1, 29, 33))
        field[1][rng.randint(0, len(field[1])) :] = [Raw(rng.choice(("1", "1", "0")))] * count


def _permuted(rng: Random, table: Pairs) -> None:
    field = _field(rng, table, "shape", "shape", "shape", "data_offsets")
    if field:
        rng.shuffle(field[1])


def _swapped_offsets(rng: Random, table: Pairs) -> None:
    a, b = _field(rng, table, "data_offsets"), _field(rng, table, "data_offsets")
    if a and b:
        a[1], b[1] = b[1], a[1]


def _shifted(rng: Random, table: Pairs) -> None:
    by = rng.choice((-8, -4, -1, 1, 2, 4, 64, 2**32, 2**63, 2**64))
    start = rng.randrange(len(table) + 1)
    for _, fields in _tensors(table)[start : start + rng.choice((1, 1000))]:
        for pair in fields:
            if pair[0] == "data_offsets" and type(pair[1]) is list:
                pair[1] = [n + by if type(n) is int else n for n in pair[1]]


def _dtype(rng: Random, table: Pairs) -> None:
    for _, fields in rng.sample(found := _tensors(table), min(1, len(found))):
        for pair in fields:
            if pair[0] == "dtype":
                odd = ("f32", "F32 ", "", "BF17", "F32\0", 0, None, ["F32"], Raw('"\\u00463\\u0032"'))
                pair[1] = rng.choice((*DTYPES, *odd))


def _doubled_key(rng: Random, table: Pairs) -> None:
    found = _any_object(rng, table)
    if found:
        key, value = rng.choice(found)
        found.insert(rng.randint(0, len(found)), [key, value])


def _dropped_key(rng: Random, table: Pairs) -> None:
    found = _any_object(rng, table)
    if found:
        del found[rng.randrange(len(found))]


def _renamed(rng: Random, table: Pairs) -> None:
    found = _any_object(rng, table)
    if found:
        rng.choice(found)[0] = rng.choice(NAMES)


def _swapped_keys(rng: Random, table: Pairs) -> None:
    found = _any_object(rng, table)
    if found:
        a, b = rng.choice(found), rng.choice(found)
        a[0], b[0] = b[0], a[0]


def _shuffled(rng: Random, table: Pairs) -> None:
    rng.shuffle(_any_object(rng, table))


def _added_field(rng: Random, table: Pairs) -> None:
    _any_object(rng, table).append([rng.choice(("more", *NAMES)), rng.choice((0, "x", None, [], Pairs()))])


def _nested(rng: Random, table: Pairs) -> None:
    found = _any_object(rng, table)
    if found:
        pair, depth = rng.choice(found), rng.choice(DEPTHS)
        inner = write(pair[1])
        pair[1] = Raw(rng.choice(("[" * depth + inner + "]" * depth, '{"a":' * depth + inner + "}" * depth)))


def _metadata(rng: Random, table: Pairs) -> None:
    odd: tuple[Any, ...] = (
        Pairs(),
        Pairs([["k", 1]]),
        Pairs([["k", "é\\u0000"]]),
        None,
        [],
        "x",
        Pairs([["", ""]]),
    )
    old = [pair for pair in table if pair[0] == "__metadata__"]
    for pair in old:
        table.remove(pair)
    table.insert(rng.randint(0, len(table)), ["__metadata__", rng.choice(odd)])


def _escaped(rng: Random, table: Pairs) -> None:
    if table:
        pair = rng.choice(table)
        text = json.dumps(str(pair[0]))[1:-1]
        pair[0] = Raw('"' + re.sub(r"(?<!\\)\w", lambda m: f"\\u{ord(m[0]):04x}", text, count=3) + '"')


def _same_data(rng: Random, table: Pairs) -> None:
    found = _tensors(table)
    if found:
        name, fields = rng.choice(found)
        table.append([f"{name}.again", Pairs([list(pair) for pair in fields])])


_EDITS = (
    *(_number, _number, _longer, _permuted, _permuted, _swapped_offsets, _shifted, _dtype, _dtype),
    *(_doubled_key, _dropped_key, _renamed, _swapped_keys, _shuffled, _shuffled, _added_field, _nested),
    *(_metadata, _escaped, _same_data),
)
