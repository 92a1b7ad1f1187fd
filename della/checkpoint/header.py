"""The header of a safetensors file: parsed, validated, built.  Pure but for `read_header`.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the data.  Reading is never laxer than the
safetensors package 0.8.0, and refuses more: duplicate keys, unknown fields, names that are empty or hold NUL.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from della.checkpoint.files import open_to_read, readable
from della.checkpoint.strict import AGAIN, json_object
from della.dtypes import DTYPES, DType
from della.errors import CheckpointError, Collector, Problem

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
MOST_ELEMENTS = 2**63 - 1
MOST_AXES = 32  # NumPy before 2.0 has no more
ALIGNMENT = 64
METADATA = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}
WIDE = "give the model in BF16, F16 or F32"
Refusal = Callable[..., CheckpointError]
LFS_POINTER = b"version "  # how the text begins that Git LFS leaves for a file


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header.  ``begin`` and ``end`` are bytes counted from ``Header.data_start``."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """``tensors`` in the order of their data; ``data_start`` is the file offset of the first byte of data."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int


def header_length(first: bytes, file_size: int, where: str) -> int:
    """Bytes of JSON behind the first 8 bytes of a file of ``file_size`` bytes.  Raises CheckpointError."""
    if file_size < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise CheckpointError(
            Problem(
                f"truncated: expected at least {LENGTH_BYTES} bytes, found {min(file_size, len(first))}",
                AGAIN,
                where,
            )
        )
    if first[:LENGTH_BYTES] == LFS_POINTER:
        raise CheckpointError(
            Problem("a pointer of Git LFS, not the file itself", f"fetch it: git lfs pull, or {AGAIN}", where)
        )
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(
            Problem(
                f"not a safetensors file: its first 8 bytes announce a header of {length:,} bytes, and "
                f"{MOST_HEADER_BYTES:,} is the most",
                AGAIN,
                where,
            )
        )
    if LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            Problem(
                f"truncated: the header alone takes {LENGTH_BYTES + length:,} bytes, found {file_size:,}",
                AGAIN,
                where,
            )
        )
    return length


def parse_header(raw_prefix: bytes, file_size: int, where: str) -> Header:
    """The header of a file, given its first bytes (8 + length or more) and its size in bytes.

    ``where`` names the file in messages.  Raises CheckpointError unless the tensors fill the rest of the file
    exactly, without a hole or an overlap.
    """
    length = header_length(raw_prefix, file_size, where)
    data_start = LENGTH_BYTES + length
    if len(raw_prefix) < data_start:
        raise ValueError(f"the first {data_start} bytes are needed, {len(raw_prefix)} were given")
    raw = bytes(raw_prefix[LENGTH_BYTES:data_start])
    if not raw.startswith(b"{"):
        raise CheckpointError(
            Problem(
                f"not a safetensors file: the header must begin with '{{', found {raw[:1]!r}", AGAIN, where
            )
        )
    table = json_object(raw, where, only_integers=True)
    metadata = _metadata(table.pop(METADATA, {}), where)
    infos = [tensor_info(name, entry, where) for name, entry in table.items()]
    infos.sort(key=lambda info: (info.begin, info.end))
    _check_layout(infos, data_start, file_size, where)
    return Header({info.name: info for info in infos}, metadata, data_start)


