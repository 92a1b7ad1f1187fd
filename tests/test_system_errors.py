"""Every call to the file system may fail: one sentence says so, and OUT is absent, old or new."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import della
from crash.scene import SCENARIOS, Scenario, Scene
from della.checkpoint.files import is_file, is_there
from della.errors import DellaError

CALLS = (
    "stat", "lstat", "fstat", "open", "scandir", "listdir", "mkdir", "rename",
    "replace", "unlink", "rmdir", "link", "preadv", "pwrite", "fsync",
)  # fmt: skip
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)


class Faults:
    """Counts the calls about files below ``root``, and makes number ``at`` fail with ``code``."""

    def __init__(self, root: Path) -> None:
        self.root, self.count, self.at, self.code, self.on = str(root), 0, -1, 0, False

    def hook(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, which fails when its turn comes."""

        def failing(*args: Any, **named: Any) -> Any:
            if self.on and (where := self._where(args[0] if args else ".")) is not None:
                self.count += 1
                if self.count == self.at:
                    path = () if isinstance(args[0], int) else (where,)
                    raise OSError(self.code, os.strerror(self.code), *path)
            return call(*args, **named)

        return failing

    def _where(self, first: Any) -> str | None:
        where = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
        return where if str(where).startswith(self.root) else None


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Small models, and recipes of one document and of two."""
    folder = tmp_path_factory.mktemp("scene")
    return Scene(folder, layers=2, width=8, shard=2000).build()


@pytest.fixture
def faults(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The calls of this process, ready to fail."""
    found = Faults(scene.folder)
    for name in CALLS:
        if hasattr(os, name):
            monkeypatch.setattr(os, name, found.hook(getattr(os, name)))
    opened = found.hook(io.open)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    yield found
    found.on = False


def attempt(faults: Faults, at: int, code: int, run: Callable[[], object]) -> DellaError | None:
    """What comes of ``run`` when its call number ``at`` fails: an error in words, or none."""
    faults.count, faults.at, faults.code, faults.on = 0, at, code, True
    try:
        run()
    except DellaError as error:
        return error
    finally:
        faults.on = False
    return None


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors by /proc (Linux)")


@needs_proc
@pytest.mark.parametrize("name", ["absent", "documents, old"])
def test_any_call_of_a_merge_may_fail(scene: Scene, faults: Faults, name: str) -> None:
    scenario = next(each for each in SCENARIOS if each.name == name)
    site = scene.folder / "site"

    def merge() -> None:
        overwrite: Any = "any" if scenario.old else False
        della.merge(
            scene.folder / f"{scenario.recipe}.yml", site / "out", overwrite=overwrite, **scene.options
        )

    scene.set_up(site, scenario)
    assert attempt(faults, -1, 0, merge) is None
    total, told = faults.count, 0
    assert total > 1000
    for turn, at in enumerate(range(1, total, total // 60)):  # all of them, by hand: 1,335 and 4,840
        scene.set_up(site, scenario)
        error = attempt(faults, at, ERRORS[turn % 3], merge)
        state = scene.state(site, scenario)
        assert state == scenario.end or (error and state == scenario.start), (at, error)
        told += error is not None
    assert told > 5


@needs_proc
def test_any_call_of_plan_and_verify_may_fail(scene: Scene, faults: Faults) -> None:
    site = scene.folder / "site"
    scene.set_up(site, Scenario("old", old=True))

    def plan() -> None:
        della.plan(scene.folder / "documents.yml").close()

    def verify() -> None:
        assert not della.verify(site / "out").bad or faults.count >= faults.at

    for run in (plan, verify):
        assert attempt(faults, -1, 0, run) is None
        total = faults.count
        told = [attempt(faults, at, ERRORS[at % 3], run) for at in range(1, total, max(total // 60, 1))]
        assert any(told)


def test_what_cannot_be_looked_at_is_not_taken_for_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """os.path.lexists and, from Python 3.14, Path.is_file say no there; a file would be left out."""

    def fails(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "stat", fails)
    monkeypatch.setattr(os, "lstat", fails)
    with pytest.raises(PermissionError):
        is_file(Path("config.json"))
    with pytest.raises(PermissionError):
        is_there(Path("config.json"))


def test_a_link_in_a_circle_is_there_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert is_there(tmp_path / "a")
    assert not is_file(tmp_path / "a")
    assert not is_there(tmp_path / "c")
    assert not is_file(tmp_path / "c" / "d")
