"""What the writer asks of the file system: locks, space, durability, a rename that replaces at once."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from della.errors import OutputError

OWNER = ".della-owner"
NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100


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


def claim(folder: Path, out: Path) -> int:
    """Makes ``folder``, or takes over and empties what a dead run left; the descriptor returned is the lock.

    Raises OutputError while another run holds it.  The lock is the folder's inode, so it needs no file and
    moves along with a rename; it saves work, and nothing's correctness hangs on it.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not try_lock(fd):
            os.close(fd)
            raise OutputError(
                f"{out}: another run is writing there ({_owner(folder)}); wait for it, or stop it"
            )
        if _is_open(folder, fd):
            break
        os.close(fd)
    for entry in folder.iterdir():
        remove(entry)
    (folder / OWNER).write_text(f"pid {os.getpid()} on {os.uname().nodename}")
    return fd


def try_lock(fd: int) -> bool:
    """Whether the lock of an open folder was taken, or the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_open(folder: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(fd))
    except FileNotFoundError:
        return False


def _owner(folder: Path) -> str:
    try:
        return (folder / OWNER).read_text()[:200] or "it has just begun"
    except (OSError, UnicodeError):
        return "it has just begun"


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder."""
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


def move_in(staged: Path, out: Path, replace: bool) -> None:
    """Renames ``staged`` to ``out``; what stood there is refused (FileExistsError), or goes (``replace``).

    At every moment ``out`` is the old one or the new one.  Only where the system cannot exchange two folders
    is it missing for an instant; the old one then stands beside it as `aside`.
    """
    if not replace:
        if not _renameat2(staged, out, NOREPLACE):
            if os.path.lexists(out):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
            os.rename(staged, out)
    elif not staged.is_dir():
        os.replace(staged, out)
    else:
        old = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try_lock(old)  # what is being removed below must not look like a dead run's remains
            if _renameat2(staged, out, EXCHANGE):
                remove(staged)
            else:
                os.rename(out, aside(out))
                os.rename(staged, out)
                remove(aside(out))
        finally:
            os.close(old)


def aside(out: Path) -> Path:
    """Where an old model waits while a new one takes its name."""
    return out.with_name(f".{out.name}.della-old")


def recover(out: Path) -> None:
    """Undoes, or ends, an exchange that was cut short."""
    old = aside(out)
    if old.is_dir() and not old.is_symlink():
        if os.path.lexists(out):
            remove(old)
        else:
            os.rename(old, out)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; False where the system or the file system does not have it."""
    function = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    )
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(target))
