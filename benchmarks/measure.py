"""Measuring processes and installations.  Only the standard library, and little of it: see `run`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# ru_maxrss is in kilobytes on Linux, in bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Run:
    """One process from start to end: wall, user and system seconds, peak resident bytes, its stdout."""

    wall: float
    user: float
    system: float
    peak: int
    said: str

    @property
    def cpu(self) -> float:
        return self.user + self.system


class Failed(Exception):
    """A measured process ended with an error."""


def run(argv: Sequence[str], env: Mapping[str, str], logs: Path) -> Run:
    """Run ``argv`` (its first word is a path) and wait for it; stdout and stderr go to files in ``logs``.

    CPU time is that of the process and the children it waited for; ``peak`` that of the largest single one.
    Linux counts the memory of the process that spawns towards the peak of the spawned one, so the caller must
    stay small.  Raises Failed with the end of stderr.
    """
    out, err = logs / "stdout", logs / "stderr"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    redirect = [(os.POSIX_SPAWN_OPEN, fd, str(path), flags, 0o600) for fd, path in ((1, out), (2, err))]
    started = time.perf_counter()
    pid = os.posix_spawn(argv[0], list(argv), dict(env), file_actions=redirect)
    try:
        _, status, usage = os.wait4(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    wall = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    if code:
        told = "\n".join(err.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"{' '.join(argv)}\nended with {code}:\n{told}")
    said = out.read_text(errors="replace")
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * _RSS_UNIT, said)


@dataclass(frozen=True)
class Installation:
    """What lies in the site-packages of a virtual environment, pip left out: bytes and number of packages."""

    size: int
    packages: int


def installation(venv: Path) -> Installation:
    """Measure ``venv``.  Sizes are those of the files, compiled bytecode included."""
    size = packages = 0
    for site in venv.glob("lib/python*/site-packages"):
        for entry in os.scandir(site):
            if entry.name == "pip" or (entry.name.startswith("pip-") and entry.name.endswith(".dist-info")):
                continue
            packages += entry.name.endswith(".dist-info")
            size += sum(_sizes(entry))
    return Installation(size, packages)


def _sizes(entry: os.DirEntry[str]) -> Iterator[int]:
    if entry.is_dir(follow_symlinks=False):
        for child in os.scandir(entry):
            yield from _sizes(child)
    else:
        yield entry.stat(follow_symlinks=False).st_size


def read_all(paths: Sequence[Path]) -> None:
    """Read files to the end, so that all later reads find them in the page cache."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
