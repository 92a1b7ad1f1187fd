"""Hostile names of shards in an index, with a decoy where each one leads: none of them is followed."""

from __future__ import annotations

import json
import os
import unicodedata
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from della.errors import CheckpointError
from fuzz.job import Job, refusal
from fuzz.seeds import files

INDEX = "model.safetensors.index.json"
TENSOR = "w"
GOOD = "sub/plain.safetensors"

# {outside} is a folder beside the model's; "link" and "pipe" names are made to be what they say.
HOSTILE = (
    # Ways out, and ways that only look as if they stayed.
    *("../outside.safetensors", "../../outside.safetensors", "sub/../../outside.safetensors"),
    *(
        "sub/../inside.safetensors",
        "./inside.safetensors",
        "sub/./inside.safetensors",
        "sub//inside.safetensors",
    ),
    *("{outside}/x.safetensors", "link.safetensors", "linked/x.safetensors", "pipe.safetensors"),
    # Windows: drives, shares, streams, devices, what it trims.
    *("C:\\x.safetensors", "C:x.safetensors", "\\\\server\\share\\x.safetensors", "\\\\?\\C:\\x.safetensors"),
    *("..\\outside.safetensors", "//server/share/x.safetensors", "plain.safetensors:stream.safetensors"),
    *("CON.safetensors", "aux/x.safetensors", "com1.model.safetensors", "sub./x.safetensors"),
    ".. /outside.safetensors",
    # What a shell, a URL or the other end of a download would make of it.
    *("~/x.safetensors", "$HOME/x.safetensors", "%USERPROFILE%/x.safetensors", "*.safetensors"),
    *("file://{outside}/x.safetensors", "%2e%2e/outside.safetensors", "..%2foutside.safetensors"),
    # Letters that are not what they seem.
    *("..\uff0foutside.safetensors", "..\u2215outside.safetensors", "\u2025/outside.safetensors"),
    *("x\u202esrosnetefas.safetensors", "x\u200b.safetensors"),
    # What no file can be called, or no shard should be.
    *("x\0.safetensors", "x\n.safetensors", "", "a" * 5000 + ".safetensors", "pytorch_model.bin"),
)


def run(job: Job, most: int) -> None:
    """One index with one hostile name per case; the good name shows that nothing else is wrong with it."""
    job.counts["decoys"] = 0
    error = refusal(_model(job.folder / "good", GOOD)[0])
    if error is not None:
        job.fail(-1, f"the good name is refused: {error}", GOOD.encode())
    for case in job.numbers(min(most, len(HOSTILE))):
        home = job.folder / str(case)
        name = HOSTILE[case].format(outside=home / "outside")
        model, decoys = _model(home, name)
        job.counts["decoys"] += decoys
        raw = name.encode()
        error = job.timed(case, raw, partial(refusal, model))
        if error is None:
            job.fail(case, f"{name[:80]!r} was followed", raw)
        elif not isinstance(error, CheckpointError):
            job.fail(case, f"{name[:80]!r} raised {type(error).__name__}: {str(error)[:200]}", raw)
        elif str(model) not in str(error):
            job.fail(case, f"{name[:80]!r}: the message does not name the folder: {str(error)[:200]}", raw)


def _model(home: Path, name: str) -> tuple[Path, int]:
    """A model in a folder of ``home`` whose index names the shard ``name``; and how many decoys lie about."""
    folder = home / "deep" / "model"
    folder.mkdir(parents=True)
    (folder / "sub").mkdir()
    (home / "outside").mkdir()
    (home / "outside" / "x.safetensors").write_bytes(files()[0])
    (folder / INDEX).write_text(json.dumps({"weight_map": {TENSOR: name}}))
    if name.startswith("pipe"):
        os.mkfifo(folder / name)
    elif name.startswith("link."):
        (folder / name).symlink_to(home / "outside" / "x.safetensors")
    elif name.startswith("linked"):
        (folder / "linked").symlink_to(home / "outside")
    readings = {name, unquote(name), name.replace("\\", "/"), unicodedata.normalize("NFKC", name)}
    readings |= {name.replace("\u2215", "/"), name.replace(" ", ""), name.replace("./x", "/x")}
    readings |= {urlsplit(name).path if name.startswith("file:") else name, name.lower()}
    return folder, sum(_decoy(home, folder, reading) for reading in readings)


def _decoy(home: Path, folder: Path, reading: str) -> bool:
    """Put a whole file where one reading of a name leads to, unless that is outside of ``home``."""
    path = Path(os.path.normpath(folder / reading))
    if not path.is_relative_to(home) or not path.suffix:
        return False
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files()[0])
    except (OSError, ValueError):
        return False
    return True
