"""The fixtures that several rooms share.  What is made once for a session is looked at, never changed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command
from hypothesis import HealthCheck, settings
from llamas import save, trio
from merged import FILE, FOLDER, make

from della.cli import main as cli
from della.sandbox.walls import Sandbox

# How long inputs take to make says how busy the machine is.
settings.register_profile("della", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("della")
# A shell starts what runs in the background with SIGINT ignored, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three experts of it: NAME/model.safetensors and NAME/config.json."""
    return save(tmp_path_factory.mktemp("models"), trio())


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, recipe.yml and two merges: FOLDER in four shards, and the single FILE."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the merged folder, to spoil."""
    return Path(shutil.copytree(made / FOLDER, tmp_path / FOLDER))


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    """A copy of the merged file, to spoil."""
    return Path(shutil.copy(made / FILE, tmp_path / FILE))


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """The sandbox that della takes; a test that needs one is skipped where none works."""
    from sandboxes import any_sandbox  # which tries them

    return any_sandbox()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, which spares the start of another.  A test of signals, terminals,
    pipes, or of what is loaded, needs one of its own.
    """

    def run(folder: Path | None, *words: object) -> subprocess.CompletedProcess[str]:
        if folder is not None:
            monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["della", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(sys.argv, ended.value.code, *capfd.readouterr())

    return run
