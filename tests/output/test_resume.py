"""Merges cut short and merges in parts: nothing finished is lost, the bytes are those of a quiet run."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import put, tree
from llamas import recipe

import della
from della.checkpoint.view import Stored
from della.errors import CheckpointError, DellaError, OutputError, RecipeError
from della.output import disk, journal
from della.output.staging import Staging
from della.output.writer import StagedOutput
from della.running.compute import Compute

OWN: list[dict[str, Any]] = [{"density": 0.5}, {"density": 0.6}, {"density": 0.3}]
OPTIONS: dict[str, Any] = {"threads": 1, "shard_bytes": 9000, "fsync": False}


@pytest.fixture
def made(models: Path) -> dict[str, Any]:
    return recipe(models, "della", OWN, {})


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def quiet(made: dict[str, Any], out: Path, **options: Any) -> dict[str, bytes]:
    """What an undisturbed merge gives."""
    della.merge(made, out / "out", **{**OPTIONS, **options})
    return files(out / "out")


def stop_after(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next merge fails when so many tensors are finished."""
    real = StagedOutput.finish
    left = itertools.count(count, -1)

    def finish(self: StagedOutput, name: str, done: journal.Done) -> None:
        if next(left) == 0:
            monkeypatch.setattr(StagedOutput, "finish", real)
            raise error
        real(self, name, done)

    monkeypatch.setattr(StagedOutput, "finish", finish)


def full_disk() -> OutputError:
    error = OutputError("the disk is full")
    error.__cause__ = OSError(errno.ENOSPC, "")
    return error


