"""della.json: where a merged model comes from, and a hash of every tensor in it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from della.checkpoint.source import Source
from della.version import __version__

NAME = "della.json"


def versions() -> dict[str, str]:
    """Of everything but della itself that could change a byte."""
    others = {name: metadata.version(name) for name in ("numpy", "numba", "ml_dtypes")}
    return {"python": platform.python_version(), **others}


def build_manifest(
    *, recipe: str, method: str, seed: int, base: Source, models: Sequence[Source], identities: Sequence[str],
    hashes: Mapping[str, str], departures: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The manifest as a JSON object.  It holds nothing that differs between two runs of one recipe on one
    machine: no time, no path, no thread count.
    """
    return {
        "format": 1,
        "tool": {"name": "della", "version": __version__},
        "versions": versions(),
        "recipe": recipe,
        "merge_method": method,
        "seed": seed,
        "departures_from_mergekit": list(departures),
        "inputs": {
            "base": _identity(base, None),
            "models": [_identity(m, i) for m, i in zip(models, identities, strict=True)],
        },
        "tensor_hash": "xxh3_128",
        "tensors": dict(hashes),
    }


def _identity(source: Source, identity: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"reference": source.reference, "revision": source.revision}
    if identity is not None:
        entry["identity"] = identity
    entry["files"] = [{"name": f.name, "size": f.size, "fingerprint": f.fingerprint} for f in source.files]
    return entry


def dump(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as the bytes of della.json."""
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
