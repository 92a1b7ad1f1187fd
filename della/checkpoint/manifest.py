"""della.json: where a merged model comes from, a hash of every tensor in it, and of every other byte.

A single file carries the same in its header, under the key "della" of its metadata.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import xxhash

from della.checkpoint.header import Header
from della.checkpoint.place import MANIFEST
from della.checkpoint.source import Source
from della.version import __version__

__all__ = ["FORMAT", "MANIFEST", "build_manifest", "dump", "embed", "embedded", "is_sealed", "sealed"]

FORMAT = 2
KEY = "della"
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
    *, recipe: str, method: str, seed: int, base: Source, models: Sequence[Source], identities: Sequence[str],
    hashes: Mapping[str, str], inputs: Mapping[Source, Mapping[str, str]], departures: Sequence[str],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The manifest as a JSON object.  ``hashes`` are of the output's tensors, ``inputs`` of those that were
    read; ``files`` are size and hash of each file.

    It holds nothing that differs between two runs of one recipe on one machine: no time, no path, no thread
    count.
    """
    return {
        "format": FORMAT,
        "tool": {"name": "della", "version": __version__},
        "versions": versions(),
        "recipe": recipe,
        "merge_method": method,
        "seed": seed,
        "departures_from_mergekit": list(departures),
        "inputs": {
            "base": _identity(base, None, inputs),
            "models": [_identity(m, i, inputs) for m, i in zip(models, identities, strict=True)],
        },
        "tensor_hash": "xxh3_128",
        "tensors": dict(hashes),
        "files": dict(files),
    }


def _identity(
    source: Source, identity: str | None, inputs: Mapping[Source, Mapping[str, str]]
) -> dict[str, Any]:
    entry: dict[str, Any] = {"reference": source.reference, "revision": source.revision}
    if identity is not None:
        entry["identity"] = identity
    entry["files"] = [{"name": f.name, "size": f.size, "fingerprint": f.fingerprint} for f in source.files]
    entry["tensors"] = dict(sorted(inputs.get(source, {}).items()))
    return entry


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as the bytes of della.json, sealed."""
    return sealed((json.dumps(_BLANK | dict(manifest), indent=1, ensure_ascii=False) + "\n").encode())


def embed(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The manifest as metadata of a single file; `sealed` is for its header."""
    return {"format": "pt", KEY: json.dumps(_BLANK | dict(manifest))}


def embedded(header: Header) -> bytes:
    """The manifest in the metadata of a single file, as text; empty where there is none."""
    return header.metadata.get(KEY, "").encode()


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
