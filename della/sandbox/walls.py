"""A sandbox that the kernel holds, for code that a model wrote.

    outer wall   bubblewrap: namespaces without network, processes or files of the system
    inner wall   guard.py: Landlock for files, seccomp for system calls, limits; alone without bubblewrap

A program gets a fresh interpreter with the standard library and nothing else: no environment, no descriptors
but the three, nothing to write to (under bubblewrap: an empty folder in memory).  What it prints is read up
to a limit; then, or when its time is over, it is killed with all that it started.
"""

from __future__ import annotations

import contextlib
import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Protocol

from della.errors import EvaluationError, Problem, unknown
from della.sandbox import seccomp
from della.sandbox.process import Ended, converse, end

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
module = sys.modules["della.sandbox.guard"] = type(sys)("della.sandbox.guard")
exec(guard, module.__dict__)
module.main(*orders)
"""


_HERE = __name__.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use; sizes in bytes.

    seconds: of wall time, and of CPU time.  memory: of each process.  output: of stdout, and of stderr.
    disk: of the scratch folder; the Landlock sandbox has none.  processes: how many a program may start that
    is trusted to lock its children (`guard.lock_child`); generated code may start none.  files: open at once.
    """

    seconds: float = 10.0
    memory: int = 512 << 20
    output: int = 1 << 20
    disk: int = 16 << 20
    processes: int = 0
    files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, what it wrote, and how long it ran.

    ended: "exited" with ``code``; by the signal ``code`` (9 too if it wrote more than it may); or "timeout".
    """

    ended: Ended
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

    It is tried before it is returned.  Raises EvaluationError where none holds: then nothing may be run.
    """
    if name is not None and name not in NAMES:
        raise EvaluationError(unknown("sandbox", name, NAMES))
    faults = []
    for each in NAMES if name is None else (name,):
        fault, sandbox = _why_not(each)
        if sandbox is not None:
            return sandbox
        faults.append(fault)
    problem = f"no sandbox for generated code works here ({'; '.join(faults)}), and without one it is not run"
    raise EvaluationError(Problem(problem, INSTALL))


def _why_not(name: str) -> tuple[str, Sandbox | None]:
    """The sandbox, after it kept out what it must; else what is wrong."""
    if sys.platform != "linux" or seccomp.machine() is None:
        return f"{name} needs Linux on x86_64 or aarch64", None
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
    return f"the sandbox {name} does not hold: {outcome.stderr.strip() or outcome}", None


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
    sys.exit(f"only {len(held)} of 3 attempts failed")
if os.getppid() != parent:
    sys.exit("it is not in a namespace of its own")
sys.stdout.write("held")
"""


@dataclass(frozen=True, slots=True)
class _Walls:
    """A sandbox of either kind: with ``bwrap``, the path of that program, or with the inner wall alone."""

    name: str
    bwrap: str | None

    def run(self, source: str, stdin: bytes = b"", limits: Limits = Limits()) -> Outcome:
        codes = dict(_codes())
        orders = marshal.dumps((codes.pop(f"{_HERE}.guard"), self._orders(limits), codes, source))
        process, info = self._start(limits)
        try:
            data = len(orders).to_bytes(4, "big") + orders + stdin
            ended, stdout, stderr, seconds = converse(process, data, limits.output, limits.seconds)
        finally:
            code = end(process, info)
        said = stderr.decode(errors="replace")
        if ended is None:
            last = said.strip().rpartition("\n")[2] or f"it ended with {code}"
            raise EvaluationError(f"the sandbox {self.name} did not begin: {last}")
        if self.bwrap and 128 < code <= 192:  # how bwrap tells a signal
            code = 128 - code
        if ended != "timeout":
            ended = "signal" if code < 0 else "exited"
        return Outcome(ended, abs(code), stdout, said, seconds)

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
            raise EvaluationError(f"the sandbox {self.name} did not begin: {error}") from error
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
        command += ["--size", str(max(limits.disk, 4096)), "--tmpfs", _SCRATCH, "--chdir", _SCRATCH]
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
    """The standard library and the shared libraries it needs, no path inside another."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    paths = {os.path.join(prefix, lib) for prefix in prefixes for lib in ("lib", "lib64")}
    paths.add(os.path.realpath(sysconfig.get_path("stdlib")))
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/nix/store", "/gnu/store"}
    paths |= {"/etc/ld.so.cache", *map(str, Path("/etc").glob("ld-musl-*.path"))}
    kept: list[str] = []
    for path in sorted(filter(os.path.exists, paths)):
        if not any(path.startswith(f"{outer}/") for outer in kept):
            kept.append(path)
    return kept


def _processes() -> int:
    """How many processes and threads this user has: the kernel's limit counts them all."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == os.getuid():
                count += len(os.listdir(process / "task"))
    return count
