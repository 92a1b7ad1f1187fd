"""della.json: where a merged model comes from, a hash of every tensor in it, and of every other byte.

A single file carries the same in its header, under the key "della" of its metadata.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from della.checkpoint.header import Header, read_header
from della.checkpoint.layout import confined, read_small, why_no_file
from della.checkpoint.source import Source
from della.checkpoint.strict import json_object
from della.checkpoint.view import Stored
from della.errors import CheckpointError, OutputError, Problem
from della.output.disk import is_name_below
from della.output.place import KEY, MANIFEST
from della.version import __version__

__all__ = [
    "FORMAT", "MANIFEST", "Entry", "Manifest", "Recorded", "build_manifest", "dump", "embed", "is_sealed",
    "read_manifest", "recorded", "sealed",
]  # fmt: skip

FORMAT = 2
MOST_BYTES = 100_000_000
UNKNOWN = "0" * 32
# The first in the file is the manifest's own: it is its first key, and in a header metadata comes first.
_BLANK = {"seal": UNKNOWN}
_SEAL = re.compile(rb'(\\?"seal\\?": \\?")([0-9a-f]{32})')


def versions() -> dict[str, str]:
    """Of everything but della itself that could change a byte."""
    others = {name: metadata.version(name) for name in ("numpy", "numba", "ml_dtypes")}
    return {"python": platform.python_version(), **others}


def build_manifest(
    *, recipe: str, method: str, seed: int, base: Mapping[str, Any], models: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]], coverage: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str], departures: Sequence[str],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The manifest as a JSON object.

    ``base``, ``models`` and ``others`` (bases of single slices) are as `recorded` gives them, each model with
    its identity and input norms;
    ``coverage`` is how much of each model takes part; ``hashes`` are of the output's tensors; ``files`` are
    size and hash of each file.  It holds nothing that differs between two runs of one recipe on one machine:
    no time, no path, no thread count.
    """
    return {
        "format": FORMAT,
        "tool": {"name": "della", "version": __version__},
        "versions": versions(),
        "recipe": recipe,
        "merge_method": method,
        "seed": seed,
        "departures_from_mergekit": list(departures),
        "inputs": {"base": dict(base), "models": list(models)} | ({"others": list(others)} if others else {}),
        "coverage": dict(coverage),
        "tensor_hash": "xxh3_128",
        "tensors": dict(hashes),
        "files": dict(files),
    }


def recorded(source: Source, hashes: Mapping[Stored, str]) -> dict[str, Any]:
    """An input as the manifest has it: its files, and the hashes of those of its tensors that were read."""
    return {
        "reference": source.reference,
        "revision": source.revision,
        "files": [
            {"name": f.name, "size": f.size, "header_fingerprint": f.fingerprint} for f in source.files
        ],
        "tensors": {name: hashes[part] for name, part in sorted(source.parts.items()) if part in hashes},
    }


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as the bytes of della.json, sealed."""
    return sealed((json.dumps(_BLANK | dict(manifest), indent=1, ensure_ascii=False) + "\n").encode())


def embed(manifest: Mapping[str, Any], room: int = 0) -> dict[str, str]:
    """The manifest as metadata of a single file, in at least ``room`` bytes of its header; `sealed` is for
    that header."""
    text = json.dumps(_BLANK | dict(manifest))
    return {"format": "pt", KEY: text + " " * (room - len(json.dumps(text)))}


def sealed(raw: bytes) -> bytes:
    """``raw`` with its seal: xxh3_128 (hex) of all of ``raw`` with zeros in the seal's place."""
    match = _SEAL.search(raw)
    assert match is not None, "a manifest has a place for its seal"
    return raw[: match.start(2)] + _seal(raw, match) + raw[match.end(2) :]


def is_sealed(raw: bytes) -> bool:
    """Whether ``raw`` (della.json, or the header of a single file) is as it was sealed."""
    match = _SEAL.search(raw)
    return match is not None and match[2] == _seal(raw, match)


def _seal(raw: bytes, match: re.Match[bytes]) -> bytes:
    blank = raw[: match.start(2)] + UNKNOWN.encode() + raw[match.end(2) :]
    return xxhash.xxh3_128_hexdigest(blank).encode()


# ---- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A file of the model: ``hash`` is that of its header alone if it ``holds_tensors``."""

    size: int
    hash: str
    holds_tensors: bool


@dataclass(frozen=True)
class Recorded:
    """An input as it was merged: fingerprints of its files, and hashes of those tensors that were read; with
    its file of input ``norms``, if it had one.
    """

    reference: str
    revision: str | None
    files: dict[str, str]
    tensors: dict[str, str]
    norms: Recorded | None


