"""A vLLM server of our own for one model: started, waited for, and ended again.

vLLM pins its own torch, so it mostly lives in another environment: only its command is run here, and spoken
to over HTTP.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from della.errors import EvaluationError, Problem, either
from della.evaluate.backends import Model
from della.output import disk

HOST = "127.0.0.1"
START_SECONDS, END_SECONDS = 1800.0, 15.0
_LAST_BYTES = 2000  # of the log, for a message
_PR_SET_PDEATHSIG = 1


@contextmanager
def vllm_server(
    model: Model, log: Path, *, command: Sequence[str], arguments: Sequence[str] = (), dtype: str, seed: int,
    seconds: float = START_SECONDS,
) -> Iterator[str]:  # fmt: skip
    """The base URL of a server that knows ``model`` by its name.

    command: vLLM's program.  arguments: further ones of `vllm serve`.  log: where its output goes.
    seconds: how long it may take to load the model.  Raises EvaluationError.
    """
    program = shutil.which(command[0])
    if program is None:
        raise EvaluationError(
            Problem(
                "no such command",
                "install vLLM, in an environment of its own if it does not fit this one, and give its "
                f"program: {either('--vllm-command ENV/bin/vllm', 'vllm_command=(PROGRAM,)')}",
                command[0],
            )
        )
    found, revision = model.local_or_hub
    port = _free_port()
    line = [
        program, *command[1:], "serve", found, "--host", HOST, "--port", str(port), "--served-model-name",
        model.name, "--dtype", dtype, "--seed", str(seed), "--generation-config", "vllm",
        *(("--revision", revision) if revision else ()), *arguments,
    ]  # fmt: skip
    with disk.explained(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    with output:
        child = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_end_with_parent(),  # noqa: PLW1509  (nothing else runs yet)
        )  # fmt: skip
    try:
        _wait(child, port, log, seconds)
        yield f"http://{HOST}:{port}/v1"
    finally:
        _end(child)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait(child: subprocess.Popen[bytes], port: int, log: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not _is_healthy(port):
        code = child.poll()
        if code is not None:
            raise EvaluationError(Problem(f"vLLM ended with exit code {code} before it served", _last(log)))
        if time.monotonic() > until:
            raise EvaluationError(Problem(f"vLLM does not serve after {seconds:g} s", _last(log)))
        time.sleep(0.1)


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        said = file.read().decode("utf-8", "replace").strip()
    return f"its log is {log} and ends so:\n{said}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """The server and what it has started: asked first, then killed."""
    for signum, seconds in ((signal.SIGTERM, END_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux, a kill -9 of ours ends the server too: it would hold the GPU for ever."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL)) and None
