"""Files that are read, and what the system gives for it: opened without waiting, read by offset from threads.

This module and output/disk.py are the only ones that know one system from another.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from della.errors import CheckpointError, Problem

# Without O_NONBLOCK a named pipe in a model's folder would hang the program; Windows has none there, but
# translates line ends unless it is told not to.
if sys.platform == "win32":
    PLAIN = os.O_BINARY
else:
    PLAIN = os.O_NONBLOCK

NO_NAMES = (21, 123, 1921)  # what Windows says of drives without a disk, of odd names, of links in a circle

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


def is_there(path: Path) -> bool:
    """Whether anything is called ``path``, a broken link as well.

    Raises OSError where the system cannot say: os.path.lexists says no there, and so does Path.is_file from
    Python 3.14 on, by which a file would be left out of a result.
    """
    return _exists(os.lstat, path) is not None


def is_file(path: Path) -> bool:
    """Whether ``path`` leads to a plain file.  Raises OSError as `is_there`."""
    found = _exists(os.stat, path)
    return found is not None and stat.S_ISREG(found.st_mode)


def _exists(look: Callable[[Path], os.stat_result], path: Path) -> os.stat_result | None:
    try:
        return look(path)
    except ValueError:  # no name that a file can have
        return None
    except OSError as error:
        is_no_name = getattr(error, "winerror", None) in NO_NAMES
        if is_no_name or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


@contextmanager
def readable(subject: str | Path) -> Iterator[None]:
    """Errors of the system in reading ``subject`` become a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be read ({error.strerror})", subject=str(subject))) from error
