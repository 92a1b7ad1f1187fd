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

from della.errors import OutputError, Problem
from della.output import disk

Record = dict[str, Any]
FORMAT = 3  # of the records below; the journals of version 0.1.0 name none, and are of format 1
Facts = Mapping[str, Any]  # what a method learnt of the whole model, by tensor

# The fields of every kind of record, told by its first one.
_KINDS: dict[str, dict[str, type]] = {
    "key": {"key": str, "part": str, "pid": int, "host": str, "started": str},
    "tensor": {"tensor": str, "hash": str, "inputs": list, "measured": list},
    "facts": {"facts": dict},
    "swap": {"swap": bool},
    "end": {"end": bool},
}


@dataclass(frozen=True, slots=True)
class Done:
    """A finished tensor: xxh3_128 (hex) of its staged bytes, and of each stored tensor
    that was read, the base's first; and what was ``measured`` of each operand."""

    hash: str
    inputs: tuple[str, ...]
    measured: tuple[tuple[float, ...], ...] = ()


class Journal:
    """One writer's journal, open for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def begin(self, key: str, part: str) -> None:
        """A writer begins; ``key`` says what is merged."""
        size = os.fstat(self.fd).st_size
        if size and disk.read_back(self.fd, 1, size - 1) != b"\n":
            os.write(self.fd, b"\n")  # ends a torn line
        pid = os.getpid()
        host, started = disk.host(), disk.started(pid)
        who = {"part": part, "pid": pid, "host": host, "started": started}
        self._append({"key": key, **who, "format": FORMAT})

    def finished(self, name: str, done: Done) -> None:
        """All bytes of tensor ``name`` are written."""
        self._append({"tensor": name, "hash": done.hash, "inputs": done.inputs, "measured": done.measured})

    def facts(self, facts: Facts) -> None:
        """What a method learnt of the whole model, which took a pass over all inputs."""
        self._append({"facts": facts})

    def swap(self, begun: bool) -> None:
        """From now on (``begun``) the old model may stand where the new one was staged; or it does not."""
        self._append({"swap": begun})

    def end(self) -> None:
        """The writer stops in good order."""
        self._append({"end": True})

    def close(self) -> None:
        os.close(self.fd)

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record).encode()
        line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
        if os.write(self.fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open(path: Path, flags: int) -> int:
    """A journal, opened; what is no plain file is refused."""
    fd = disk.open_plain(path, flags)
    if fd is None:
        raise OutputError(Problem("not a journal of della", f"remove {path.parent}", str(path)))
    return fd


def records(path: Path) -> Iterator[Record]:
    """What a journal says, line by line; lines that are torn, damaged or strange are passed over."""
    with open(_open(path, os.O_RDONLY), "rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() == checksum and (record := _parsed(text)):
                yield record


def _parsed(text: bytes) -> Record | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    kind = next(iter(record), None) if isinstance(record, dict) else None
    fields = _KINDS.get(str(kind), {})
    right = bool(fields) and all(isinstance(record.get(name), of) for name, of in fields.items())
    right = right and isinstance(record.get("format", 1), int)
    return record if right else None


@dataclass
class Told:
    """What journals say together: keys and formats of all writers, finished tensors, what was learnt of the
    whole model, whether a swap has begun, and by which of the journals something was finished.
    """

    keys: set[str]
    formats: set[int]
    done: dict[str, Done]
    facts: Facts
    swapped: bool
    authors: set[str]


def told(paths: Sequence[Path]) -> Told:
    """Everything that the journals at ``paths`` say.  Raises OutputError for what is no journal."""
    found = Told(set(), set(), {}, {}, False, set())
    for path in paths:
        for record in records(path):
            if "tensor" in record:
                measured = tuple(tuple(each) for each in record["measured"])
                found.done[record["tensor"]] = Done(record["hash"], tuple(record["inputs"]), measured)
                found.authors.add(path.name)
            elif "key" in record:
                found.keys.add(record["key"])
                found.formats.add(record.get("format", 1))
            found.facts = record.get("facts", found.facts)
            found.swapped = record.get("swap", found.swapped)
    return found


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
    return bool(writer["host"] != disk.host() or disk.is_running(writer["pid"], writer["started"]))
