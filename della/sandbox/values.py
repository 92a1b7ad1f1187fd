"""Values of plain types as bytes, and back: what crosses the wall of the sandbox.

The same module is used on both sides.  Outside nothing is believed: a value is rebuilt from its bytes as one
of a few types, so no method of a generated class ever runs there.  Subclasses (Counter, a named tuple) cross
as the plain type they hold, iterators as iterators over the same items; other objects do not cross.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

MOST_BYTES = 1 << 20
MOST_DEPTH = 100


class CannotCrossError(ValueError):
    """A value that has no plain type, or is too large or too deep."""


def encode(value: object, most: int = MOST_BYTES) -> bytes:
    """``value`` as bytes, at most about ``most``; CannotCrossError if that cannot be."""
    out = bytearray()
    _write(out, value, most, 0)
    return bytes(out)


def decode(data: bytes) -> Any:
    """What `encode` was given; ValueError for bytes that it would not have written."""
    reader = _Reader(data)
    try:
        value = reader.value(0)
    except (TypeError, OverflowError) as error:  # what cannot be hashed, in a set
        raise ValueError(f"no value: {error}") from error
    if reader.position != len(data):
        raise ValueError("bytes after the value")
    return value


def _write(out: bytearray, value: object, most: int, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise CannotCrossError("nested too deeply")
    if value is None or value is True or value is False:
        out += b"N" if value is None else b"T" if value else b"F"
    elif isinstance(value, int):
        out += b"i%b;" % int.__format__(value, "x").encode()
    elif isinstance(value, float):
        out += b"f%b;" % float.hex(value).encode()
    elif isinstance(value, complex):
        out += b"c%b;%b;" % (float.hex(value.real).encode(), float.hex(value.imag).encode())
    elif isinstance(value, str):
        data = str.encode(value, "utf-8", "surrogatepass")
        out += b"s%d:%b" % (len(data), data)
    elif isinstance(value, (bytes, bytearray)):
        out += b"%b%d:%b" % (b"b" if isinstance(value, bytes) else b"a", len(value), bytes(value))
    elif isinstance(value, range):
        _write_items(out, b"r", [value.start, value.stop, value.step], most, depth)
    else:
        tag, items = _items(value)
        _write_items(out, tag, items, most, depth)
    if len(out) > most:
        raise CannotCrossError("too large")


def _write_items(out: bytearray, tag: bytes, items: Iterable[object], most: int, depth: int) -> None:
    out += tag
    for item in items:
        _write(out, item, most, depth + 1)
    out += b"."


def _items(value: Any) -> tuple[bytes, Iterable[object]]:
    """The tag of a container, and what it holds; of a mapping, keys and values in turn."""
    if isinstance(value, dict):
        return b"d", (part for pair in dict.items(value) for part in pair)
    kinds: tuple[tuple[bytes, Any], ...] = ((b"l", list), (b"t", tuple), (b"S", set), (b"z", frozenset))
    for tag, kind in kinds:
        if isinstance(value, kind):
            return tag, kind.__iter__(value)
    kind = type(value)
    if kind is type({}.keys()):
        return b"k", (part for key in value for part in (key, None))
    if kind is type({}.values()):
        return b"v", value
    if kind is type({}.items()):
        return b"m", (part for pair in value for part in pair)
    if kind.__name__ == "deque" and kind is type(_deque([])):
        return b"q", value
    if hasattr(kind, "__next__"):
        return b"I", value
    raise CannotCrossError(f"an object of type {kind.__name__}")


def _deque(items: list[Any]) -> object:
    from collections import deque  # rarely needed, and not free

    return deque(items)


def _dict(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


_SINGLE = {b"N": None, b"T": True, b"F": False}
_CONTAINERS: dict[bytes, Callable[[list[Any]], object]] = {
    b"l": list,
    b"t": tuple,
    b"S": set,
    b"z": frozenset,
    b"I": iter,
    b"q": _deque,
    b"r": lambda items: range(*items),
    b"d": _dict,
    b"k": lambda items: _dict(items).keys(),
    b"v": lambda items: dict(enumerate(items)).values(),
    b"m": lambda items: _dict(items).items(),
}
_TEXTS: dict[bytes, Callable[[bytes], object]] = {
    b"s": lambda data: data.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"a": bytearray,
}


class _Reader:
    """Reads values from bytes, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 0

    def value(self, depth: int) -> object:
        tag = self.data[self.position : self.position + 1]
        self.position += 1
        if depth > MOST_DEPTH:
            raise ValueError("nested too deeply")
        if tag in _SINGLE:
            return _SINGLE[tag]
        if tag == b"i":
            return int(self._until(b";"), 16)
        if tag == b"f":
            return self._float()
        if tag == b"c":
            return complex(self._float(), self._float())
        if tag in _TEXTS:
            return _TEXTS[tag](self._take(int(self._until(b":"))))
        if tag in _CONTAINERS:
            return _CONTAINERS[tag](self._until_dot(depth))
        raise ValueError(f"no value begins with {tag!r}")

    def _until_dot(self, depth: int) -> list[object]:
        items = []
        while self.data[self.position : self.position + 1] != b".":
            items.append(self.value(depth + 1))
        self.position += 1
        return items

    def _until(self, end: bytes) -> str:
        stop = self.data.find(end, self.position)
        if stop < 0:
            raise ValueError("the value ends too early")
        text, self.position = self.data[self.position : stop], stop + 1
        return text.decode("ascii")

    def _take(self, length: int) -> bytes:
        if not 0 <= length <= len(self.data) - self.position:
            raise ValueError("the value ends too early")
        self.position += length
        return self.data[self.position - length : self.position]

    def _float(self) -> float:
        return float.fromhex(self._until(b";"))
