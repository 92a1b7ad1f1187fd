"""A sandbox that the kernel holds, for code that a model wrote.

    outer wall   bubblewrap: namespaces without network, processes or files of the system
    inner wall   guard.py: Landlock for files, seccomp for system calls, limits; alone where bubblewrap is missing

A program gets a fresh interpreter with the standard library and nothing else: no environment, no descriptors but the
three, nothing to write to (under bubblewrap: an empty folder in memory).  What it prints is read up to a limit;
then, or when its time is over, it is killed with all that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import marshal
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Literal, Protocol

from della.errors import EvaluationError
from della.evaluate import seccomp

NAMES = ("bubblewrap", "landlock")
INSTALL = "install bubblewrap (apt-get install bubblewrap, dnf install bubblewrap, apk add bubblewrap)"
_SCRATCH = "/scratch"
_INSIDE = ("guard", "values", "harness")  # what is sent into the sandbox, in this order
# Reads exactly its orders from standard input, and leaves the rest of it to the program.
_START = """
import marshal, posix, sys
def read(count):
    data = b""
    while len(data) < count:
        data += posix.read(0, count - len(data)) or exit(1)
    return data
guard, *orders = marshal.loads(read(int.from_bytes(read(4), "big")))
module = sys.modules["della.evaluate.guard"] = type(sys)("della.evaluate.guard")
exec(guard, module.__dict__)
module.main(*orders)
"""


_Ended = Literal["exited", "signal", "timeout"]
_HERE = __name__.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use; sizes in bytes.

    seconds: of wall time, and of CPU time.  memory: of each process.  output: of stdout, and of stderr.  disk:
    of the scratch folder; the Landlock sandbox has none.  processes: how many a program may start that is
    trusted to lock its children (`guard.lock_child`); generated code may start none.  files: open at once.
    """

    seconds: float = 10.0
    memory: int = 512 << 20
    output: int = 1 << 20
    disk: int = 16 << 20
    processes: int = 0
    files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, and what it wrote.

    ended: "exited" with ``code``; by the signal ``code`` (9 too if it wrote more than it may); or "timeout".
    """

    ended: _Ended
    code: int
    stdout: bytes
    stderr: str
    seconds: float


class Sandbox(Protocol):
    """Runs Python source, each time in a fresh interpreter behind walls."""

    @property
    def name(self) -> str: ...

    def run(self, source: str, stdin: bytes = b"", limits: Limits = ...) -> Outcome:
        """Run a program to its end, or to that of its limits; EvaluationError if it cannot be started."""


def open_sandbox(name: str | None = None) -> Sandbox:
    """The sandbox ``name``, "bubblewrap" or "landlock", by default the first that works here.

    It is tried before it is returned.  Raises EvaluationError where none holds: generated code is then not run.
    """
    if name is not None and name not in NAMES:
        raise EvaluationError(f"sandbox {name!r}: expected one of {', '.join(NAMES)}")
    faults = []
    for each in NAMES if name is None else (name,):
        fault, sandbox = _why_not(each)
        if sandbox is not None:
            return sandbox
        faults.append(f"{each}: {fault}")
    problem = f"no sandbox for generated code works here ({'; '.join(faults)}), and without one it is not run"
    raise EvaluationError(f"{problem}; {INSTALL}")


def _why_not(name: str) -> tuple[str, Sandbox | None]:
    """The sandbox, after it kept out what it must; else what is wrong."""
    if sys.platform != "linux" or seccomp.machine() is None:
        return "it needs Linux on x86_64 or aarch64", None
    bwrap = shutil.which("bwrap") if name == "bubblewrap" else None
    if name == "bubblewrap" and bwrap is None:
        return "the program bwrap is not installed", None
    sandbox = _Walls(name, bwrap)
    try:
        # bubblewrap's own process is the first in the namespace
        outcome = sandbox.run(_PROBE, repr((__file__, 1 if bwrap else os.getpid())).encode())
    except EvaluationError as error:
        return str(error), None
    if outcome.stdout == b"held":
        return "", sandbox
    lines = outcome.stderr.strip().splitlines() or [outcome.stdout.decode(errors="replace") or outcome.ended]
    return lines[-1], None


_PROBE = """
import os, socket, sys
outside, parent = eval(sys.stdin.read())
held = []
for escape in (lambda: open(outside), socket.socket, os.fork):
    try:
        escape()
    except OSError:
        held.append(escape)
