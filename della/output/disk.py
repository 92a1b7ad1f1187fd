"""What the writer asks of the system: space, durability, locks, who lives, a rename that replaces at once.

This module and checkpoint/files.py are the only ones that know one system from another.  What a system cannot
do is said in docs/safety.md.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from della.checkpoint.files import PLAIN, read_at, turn
from della.checkpoint.names import is_windows_name
from della.errors import CheckpointError, OutputError, Problem

if sys.platform == "win32":
    import _winapi
    import msvcrt
else:
    import fcntl

AT_FDCWD = -100
# (refuse what stands there, exchange it) as flags of a rename
LINUX_FLAGS, MACOS_FLAGS = (1, 2), (4, 2)
SYNC_FILE_RANGE_WRITE = 2
LOCK = "lock"  # the file that stands for its folder where no folder can be locked
LOCKED_FROM, MOST_LOCKS = 1 << 30, 1 << 20  # bytes beyond all that is written, as Windows locks bytes
PROCESS_QUERY = 0x1000
RENAME_PATIENCE = 2.0  # seconds

_spans: dict[int, tuple[int, int]] = {}  # which of these bytes each descriptor has locked


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
        if getattr(error, "winerror", None) == 32:
            why = "open in another program; close it there"
        said, _, fix = why.partition("; ")
        raise OutputError(Problem(said, fix or None, str(path))) from error


@contextmanager
def refusals_of_system(out: Path | None = None) -> Iterator[None]:
    """Turns an OSError about a file that no step has told better into an OutputError, if the file belongs to
    ``out``, or else into a CheckpointError."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes | Path):
            raise  # of a stream, of the network, or of who called
        path = Path(os.path.abspath(os.fsdecode(error.filename)))
        if out is not None and _belongs(path, Path(os.path.abspath(out))):
            with explained(path):
                raise
        raise CheckpointError(Problem(f"cannot be read ({error.strerror})", subject=str(path))) from error


def _belongs(path: Path, out: Path) -> bool:
    """Whether ``path`` is a result, stands in it, or in one of the folders that a merge keeps beside it."""
    if not path.is_relative_to(out.parent):
        return out.is_relative_to(path)
    first = path.relative_to(out.parent).parts[:1]
    return not first or first[0] == out.name or first[0].startswith(f".{out.name}.della-")


# ---- locks, and who holds them ----


def lock_of(folder: Path) -> Path:
    """What is opened to hold a folder: itself, or a file in it where only files can be locked."""
    return folder / LOCK if sys.platform == "win32" else folder


def open_folder(folder: Path) -> int:
    """A descriptor of a folder, for locks.  Raises NotADirectoryError for all else, links as well."""
    if sys.platform != "win32":
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    fd = open_plain(folder / LOCK, os.O_RDWR | os.O_CREAT)
    if fd is None:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return fd


def try_lock(fd: int, shared: bool = False) -> bool | None:
    """Whether a lock was taken, in place of the one that was held; None where there are no locks.

    It excludes all others, or, ``shared``, those that are not shared.
    """
    try:
        if sys.platform == "win32":
            _lock_bytes(fd, shared)
        else:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _lock_bytes(fd: int, shared: bool) -> None:
    """Windows locks bytes, each for one only: who is alone takes them all, who shares takes any."""
    if sys.platform == "win32":
        before = _spans.pop(fd, None)
        if before is not None:
            os.lseek(fd, before[0], os.SEEK_SET)
            with suppress(OSError):  # of a file that had the same descriptor
                msvcrt.locking(fd, msvcrt.LK_UNLCK, before[1])
        first = secrets.randbelow(MOST_LOCKS) if shared else 0
        at, count = LOCKED_FROM + first, 1 if shared else MOST_LOCKS
        os.lseek(fd, at, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, count)
        _spans[fd] = (at, count)


def user() -> int:
    """Whom what is written belongs to, as in st_uid; 0 where the system has no such numbers."""
    if sys.platform == "win32":
        return 0
    return os.geteuid()


def host() -> str:
    """The name of this machine."""
    return platform.node()


