"""Runs inside the sandbox, first: gives away what the process could do, then runs the code it was sent.

Nothing of della is at hand here, only the standard library.  Limits, files (Landlock) and system calls
(seccomp) are bound by the kernel, for good: what runs afterwards can undo none of it.  Under bubblewrap this
is the second wall; where there is no bubblewrap it is the only one, and what is missing is an error.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # typing, dataclasses and signal would take longer to import than all else here
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

# prctl
_SET_PDEATHSIG, _SET_KEEPCAPS, _SET_SECCOMP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 1, 8, 22, 38, 47
_SECCOMP_MODE_FILTER, _CAP_AMBIENT_CLEAR_ALL, _CAP_SETUID, _SIGKILL = 2, 4, 7, 9
# Landlock: system calls, rights to files, and what came with which version of its ABI.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _PATH_BENEATH = 444, 445, 446, 1
_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # all, moving, truncating, ioctl of devices
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _TRUNCATE = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 14
_OF_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
_WRITING = _OF_FILES | _READ_DIR | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG
_NETWORK, _SCOPES = 0b11, 0b11  # bind and connect TCP; abstract sockets and signals out of the sandbox

_LIBC = ctypes.CDLL(None, use_errno=True)
NULL = -1  # /dev/null, opened before nothing can be opened for writing any more
_child_filter = b""


def lock(
    limits: dict[str, int],
    readable: list[str],
    writable: list[str],
    filters: tuple[bytes, bytes],
    alone: bool,
    parent: int,
) -> None:
    """Take away everything but what the arguments leave; OSError if the kernel cannot.

    limits: those of resource.setrlimit, by name.  filters: for this process, and for its children.  alone: no
    bubblewrap is around; then ``parent`` must be the parent still.
    """
    global NULL, _child_filter
    NULL, _child_filter = os.open(os.devnull, os.O_RDWR), filters[1]
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    rules = _landlock(readable, writable, alone)
    if alone:
        if os.geteuid() == 0:
            _become_nobody()
        _prctl(_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != parent:
            raise OSError("the process that started the sandbox is gone")
    _drop_capabilities()
    _prctl(_SET_NO_NEW_PRIVS, 1)
    if rules is not None:
        _checked(_LIBC.syscall(_RESTRICT_SELF, rules, 0), "Landlock")
        os.close(rules)
    _seccomp(filters[0])


def lock_child(seconds: float) -> None:
    """After a fork, before generated code runs: no process of its own, and an alarm that it cannot stop."""
    import signal

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _seccomp(_child_filter)


def _landlock(readable: list[str], writable: list[str], alone: bool) -> int | None:
    """A ruleset under which only these files can be opened; None where a second wall is missing."""
    abi = _LIBC.syscall(_CREATE_RULESET, None, 0, 1)
    if abi < 1:
        if alone:
            raise OSError(ctypes.get_errno(), "the kernel has no Landlock")
        return None
    handled = sum(rights for version, rights in _RIGHTS.items() if version <= abi)
    attributes = struct.pack("=QQQ", handled, _NETWORK, _SCOPES)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _checked(_LIBC.syscall(_CREATE_RULESET, attributes, len(attributes), 0), "Landlock")
    allowed = [(path, _READ_FILE | _READ_DIR) for path in readable]
    for path, rights in allowed + [(path, _WRITING) for path in writable]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights & handled, fd)
        _checked(_LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), "Landlock")
        os.close(fd)
    return ruleset


def _become_nobody() -> None:
    """Root becomes a user whom nobody else is; where it cannot (some containers), it only loses its rights.

    An interpreter in root's own folder could then no longer read its library: if so, the process reads files
    as root's (Landlock says which), and is the other user for all else.
    """
    _prctl(_SET_KEEPCAPS, 1)
    for uid in (1_900_000_000 + os.getpid(), 65534):
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError:
            continue
        break
    try:
        os.stat(os.__file__)
    except PermissionError:
        _set_capabilities(1 << _CAP_SETUID)
        _LIBC.setfsuid(0)


def _drop_capabilities() -> None:
    _LIBC.prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _set_capabilities(0)


def _set_capabilities(bits: int) -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _checked(_LIBC.capset(header, struct.pack("=6I", bits, bits, 0, 0, 0, 0)), "capset")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(program: bytes) -> None:
    _prctl(_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(program) // 8, program)))


def _prctl(option: int, *arguments: object) -> None:
    rest = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    rest += [ctypes.c_ulong(0)] * (4 - len(rest))
    _checked(_LIBC.prctl(option, *rest), f"prctl {option}")


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def main(orders: dict[str, Any], modules: dict[str, CodeType], source: str) -> None:
    """Lock as ordered, make ``modules`` importable, and run ``source`` as a program."""
    sys.path[:] = [path for path in sys.path if path]
    lock(**orders)
    os.environ.clear()
    for name, code in modules.items():
        module = sys.modules[name] = type(sys)(name)
        exec(code, module.__dict__)
    os.write(1, b"!")  # it has begun: all that is written from here on may come from the program
    program = sys.modules["__main__"] = type(sys)("__main__")
    exec(compile(source, "<program>", "exec"), program.__dict__)