@dataclass(frozen=True)
class Manifest:
    """What verifying needs of a manifest.  Its form was checked; what it says is not to be trusted yet."""

    recipe: str
    versions: dict[str, str]
    tensors: dict[str, str]
    files: dict[str, Entry]
    base: Recorded
    models: list[Recorded]
    others: list[Recorded]


class _NotOurs(Exception):
    """The manifest has not the form that della gives it; says where."""


def read_manifest(out: Path) -> tuple[Manifest, Header | None]:
    """The manifest of the folder or file ``out``, which is there; and the header of a single file.

    Raises OutputError where there is no manifest, or one that this version does not know, CheckpointError
    where it is damaged.
    """
    header = None
    if out.is_dir():
        where, path = out / MANIFEST, confined(out, MANIFEST)
        if not where.is_symlink() and not path.exists():
            raise OutputError(
                Problem(f"holds no {MANIFEST}", "only what della has merged can be verified", str(out))
            )
        if not path.is_file():
            raise CheckpointError(Problem(*why_no_file(path), str(where)))
        raw = text = read_small(path, MOST_BYTES)
    elif out.is_file() and out.suffix == ".safetensors":
        where = out
        header, raw, _ = read_header(out)
        text = header.metadata.get(KEY, "").encode()
        if not text and not _SEAL.search(raw):
            raise OutputError(
                Problem("no manifest in its header", "only what della has merged can be verified", str(out))
            )
    else:
        raise OutputError(
            Problem("neither a folder nor a .safetensors file", "name what della has merged", str(out))
        )
    damage = CheckpointError(
        Problem("changed since it was written, so nothing can be held against it", subject=str(where))
    )
    if _SEAL.search(raw) and not is_sealed(raw):
        raise damage
    found = json_object(text, str(where))
    if type(found.get("format")) is not int or found["format"] != FORMAT:
        raise OutputError(
            Problem(
                f"a manifest of format {_scalar(found.get('format'))}, and this version of della knows "
                f"format {FORMAT}",
                "verify with the version that merged it",
                str(where),
            )
        )
    if not is_sealed(raw):
        raise damage
    try:
        return _parse(found), header
    except _NotOurs as error:
        raise CheckpointError(
            Problem(f"not a manifest as della writes it ({error})", "merge again to have one", str(where))
        ) from None


def _scalar(value: object) -> str:
    return str(value)[:20] if isinstance(value, int | str) else "unknown"


def _parse(found: Mapping[str, Any]) -> Manifest:
    inputs = _part(found, "inputs", dict)
    tool = _part(found, "tool", dict)
    files = _part(found, "files", dict)
    return Manifest(
        recipe=_part(found, "recipe", str),
        versions={"della": _part(tool, "version", str)} | _texts(found, "versions"),
        tensors=_texts(found, "tensors"),
        files={name: _entry(name, entry) for name, entry in files.items()},
        base=_recorded(_part(inputs, "base", dict)),
        models=[_recorded(model) for model in _part(inputs, "models", list)],
        others=[_recorded(each) for each in _part({"others": [], **inputs}, "others", list)],
    )


def _entry(name: str, entry: object) -> Entry:
    if not is_name_below(name):
        raise _NotOurs(f"{name[:80]!r} is no name of a file in a model's folder")
    size = _part(entry, "size", int)
    assert isinstance(entry, dict)
    holds_tensors = "header_hash" in entry
    return Entry(size, _part(entry, "header_hash" if holds_tensors else "hash", str), holds_tensors)


def _recorded(found: object) -> Recorded:
    files = {_part(file, "name", str): _fingerprint(file) for file in _part(found, "files", list)}
    assert isinstance(found, dict)
    revision = None if found.get("revision") is None else _part(found, "revision", str)
    norms = _recorded(_part(found, "input_norms", dict)) if "input_norms" in found else None
    return Recorded(_part(found, "reference", str), revision, files, _texts(found, "tensors"), norms)


def _fingerprint(file: object) -> str:
    """Of size and header alone; earlier builds called it fingerprint, as if it were of the whole file."""
    is_old = isinstance(file, dict) and "header_fingerprint" not in file and "fingerprint" in file
    return str(_part(file, "fingerprint" if is_old else "header_fingerprint", str))


def _part(table: object, key: str, kind: type) -> Any:
    value = table.get(key) if isinstance(table, dict) else None
    if type(value) is not kind:
        raise _NotOurs(f"{key!r} is missing or of a wrong type")
    return value


def _texts(table: object, key: str) -> dict[str, str]:
    found: dict[str, str] = _part(table, key, dict)
    if not all(isinstance(text, str) for text in found.values()):
        raise _NotOurs(f"{key!r} must hold texts only")
    return found
