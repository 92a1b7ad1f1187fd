"""What the writer asks of the file system: space, durability, locks, a rename that replaces at once."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from della.errors import OutputError

NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100
SYNC_FILE_RANGE_WRITE = 2


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError about ``path`` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        fixes = {
            errno.ENOSPC: "the disk is full; free some space, or write to another disk",
            errno.EDQUOT: "your quota on this disk is used up; free some space, or write to another disk",
            errno.EIO: "the disk reports an error; check it, and write to another one",
            errno.EACCES: "permission denied; choose a place that you may write to",
            errno.EPERM: "permission denied; choose a place that you may write to",
            errno.EROFS: "the file system is read-only; choose a place that you may write to",
            errno.EEXIST: "exists already; choose another place",
            errno.ENOTEMPTY: "exists already; choose another place",
        }
        why = fixes.get(error.errno or 0, f"cannot be written ({error.strerror or error})")
        raise OutputError(f"{path}: {why}") from error


def try_lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool | None:
    """Whether the lock (LOCK_EX or LOCK_SH) of an open file was taken; None where there are no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_open(path: Path, fd: int) -> bool:
    """Whether ``fd`` is what now stands at ``path``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_at(fd: int, content: memoryview, at: int) -> None:
    """Writes all of ``content`` (bytes) at offset ``at`` of a file."""
    while content:
        count = os.pwrite(fd, content, at)
        content = content[count:]
        at += count


def put(path: Path, content: bytes) -> None:
    """A small file as a whole, or what stood there before; OutputError where it cannot be written."""
    staged = path.with_name(path.name + ".new")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.write_bytes(content)
            staged.replace(path)
        except BaseException:
            with suppress(OSError):  # it may not be a file
                staged.unlink()
            raise


def allocate(fd: int, size: int) -> None:
    """Gives a file its size, and its blocks where the file system can reserve them."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(fd, size)


def start_writing(fd: int, at: int, count: int) -> None:
    """Asks the system to begin writing a range of a file to the disk, without waiting for it."""
    function = _libc("sync_file_range")
    if function is not None and count:
        wide = ctypes.c_int64
        function(fd, wide(at), wide(count), SYNC_FILE_RANGE_WRITE)  # advice: a failure shows in fsync


def sync(fd: int) -> None:
    """Returns once a file is on the disk, as far as the system can tell."""
    if sys.platform == "darwin":
        with suppress(OSError):  # network file systems do not know it
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync alone leaves the data in the drive's cache there
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Returns once the names in ``folder`` are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def move_in(staged: Path, out: Path, replace: bool, aside: Path) -> None:
    """Renames ``staged`` to ``out``; what stood there is refused (FileExistsError), or (``replace``) takes
    the place of ``staged``.

    At every moment ``out`` is the old one or the new one.  Only where the system cannot exchange two folders
    is it missing for an instant; the old one then stands at ``aside``.
    """
    if not replace:
        if not _renameat2(staged, out, NOREPLACE):
            _rename_to_free(staged, out)
    elif not staged.is_dir():
        os.replace(staged, out)
    elif not _renameat2(staged, out, EXCHANGE):
        os.rename(out, aside)
        try:
            os.rename(staged, out)
        except BaseException:
            os.rename(aside, out)
            raise


def _rename_to_free(staged: Path, out: Path) -> None:
    """A rename that replaces nothing, where the system has none: a folder's never replaces one that holds
    something, and a file gets a second name first.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    if staged.is_dir():
        os.rename(staged, out)
        return
    try:
        os.link(staged, out)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.rename(staged, out)
    else:
        os.unlink(staged)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; False where the system or the file system does not have it."""
    function = _libc("renameat2")
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(target))


@functools.cache
def _libc(name: str) -> Any:
    """A function of Linux's C library, or None."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
