"""Files cut off at every length: each is refused with its name, the bytes expected and the bytes found."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from della.errors import CheckpointError
from fuzz.job import Job, refusal
from fuzz.seeds import files

SAMPLE_STEP = 7


def run(job: Job, most: int) -> None:
    """A shard of a sharded model at every length below its own, and in full a single file as well."""
    job.counts["files"] = 0
    case = 0
    makers = (_shard,) if job.sample else (_shard, _single)
    for make in makers:
        path = make(job.folder / make.__name__)
        raw = path.read_bytes()
        job.counts["files"] += 1
        if error := refusal(path.parent):
            job.fail(-1, f"the whole model is refused: {error}", raw)
        for length in range(0, len(raw), SAMPLE_STEP if job.sample else 1):
            if case < most and job.only in (None, case):
                path.write_bytes(raw[:length])
                _check(job, case, path, raw, length)
            case += 1
        path.write_bytes(raw)


def _single(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "model.safetensors"
    path.write_bytes(files()[2])
    return path


def _shard(folder: Path) -> Path:
    folder.mkdir()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {"w": names[0], "z.weight": names[1], "y.bias": names[1], "x": names[1], "v": names[1]}
    for name, raw in zip(names, (files()[0], files()[10]), strict=True):
        (folder / name).write_bytes(raw)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder / names[1]


def _check(job: Job, case: int, path: Path, raw: bytes, length: int) -> None:
    cut = raw[:length]
    error = job.timed(case, cut, partial(refusal, path.parent))
    if error is None:
        job.fail(case, f"{length} of {len(raw)} bytes were taken for a whole file", cut)
    elif not isinstance(error, CheckpointError):
        job.fail(case, f"{length} bytes raised {type(error).__name__}: {str(error)[:200]}", cut)
    else:
        for what, wanted in (
            ("the file", str(path)),
            ("the bytes expected", f" {expected(raw, length):,} bytes"),
            ("the bytes found", f"found {length:,}"),
        ):
            if wanted not in str(error):
                lacks = f"{length} bytes: no word of {what}, {wanted.strip()!r}"
                job.fail(case, f"{lacks}: {str(error)[:300]}", cut)


def expected(raw: bytes, length: int) -> int:
    """The size that a reader of the first ``length`` bytes of ``raw`` can know it to have, at least."""
    header = 8 + int.from_bytes(raw[:8], "little")
    return 8 if length < 8 else header if length < header else len(raw)
