"""The journal of a staged merge: who works on it, and which tensors are finished, a line each.

A line is appended in one write and carries its own checksum, so a torn or damaged line is never believed, and
none has to be on the disk before the next: what a line says of a tensor is checked against the staged bytes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

Record = Mapping[str, Any]
# tensor -> for every expert (high, skip, low, take): see merging.tensor.Band
Bands = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished tensor: xxh3_128 (hex) of its staged bytes, and of each input's bytes, the base's first."""

    hash: str
    inputs: tuple[str, ...]


class Journal:
    """One writer's journal, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o666)

    def begin(self, key: str, model: int, part: str) -> None:
        """A writer begins: ``key`` says what is merged, ``model`` is the inode of the staged folder."""
        size = os.fstat(self.fd).st_size
        if size and os.pread(self.fd, 1, size - 1) != b"\n":
            os.write(self.fd, b"\n")  # ends a torn line
        pid = os.getpid()
        self._append({"key": key, "model": model, "part": part, "pid": pid, "host": os.uname().nodename,
                      "started": _start_of(pid)})  # fmt: skip

    def finished(self, name: str, done: Done) -> None:
        """All bytes of tensor ``name`` are written."""
        self._append({"tensor": name, "hash": done.hash, "inputs": done.inputs})

    def bands(self, bands: Bands) -> None:
        """Thresholds of the whole model, which took a pass over all inputs."""
        self._append({"bands": bands})

    def end(self) -> None:
        """The writer stops in good order."""
        self._append({"end": True})

    def close(self) -> None:
        os.close(self.fd)

    def _append(self, record: Record) -> None:
        text = json.dumps(record).encode()
        line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
        if os.write(self.fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """What a journal says, line by line; lines that are torn or damaged are passed over."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() == checksum:
                yield json.loads(text)


def finished(paths: Sequence[Path]) -> tuple[dict[str, Done], Bands]:
    """The tensors that journals call finished, and the thresholds of the whole model if one holds them."""
    done: dict[str, Done] = {}
    bands: Bands = {}
    for path in paths:
        for record in records(path):
            if "tensor" in record:
                done[record["tensor"]] = Done(record["hash"], tuple(record["inputs"]))
            bands = record.get("bands", bands)
    return done, bands


def writer_of(path: Path) -> Record | None:
    """The record of the last writer that began; None where there is none or it ended in good order."""
    last = None
    for record in records(path):
        last = record if "key" in record else None if "end" in record else last
    return last


def named(writer: Record) -> str:
    """A writer in words: ``pid 7 on host`` and its part, if it does only one."""
    part = "" if writer["part"] == "1/1" else f", part {writer['part']}"
    return f"pid {writer['pid']} on {writer['host']}{part}"


def may_live(writer: Record) -> bool:
    """Whether a writer may still be at work: on another host nobody can tell from here."""
    if writer["host"] != os.uname().nodename:
        return True
    try:
        os.kill(writer["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_start_of(writer["pid"]) == writer["started"])


def _start_of(pid: int) -> str:
    """When a process began, in the system's own terms: a pid may have been given anew."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
