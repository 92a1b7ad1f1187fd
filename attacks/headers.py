"""Rows 1 and 2: files that end too early, and headers that lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attacks import INPUT, refused
from attacks.files import NORM, WEIGHTS, blob, file_of, put, sharded, table_of, tensors

MATH = f"math/{WEIGHTS}"
AGAIN = "download the file again"

# ---- row 1: truncated -------------------------------------------------------------------------------------


@refused(1, INPUT, f"FOLDER/{MATH}", "expected 3,205 bytes", "found 3,204;", AGAIN)
def last_byte_missing(folder: Path) -> None:
    os.truncate(folder / MATH, (folder / MATH).stat().st_size - 1)


@refused(1, INPUT, f"FOLDER/{MATH}", "1 bytes follow the last tensor", AGAIN)
def one_byte_more(folder: Path) -> None:
    put(folder / MATH, (folder / MATH).read_bytes() + b"\0")


@refused(1, INPUT, f"FOLDER/{MATH}", r"header alone takes [\d,]+ bytes", "found 100;", AGAIN)
def ends_in_the_header(folder: Path) -> None:
    os.truncate(folder / MATH, 100)


@refused(1, INPUT, f"FOLDER/{MATH}", "at least 8 bytes", "found 7;", AGAIN)
def ends_in_the_length(folder: Path) -> None:
    os.truncate(folder / MATH, 7)


@refused(1, INPUT, f"FOLDER/{MATH}", "at least 8 bytes", "found 0;", AGAIN)
def nothing_in_it(folder: Path) -> None:
    os.truncate(folder / MATH, 0)


@refused(1, INPUT, "FOLDER/math/s2.safetensors", "expected 923 bytes", "found 922;", AGAIN)
def one_shard_of_two(folder: Path) -> None:
    sharded(folder / "math")
    shard = folder / "math/s2.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


@refused(1, INPUT, f"FOLDER/{MATH}", "Git LFS", "git lfs pull")
def a_pointer_of_git_lfs(folder: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2800\n"
    put(folder / MATH, pointer.encode())


@refused(1, INPUT, f"FOLDER/{MATH}", "not a safetensors file", AGAIN)
def a_page_of_html(folder: Path) -> None:
    put(folder / MATH, b"<!DOCTYPE html><html><body>Sign in to go on</body></html>")


# ---- row 2: headers that lie ------------------------------------------------------------------------------


def lie(name: str, *says: str) -> Callable[[Callable[[dict[str, Any], dict[str, Any]], Any]], None]:
    """Registers a change to the header of the file; ``NORM`` is the tensor it is about.

    The change gets the header and the entry of NORM, and returns None, or what to write instead.
    """

    def register(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> None:
        @refused(2, INPUT, f"FOLDER/{MATH}", *says, AGAIN, name=name)
        def make(folder: Path) -> None:
            header, data = table_of(tensors(1))
            instead = change(header, header[NORM])
            put(folder / MATH, blob(header if instead is None else instead, data))

    return register


def text(header: dict[str, Any], old: str, new: str) -> bytes:
    """The header's JSON with one piece of it replaced."""
    raw = json.dumps(header)
    assert old in raw
    return raw.replace(old, new, 1).encode()


@lie("overlap", NORM, "overlaps", "begin at 1,280, found 1,276")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["data_offsets"] = [1276, 2076]


@lie("one-tensor-over-another", "overlaps")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header["twin"] = dict(norm)


@lie("hole", NORM, "leaves a hole of 4 bytes", "begin at 1,280, found 1,284")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["data_offsets"] = [1284, 2084]


@lie("beyond-the-file", "expected 3,676 bytes, found 3,276")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header["far"] = {"dtype": "F32", "shape": [100], "data_offsets": [2400, 2800]}


@lie("far-beyond-the-file", "far", "leaves a hole")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header["far"] = {"dtype": "F32", "shape": [1], "data_offsets": [2**62, 2**62 + 4]}


@lie("end-before-begin", NORM, "begin <= end")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["data_offsets"].reverse()


@lie("shape-and-offsets-differ", NORM, r"F32 \[201\] takes 804 bytes", "span 800")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [201]


@lie("product-overflows", NORM, "overflows 64 bits")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [2**32, 2**32, 25, 8]


@lie("nothing-times-a-huge-shape", NORM, "overflows 64 bits")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm |= {"shape": [0, 2**62, 2**62], "data_offsets": [1280, 1280]}


