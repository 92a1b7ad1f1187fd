"""The place that a result should go to, looked at before anything is read or written."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from della.checkpoint.header import read_header
from della.errors import CheckpointError, OutputError, Problem
from della.options import Target, spelt
from della.output.disk import can_be_called, explained, user

MANIFEST = "della.json"
KEY = "della"  # under which the header of a single file has the same
MOST_NAME_BYTES = 255 - len("..della-staging")  # what stands beside it has a longer name
MARGIN_BYTES = 1 << 26  # for headers, tokenizers, della.json and whatever else is not a tensor
# Ends of names that stand for a file of weights, and such files are not written.
NOT_WRITTEN = (
    ".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy", ".onnx", ".h5", ".msgpack",
    ".tflite", ".zip", ".tar", ".gz",
)  # fmt: skip
Overwrite = bool | str
"""Whether OUT may be replaced: False, True where della made it, "any" model."""
# What a folder without della.json may hold and still be taken for a model that --overwrite may replace.
MODEL_FILES = (
    ".safetensors", ".json", ".jinja", ".md", ".model", ".txt", ".tiktoken", ".gitattributes", "LICENSE",
)  # fmt: skip


def check_place(out: Path, overwrite: Overwrite, single_file: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses an OUT that is taken, cannot be written or replaced, or touches an input (OutputError)."""
    with explained(out):
        problems = list(_complaints(out, overwrite, single_file, inputs))
    if problems:
        raise OutputError(*problems)


def _complaints(
    out: Path, overwrite: Overwrite, single_file: bool, inputs: Iterable[Path]
) -> Iterator[Problem]:
    if not is_name(out):
        said = f"cannot be the name of a model, which has 1 to {MOST_NAME_BYTES} bytes and no NUL"
        yield Problem(f"{str(out)[:1000]!r} {said}")
        return
    if not can_be_called(out.name):
        yield Problem("Windows takes this name for a device, or changes it", "choose another place", str(out))
        return
    if single_file and out.suffix != ".safetensors":
        yield Problem("one file was asked for", "its name must end in .safetensors", str(out))
    if not single_file and out.suffix.lower() in NOT_WRITTEN:
        fix = "name a folder, or a file that ends in .safetensors"
        yield Problem(f"{out.suffix} files are not written", fix, str(out))
        return
    if not single_file and out.suffix.lower() == ".safetensors":
        yield Problem("a folder was asked for", "its name must not end in .safetensors", str(out))
    touched = next((place for place in inputs if _inside(out, place) or _inside(place, out)), None)
    if touched:
        yield Problem(f"touches the input {touched}", "choose another place for the result", str(out))
        return
    home = next(step for step in out.parents if os.path.lexists(step))
    if not home.is_dir():
        yield Problem("not a folder, so nothing can be written in it", "choose another place", str(home))
    elif not os.access(home, os.W_OK | os.X_OK):
        yield Problem("permission denied", "choose a place that you may write to", str(home))
    elif out.is_symlink():
        yield Problem("a link", "name the place that it leads to", str(out))
    elif out.exists():
        yield from _taken(out, overwrite, single_file)


def is_name(out: Path) -> bool:
    """Whether a model can have this name."""
    return 0 < len(os.fsencode(out.name)) <= MOST_NAME_BYTES and "\0" not in str(out)


def is_empty(out: Path) -> bool:
    """Whether a folder stands there in which there is nothing."""
    return out.is_dir() and not os.path.ismount(out) and not os.listdir(out)


def is_made_by_della(out: Path) -> bool:
    """Whether a folder or file says that della has merged it."""
    if out.is_dir():
        return os.path.lexists(out / MANIFEST) or is_empty(out)
    try:
        return KEY in read_header(out)[0].metadata
    except CheckpointError:
        return False


