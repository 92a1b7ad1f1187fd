"""JSON from files that della did not write: one reading, or none."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from della.errors import CheckpointError, Problem

AGAIN = "download the file again"
MOST_DIGITS = 19  # every integer of as many fits 64 bits unsigned; a longer one is an attack or a mistake


class _Refused(ValueError):
    """Raised inside the decoder's hooks; becomes a CheckpointError that names the file."""


def json_object(raw: bytes, where: str, *, only_integers: bool = False) -> dict[str, Any]:
    """The JSON object in ``raw``; everything else is refused, as `json_value` does."""
    value = json_value(raw, where, only_integers=only_integers)
    if not isinstance(value, dict):
        raise CheckpointError(
            Problem(f"expected a JSON object, found a {type(value).__name__}", AGAIN, where)
        )
    return value


def json_value(raw: bytes, where: str, *, only_integers: bool = False) -> Any:
    """The JSON value in ``raw``; keys must be unique at every level and text must be UTF-8.

    ``where`` names the file in messages.  NaN is refused; with ``only_integers`` so is every number that is
    not a non-negative integer.  Otherwise Infinity passes: published model configurations hold it.
    Raises CheckpointError.
    """
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # a byte order mark, as editors on Windows write it
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_natural if only_integers else _integer,
            parse_float=_no_number if only_integers else float,
            parse_constant=_no_number if only_integers else _constant,
        )
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # finds a lone surrogate, which has no UTF-8
    except UnicodeError as error:
        raise CheckpointError(Problem(f"text is not UTF-8 ({error})", AGAIN, where)) from None
    except RecursionError:
        raise CheckpointError(Problem("JSON is nested too deeply", AGAIN, where)) from None
    except ValueError as error:
        raise CheckpointError(Problem(f"invalid JSON: {error}", AGAIN, where)) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:200]!r} stands twice")
            seen.add(key)
    return table


def _natural(digits: str) -> int:
    # "-0" is the integer 0 to Python, but not to the safetensors package.
    if digits.startswith("-") or len(digits) > MOST_DIGITS:
        raise _Refused(f"{digits[:40]} is not a size (an integer from 0 to 10^{MOST_DIGITS} - 1)")
    return int(digits)


def _integer(digits: str) -> int:
    if len(digits) > 100:
        raise _Refused(f"the integer {digits[:40]}... is too long")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise _Refused(f"{text[:40]} is not an integer")


def _constant(text: str) -> float:
    if text == "NaN":
        raise _Refused("NaN is not JSON")
    return float(text)