def read_header(path: Path, where: str | None = None) -> tuple[Header, bytes, int]:
    """The header of the file at ``path``, the raw bytes it was parsed from, and the file's size in bytes.

    ``where`` names the file in messages, by default its path.  Raises CheckpointError.
    """
    where = where or str(path)
    with readable(where), open(open_to_read(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(LENGTH_BYTES) or b""
        raw = first + _read_exactly(file, header_length(first, size, where), where)
    return parse_header(raw, size, where), raw, size


def _read_exactly(file: io.FileIO, count: int, where: str) -> bytes:
    parts: list[bytes] = []
    while count > 0:
        part = file.read(count)
        if not part:
            raise CheckpointError(Problem("shrank while it was read", "is something writing to it?", where))
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _metadata(value: object, where: str) -> dict[str, str]:
    if value is None:  # mlx writes it, and the safetensors package takes it
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(
            Problem(f"{METADATA} must be an object of strings, found a {type(value).__name__}", AGAIN, where)
        )
    for key, text in value.items():
        if not isinstance(text, str):
            raise CheckpointError(
                Problem(
                    f"{METADATA} key {_short(key)} must be a string, found a {type(text).__name__}",
                    AGAIN,
                    where,
                )
            )
    return value


def tensor_info(name: str, entry: object, where: str) -> TensorInfo:
    """One entry of a header, checked by itself: its name, dtype, shape and span.  Raises CheckpointError."""
    refused = partial(_refused, where, name)
    if not name or "\0" in name:
        raise refused("a tensor's name must not be empty or contain NUL")
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise refused(f"expected the fields data_offsets, dtype, shape, found {str(found)[:200]}")
    dtype = _dtype(entry["dtype"], refused)
    shape = _naturals(entry["shape"], "shape", refused)
    offsets = _naturals(entry["data_offsets"], "data_offsets", refused)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refused(f"data_offsets must be [begin, end] with begin <= end, found {str(list(offsets))[:80]}")
    if len(shape) > MOST_AXES:
        raise refused(f"a shape has at most {MOST_AXES} axes, found {len(shape)}")
    # Zeros are left out: 0 x 2^63 x 2^63 has no elements, but no array of that shape can be made either.
    if math.prod(n for n in shape if n) * dtype.bits > MOST_ELEMENTS:
        raise refused(f"shape {list(shape)} overflows 64 bits")
    expected = math.prod(shape) * dtype.bytes
    if offsets[1] - offsets[0] != expected:
        span = f"its data_offsets {list(offsets)} span {offsets[1] - offsets[0]:,}"
        raise refused(f"{dtype.name} {list(shape)} takes {expected:,} bytes, {span}")
    return TensorInfo(name, dtype, shape, offsets[0], offsets[1])


def _refused(where: str, name: str, said: str, fix: str = AGAIN) -> CheckpointError:
    return CheckpointError(Problem(f"tensor {_short(name)}: {said}", fix, where, name))


def _dtype(value: object, refused: Refusal) -> DType:
    dtype = DTYPES.get(value) if isinstance(value, str) else None
    if dtype is None:
        raise refused(f"unknown dtype {_short(value)}", WIDE)
    if dtype.kind == "opaque":
        raise refused(f"dtype {dtype.name} holds scaled or packed values that cannot be merged", WIDE)
    return dtype


def _naturals(value: object, field: str, refused: Refusal) -> tuple[int, ...]:
    # Not isinstance: true and false are ints to Python.  Negative numbers the JSON reader has refused.
    if not isinstance(value, list) or any(type(n) is not int for n in value):
        raise refused(f"{field} must be a list of integers, found {str(value)[:80]}")
    return tuple(value)


def _check_layout(infos: Sequence[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    """Every byte of data belongs to exactly one tensor; sizes are told as those of the whole file."""
    at, before = 0, "the header"
    for info in infos:
        if info.begin != at:
            what = "overlaps" if info.begin < at else f"leaves a hole of {info.begin - at:,} bytes after"
            raise CheckpointError(
                Problem(
                    f"tensor {_short(info.name)} {what} {before}: expected its data to begin at "
                    f"{at:,}, found {info.begin:,}",
                    AGAIN,
                    where,
                    info.name,
                )
            )
        at, before = info.end, f"tensor {_short(info.name)}"
    whole = data_start + at
    if whole != file_size:
        what = "truncated" if whole > file_size else f"{file_size - whole:,} bytes follow the last tensor"
        raise CheckpointError(Problem(f"{what}: expected {whole:,} bytes, found {file_size:,}", AGAIN, where))


def _short(value: object) -> str:
    return repr(value if not isinstance(value, str) or len(value) <= 200 else value[:200] + "...")


def build_header(
    tensors: Sequence[tuple[str, DType, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file whose data holds ``tensors`` in the given order, and where each one lies.

    Returns the bytes up to the data, a multiple of 64, and name -> (begin, end) counted from their end.
    ``metadata`` is ``{"format": "pt"}`` unless given.  Raises CheckpointError for names that no reader takes.
    """
    table: dict[str, object] = {METADATA: dict({"format": "pt"} if metadata is None else metadata)}
    spans: dict[str, tuple[int, int]] = {}
    problems = Collector(CheckpointError)
    end = 0
    for name, dtype, shape in tensors:
        if name in table or not name or "\0" in name or name.encode(errors="ignore").decode() != name:
            said = f"tensor {_short(name)}: a name must be unique, not empty, UTF-8 and without NUL"
            problems.add(said, tensor=name)
        begin, end = end, end + math.prod(shape) * dtype.bytes
        spans[name] = (begin, end)
        table[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    length = len(text) + -(LENGTH_BYTES + len(text)) % ALIGNMENT
    if length > MOST_HEADER_BYTES:
        said = f"a header of {length:,} bytes, and {MOST_HEADER_BYTES:,} is the most"
        problems.add(said, "use smaller shards")
    problems.raise_any()
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length), spans
