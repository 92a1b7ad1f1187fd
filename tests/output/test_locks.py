"""One writer at a time: who holds a place is named, who is dead is taken over, with locks and without."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from checkpoints import numbers, save_model, tree

from della.errors import OutputError
from della.output import disk, staging
from della.output.journal import Done, Journal
from della.output.staging import Staging

HOST = os.uname().nodename
ME = f"pid {os.getpid()} on {HOST}"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PATIENCE", 0.1)


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file system has locks, or (some network ones) has none."""
    if request.param == "no locks":

        def flock(fd: int, kind: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", flock)
    return str(request.param)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Held:
    """Claims that are released at the end of a test."""

    def __init__(self) -> None:
        self.all: list[Staging] = []

    def __call__(self, out: Path, key: str = "k", part: int = 1, parts: int = 1) -> Staging:
        self.all.append(Staging(out, key, part, parts))
        self.all[-1].claim()
        return self.all[-1]


@pytest.fixture
def claim() -> Iterator[Held]:
    held = Held()
    yield held
    for each in held.all:
        each.release()


def refused(claim: Held, *arguments: Any) -> str:
    with pytest.raises(OutputError) as caught:
        claim(*arguments)
    return str(caught.value)


def busy(out: Path, who: str) -> str:
    return f"{out}: another run is writing there ({who}); wait for it, or stop it"


def test_the_second_of_two_is_refused_and_the_first_named(out: Path, claim: Held, locks: str) -> None:
    first = claim(out)
    before = tree(out.parent)
    assert refused(claim, out) == busy(out, ME)
    assert refused(claim, out, "another merge") == busy(out, ME)
    assert refused(claim, out, "k", 1, 2) == busy(out, ME)
    assert tree(out.parent) == before
    first.journal.end()
    first.release()
    claim(out)


def test_parts_work_side_by_side_but_not_twice(out: Path, claim: Held, locks: str) -> None:
    claim(out, "k", 1, 3)
    claim(out, "k", 3, 3)
    assert refused(claim, out, "k", 3, 3) == busy(out, f"{ME}, part 3/3")
    assert refused(claim, out) == busy(out, f"{ME}, part 1/3; {ME}, part 3/3")
    claim(out, "k", 2, 3)


DEAD = """
import os, sys
from pathlib import Path
from della.output.journal import Done
from della.output.staging import Staging
staging = Staging(Path(sys.argv[1]), "k", int(sys.argv[2]), int(sys.argv[3]))
staging.claim()
staging.journal.finished("w", Done("h", ()))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("part", "parts"), [(1, 1), (2, 3)])
def test_a_dead_holder_on_this_host_is_taken_over(
    out: Path, claim: Held, locks: str, part: int, parts: int
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", DEAD, str(out), str(part), str(parts)]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    assert claim(out, "k", part, parts).done == {"w": Done("h", ())}


def test_a_pid_that_was_given_anew_is_not_taken_for_the_holder(
    out: Path, claim: Held, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk, "started", lambda pid: "an earlier process")
        claim(out).release()  # without an end: as if killed
    claim(out)


def test_a_holder_on_another_host(
    out: Path, claim: Held, locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With locks, a lock that was got is proof that the other one is gone; without, nobody can tell."""
    with monkeypatch.context() as patch:
        patch.setattr(disk, "host", lambda: "elsewhere")
        claim(out).release()
    if locks == "locks":
        claim(out)
    else:
        assert refused(claim, out) == (
            busy(out, f"pid {os.getpid()} on elsewhere")
            + f"; if it is dead, remove {out.parent}/.out.della-staging"
        )


def test_whoever_has_just_begun_is_waited_for(
    out: Path, claim: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is locked before the journal names the writer; the loser wants a name."""
    folder = out.with_name(".out.della-staging")
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert refused(claim, out) == busy(out, "it has just begun")
    (folder / "model").mkdir()
    journal = Journal(folder / "journal-1-of-1")
    journal.begin("k", "1/1")
    assert refused(claim, out) == busy(out, ME)
    journal.close()
    os.close(fd)
    claim(out)


def test_a_folder_that_a_stranger_laid_out_is_not_used(
    out: Path, claim: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that everybody may write to, somebody could leave "finished" tensors."""
    claim(out).release()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    claim(out).release()  # nobody else can write here
    out.parent.chmod(0o1777)
    assert refused(claim, out) == (
        f"{out.parent}/.out.della-staging: made by another user in a folder that everybody may write to; "
        "choose another place, or remove it"
    )


def test_links_in_the_staging_folder_are_not_followed(out: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_bytes(b"x" * 1000)
    folder = tmp_path / ".out.della-staging"
    folder.mkdir()
    (folder / "model").symlink_to(precious)
    save_model(out, 1.0)
    assert numbers(out) == [1.0, 1.0]
    folder.mkdir()
    (folder / "journal-1-of-1").symlink_to(precious / "model.safetensors")
    with pytest.raises(OutputError, match=r"journal-1-of-1: not a journal of della; remove "):
        save_model(out, 2.0, overwrite="any")
    assert tree(precious) == {f"{precious}/model.safetensors": b"x" * 1000}


def test_strange_journals(out: Path, claim: Held) -> None:
    """What is no file is refused, and lines with a right checksum but a wrong form are passed over."""
    folder = out.with_name(".out.della-staging")
    for make in (os.mkfifo, os.mkdir):
        (folder / "model").mkdir(parents=True)
        make(folder / "journal-1-of-1")
        assert refused(claim, out) == f"{folder}/journal-1-of-1: not a journal of della; remove {folder}"
        shutil.rmtree(folder)
    for text in (
        *(b"", b"3", b"null", b'"key"', b"[]", b"{}", b'{"key":1}', b'{"key":["a"],"pid":1}', b"{", b"\xff"),
        *(
            b'{"key":"k","part":"1/1","pid":99999999999999999999,"host":"h","started":"","format":3}',
            b'{"tensor":1}',
        ),
        b'{"key":"k","part":"1/1","pid":1,"host":"h","started":"","format":[3]}',
        *(b'{"tensor":"w","hash":3,"inputs":[]}', b'{"facts":[]}', b'{"swap":"yes"}', b'{"end":0}'),
    ):
        folder.mkdir(exist_ok=True)
        checksum = xxhash.xxh3_64_hexdigest(text).encode()
        (folder / "journal-1-of-1").write_bytes(checksum + b" " + text + b"\n")
        found = claim(out)
        assert found.done == {}
        found.release()


def test_a_staging_folder_that_is_a_file(out: Path, claim: Held) -> None:
    out.with_name(".out.della-staging").write_text("")
    assert refused(claim, out) == f"{out.parent}/.out.della-staging: not a staging folder of della; remove it"


def test_a_part_of_another_merge_cannot_slip_in(out: Path, claim: Held, locks: str) -> None:
    claim(out, "k", 1, 2)
    assert "holds another merge (" in refused(claim, out, "other", 2, 2)
    claim(out, "k", 2, 2)


def test_a_lock_that_could_not_be_shared_is_taken_anew(
    out: Path, claim: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From alone to shared is two steps for the system, and another one may come between."""
    real, answers = disk.try_lock, iter([False])

    def try_lock(fd: int, shared: bool = False) -> bool | None:
        if shared and next(answers, True) is False:
            return False
        return real(fd, shared)

    monkeypatch.setattr(disk, "try_lock", try_lock)
    part = claim(out, "k", 1, 2)
    monkeypatch.undo()
    monkeypatch.setattr(staging, "PATIENCE", 0.1)
    assert part.is_held
    assert refused(claim, out) == busy(out, f"{ME}, part 1/2")


def test_a_folder_of_the_users_own_is_not_touched(out: Path, claim: Held) -> None:
    folder = out.with_name(".out.della-staging")
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert refused(claim, out) == f"{folder}: holds 'notes.txt', which is not della's; move it away"
    assert (folder / "notes.txt").read_text() == "mine"
