"""Files that are read, and what the system gives for it: opened without waiting, read by offset from threads.

This module and output/disk.py are the only ones that know one system from another.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from della.errors import CheckpointError, Problem

# Without O_NONBLOCK a named pipe in a model's folder would hang the program; Windows has none there, but
# translates line ends unless it is told not to.
if sys.platform == "win32":
    PLAIN = os.O_BINARY
else:
    PLAIN = os.O_NONBLOCK

_turns = [threading.Lock() for _ in range(64)]


def open_to_read(path: Path) -> int:
    """A descriptor for reading ``path``, through links; opening a pipe does not wait.  Raises OSError."""
    return os.open(path, os.O_RDONLY | PLAIN)


def read_at(fd: int, buffer: memoryview, at: int) -> int:
    """Fills ``buffer`` (bytes) from offset ``at`` of a file on, from any thread.

    Returns the number of bytes that were read, which may be less than asked for; 0 at the file's end.
    """
    if sys.platform != "win32" and hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], at)
    with turn(fd), io.FileIO(fd, closefd=False) as file:
        file.seek(at)
        return file.readinto(buffer) or 0


def turn(fd: int) -> threading.Lock:
    """Held while a file is read or written at its one position, where the system knows no other way."""
    return _turns[fd % len(_turns)]


@contextmanager
def readable(subject: str | Path) -> Iterator[None]:
    """Errors of the system in reading ``subject`` become a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be read ({error.strerror})", subject=str(subject))) from error