@lie("negative-shape", "-200 is not a size")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [-200]


@lie("negative-offset", "-4 is not a size")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["data_offsets"] = [-4, 796]


@lie("offset-of-a-thousand-digits", "is not a size")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["data_offsets"] = [10**999, 10**999 + 800]


@lie("fraction-as-a-size", "is not an integer")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [200.0]


@lie("true-as-a-size", NORM, "list of integers")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [200, True]


@lie("a-thousand-axes", NORM, "at most 32 axes, found 1000")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [200, *[1] * 999]


@lie("a-tensor-twice", NORM, "stands twice")
def _(header: dict[str, Any], norm: dict[str, Any]) -> bytes:
    return text(header, '"lm_head.weight"', f'"{NORM}"')


@lie("a-tensor-twice-in-disguise", NORM, "stands twice")
def _(header: dict[str, Any], norm: dict[str, Any]) -> bytes:
    return text(header, '"lm_head.weight"', f'"\\u006d{NORM[1:]}"')


@lie("a-field-twice", "shape", "stands twice")
def _(header: dict[str, Any], norm: dict[str, Any]) -> bytes:
    return text(header, '"shape": [200]', '"shape": [200], "shape": [100, 2]')


@lie("a-name-with-nul", "NUL")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header[f"{NORM}\0x"] = header.pop(NORM)


@lie("an-empty-name", "empty")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header[""] = header.pop(NORM)


@lie("half-a-character-as-a-name", "not UTF-8")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header["\ud800"] = header.pop(NORM)


@lie("bytes-that-are-no-text", "not UTF-8")
def _(header: dict[str, Any], norm: dict[str, Any]) -> bytes:
    return json.dumps(header).encode().replace(b"lm_head", b"lm\xffhead")


@lie("a-field-more", NORM, "expected the fields", "secret")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["secret"] = 1


@lie("a-field-less", NORM, "expected the fields")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    del norm["dtype"]


@lie("metadata-that-is-no-text", "__metadata__", "must be a string")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    header["__metadata__"] = {"format": {"a": 1}}


@lie("a-list-as-the-header", "must begin with '{'")
def _(header: dict[str, Any], norm: dict[str, Any]) -> list[object]:
    return [header]


@lie("a-million-brackets", "nested too deeply")
def _(header: dict[str, Any], norm: dict[str, Any]) -> bytes:
    return b'{"a":' + b"[" * 1_000_000


@lie("not-a-number", "NaN is not an integer")
def _(header: dict[str, Any], norm: dict[str, Any]) -> None:
    norm["shape"] = [float("nan")]


@refused(2, INPUT, f"FOLDER/{MATH}", NORM, "unknown dtype 'F33'", "give the model in BF16")
def unknown_dtype(folder: Path) -> None:
    header, data = table_of(tensors(1))
    header[NORM]["dtype"] = "F33"
    put(folder / MATH, blob(header, data))


@refused(2, INPUT, f"FOLDER/{MATH}", "lm_head.weight", "F4", "give the model in BF16, F16 or F32")
def four_bits_a_number(folder: Path) -> None:
    header, data = table_of({"lm_head.weight": np.zeros(10, np.float32)})
    header["lm_head.weight"] |= {"dtype": "F4", "shape": [80]}
    put(folder / MATH, blob(header, data))


@refused(2, INPUT, f"FOLDER/{MATH}", "header of 100,000,001 bytes", "100,000,000 is the most", AGAIN)
def more_than_100_megabytes(folder: Path) -> None:
    put(folder / MATH, (100_000_001).to_bytes(8, "little") + b"{}")
    os.truncate(folder / MATH, 100_000_100)  # sparse: it takes no room on the disk


@refused(2, INPUT, f"FOLDER/{MATH}", "header of 18,446,744,073,709,551,615 bytes", AGAIN)
def a_header_of_all_ones(folder: Path) -> None:
    put(folder / MATH, b"\xff" * 8 + b"{}")


@refused(2, INPUT, "FOLDER/base/s2.safetensors", "FOLDER/math/model.safetensors", "overlaps", "truncated")
def in_two_models_at_once(folder: Path) -> None:
    """Both are told."""
    sharded(folder / "base")
    header, data = table_of(tensors(1))
    header["twin"] = dict(header[NORM])
    put(folder / MATH, blob(header, data))
    put(folder / "base/s2.safetensors", file_of({NORM: tensors(0)[NORM]})[:-5])