if len(held) < 3:
    sys.exit("it does not hold")
if os.getppid() != parent:
    sys.exit("it is not in a namespace of its own")
sys.stdout.write("held")
"""


@dataclass(frozen=True, slots=True)
class _Walls:
    """A sandbox of either kind: with ``bwrap``, the path of that program, or with the inner wall alone."""

    name: str
    bwrap: str | None

    def run(self, source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Outcome:  # noqa: B008
        codes = dict(_codes())
        orders = marshal.dumps((codes.pop(f"{_HERE}.guard"), self._orders(limits), codes, source))
        begun = time.monotonic()
        process, info = self._start(limits)
        try:
            data = len(orders).to_bytes(4, "big") + orders + stdin
            ended, stdout, stderr = _converse(process, data, limits.output, begun + limits.seconds)
        finally:
            code = _end(process, info)
        if self.bwrap and 128 < code <= 192:  # how bwrap tells a signal
            code = 128 - code
        if ended != "timeout":
            ended = "signal" if code < 0 else "exited"
        return Outcome(ended, abs(code), stdout, stderr.decode(errors="replace"), time.monotonic() - begun)

    def _start(self, limits: Limits) -> tuple[subprocess.Popen[bytes], int | None]:
        """The process, and where bubblewrap says who its child is."""
        command = [_interpreter(), "-s", "-S", "-B", "-X", "utf8", "-c", _START]
        environment = {"PYTHONHASHSEED": "0"}  # sets of texts have one order, so scores can be repeated
        reading, writing = os.pipe() if self.bwrap else (None, None)
        if writing is not None:
            command = [*self._bubblewrap(limits, writing), "--", *command]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                cwd="/",
                env=environment,
                start_new_session=True,
                pass_fds=() if writing is None else (writing,),
            )
        except OSError as error:
            if reading is not None:
                os.close(reading)
            raise EvaluationError(f"the sandbox {self.name} cannot be started: {error}") from error
        finally:
            if writing is not None:
                os.close(writing)
        return process, reading

    def _bubblewrap(self, limits: Limits, info: int) -> list[str]:
        command = [str(self.bwrap), "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
        command += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--info-fd", str(info)]
        for path in [*_readable(), _interpreter()]:
            if os.path.islink(path):
                command += ["--symlink", os.readlink(path), path]
            else:
                command += ["--ro-bind", path, path]
        for device in ("null", "zero", "urandom", "random"):
            command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        command += ["--size", str(limits.disk), "--tmpfs", _SCRATCH, "--chdir", _SCRATCH]
        return [*command, "--remount-ro", "/"]

    def _orders(self, limits: Limits) -> dict[str, object]:
        """The arguments of `guard.lock`."""
        machine = seccomp.machine()
        assert machine is not None
        writing, forking = self.bwrap is not None, limits.processes > 0
        seconds = int(limits.seconds) + 1
        others = _processes() if forking and not self.bwrap and os.geteuid() else 1 if self.bwrap else 0
        return {
            "limits": {
                "AS": limits.memory,
                "CPU": seconds,
                "FSIZE": limits.disk if writing else 0,
                "NOFILE": limits.files,
                "NPROC": limits.processes + 1 + others,
                "CORE": 0,
                "MEMLOCK": 0,
                "MSGQUEUE": 0,
            },
            "readable": [*_readable(), "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"],
            "writable": [_SCRATCH, "/dev/null"] if writing else [],
            "filters": (
                seccomp.filter_of(machine, writing=writing, forking=forking),
                seccomp.child_filter(machine),
            ),
            "alone": not writing,
            "parent": os.getpid(),
        }


# ---- what the interpreter needs --------------------------------------------------------------------------


@cache
def _codes() -> dict[str, CodeType]:
    """The modules that are sent inside, compiled, by name."""
    found: dict[str, CodeType] = {}
    for name in _INSIDE:
        loader = getattr(importlib.util.find_spec(f"{_HERE}.{name}"), "loader", None)
        found[f"{_HERE}.{name}"] = loader.get_code(f"{_HERE}.{name}")  # type: ignore[union-attr]
    return found


@cache
def _interpreter() -> str:
    """This interpreter, not that of a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def _readable() -> list[str]:
    """The standard library and the shared libraries it needs, no place inside another."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    places = {os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", "lib64")}
    places.add(os.path.realpath(sysconfig.get_path("stdlib")))
    places |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/nix/store", "/gnu/store"}
    places |= {"/etc/ld.so.cache", *map(str, Path("/etc").glob("ld-musl-*.path"))}
    kept: list[str] = []
    for place in sorted(filter(os.path.exists, places)):
        if not any(place.startswith(f"{outer}/") for outer in kept):
            kept.append(place)
    return kept


def _processes() -> int:
    """How many processes and threads this user has: the kernel's limit counts them all."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count


