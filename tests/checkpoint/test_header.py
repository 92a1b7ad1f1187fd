"""The header: what is refused and in which words; agreement with the safetensors package, both ways."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from della.checkpoint.header import Header, build_header, parse_header, read_header
from della.dtypes import DTYPES
from della.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MERGED = [dtype for dtype in DTYPES.values() if dtype.kind != "opaque"]


def blob(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def parse(raw: bytes) -> Header:
    return parse_header(raw, len(raw), "m.safetensors")


def ours(raw: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """name -> (dtype, shape, data), or None where we refuse."""
    try:
        header = parse(raw)
    except CheckpointError:
        return None
    start = header.data_start
    return {
        info.name: (info.dtype.name, list(info.shape), raw[start + info.begin : start + info.end])
        for info in header.tensors.values()
    }


def theirs(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    tensors = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    return {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in tensors}


def test_a_plain_header() -> None:
    header = parse(
        blob({"b": {**F32, "data_offsets": [4, 8]}, "a": F32, "__metadata__": {"k": "v"}}, b"x" * 8)
    )
    assert list(header.tensors) == ["a", "b"]
    info = header.tensors["b"]
    assert (info.name, info.dtype, info.shape) == ("b", DTYPES["F32"], (1,))
    assert (info.begin, info.end, info.nbytes, info.elements) == (4, 8, 4, 1)
    assert header.metadata == {"k": "v"}
    assert header.data_start == len(blob({"b": F32, "a": F32, "__metadata__": {"k": "v"}}))


def one(**changes: object) -> dict[str, object]:
    return {"w": {**F32, **changes}}


AGAIN = "; download the file again"
# Each message ends in AGAIN, but for those of dtypes.
REFUSED: list[tuple[bytes, str]] = [
    (b"", "truncated: expected at least 8 bytes, found 0"),
    (b"1234567", "truncated: expected at least 8 bytes, found 7"),
    (
        (100_000_001).to_bytes(8, "little"),
        "not a safetensors file: its first 8 bytes announce a header of 100,000,001 bytes, "
        "and 100,000,000 is the most",
    ),
    (
        (50).to_bytes(8, "little") + b"{}",
        "truncated: the header alone takes 58 bytes, found 10",
    ),
    (blob(b" {}"), "not a safetensors file: the header must begin with '{', found b' '"),
    (blob(b""), "not a safetensors file: the header must begin with '{', found b''"),
    (blob(one(), b"123"), "truncated: expected 73 bytes, found 72"),
    (
        b"version https://git-lfs.github.com/spec/v1",
        "a pointer of Git LFS, not the file itself; fetch it: git lfs pull, or download the file again",
    ),
    (
        blob(one(), b"12345"),
        "1 bytes follow the last tensor: expected 73 bytes, found 74",
    ),
    (
        blob({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456"),
        "tensor 'b' overlaps tensor 'a': expected its data to begin at 4, found 2",
    ),
    (
        blob({"a": F32, "b": {**F32, "data_offsets": [6, 10]}}, b"1234567890"),
        "tensor 'b' leaves a hole of 2 bytes after tensor 'a': expected its data to begin at 4, found 6",
    ),
    (
        blob(one(data_offsets=[2, 6]), b"123456"),
        "tensor 'w' leaves a hole of 2 bytes after the header: expected its data to begin at 0, found 2",
    ),
    (
        blob(one(data_offsets=[4, 0]), b"1234"),
        "tensor 'w': data_offsets must be [begin, end] with begin <= end, found [4, 0]",
    ),
    (
        blob(one(data_offsets=[0, 4, 4]), b"1234"),
        "tensor 'w': data_offsets must be [begin, end] with begin <= end, found [0, 4, 4]",
    ),
    (
        blob(one(data_offsets=[0, 8]), b"12345678"),
        "tensor 'w': F32 [1] takes 4 bytes, its data_offsets [0, 8] span 8",
    ),
    (
        blob(one(data_offsets=[False, 4]), b"1234"),
        "tensor 'w': data_offsets must be a list of integers, found [False, 4]",
    ),
    (blob(one(shape=[True]), b"1234"), "tensor 'w': shape must be a list of integers, found [True]"),
    (blob(one(shape="1"), b"1234"), "tensor 'w': shape must be a list of integers, found 1"),
    (
        blob(one(shape=[-1]), b"1234"),
        "invalid JSON: -1 is not a size (an integer from 0 to 10^19 - 1)",
    ),
    (blob(one(shape=[1.0]), b"1234"), "invalid JSON: 1.0 is not an integer"),
    (
        blob(one(shape=[10**30]), b"1234"),
        "invalid JSON: 1000000000000000000000000000000 is not a size (an integer from 0 to 10^19 - 1)",
    ),
    (blob(one(shape=[2**40, 2**40])), "tensor 'w': shape [1099511627776, 1099511627776] overflows 64 bits"),
    (
        blob(one(shape=[0, 2**40, 2**40], data_offsets=[0, 0])),
        "tensor 'w': shape [0, 1099511627776, 1099511627776] overflows 64 bits",
    ),
    (blob(one(shape=[1] * 33), b"1234"), "tensor 'w': a shape has at most 32 axes, found 33"),
    (blob(one(dtype="BF17"), b"12"), "tensor 'w': unknown dtype 'BF17'; give the model in BF16, F16 or F32"),
    (blob(one(dtype=3), b"12"), "tensor 'w': unknown dtype 3; give the model in BF16, F16 or F32"),
    (
        blob(one(dtype="F4", shape=[8]), b"1234"),
        "tensor 'w': dtype F4 holds scaled or packed values that cannot be merged; "
        "give the model in BF16, F16 or F32",
    ),
    (
        blob(one(more=1), b"1234"),
        "tensor 'w': expected the fields data_offsets, dtype, shape, "
        "found ['data_offsets', 'dtype', 'more', 'shape']",
    ),
    (
        blob({"w": ["F32", [1], [0, 4]]}, b"1234"),
        "tensor 'w': expected the fields data_offsets, dtype, shape, found list",
    ),
    (blob({"": F32}, b"1234"), "tensor '': a tensor's name must not be empty or contain NUL"),
    (blob({"a\0b": F32}, b"1234"), "tensor 'a\\x00b': a tensor's name must not be empty or contain NUL"),
    (blob({"__metadata__": {"k": 1}}), "__metadata__ key 'k' must be a string, found a int"),
    (blob({"__metadata__": [1]}), "__metadata__ must be an object of strings, found a list"),
    (
        blob(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
        "invalid JSON: NaN is not an integer",
    ),
    (
        blob(b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
        "invalid JSON: -0 is not a size (an integer from 0 to 10^19 - 1)",
    ),
    (blob(b'{"w":1,"w":1}'), "invalid JSON: the key 'w' stands twice"),
    (
        blob(b'{"w":{"dtype":"F32","dtype":"F32"}}'),
        "invalid JSON: the key 'dtype' stands twice",
    ),
    (
        blob(b'{"__metadata__":{"k":"1","k":"2"}}'),
        "invalid JSON: the key 'k' stands twice",
    ),
    (blob(b'{"a":' * 100_000), "JSON is nested too deeply"),
    (blob(b'{"a":' + b"[" * 100_000), "JSON is nested too deeply"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused_in_these_words(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(raw)
    told = message.endswith(("F32", "again"))
    assert str(caught.value) == f"m.safetensors: {message}" + AGAIN * (not told)


@pytest.mark.parametrize("raw", [b'{"\xff":1}', b'{"\\ud800":{}}', b'{"\xed\xa0\x80":{}}'])
def test_text_must_be_utf8(raw: bytes) -> None:
    with pytest.raises(
        CheckpointError, match=r"^m\.safetensors: text is not UTF-8 \(.*\); download the file again$"
    ):
        parse(blob(raw))


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES.values() if dtype.kind == "opaque"])
def test_every_opaque_dtype_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"dtype {dtype} holds scaled or packed values"):
        parse(blob({"w": {"dtype": dtype, "shape": [], "data_offsets": [0, 0]}}))


def test_a_file_is_read_to_the_end_of_its_header(tmp_path: Any) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"w": np.arange(6.0).reshape(2, 3)}, path, metadata={"k": "v"})
    header, raw, size = read_header(path)
    assert (header.tensors["w"].shape, header.metadata, size) == ((2, 3), {"k": "v"}, path.stat().st_size)
    assert raw == path.read_bytes()[: header.data_start]


def test_a_named_pipe_and_a_folder_do_not_hang(tmp_path: Any) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="truncated: expected at least 8 bytes, found 0"):
        read_header(tmp_path / "pipe")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read (Is a directory)"


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
    lambda name: name != "__metadata__"
)
plans = st.lists(
    st.tuples(names, st.sampled_from(MERGED), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    unique_by=lambda row: row[0],
    max_size=5,
)
metadatas = st.none() | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), names, max_size=2)


@settings(max_examples=150, deadline=None)
@given(plans, metadatas)
def test_what_we_build_both_read_alike(plan: list[Any], metadata: dict[str, str] | None) -> None:
    raw, spans = build_header(plan, metadata)
    size = max((end for _, end in spans.values()), default=0)
    raw += np.random.default_rng(size).bytes(size)
    header = parse(raw)
    assert header.data_start % 64 == 0
    assert header.metadata == ({"format": "pt"} if metadata is None else metadata)
    assert {info.name: (info.dtype, info.shape) for info in header.tensors.values()} == {
        name: (dtype, shape) for name, dtype, shape in plan
    }
    assert {info.name: (info.begin, info.end) for info in header.tensors.values()} == spans
    assert list(spans) == [name for name, _, _ in plan]
    assert ours(raw) == theirs(raw)


@settings(max_examples=100, deadline=None)
@given(plans, metadatas)
def test_what_they_build_we_read_alike(plan: list[Any], metadata: dict[str, str] | None) -> None:
    arrays = {name: np.zeros(shape, dtype.numpy) for name, dtype, shape in plan}
    raw = safetensors.numpy.save(arrays, metadata or None)  # {} and no tensors make it write invalid JSON
    assert ours(raw) == theirs(raw)
    assert parse(raw).metadata == (metadata or {})


def never_laxer(raw: bytes) -> bool:
    """Whether we accept; if so the official package must read the same."""
    mine = ours(raw)
    if mine is not None:
        assert mine == theirs(raw)
    return mine is not None


SEED, _ = build_header(
    [("a.b", DTYPES["BF16"], (2, 3)), ("é", DTYPES["F32"], ()), ("z", DTYPES["I64"], (0, 4))],
    {"k": "\\u0041"},
)
SEED += bytes(range(16))


@settings(max_examples=250, deadline=None)  # many more: python -m fuzz headers
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SEED) - 1),
            st.sampled_from(["set", "insert", "delete", "copy"]),
            st.binary(min_size=1, max_size=3)
            | st.sampled_from([b'"', b"{", b"}", b"-", b"0", b"e", b"\\u0", b","]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_mutated_bytes_are_never_read_laxer(edits: list[tuple[int, str, bytes]], mend: bool) -> None:
    raw = bytearray(SEED)
    for at, kind, piece in edits:
        if kind == "set":
            raw[at : at + len(piece)] = piece
        elif kind == "insert":
            raw[at:at] = piece
        elif kind == "delete":
            del raw[at : at + len(piece)]
        else:
            raw[at:at] = raw[at : at + 20]
    if mend:  # the length again right, so that the JSON is looked at
        raw[:8] = (len(raw) - 8 - 16).to_bytes(8, "little")
    never_laxer(bytes(raw))


NUMBERS = ["0", "1", "2", "4", "-0", "-1", "01", "1.0", "1e0", "1E400", "true", "null", '"1"', "[]", "+1"]
NUMBERS += ["0x1", "18446744073709551615", "18446744073709551616", "9" * 19, "9" * 20, "9" * 5000, "NaN"]
STRINGS = [
    '"F32"',
    '"U8"',
    '"f32"',
    '"F4"',
    "null",
    "0",
    '"\\u0046\\u0033\\u0032"',
    '"F32 "',
    '"\\ud83d\\ude00"',
]
KEYS = [
    '"w"',
    '"v"',
    '"__metadata__"',
    '"\\u0077"',
    '"\\u0000"',
    '""',
    '"\\ud800"',
    '"dtype"',
    '"\t"',
    "w",
    "'w'",
]


@settings(max_examples=250, deadline=None)  # many more: python -m fuzz headers
@given(st.data())
def test_odd_tokens_are_never_read_laxer(data: st.DataObject) -> None:
    draw = data.draw
    number = st.sampled_from(NUMBERS[:4]) | st.sampled_from(NUMBERS)

    def entry() -> str:
        shape = ",".join(draw(st.lists(number, max_size=3)))
        offsets = ",".join(draw(st.lists(number, min_size=2, max_size=2)))
        dtype = draw(st.sampled_from(STRINGS[:2]) | st.sampled_from(STRINGS))
        fields = [f'"dtype":{dtype}', f'"shape":[{shape}]', f'"data_offsets":[{offsets}]']
        return "{" + ",".join(draw(st.permutations(fields))[: draw(st.sampled_from([3, 3, 3, 2]))]) + "}"

    keys = draw(st.lists(st.sampled_from(KEYS[:2]) | st.sampled_from(KEYS), max_size=3))
    text = (
        "{"
        + ",".join(f"{key}:{entry()}" for key in keys)
        + "}"
        + draw(st.sampled_from(["", " ", "\n", ",", "\0"]))
    )
    never_laxer(blob(text.encode(), b"\0" * draw(st.sampled_from([0, 1, 2, 4, 8]))))


def test_the_fuzzers_do_accept_something() -> None:
    assert never_laxer(SEED)
    assert never_laxer(
        blob(b'{"w":{"shape":[1],"data_offsets":[0,4],"dtype":"\\u0046\\u0033\\u0032"}} \n', b"1234")
    )


@pytest.mark.parametrize("name", ["", "a\0", "__metadata__", "\ud800"])
def test_names_that_no_reader_takes_are_not_written(name: str) -> None:
    with pytest.raises(CheckpointError, match="a name must be unique, not empty, UTF-8 and without NUL"):
        build_header([(name, DTYPES["F32"], (1,))])
    with pytest.raises(CheckpointError, match=r"^2 problems:"):
        build_header([("a", DTYPES["F32"], ()), (name, DTYPES["F32"], ()), ("a", DTYPES["F32"], ())])