def cut_short(
    made: dict[str, Any], out: Path, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> str:
    stop_after(count, full_disk(), monkeypatch)
    with pytest.raises(OutputError) as caught:
        della.merge(made, out, **{**OPTIONS, **options})
    return str(caught.value)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The tensors whose bytes are read from an input."""
    names: set[str] = set()
    real = Stored.read_bytes

    def read_bytes(self: Stored, start: int, buffer: memoryview) -> None:
        names.add(self.name)
        real(self, start, buffer)

    monkeypatch.setattr(Stored, "read_bytes", read_bytes)
    return names


@pytest.mark.parametrize("single", [False, True])
def test_the_same_command_goes_on_and_reads_nothing_twice(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: set[str], single: bool
) -> None:
    out = tmp_path / ("out.safetensors" if single else "out")
    della.merge(made, tmp_path / "quiet" / out.name, **OPTIONS)
    said = cut_short(made, out, 25, monkeypatch)
    staging = out.with_name(f".{out.name}.della-staging")
    assert "the disk is full" in said
    assert f"25 finished tensors are kept in {staging}" in said
    assert "the same call resumes it" in said
    assert sorted(os.listdir(tmp_path)) == [staging.name, "quiet"]
    finished = set(journal.told([staging / "journal-1-of-1"]).done)
    assert len(finished) == 25
    read.clear()
    told: list[str] = []
    result = della.merge(made, out, tell=told.append, **OPTIONS)
    assert (result.resumed, told) == (
        25, ["25 of 40 tensors were finished before; the merge is resumed"]
    )  # fmt: skip
    assert read, "the others are computed"
    assert not read & finished
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, "quiet"])
    assert tree(out) == {
        name.replace("/quiet/", "/"): raw for name, raw in tree(tmp_path / "quiet" / out.name).items()
    }
    assert out.is_dir() or out.read_bytes() == (tmp_path / "quiet" / out.name).read_bytes()
    assert della.verify(out).is_well


def test_finished_tensors_are_looked_at(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut took away (zeros in a file) is computed again; so is what a torn line tells of."""
    wanted = quiet(made, tmp_path / "quiet")
    out, staging = tmp_path / "out", tmp_path / ".out.della-staging"
    cut_short(made, out, 25, monkeypatch)
    shard = staging / "model/model-00001-of-00005.safetensors"
    assert shard.exists(), sorted(os.listdir(staging / "model"))
    raw = bytearray(shard.read_bytes())
    raw[2000:] = bytes(len(raw) - 2000)
    shard.write_bytes(raw)
    lines = (staging / "journal-1-of-1").read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"hash": "', b'"hash": "0')
    (staging / "journal-1-of-1").write_bytes(b"".join(lines)[:-20])
    put(staging / "model", {"model.safetensors": b"stale", "sub/file": b""})
    result = della.merge(made, out, **OPTIONS)
    assert 0 < result.resumed < 23
    assert files(out) == wanted
    assert sorted(os.listdir(tmp_path)) == ["out", "quiet"]


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"overrides": "lambda=0.5"}, {"shard_bytes": 12_000}, {"touch": True}],
    ids=lambda other: next(iter(other)),
)
def test_what_another_merge_left_is_not_used(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    shutil.copytree(models, tmp_path / "models")
    made = recipe(tmp_path / "models", "della", OWN, {})
    out = tmp_path / "place/out"
    cut_short(made, out, 25, monkeypatch)
    if other.pop("touch", False):
        os.utime(tmp_path / "models/code/model.safetensors", ns=(1, 1))
    told: list[str] = []
    result = della.merge(made, out, tell=told.append, **{**OPTIONS, **other})
    assert result.resumed == 0
    assert told == ["what an unfinished run of another merge had left for this place was removed"]
    assert files(out) == quiet(made, tmp_path / "quiet", **other)
    assert della.verify(out).is_well
    assert os.listdir(out.parent) == ["out"]


def test_an_input_that_changes_meanwhile_is_noticed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path / "models")
    changed = tmp_path / "models/code/model.safetensors"
    real = StagedOutput.finish

    def finish(self: StagedOutput, name: str, done: journal.Done) -> None:
        os.utime(changed, ns=(1, 1))
        real(self, name, done)

    monkeypatch.setattr(StagedOutput, "finish", finish)
    with pytest.raises(CheckpointError) as caught:
        della.merge(recipe(tmp_path / "models", "della", OWN, {}), tmp_path / "place/out", **OPTIONS)
    assert str(caught.value) == (
        f"{changed}: changed while it was merged; is something writing to it? Start again"
    )
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (KeyboardInterrupt(), True),
        (full_disk(), True),
        (CheckpointError("damaged"), False),
        (OutputError("w: element 1 becomes inf"), False),
        (ValueError("a defect"), True),
        (MemoryError(), True),
        (BrokenPipeError(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_a_second_try_can_mend_is_kept(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_kept: bool
) -> None:
    stop_after(25, error, monkeypatch)
    with pytest.raises(type(error)):
        della.merge(made, tmp_path / "out", **OPTIONS)
    assert (tmp_path / ".out.della-staging").exists() == is_kept
    stop_after(0, error, monkeypatch)
    with pytest.raises(type(error)):
        della.merge(made, tmp_path / "new", **OPTIONS)
    assert not (tmp_path / ".new.della-staging").exists(), "nothing was finished"


def test_after_a_swap_the_old_model_is_not_taken_for_a_staged_one(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the swap and the tidying up: what lies in the staging folder is the old model then."""
    out, staging = tmp_path / "out", tmp_path / ".out.della-staging"
    della.merge(made, out, seed=7, **OPTIONS)
    (out / "stale-00001-of-00002.safetensors").write_bytes(b"old")
    for path in out.iterdir():
        os.link(path, tmp_path / f"mine-{path.name}")  # another name of the user's for the same file
    before = {path.name: path.read_bytes() for path in tmp_path.glob("mine-*")}
    monkeypatch.setattr(Staging, "remove", lambda self: None)
    della.merge(made, out, overwrite="any", **OPTIONS)
    monkeypatch.undo()
    assert (staging / "model/stale-00001-of-00002.safetensors").exists()
    wanted = files(out)
    with pytest.raises(OutputError) as caught:
        della.merge(made, out, overwrite="any", finish=True, **OPTIONS)
    assert str(caught.value) == (
        f"{out}: an earlier run was cut short while it put the new model there; see what della.verify says"
        ", and leave out finish if it is not there"
    )
    result = della.merge(made, out, overwrite="any", **OPTIONS)
    assert (result.resumed, files(out)) == (0, wanted)
    assert not staging.exists()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mine-*")} == before


def test_thresholds_of_the_whole_model_are_kept_too(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: set[str]
) -> None:
    made = recipe(models, "ties", [{"density": 0.3}] * 3, {"scope": "model"})
    wanted = quiet(made, tmp_path / "quiet")
    cut_short(made, tmp_path / "out", 25, monkeypatch)
    finished = set(journal.told([tmp_path / ".out.della-staging/journal-1-of-1"]).done)
    read.clear()
    assert della.merge(made, tmp_path / "out", **OPTIONS).resumed == 25
    assert not read & finished
    assert files(tmp_path / "out") == wanted


# ---- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parts", "single"), [(2, False), (3, False), (7, False), (2, True)])
def test_parts_in_any_order_give_the_bytes_of_one_run(
    made: dict[str, Any], tmp_path: Path, parts: int, single: bool
) -> None:
    name = "out.safetensors" if single else "out"
    della.merge(made, tmp_path / "quiet" / name, **OPTIONS)
    out = tmp_path / "place" / name
    order = [*range(2, parts + 1), 1]
    for number in order[:-1]:
        result = della.merge(made, out, part=(number, parts), **OPTIONS)
        assert result.manifest == {}
        assert not out.exists()
    with pytest.raises(OutputError) as caught:
        della.merge(made, out, finish=True, **OPTIONS)
    assert "are not finished (" in str(caught.value)
    assert "run the parts that are missing, or leave out finish" in str(caught.value)
    for number in (order[-1], order[0]):  # one once more: nothing is left to do
        della.merge(made, out, part=(number, parts), **OPTIONS)
    result = della.merge(made, out, finish=True, **OPTIONS)
    assert result.resumed == 40
    same = tmp_path / "quiet" / name
    assert out.read_bytes() == same.read_bytes() if single else files(out) == files(same)
    assert os.listdir(out.parent) == [name]


def test_a_part_without_a_file_says_so(made: dict[str, Any], tmp_path: Path) -> None:
    told: list[str] = []
    for number in range(1, 8):
        della.merge(made, tmp_path / "out", part=(number, 7), tell=told.append, **OPTIONS)
    said = "nothing to do for this part: the result has 5 files; a smaller shard_bytes makes more"
    assert told == [said] * 2


def test_one_run_takes_over_from_parts(made: dict[str, Any], tmp_path: Path, read: set[str]) -> None:
    wanted = quiet(made, tmp_path / "quiet")
    out = tmp_path / "out"
    della.merge(made, out, part=(2, 3), **OPTIONS)
    finished = set(journal.told([tmp_path / ".out.della-staging/journal-2-of-3"]).done)
    read.clear()
    with della.plan(made):  # looks at buffers, and at what a dtype would cut
        looked = set(read)
    read.clear()
    assert 0 < della.merge(made, out, **OPTIONS).resumed == len(finished)
    assert not (read & finished) - looked
    assert finished - looked
    assert files(out) == wanted


def test_a_part_that_was_cut_short_goes_on(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    della.merge(made, out, part=(1, 2), **OPTIONS)
    stop_after(3, CheckpointError("damaged"), monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        della.merge(made, out, part=(2, 2), **OPTIONS)
    assert caught.value.problems[0].said == "damaged"
    assert "kept" in (caught.value.problems[0].fix or "")
    assert della.merge(made, out, part=(2, 2), **OPTIONS).resumed == 3
    della.merge(made, out, finish=True, **OPTIONS)
    assert files(out) == quiet(made, tmp_path / "quiet")


def test_parts_of_different_merges_do_not_mix(made: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    della.merge(made, out, part=(1, 2), **OPTIONS)
    before = tree(tmp_path)
    for other in ({"seed": 7}, {"shard_bytes": 8000}):
        with pytest.raises(OutputError) as caught:
            della.merge(made, out, part=(2, 2), **{**OPTIONS, **other})
        assert str(caught.value) == (
            f"{tmp_path}/.out.della-staging: holds another merge (another recipe, seed, version or shard "
            "size, or inputs that have changed since); do this one alike, or remove that folder"
        )
        assert tree(tmp_path) == before
    for part, said in (((0, 2), "0/2"), ((3, 2), "3/2")):
        with pytest.raises(RecipeError) as refused:
            della.merge(made, out, part=part, **OPTIONS)
        assert str(refused.value) == f"part {said}: expected (i, n) with 1 <= i <= n, such as (2, 7)"
    with pytest.raises(RecipeError):
        della.merge(made, out, part=(1, 2), finish=True, **OPTIONS)


def test_a_finish_does_not_believe_the_journals(made: dict[str, Any], tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / ".out.della-staging/model"
    for number in (1, 2):
        della.merge(made, out, part=(number, 2), **OPTIONS)
    shard = sorted(model.iterdir())[-1]
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(OutputError, match=r"^.*/out: 1 of 40 tensors are not finished \("):
        della.merge(made, out, finish=True, **OPTIONS)
    assert not out.exists()
    for number in (1, 2):
        della.merge(made, out, part=(number, 2), **OPTIONS)
    della.merge(made, out, finish=True, **OPTIONS)
    assert files(out) == quiet(made, tmp_path / "quiet")


def test_threads_parts_and_orders(models: Path, tmp_path: Path) -> None:
    """20 combinations."""
    base = recipe(models, "della", [{"density": 0.5}] * 3, {}, base_model=str(models / "base"))
    orders = list(itertools.permutations(range(3)))
    combinations = list(itertools.product((1, 2, 4), (1, 2, 7), orders))
    found = []
    for threads, parts, order in combinations[::3] + combinations[1:3]:
        out = tmp_path / "out"
        made = {**base, "models": [base["models"][k] for k in order]}
        options = {**OPTIONS, "threads": threads}
        for number in range(parts, 0, -1) if parts > 1 else ():
            della.merge(made, out, part=(number, parts), **options)
        della.merge(made, out, finish=parts > 1, **options)
        found.append({n: raw for n, raw in files(out).items() if n not in ("README.md", "della.json")})
        shutil.rmtree(out)
    assert len(found) == 20
    assert [each for each in found if each != found[0]] == []


def test_a_finish_removes_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    """With a wrong option it fits no part; the parts' work stays."""
    out = tmp_path / "out"
    for number in (1, 2):
        della.merge(made, out, part=(number, 2), **OPTIONS)
    before = tree(tmp_path)
    for other in ({"shard_bytes": 8000}, {"seed": 7}):
        for finish in (True, False):
            with pytest.raises(OutputError, match=r"della-staging: holds another merge \("):
                della.merge(made, out, finish=finish, **{**OPTIONS, **other})
            assert tree(tmp_path) == before
    assert della.merge(made, out, finish=True, **OPTIONS).resumed == 40


def test_one_run_that_fails_leaves_the_work_of_parts(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    della.merge(made, out, part=(1, 2), **OPTIONS)
    stop_after(3, CheckpointError("damaged"), monkeypatch)
    with pytest.raises(CheckpointError):
        della.merge(made, out, **OPTIONS)
    assert (tmp_path / ".out.della-staging/journal-1-of-2").exists()
    done = journal.told(sorted((tmp_path / ".out.della-staging").glob("journal-*"))).done
    assert della.merge(made, out, **OPTIONS).resumed == len(done) > 3


def test_a_part_that_fails_at_once_leaves_nothing(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(0, CheckpointError("damaged"), monkeypatch)
    with pytest.raises(CheckpointError):
        della.merge(made, tmp_path / "out", part=(1, 2), **OPTIONS)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("part", [(1, 1), (1, 2)])
def test_a_run_whose_staging_was_replaced_does_not_commit(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: tuple[int, int]
) -> None:
    """The folder was taken for a dead run's and removed, and another merge has begun in it."""
    out, staging = tmp_path / "out", tmp_path / ".out.della-staging"
    real = StagedOutput.finish
    left = itertools.count(10, -1)

    def finish(self: StagedOutput, name: str, done: journal.Done) -> None:
        real(self, name, done)
        if next(left) == 0:
            monkeypatch.setattr(StagedOutput, "finish", real)
            shutil.rmtree(staging)
            della.merge(made, out, part=(2, 3), seed=9, **OPTIONS)

    monkeypatch.setattr(StagedOutput, "finish", finish)
    with pytest.raises(
        OutputError, match="replaced or removed by another run while this one worked; start again"
    ):
        della.merge(made, out, part=part, **OPTIONS)
    assert not out.exists()
    assert (staging / "journal-2-of-3").exists(), "the other's work is not touched"
    assert della.merge(made, out, seed=9, **OPTIONS).resumed > 5


def test_what_a_user_puts_into_out_meanwhile_is_not_lost(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    della.merge(made, out, **OPTIONS)
    before = files(out) | {"precious.bin": b"x"}
    for late in (False, True):  # while the files are synced, or in the instant before the rename
        real = disk.move_in

        def move_in(staged: Path, place: Path, replace: bool, aside: Path, real: Any = real) -> None:
            put(out, {"precious.bin": b"x"})
            monkeypatch.setattr(disk, "move_in", real)
            real(staged, place, replace, aside)

        if late:
            (out / "precious.bin").unlink()
            monkeypatch.setattr(disk, "move_in", move_in)
        else:
            monkeypatch.setattr(StagedOutput, "_sync_files", lambda self: put(out, {"precious.bin": b"x"}))
        with pytest.raises(OutputError, match=r"not a model, or more \(it holds precious.bin\)"):
            della.merge(made, out, seed=7, overwrite="any", **OPTIONS)
        monkeypatch.undo()
        assert files(out) == before
        assert os.listdir(tmp_path) == ["out"]


def test_after_the_commit_nothing_untrue_is_told(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Staging.remove

    def stopped(self: Staging) -> None:
        monkeypatch.setattr(Staging, "remove", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "remove", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        della.merge(made, tmp_path / "out", **OPTIONS)
    assert str(caught.value) == f"{tmp_path}/out is complete"

    def broken(folder: Path) -> None:
        if folder.name != "model":
            raise OSError(errno.EIO, "")

    monkeypatch.setattr(disk, "sync_folder", broken)
    with pytest.raises(OutputError) as refused:
        della.merge(made, tmp_path / "new", **{**OPTIONS, "fsync": True})
    (problem,) = refused.value.problems
    assert (problem.subject, problem.fix) == (f"{tmp_path}/new", "check it, and write to another one")
    assert "the disk reports an error" in problem.said
    assert f"{tmp_path}/new is complete" in problem.said
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]
    assert files(tmp_path / "new") == files(tmp_path / "out")


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_goes_on_from(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from della.cli import main as cli

    path = tmp_path / "r.yml"
    path.write_text(json.dumps(recipe(models, "task_arithmetic", [{}] * 3, {}, dtype="float32")))

    def command(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr("sys.argv", ["della", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capfd.readouterr().err.splitlines()

    merge = ("merge", str(path), str(tmp_path / "out"), "--threads", "1")
    stop_after(25, KeyboardInterrupt(), monkeypatch)
    staging = tmp_path / ".out.della-staging"
    code, said = command(*merge, "--quiet")
    kept = f"25 finished tensors are kept in {staging}; the same command resumes it"
    assert (code, said) == (130, [f"della: stopped; the output is as it was; {kept}"])
    code, said = command("verify", str(tmp_path / "out"))
    assert (code, said) == (
        4, [f"della: {tmp_path}/out: nothing is there; {staging}: an unfinished merge (25 tensors done); "
            "the same command resumes it"],
    )  # fmt: skip
    code, said = command(*merge)
    assert code == 0
    assert "note: 25 of 40 tensors were finished before; the merge is resumed" in said
    parts = [*merge[:2], str(tmp_path / "parts"), "--shard-size", "20kB", "--quiet"]
    for text in ("2/2", "1/2"):
        assert command(*parts, "--part", text) == (0, [])
    assert command(*parts, "--finish") == (0, [])
    for text in ("2", "a/b", "1/2/3", "-1/2"):
        code, said = command(*parts, f"--part={text}")
        assert (code, said) == (2, [f"della: --part {text}: expected I/N, such as 2/7"])


# ---- journals ---------------------------------------------------------------------------------------------


def test_a_journal_believes_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal-1-of-1"
    done = journal.Done("0" * 32, ("1" * 32, "2" * 32))

    def write(act: Callable[[journal.Journal], None]) -> None:
        book = journal.Journal(path)
        book.begin("key", "1/1")
        act(book)
        book.close()

    write(lambda book: book.finished("a", done))
    write(lambda book: book.finished("b\n\0é", done))
    assert journal.told([path]).done == {"a": done, "b\n\0é": done}
    raw = path.read_bytes()
    for end in range(len(raw)):
        path.write_bytes(raw[:end])
        found = journal.told([path]).done
        assert set(found) <= {"a", "b\n\0é"}
        assert all(entry == done for entry in found.values())
    path.write_bytes(raw[:-9])
    write(lambda book: book.finished("c", done))
    assert set(journal.told([path]).done) == {"a", "c"}, "a torn line does not swallow the next one"
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        assert all(entry == done for entry in journal.told([path]).done.values())


def test_space_that_is_taken_already_is_not_asked_for_again(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(made, tmp_path / "out", 25, monkeypatch)
    staged = sum(p.stat().st_blocks * 512 for p in (tmp_path / ".out.della-staging/model").iterdir())
    assert staged > 0
    monkeypatch.setattr("della.output.place.MARGIN_BYTES", 0)
    real = os.statvfs(tmp_path)

    class Nearly:
        f_blocks, f_frsize, f_bfree, f_bavail = real.f_blocks, 1, 0, 0

    monkeypatch.setattr(os, "statvfs", lambda _: Nearly)
    with pytest.raises(DellaError, match="the result needs"):
        della.merge(made, tmp_path / "other", **OPTIONS)
    assert della.merge(made, tmp_path / "out", **OPTIONS).resumed == 25


def test_when_all_parts_are_done_nothing_is_computed(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        della.merge(made, tmp_path / "out", part=(number, 2), **OPTIONS)
    monkeypatch.delattr(Compute, "pieces")
    assert della.merge(made, tmp_path / "out", **OPTIONS).resumed == 40
