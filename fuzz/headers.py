"""Mutated headers: refused in our own words, quickly, and never read where the official package refuses."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import safetensors

from della.checkpoint import header as checked
from della.checkpoint.source import open_source
from della.errors import CheckpointError
from fuzz.job import Job
from fuzz.json_edits import edit, read, write
from fuzz.mutate import damage
from fuzz.seeds import files

ON_DISK = 50  # every 50th case is opened as a file, too
LENGTHS = (0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 1)

Tensors = dict[str, tuple[str, list[int], bytes]]


def run(job: Job, most: int) -> None:
    """One file with one to three changes in its header per case."""
    seeds = files()
    job.counts.update({"accepted": 0, "refused by della alone": 0})
    for case in job.numbers(most):
        raw = mutated(job.rng(case), seeds)
        mine = job.timed(case, raw, partial(ours, raw))
        if isinstance(mine, Exception):
            job.fail(case, f"raised {type(mine).__name__}: {str(mine)[:200]}", raw)
            continue
        official = theirs(raw)
        job.counts["accepted"] += mine is not None
        job.counts["refused by della alone"] += mine is None and official is not None
        if mine is not None and official is None:
            job.fail(case, "accepted, but refused by safetensors", raw)
        elif mine is not None and mine != official:
            job.fail(case, "read otherwise than by safetensors", raw)
        if case % ON_DISK == 0:
            _as_a_file(job, case, raw, mine is not None)


def ours(raw: bytes) -> Tensors | Exception | None:
    """name -> (dtype, shape, data); None where della refuses; what it should never raise, if it does."""
    try:
        header = checked.parse_header(raw, len(raw), "m.safetensors")
        start = header.data_start
        return {
            info.name: (info.dtype.name, list(info.shape), raw[start + info.begin : start + info.end])
            for info in header.tensors.values()
        }
    except CheckpointError:
        return None
    except Exception as error:
        return error


def theirs(raw: bytes) -> Tensors | None:
    """The same as the official package reads it; None where it refuses."""
    try:
        tensors: list[tuple[str, Any]] = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in tensors}


def _as_a_file(job: Job, case: int, raw: bytes, accepted: bool) -> None:
    """Opening the file must say the same; only a tensor whose name tells of quantisation is refused later."""
    path = job.folder / "m.safetensors"
    path.write_bytes(raw)
    try:
        open_source(str(path)).close()
    except CheckpointError as error:
        if str(path) not in str(error) and str(path.parent) not in str(error):
            job.fail(case, f"the message does not name the file: {str(error)[:200]}", raw)
        elif accepted and "quantised" not in str(error):
            job.fail(case, f"refused only as a file: {str(error)[:200]}", raw)
    except Exception as error:
        job.fail(case, f"opening raised {type(error).__name__}: {str(error)[:200]}", raw)
    else:
        if not accepted:
            job.fail(case, "accepted only as a file", raw)


def mutated(rng: Random, seeds: tuple[bytes, ...]) -> bytes:
    """A file with one to three changes, mostly in its header, whose length field is then mostly right."""
    raw, other = rng.choice(seeds), rng.choice(seeds)
    stop = 8 + int.from_bytes(raw[:8], "little")
    text, data = raw[8:stop], raw[stop:]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.45:
            text = _edited(rng, text)
        elif kind < 0.9:
            text = damage(rng, text, other[8:])
        elif data and kind < 0.95:
            data = damage(rng, data, other)
        else:
            text += rng.choice((b" ", b"  \n", b"\t", b"\0", b"}", b","))
    length = len(text).to_bytes(8, "little")
    if rng.random() < 0.05:
        length = rng.choice(LENGTHS).to_bytes(8, "little")
    elif rng.random() < 0.05:
        length = max(0, len(text) + rng.choice((-8, -1, 1, 8))).to_bytes(8, "little")
    elif rng.random() < 0.03:
        length = damage(rng, length, other)
    return length + text + data


def _edited(rng: Random, text: bytes) -> bytes:
    table = read(text)
    if table is None:
        return text
    edit(rng, table)
    return write(table, rng.choice(("", "", "", " ", "\n"))).encode("utf-8", "surrogatepass")