def _taken(out: Path, overwrite: Overwrite, single_file: bool) -> Iterator[Problem]:
    if not overwrite and (single_file or not is_empty(out)):
        yield Problem(
            "exists already",
            f"choose another place, or allow it to be replaced: {spelt(Target, 'overwrite', True)}",
            str(out),
        )
    elif single_file != out.is_file():
        kind = "folder" if single_file else "file"
        yield Problem(f"a {kind}, which is not replaced", "choose another place", str(out))
    elif os.path.ismount(out):
        yield Problem(
            "a mount point, which cannot be replaced in one step", "choose a folder in it", str(out)
        )
    elif not _is_ours_to_move(out):
        yield Problem("belongs to another user, so it cannot be replaced", "choose another place", str(out))
    elif not single_file and (problem := refusal_to_replace(out, out)):
        yield problem
    elif overwrite != "any" and not is_made_by_della(out):
        said = "not replaced: della has not made it, so it may be wanted elsewhere"
        fix = f"choose another place, or allow it all the same: {spelt(Target, 'overwrite', 'any')}"
        yield Problem(said, fix, str(out))


def _is_ours_to_move(out: Path) -> bool:
    """Whether the system lets this user rename ``out``: in a folder with the sticky bit only its owner may,
    and a folder that moves must be writable.
    """
    mine, home, found = user(), out.parent.stat(), out.stat()
    if mine and home.st_mode & stat.S_ISVTX and mine not in (home.st_uid, found.st_uid):
        return False
    return not out.is_dir() or os.access(out, os.W_OK | os.X_OK)


def refusal_to_replace(out: Path, found: Path) -> Problem | None:
    """Why ``found``, which stands (or stood) at ``out``, may not be replaced, if it may not."""
    foreign = _foreign(found)
    if not foreign:
        return None
    said = f"not replaced: it is not a model, or more (it holds {', '.join(sorted(foreign)[:5])})"
    return Problem(said, "choose another place, or remove it yourself", str(out))


def _foreign(out: Path) -> list[str]:
    """What stands in a folder that does not belong to a model.

    A folder that may be replaced is empty, or a model and nothing else; della.json tells of more files.
    """
    names = _listed(out)
    ours: set[str] = set()
    if MANIFEST in names:
        with explained(out / MANIFEST):
            raw = (out / MANIFEST).read_bytes()
        with suppress(ValueError, LookupError, TypeError):  # of another version, or damaged
            ours = {str(name) for name in json.loads(raw)["files"]}
    for name in list(names):  # a folder of ours is looked into
        if name.endswith("/") and any(file.startswith(name) for file in ours):
            names.remove(name)
            names += (f"{name}{below}" for below in _listed(out / name, deep=True))
    foreign = [name for name in names if not name.endswith(MODEL_FILES) and name not in ours]
    a_model = MANIFEST in names or "config.json" in names or any(n.endswith(".safetensors") for n in names)
    return foreign if a_model else names


def _listed(folder: Path, deep: bool = False) -> list[str]:
    """What stands in a folder, a "/" behind the names of folders; if ``deep``, with what stands in them
    instead."""
    found: list[str] = []
    with explained(folder):
        for entry in os.scandir(folder):
            is_folder = entry.is_dir(follow_symlinks=not deep)
            if is_folder and deep:
                found += (f"{entry.name}/{name}" for name in _listed(folder / entry.name, deep))
            else:
                found.append(entry.name + "/" * is_folder)
    return found


def _inside(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place``, or lies in it, by device and inode."""
    try:
        there = place.stat()
    except OSError:
        return False
    try:
        real = path.resolve()
    except RuntimeError:  # links in a circle
        return False
    for step in (real, *real.parents):
        with suppress(OSError):
            if os.path.samestat(step.stat(), there):
                return True
    return False


def space_needed(tensors: int) -> int:
    """Bytes that must be free for a result whose tensors have so many."""
    return tensors + MARGIN_BYTES


def check_space(folder: Path, tensors: int, taken: int = 0) -> None:
    """Refuses when the disk of ``folder`` has less free than a result of so many bytes of tensors needs, but
    for what staged work has ``taken`` already (OutputError).

    A ``folder`` that is not there yet lies on the disk of its nearest parent.
    """
    home = next(step for step in (folder, *folder.parents) if os.path.isdir(step))
    with explained(home):
        total, _, free = shutil.disk_usage(home)
    needed = space_needed(tensors) - taken
    if total and free < needed:  # some network file systems report nothing
        raise OutputError(
            Problem(
                f"the result {'still ' * (taken > 0)}needs {needed:,} bytes, {free:,} are free",
                "free some space, or write to another disk",
                str(folder),
            )
        )
