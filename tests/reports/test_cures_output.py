"""What messages on the place of a result, on unfinished merges and on finished ones advise is done as it
is written, and a right merge or a right refusal comes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from commands import Command
from cures import cures
from merged import reseal
from safetensors.numpy import load_file

import della
from della.dtypes import DTYPES
from della.errors import OutputError
from della.output.writer import StagedOutput

BASE: dict[str, Any] = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.ones(300, np.float32)}
ONE = {name: array + 2 for name, array in BASE.items()}
RECIPE = "merge_method: task_arithmetic\nbase_model: ./base\nmodels: [{model: ./one}]\n"
STAGING = Path(".out.della-staging")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": ONE})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(command: Command) -> Callable[..., tuple[int, str]]:
    def words(*given: object) -> tuple[int, str]:
        done = command(None, *given)
        return done.returncode, done.stdout + done.stderr

    return words


Run = Callable[..., tuple[int, str]]


def check(out: str = "out") -> None:
    path = Path(out)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert found.keys() == ONE.keys()
    for name, array in ONE.items():
        assert np.array_equal(found[name], array)


def cured(run: Run, refused: str, advice: str, then: str) -> None:
    """`della merge recipe.yml REFUSED` says ``advice``, and with THEN the merge is made."""
    code, said = run("merge", "recipe.yml", *refused.split())
    assert code == 4, said
    assert advice in " ".join(said.split()), said
    code, said = run("merge", "recipe.yml", *then.split())
    assert code == 0, said
    check(then.split()[0])


# ---- the place --------------------------------------------------------------------------------------------

PLACES = {
    "of another program": ("x.gguf", "a folder, or a file that ends in .safetensors", "x.safetensors"),
    "a folder of that program": ("x.gguf", "name a folder", "x"),
    "touches an input": ("base/out", "choose another place", "other"),
    "below a file": ("recipe.yml/out", "choose another place", "other"),
    "a link": ("link", "name the place that it leads to", "there"),
    "there already": ("old", "choose another place", "new"),
    "to be replaced": ("old", "--overwrite", "old --overwrite"),
    "of others": ("foreign --overwrite", "--overwrite=any", "foreign --overwrite=any"),
    "elsewhere": ("foreign --overwrite", "choose another place", "other"),
    "no model": ("notes --overwrite=any", "choose another place, or remove it yourself", "other"),
    "a file for a folder": ("plain --overwrite", "choose another place", "other"),
}


@cures("output/place.py:_complaints")
@cures("output/place.py:_complaints", "output/place.py:_complaints", "output/place.py:_complaints")
@cures("output/place.py:_taken", "output/place.py:_taken", "output/place.py:_taken")
@cures("output/place.py:refusal_to_replace")
@pytest.mark.parametrize("kind", PLACES)
def test_another_place(run: Run, folder: Path, kind: str) -> None:
    Path("link").symlink_to("there")
    put(folder, {"foreign/model.safetensors": {"z": np.ones(3)}, "notes/thesis.tex": b"x", "plain": b"x"})
    if "old" in PLACES[kind][0]:
        assert run("merge", "recipe.yml", "old")[0] == 0
    cured(run, *PLACES[kind])
    assert (folder / "notes/thesis.tex").exists()


@cures("output/place.py:_complaints", "output/place.py:_complaints")
def test_a_file_or_a_folder() -> None:
    plan = [("w", DTYPES["F32"], (2,))]
    for single, wrong, right, advice in (
        (True, "out", "out.safetensors", "must end in .safetensors"),
        (False, "out.safetensors", "out", "must not end in .safetensors"),
    ):
        with (
            pytest.raises(OutputError, match=advice),
            StagedOutput(Path(wrong).absolute(), plan, single_file=single),
        ):
            pass
        with StagedOutput(Path(right).absolute(), plan, single_file=single, fsync=False):
            pass


@cures(
    "output/place.py:_complaints",
    "output/place.py:_complaints",
    "output/place.py:_taken",
    "output/place.py:_taken",
)
@pytest.mark.parametrize("what", ["device", "permission", "mount", "owner"])
def test_what_the_system_does_not_let(run: Run, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    Path("out").chmod(0o755)
    advice = "choose another place"
    if what == "device":
        monkeypatch.setattr("della.output.place.can_be_called", lambda name: name != "out")
    elif what == "permission":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")
        Path("closed").mkdir()
        cured(run, "closed/out", "a place that you may write to", "open/out")
        return
    elif what == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
        cured(run, "out --overwrite=any", "choose a folder in it", "out/in")
        return
    else:
        monkeypatch.setattr("della.output.place._is_ours_to_move", lambda out: out.name != "out")
        put(Path("out"), {"model.safetensors": {"z": np.ones(3)}})
    cured(run, "out --overwrite=any", advice, "other")


@cures("output/place.py:check_space")
def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(tuple[int, int, int]):
        pass

    free = {"full": 10}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (10**12, 0, free.get(Path(path).name, 10**12)))
    Path("full").mkdir()
    cured(run, "full/out", "another disk", "other")
    free["full"] = 10**12
    assert run("merge", "recipe.yml", "full/out")[0] == 0, "some space was freed"
    check("full/out")


@cures("output/disk.py:explained")
@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "may write to")]
)
def test_errors_of_the_disk(run: Run, monkeypatch: pytest.MonkeyPatch, code: int, advice: str) -> None:
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **more: Any) -> None:
        if "elsewhere" not in str(path) and "staging" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        real(path, *arguments, **more)

    Path("elsewhere").mkdir()
    monkeypatch.setattr(os, "mkdir", mkdir)
    cured(run, "out", advice, "elsewhere/out")
    monkeypatch.undo()


# ---- unfinished merges ------------------------------------------------------------------------------------


def started(run: Run, part: str = "1/2") -> None:
    """A part of a merge is done, and its staging stands there."""
    code, said = run("merge", "recipe.yml", "out", "--part", part, "--shard-size", "1kB")
    assert code == 0, said


@cures("output/staging.py:Staging._take", "output/staging.py:Staging._make_ready")
@pytest.mark.parametrize("what", ["file", "stranger"])
def test_the_staging_folder_is_not_ours(run: Run, what: str) -> None:
    if what == "file":
        STAGING.write_text("x")
        advice = "remove it"
    else:
        put(STAGING, {"notes.txt": b"mine"})
        advice = "move it away"
    code, said = run("merge", "recipe.yml", "out")
    assert (code, advice in said) == (4, True)
    if what == "file":
        STAGING.unlink()
    else:
        shutil.move(STAGING / "notes.txt", "notes.txt")
    assert run("merge", "recipe.yml", "out")[0] == 0
    check()


@cures("output/staging.py:Staging._make_ready", "running/run.py:_Run.all")
@pytest.mark.parametrize("cure", ["alike", "remove"])
def test_another_merge_was_begun(run: Run, cure: str) -> None:
    started(run)
    Path("other.yml").write_text(RECIPE + "seed: 5\nparameters: {lambda: 1}\n")
    code, said = run("merge", "other.yml", "out")
    assert (code, "do this one alike, or remove that folder" in " ".join(said.split())) == (4, True)
    if cure == "remove":
        shutil.rmtree(STAGING)
        assert run("merge", "other.yml", "out")[0] == 0
    else:
        code, said = run("merge", "recipe.yml", "out", "--finish", "--shard-size", "1kB")
        assert (code, "run the parts that are missing" in said, "leave out --finish" in said) == (
            4,
            True,
            True,
        )
        started(run, "2/2")
        assert run("merge", "recipe.yml", "out", "--finish", "--shard-size", "1kB")[0] == 0
    check()


def test_without_finish_what_is_missing_is_computed(run: Run) -> None:
    started(run)
    assert run("merge", "recipe.yml", "out", "--finish", "--shard-size", "1kB")[0] == 4
    assert run("merge", "recipe.yml", "out", "--shard-size", "1kB")[0] == 0
    check()


@cures("output/journal.py:_open", "output/staging.py:Staging._refuse_strangers")
@pytest.mark.parametrize("what", ["journal", "owner"])
def test_a_trap(run: Run, what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    STAGING.mkdir()
    if what == "journal":
        (STAGING / "journal-1-of-1").mkdir()
    else:
        folder.chmod(0o777)
        monkeypatch.setattr("della.output.disk.user", lambda: 12345)
    code, said = run("merge", "recipe.yml", "out")
    assert (code, "remove" in said) == (4, True)
    shutil.rmtree(STAGING)
    folder.chmod(0o755)
    assert run("merge", "recipe.yml", "out")[0] == 0
    check()


@cures("output/staging.py:Staging._busy")
def test_another_run_is_waited_for(run: Run) -> None:
    plan = [("w", DTYPES["F32"], (2,))]
    with StagedOutput(Path("out").absolute(), plan, fsync=False):
        code, said = run("merge", "recipe.yml", "out")
        assert (code, "wait for it, or stop it" in said) == (4, True)
    assert run("merge", "recipe.yml", "out")[0] == 0
    check()


@cures("options.py:Execution.__post_init__", "options.py:is_mergekit")
def test_options_that_contradict(run: Run) -> None:
    started(run)
    started(run, "2/2")
    words = ["merge", "recipe.yml", "out", "--finish", "--shard-size", "1kB"]
    code, said = run(*words, "--part", "1/2")
    assert (code, "leave out --part" in said) == (2, True)
    assert run(*words)[0] == 0
    check()
    code, said = run("merge", "recipe.yml", "other", "--compat", "mergekti")
    assert (code, "--compat mergekit" in said) == (2, True)
    assert run("merge", "recipe.yml", "other", "--compat", "mergekit")[0] == 0
    check("other")


# ---- finished merges --------------------------------------------------------------------------------------


@cures(
    *["output/manifest.py:read_manifest"] * 1,
    "running/verify.py:verify",
    "running/verify.py:_Model._stranger",
)
@cures(
    "output/manifest.py:read_manifest", "output/manifest.py:read_manifest", "output/manifest.py:read_manifest"
)
def test_verify_is_given_a_merge(run: Run) -> None:
    assert run("merge", "recipe.yml", "out")[0] == 0
    for wrong in ("base", "base/model.safetensors", "recipe.yml"):
        code, said = run("verify", wrong)
        assert (code, "della has merged" in said) == (4, True)
    assert run("verify", "out")[0] == 0
    put(Path("out"), {"more.safetensors": {"z": np.ones(2)}})
    code, said = run("verify", "out")
    assert (code, "move it away" in said) == (5, True)
    Path("out/more.safetensors").unlink()
    assert run("verify", "out")[0] == 0
    reseal(Path("out"), lambda manifest: manifest.update(format=99))
    assert "with the version that merged it" in run("verify", "out")[1]
    shutil.rmtree("out")
    started(run)
    code, said = run("verify", "out")
    assert (code, "resumes it" in said) == (4, True)
    assert run("merge", "recipe.yml", "out", "--shard-size", "1kB")[0] == 0
    assert run("verify", "out")[0] == 0


@cures("running/verify.py:_hint")
def test_where_the_recipe_was(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("merge", "recipe.yml", "out")[0] == 0
    (folder / "a b").mkdir()
    for name in ("base", "one"):
        shutil.move(name, f"a b/{name}")
    code, said = run("verify", "out", "--sources")
    assert (code, "--from FOLDER" in said) == (3, True)
    assert run("verify", "out", "--sources", "--from", "a b")[0] == 0
    assert della.verify("out", sources=True, base_dir="a b").is_well


@cures("output/manifest.py:read_manifest")
def test_a_manifest_that_is_none_of_ours(run: Run) -> None:
    assert run("merge", "recipe.yml", "out")[0] == 0
    reseal(Path("out"), lambda manifest: manifest.pop("inputs"))
    assert "merge again to have one" in " ".join(run("verify", "out")[1].split())
    assert run("merge", "recipe.yml", "out", "--overwrite")[0] == 0
    assert run("verify", "out")[0] == 0
    check()


@cures("output/writer.py:StagedOutput.add_file", "output/writer.py:StagedOutput.add_file")
def test_side_files_have_plain_names_and_a_folder(folder: Path) -> None:
    plan = [("w", DTYPES["F32"], (2,))]
    with StagedOutput(folder / "out", plan, fsync=False) as output:
        for name in ("../x", "model.safetensors"):
            with pytest.raises(OutputError, match="a plain name is needed"):
                output.add_file(name, b"x")
        output.add_file("notes.txt", b"x")
    with (
        StagedOutput(folder / "o.safetensors", plan, single_file=True, fsync=False) as output,
        pytest.raises(OutputError, match="write to a folder"),
    ):
        output.add_file("notes.txt", b"x")


@cures("output/writer.py:StagedOutput._create")
def test_a_link_in_place_of_a_shard(run: Run) -> None:
    started(run)
    shard = next((STAGING / "model").glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(Path("base/model.safetensors").absolute())
    before = Path("base/model.safetensors").read_bytes()
    code, said = run("merge", "recipe.yml", "out", "--shard-size", "1kB")
    assert (code, "not a plain file; remove it" in " ".join(said.split())) == (4, True), said
    shard.unlink()
    assert run("merge", "recipe.yml", "out", "--shard-size", "1kB")[0] == 0
    check()
    assert Path("base/model.safetensors").read_bytes() == before
