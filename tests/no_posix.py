"""`della` as on a system that is not POSIX: `python tests/no_posix.py ARGUMENTS` is `della ARGUMENTS`.

Modules, functions and flags that Windows has not are hidden, and what it does otherwise is done so: a folder
cannot be opened, nothing that is open is renamed or removed, a rename replaces nothing, locks are of bytes.
Not Windows itself: paths are still POSIX's, and what Windows' own calls do is believed to be as documented.

The environment can stop it: DIE_AT (the number of a finished tensor, or rename:N) ends it there and then,
WAIT_AT (the number of a finished tensor) writes a line and waits for one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import importlib
import os
import shutil
import struct
import sys
import sysconfig
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

BINARY = 1 << 30
HIDDEN = (
    *("uname", "statvfs", "preadv", "pread", "pwritev", "pwrite", "posix_fallocate", "geteuid", "getuid"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "sched_getaffinity", "link", "fork", "killpg"),
    *("mkfifo", "getpgid", "setsid", "set_blocking", "waitid"),
)
# What decides by the system when it is imported, and is not under test.
FIRST = (
    *("numpy", "numba", "ml_dtypes", "yaml", "typer", "rich.console", "rich.progress", "xxhash"),
    *("subprocess", "tempfile", "platform", "importlib.metadata", "concurrent.futures.thread", "socket"),
)


def hide() -> None:
    """From now on this process has nothing of POSIX's alone."""
    warnings.simplefilter("ignore", EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"della\.")
    for name in FIRST:
        importlib.import_module(name)
    tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[assignment]
    sysconfig.get_config_vars()  # cached, too
    _replace_files()
    _replace_locks()
    _replace_processes()
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None  # type: ignore[assignment]
    for name in HIDDEN:
        delattr(os, name)
    sys.platform = "win32"


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("not on this system")


def _denied(path: Any) -> PermissionError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _is_open(path: Any) -> bool:
    """Whether any process has ``path``, or something in it, open."""
    wanted = os.path.realpath(path)
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            found = os.readlink(link)
        except OSError:
            continue
        if found == wanted or found.startswith(wanted + "/"):
            return True
    return False


def _replace_files() -> None:
    opened, renamed, replaced, unlinked, statvfs = os.open, os.rename, os.replace, os.unlink, os.statvfs

    def open_(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if os.path.isdir(path):
            raise _denied(path)
        caller = sys._getframe(1).f_globals["__name__"]
        assert flags & BINARY or not caller.startswith("della."), "line ends would be translated"
        return opened(path, flags & ~BINARY, mode, **more)

    def rename(source: Any, target: Any) -> None:
        _count("rename")
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if _is_open(source):
            raise _denied(source)
        renamed(source, target)

    def replace(source: Any, target: Any) -> None:
        _count("rename")
        if os.path.isdir(target) or _is_open(source) or _is_open(target):
            raise _denied(target)
        replaced(source, target)

    def unlink(path: Any, **more: Any) -> None:
        if _is_open(path):
            raise _denied(path)
        unlinked(path, **more)

    def disk_usage(path: Any) -> tuple[int, int, int]:
        found = statvfs(path)
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return total, total - free, free

    changed: dict[str, Any] = {"open": open_, "rename": rename, "replace": replace, "unlink": unlink}
    for name, function in {**changed, "remove": unlink, "O_BINARY": BINARY, "kill": _refuse}.items():
        setattr(os, name, function)
    shutil.disk_usage = disk_usage  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    library = ctypes.CDLL

    def cdll(name: Any, *arguments: Any, **more: Any) -> Any:
        return library(name, *arguments, **more) if name else _refuse()

    ctypes.CDLL = cdll  # type: ignore[assignment, misc]


def _replace_locks() -> None:
    """Locks of byte ranges, each for one open file only, also within one process."""
    control, take, free = fcntl.fcntl, fcntl.F_WRLCK, fcntl.F_UNLCK

    def locking(fd: int, mode: int, count: int) -> None:
        at = os.lseek(fd, 0, os.SEEK_CUR)
        assert at < 1 << 31, "the offset has 32 bits"
        kind = free if mode == 0 else take
        try:
            control(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, at, count, 0))
        except OSError:
            raise _denied(fd) from None

    module = types.ModuleType("msvcrt")
    module.__dict__.update(locking=locking, LK_UNLCK=0, LK_NBLCK=2)
    sys.modules["msvcrt"] = module


def _replace_processes() -> None:
    def open_process(access: int, inherit: bool, pid: int) -> int:
        if not os.path.exists(f"/proc/{pid}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pid

    module = types.ModuleType("_winapi")
    module.__dict__.update(
        OpenProcess=open_process, GetExitCodeProcess=lambda handle: 259, CloseHandle=lambda handle: None,
        STILL_ACTIVE=259,
    )  # fmt: skip
    sys.modules["_winapi"] = module


_counts: dict[str, int] = {}


def _count(what: str) -> None:
    """One more of ``what``: the end, or a pause, where the environment wants it."""
    _counts[what] = _counts.get(what, 0) + 1
    here = {"rename": f"rename:{_counts[what]}"}.get(what, str(_counts[what]))
    if os.environ.get("DIE_AT") == here:
        os._exit(9)
    if os.environ.get("WAIT_AT") == here:
        print("waiting", flush=True)
        sys.stdin.readline()


def _counted(finish: Callable[..., None]) -> Callable[..., None]:
    def counting(*arguments: Any) -> None:
        finish(*arguments)
        _count("tensor")

    return counting


def main() -> None:
    """Run the command with POSIX hidden."""
    hide()
    from della.cli import main as cli
    from della.output.writer import StagedOutput

    StagedOutput.finish = _counted(StagedOutput.finish)  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
