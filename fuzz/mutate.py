"""Changes to bytes that know nothing of what the bytes mean."""

from __future__ import annotations

import re
from random import Random

_DIGIT = re.compile(rb"[0-9]")
MOST_COPIED = 40


def damage(rng: Random, raw: bytes, other: bytes) -> bytes:
    """``raw`` with one random change; ``other`` is what may be spliced into it."""
    return rng.choice(_CHANGES)(rng, raw, other)


def _flip(rng: Random, raw: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(raw) or 1)
    return raw[:at] + bytes([b ^ (1 << rng.randrange(8)) for b in raw[at : at + 1]]) + raw[at + 1 :]


def _replace(rng: Random, raw: bytes, other: bytes) -> bytes:
    at = rng.randrange(len(raw) or 1)
    return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]


def _insert(rng: Random, raw: bytes, other: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    return raw[:at] + rng.randbytes(rng.choice((1, 1, 2, 5))) + raw[at:]


def _delete(rng: Random, raw: bytes, other: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    return raw[:at] + raw[at + rng.choice((1, 1, 2, 9)) :]


def _double(rng: Random, raw: bytes, other: bytes) -> bytes:
    at = rng.randint(0, len(raw))
    piece = raw[at : at + rng.randint(1, MOST_COPIED)]
    return raw[:at] + piece + raw[at:]


def _splice(rng: Random, raw: bytes, other: bytes) -> bytes:
    at, there = rng.randint(0, len(raw)), rng.randint(0, len(other))
    return raw[:at] + other[there : there + rng.randint(1, MOST_COPIED)] + raw[at:]


def _cross(rng: Random, raw: bytes, other: bytes) -> bytes:
    return raw[: rng.randint(0, len(raw))] + other[rng.randint(0, len(other)) :]


def _digit(rng: Random, raw: bytes, other: bytes) -> bytes:
    digits = [match.start() for match in _DIGIT.finditer(raw)]
    if not digits:
        return raw
    at = rng.choice(digits)
    return raw[:at] + str(rng.randrange(10)).encode() + raw[at + 1 :]


_CHANGES = (_flip, _replace, _insert, _delete, _double, _splice, _cross, _digit, _digit)
