"""The files of a model that is to be written: which tensor lies where, and the header of each file.  Pure."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from della.checkpoint.header import build_header
from della.dtypes import DType
from della.errors import OutputError

TensorPlan = Sequence[tuple[str, DType, Sequence[int]]]

INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written: its header, its size in bytes, where each tensor lies in it (begin, end)."""

    name: str
    header: bytes
    size: int
    spans: dict[str, tuple[int, int]]


def plan_shards(tensors: TensorPlan, max_bytes: int) -> list[list[int]]:
    """Indices of ``tensors`` by shard: in order, each shard at most ``max_bytes`` of data.

    A tensor that is larger has a shard to itself.  No tensors make one empty shard.
    """
    shards: list[list[int]] = [[]]
    used = 0
    for index, (_, dtype, shape) in enumerate(tensors):
        size = math.prod(shape) * dtype.bytes
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(index)
        used += size
    return shards


def lay_out(
    tensors: TensorPlan,
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    single: str | None = None,
    stem: str = "model",
) -> list[Shard]:
    """The files that hold ``tensors``, named after ``stem``; with ``single``, one file of that name.

    Within a file wider dtypes come first, so that every tensor is aligned to its own width.
    Raises OutputError for a name that stands twice.
    """
    twice = [name for name, count in Counter(name for name, _, _ in tensors).items() if count > 1]
    if twice:
        raise OutputError(*(f"tensor {name!r} would be written twice" for name in twice))
    groups = [list(range(len(tensors)))] if single else plan_shards(tensors, shard_bytes)
    shards = []
    for number, group in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        group.sort(key=lambda index: -tensors[index][1].bits)
        header, relative = build_header([tensors[index] for index in group], metadata)
        start = len(header)
        spans = {tensor: (start + begin, start + end) for tensor, (begin, end) in relative.items()}
        size = max((end for _, end in spans.values()), default=start)
        shards.append(Shard(single or f"{stem}{part}.safetensors", header, size, spans))
    return shards


def index_json(shards: Sequence[Shard]) -> bytes:
    """The index of a model of several files: tensor -> file, and the bytes of all tensors."""
    names = {tensor: shard.name for shard in shards for tensor in shard.spans}
    total = sum(end - begin for shard in shards for begin, end in shard.spans.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def share(shards: Sequence[Shard], part: int, parts: int) -> list[Shard]:
    """The shards of part ``part`` (from 1) of ``parts``: every shard in exactly one, about equal in bytes."""
    loads = [0] * min(parts, len(shards))
    mine = []
    for shard in sorted(shards, key=lambda shard: -shard.size):
        owner = min(range(len(loads)), key=loads.__getitem__)
        loads[owner] += shard.size
        if owner == part - 1:
            mine.append(shard)
    return mine
