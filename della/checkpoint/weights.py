"""The files of weights of one opened checkpoint, read by offset into the caller's buffers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from della.checkpoint.files import open_to_read, read_at, readable
from della.checkpoint.layout import File
from della.errors import CheckpointError, Problem


class Weights:
    """Files that are opened when they are first read; safe to read from several threads.

    ``reference`` is the model as its user names it.  A file that is not as it was when its header was read is
    refused.
    """

    def __init__(self, reference: str, files: Iterable[File]) -> None:
        self.reference = reference
        self._sizes = {file.path: file.size for file in files}
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes) with what ``file`` holds from ``offset`` on.

        Raises CheckpointError when the file has changed or cannot be read.
        """
        fd, rest = self._open(file), buffer
        while rest:
            try:
                count = read_at(fd, rest, offset)
            except OSError as error:
                raise CheckpointError(
                    Problem(f"cannot be read ({error.strerror})", subject=str(file))
                ) from error
            if count == 0:
                raise _shrank(file)
            rest = rest[count:]
            offset += count

    def check_size(self, file: Path) -> None:
        """Refuse a file that has another size now: it may be mapped, and its pages be gone."""
        if os.fstat(self._open(file)).st_size != self._sizes[file]:
            raise _shrank(file)

    def close(self) -> None:
        """Close every file; what is read later opens it again."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def _open(self, path: Path) -> int:
        fd = self._fds.get(path)
        if fd is not None:
            return fd
        with self._lock:
            if path not in self._fds:
                self._fds[path] = _open_unchanged(path, self._sizes[path])
            return self._fds[path]


def _shrank(file: Path) -> CheckpointError:
    return CheckpointError(Problem("shrank while it was read", "is something writing to it?", str(file)))


def _open_unchanged(path: Path, size: int) -> int:
    try:
        fd = open_to_read(path)
    except FileNotFoundError as error:
        raise CheckpointError(
            Problem("the weights are not here", "they were not downloaded, or were moved", str(path))
        ) from error
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be opened ({error.strerror})", subject=str(path))) from error
    try:
        with readable(path):
            found = os.fstat(fd).st_size
    except CheckpointError:
        os.close(fd)
        raise
    if found != size:
        os.close(fd)
        raise CheckpointError(
            Problem(
                f"changed since its header was read: expected {size:,} bytes, found {found:,}",
                "start again",
                str(path),
            )
        )
    return fd