# ---- the process, from outside ---------------------------------------------------------------------------


def _converse(
    process: subprocess.Popen[bytes], data: bytes, most: int, deadline: float
) -> tuple[_Ended, bytes, bytes]:
    """Write ``data`` and read what comes until the process is over, the time is, or it wrote more than ``most``.

    It is over when the process itself is, whatever it does with its streams.
    """
    assert process.stdin and process.stdout and process.stderr
    stdout, stderr = bytearray(), bytearray()
    read = {process.stdout.fileno(): stdout, process.stderr.fileno(): stderr}
    left, over = memoryview(data), False
    with selectors.DefaultSelector() as selector, open(_descriptor_of(process.pid), "rb", 0) as end:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for place in (*read, end.fileno()):
            selector.register(place, selectors.EVENT_READ)
        for place in (process.stdin.fileno(), *read):
            os.set_blocking(place, False)
        while not over and (seconds := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(seconds):
                if key.fd == end.fileno():
                    over = True
                elif key.fileobj is process.stdin:
                    left = _write(key.fd, left)
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif not _read(key.fd, read[key.fd], most):
                    selector.unregister(key.fd)
            if max(map(len, read.values())) > most:
                break
    for place, buffer in read.items():
        _read(place, buffer, most)
    ended: _Ended = "signal" if max(map(len, read.values())) > most else "exited" if over else "timeout"
    return ended, bytes(stdout[:most]), bytes(stderr[:most])


def _write(place: int, data: memoryview) -> memoryview:
    """Write what fits; what is left, and nothing if nobody reads any more."""
    try:
        return data[os.write(place, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _read(place: int, buffer: bytearray, most: int) -> bool:
    """Read what is there, or more than ``most``; False at the end."""
    while len(buffer) <= most:
        try:
            part = os.read(place, 1 << 16)
        except BlockingIOError:
            return True
        if not part:
            return False
        buffer += part
    return True


def _descriptor_of(pid: int) -> int:
    """A descriptor that can be read from when the process ``pid`` is over."""
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    place: int = ctypes.CDLL(None, use_errno=True).syscall(434, pid, 0)  # pidfd_open, of any machine
    if place < 0:
        raise EvaluationError("the sandbox needs Linux 5.3 or newer, which can wait for a process beside others")
    return place


def _end(process: subprocess.Popen[bytes], info: int | None) -> int:
    """Kill the process with all that it started, and return its exit code.

    Of bubblewrap its child is killed, the first process of the namespace: the kernel then kills the rest, and
    bubblewrap ends by itself and leaves no zombie.
    """
    over = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    with contextlib.suppress(OSError, ValueError):
        if info is None:
            os.killpg(process.pid, signal.SIGKILL)  # what is left of it, too; the number is its own until it is reaped
        elif not over:
            os.set_blocking(info, False)
            os.kill(int(json.loads(os.read(info, 1 << 12))["child-pid"]), signal.SIGKILL)
    if info is not None and not over:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    with contextlib.suppress(OSError):
        process.kill()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    if info is not None:
        os.close(info)
    return process.wait()
