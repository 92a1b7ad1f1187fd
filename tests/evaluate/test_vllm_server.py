"""The vLLM server of our own, with a stand-in for vLLM: it is started as it should be, and always ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand_ins import VLLM

from della.errors import EvaluationError, OutputError
from della.evaluate.backends import Model
from della.evaluate.vllm_server import vllm_server
from della.experiments.demo import TRIO

MODEL = Model("base", str(TRIO / "base"))


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The command of the stand-in, which notes into told.json."""
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    return (sys.executable, str(tmp_path / "vllm.py"))


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody has waited for is ended too."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"
)


@needs_proc
def test_it_is_started_waited_for_and_ended_with_all_it_started(
    tmp_path: Path, vllm: tuple[str, ...]
) -> None:
    log, arguments = tmp_path / "log/vllm.log", ("--tensor-parallel-size", "2")
    with vllm_server(MODEL, log, command=vllm, arguments=arguments, dtype="bfloat16", seed=7) as url:
        told = json.loads((tmp_path / "told.json").read_text())
        assert all(Path(f"/proc/{pid}").exists() for pid in told["pids"])
        port = url.removeprefix("http://127.0.0.1:").removesuffix("/v1")
        assert told["arguments"] == [
            "serve", str(TRIO / "base"), "--host", "127.0.0.1", "--port", port, "--served-model-name", "base",
            "--dtype", "bfloat16", "--seed", "7", "--generation-config", "vllm",
            "--tensor-parallel-size", "2",
        ]  # fmt: skip
    assert all(gone(pid) for pid in told["pids"])
    assert log.exists()


@needs_proc
def test_it_is_ended_after_an_error_of_ours_too(tmp_path: Path, vllm: tuple[str, ...]) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        vllm_server(MODEL, tmp_path / "vllm.log", command=vllm, dtype="float32", seed=7),
    ):
        _ = 1 / 0
    assert all(gone(pid) for pid in json.loads((tmp_path / "told.json").read_text())["pids"])


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_kill_9_of_ours_ends_it_too(tmp_path: Path, vllm: tuple[str, ...]) -> None:
    program = (
        "import pathlib, time\n"
        "from della.evaluate.backends import Model\n"
        "from della.evaluate.vllm_server import vllm_server\n"
        f"with vllm_server(Model('m', {MODEL.reference!r}), pathlib.Path({str(tmp_path / 'log')!r}),\n"
        f"                 command={vllm!r}, dtype='float32', seed=1):\n"
        "    print('serving', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "serving\n"
        server, child = json.loads((tmp_path / "told.json").read_text())["pids"]
        run.kill()
    assert gone(server)
    os.kill(child, signal.SIGKILL)  # the stand-in's own child is of no interest here


def test_what_goes_wrong_is_told_with_the_end_of_its_log(tmp_path: Path, vllm: tuple[str, ...]) -> None:
    log = tmp_path / "vllm.log"
    with (
        pytest.raises(EvaluationError) as error,
        vllm_server(
            MODEL, log, command=(sys.executable, "-c", "import sys; print('no GPU'); sys.exit(3)"),
            dtype="float32", seed=1,
        ),
    ):  # fmt: skip
        pass
    assert str(error.value) == (
        f"vLLM ended with exit code 3 before it served; its log is {log} and ends so:\nno GPU"
    )
    with (
        pytest.raises(EvaluationError, match=r"^vLLM does not serve after 0\.1 s; its log is "),
        vllm_server(MODEL, log, command=vllm, dtype="float32", seed=1, seconds=0.1),
    ):
        pass
    with (
        pytest.raises(
            EvaluationError, match=r"^none/vllm: no such command; install vLLM, in an environment of"
        ),
        vllm_server(MODEL, log, command=("none/vllm",), dtype="float32", seed=1),
    ):
        pass
    log = tmp_path / "folder"
    log.mkdir()
    with (
        pytest.raises(OutputError, match=f"^{log}: cannot be written "),
        vllm_server(MODEL, log, command=vllm, dtype="float32", seed=1),
    ):
        pass
