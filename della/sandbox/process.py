"""A process that is not trusted, from outside: talking with it up to a limit, and ending what is left."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import time
from typing import Literal

from della.errors import EvaluationError

Ended = Literal["exited", "signal", "timeout"]
MOST_SECONDS_TO_BEGIN = 60.0


def converse(
    process: subprocess.Popen[bytes], data: bytes, most: int, seconds: float
) -> tuple[Ended | None, bytes, bytes, float]:
    """Write ``data`` and read what comes, until the process is over, its time is, or ``most`` was exceeded.

    It is over when the process itself is, whatever it does with its streams.  Its first byte says that it has
    begun: ``seconds`` count from there.  Returns how it ended, None if it did not begin; what it wrote after
    that byte, to stdout and to stderr; and how long it took.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    stdout, stderr = bytearray(), bytearray()
    read = {process.stdout.fileno(): stdout, process.stderr.fileno(): stderr}
    left, begun, over = memoryview(data), 0.0, False
    deadline = time.monotonic() + MOST_SECONDS_TO_BEGIN
    with selectors.DefaultSelector() as selector, open(_descriptor_of(process.pid), "rb", 0) as watch:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for fd in (*read, watch.fileno()):
            selector.register(fd, selectors.EVENT_READ)
        for fd in (process.stdin.fileno(), *read):
            os.set_blocking(fd, False)
        while not over and (wait := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(wait):
                if key.fd == watch.fileno():
                    over = True
                elif key.fileobj is process.stdin:
                    left = _write(key.fd, left)
                    if not left:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif not _read(key.fd, read[key.fd], most):
                    selector.unregister(key.fd)
            if stdout and not begun:
                del stdout[0]
                begun = time.monotonic()
                deadline = begun + seconds
            if max(map(len, read.values())) > most:
                break
    for fd, buffer in read.items():
        _read(fd, buffer, most)
    ended: Ended = "signal" if max(map(len, read.values())) > most else "exited" if over else "timeout"
    took = time.monotonic() - begun
    return ended if begun else None, bytes(stdout[:most]), bytes(stderr[:most]), took


def _write(fd: int, data: memoryview) -> memoryview:
    """Write what fits; what is left, and nothing if nobody reads any more."""
    try:
        return data[os.write(fd, data[: 1 << 16]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _read(fd: int, buffer: bytearray, most: int) -> bool:
    """Read what is there, or more than ``most``; False at the end."""
    while len(buffer) <= most:
        try:
            part = os.read(fd, 1 << 16)
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
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(434, pid, 0)  # pidfd_open, of any machine
    if fd < 0:
        raise EvaluationError(
            "the sandbox needs Linux 5.3 or newer, which can wait for a process beside others"
        )
    return fd


def end(process: subprocess.Popen[bytes], info: int | None) -> int:
    """Kill the process with all that it started, and return its exit code.

    Of bubblewrap its child is killed, the first process of the namespace: the kernel then kills the rest, and
    bubblewrap ends by itself and leaves no zombie.
    """
    over = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    with contextlib.suppress(OSError, ValueError):
        if info is None:
            os.killpg(process.pid, signal.SIGKILL)  # what is left, too; the number is its own until reaped
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