def started(pid: int) -> str:
    """When a process began, in the system's own terms, or "": a pid may have been given anew."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_running(pid: int, since: str) -> bool:
    """Whether the process ``pid`` that began at ``since`` (as `started` says) may still run on this host."""
    try:
        if sys.platform == "win32":  # os.kill would end it
            handle = _winapi.OpenProcess(PROCESS_QUERY, False, pid)
            try:
                return _winapi.GetExitCodeProcess(handle) == _winapi.STILL_ACTIVE
            finally:
                _winapi.CloseHandle(handle)
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    return started(pid) == since


# ---- files ----


def can_be_called(name: str) -> bool:
    """Whether a file can have this name here, if its form is right."""
    return sys.platform != "win32" or is_windows_name(name)


def is_name_below(name: str) -> bool:
    """Whether a file of a folder can have this name, in which "/" leads into subfolders."""
    parts = name.split("/")
    return all(
        part not in ("", ".", "..") and not set(part) & set("\\:\0") and can_be_called(part) for part in parts
    )


def open_plain(path: Path, flags: int) -> int | None:
    """A descriptor of a plain file; None for all else: a pipe would hang, a link lead elsewhere."""
    if sys.platform == "win32":
        follow = 0
        if path.is_symlink():
            return None
    else:
        follow = os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | PLAIN | follow, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) or path.is_dir():
            return None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


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
    """Writes all of ``content`` (bytes) at offset ``at`` of a file, from any thread."""
    while content:
        if sys.platform != "win32":
            count = os.pwrite(fd, content, at)
        else:
            with turn(fd):
                os.lseek(fd, at, os.SEEK_SET)
                count = os.write(fd, content)
        content = content[count:]
        at += count


def read_back(fd: int, count: int, at: int) -> bytes:
    """At most ``count`` bytes from offset ``at`` of a file on."""
    buffer = bytearray(count)
    return bytes(buffer[: read_at(fd, memoryview(buffer), at)])


def taken(found: os.stat_result) -> int:
    """Bytes that a file takes on the disk."""
    if sys.platform == "win32":
        return found.st_size
    return found.st_blocks * 512


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
    """Returns once the names in ``folder`` are on the disk; on Windows at once, where nothing tells that."""
    if sys.platform != "win32":
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sync(fd)
        finally:
            os.close(fd)


# ---- renames ----


def move_in(staged: Path, out: Path, replace: bool, aside: Path) -> None:
    """Renames ``staged`` to ``out``; what stood there is refused (FileExistsError), or (``replace``) takes
    the place of ``staged``.

    At every moment ``out`` is the old one or the new one.  Only where the system cannot exchange two folders
    is it missing for an instant; the old one then stands at ``aside``.  No file of ``staged`` may be open:
    Windows refuses to move it then.
    """
    if not replace:
        if not _rename_by(staged, out, False):
            _rename_to_free(staged, out)
    elif not staged.is_dir():
        _patiently(os.replace, staged, out)
    elif not _rename_by(staged, out, True):
        _patiently(os.rename, out, aside)
        try:
            _patiently(os.rename, staged, out)
        except BaseException:
            _patiently(os.rename, aside, out)
            raise


def _patiently(rename: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """On Windows nothing is renamed while somebody looks into it, as a virus scanner does into new files."""
    deadline = time.monotonic() + RENAME_PATIENCE
    while True:
        try:
            return rename(source, target)
        except PermissionError:
            if sys.platform != "win32" or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _rename_to_free(staged: Path, out: Path) -> None:
    """A rename that replaces nothing, where the system has none: a folder's never replaces one that holds
    something, and a file gets a second name first.
    """
    if os.path.lexists(out):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    if sys.platform == "win32" or staged.is_dir():  # Windows never replaces by this
        _patiently(os.rename, staged, out)
        return
    try:
        os.link(staged, out)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.rename(staged, out)
    else:
        os.unlink(staged)


def _rename_by(source: Path, target: Path, swap: bool) -> bool:
    """A rename that exchanges the two (``swap``), or refuses a target that is there.

    False where there is none: Windows has neither, and not every file system of the others has both.
    """
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform, "")
    function = _libc(name)
    if function is None:
        return False
    old, new = os.fsencode(source), os.fsencode(target)
    if name == "renameat2":
        failed = function(AT_FDCWD, old, AT_FDCWD, new, LINUX_FLAGS[swap])
    else:
        failed = function(old, new, MACOS_FLAGS[swap])
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


@functools.cache
def _libc(name: str) -> Any:
    """A function of the C library, or None where it has none of this name."""
    if sys.platform == "win32" or not name:
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
