"""OUT: at once or not at all, by one run at a time, and never over something that is not ours."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PLAN, numbers, put, save_model, tree
from safetensors.numpy import save_file

from della.dtypes import DTYPES
from della.errors import OutputError
from della.output import disk
from della.output.place import check_place
from della.output.staging import Staging
from della.output.writer import StagedOutput


def refusal(out: Path, plan: Sequence[Any] = PLAN, **options: Any) -> str:
    before = tree(out.parent)
    with pytest.raises(OutputError) as caught, StagedOutput(out, plan, **options):
        pass
    assert caught.value.exit_code == 4
    assert tree(out.parent) == before
    return str(caught.value)


def test_one_single_file(tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    save_model(out, 1.0, single_file=True)
    assert os.listdir(tmp_path) == [out.name]
    assert refusal(out, single_file=True) == (
        f"{out}: exists already; choose another place, or allow it to be replaced: overwrite=True"
    )
    save_model(out, 2.0, single_file=True, overwrite="any")
    assert os.listdir(tmp_path) == [out.name]
    assert numbers(out) == [2.0, 2.0]
    assert refusal(tmp_path / "m", single_file=True) == (
        f"{tmp_path}/m: one file was asked for; its name must end in .safetensors"
    )
    assert refusal(tmp_path / "n.safetensors") == (
        f"{tmp_path}/n.safetensors: a folder was asked for; its name must not end in .safetensors"
    )
    (tmp_path / "d.safetensors").mkdir()
    assert refusal(tmp_path / "d.safetensors", single_file=True, overwrite="any") == (
        f"{tmp_path}/d.safetensors: a folder, which is not replaced; choose another place"
    )
    with StagedOutput(tmp_path / "x.safetensors", PLAN, single_file=True) as output:
        with pytest.raises(OutputError) as caught:
            output.add_file("config.json", b"{}")
        assert str(caught.value) == (
            f"{output.out}: one file was asked for, so config.json has no place; write to a folder"
        )


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_overwrite_swaps(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(disk, "_rename_by", lambda *_: False)
    out = save_model(tmp_path / "out", 1.0)
    (out / "stale-00001-of-00002.safetensors").write_bytes(b"")
    (out / "della.json").write_text("{}")
    assert (
        refusal(out)
        == f"{out}: exists already; choose another place, or allow it to be replaced: overwrite=True"
    )
    save_model(out, 2.0, overwrite="any")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["model.safetensors"]
    assert numbers(out) == [2.0, 2.0]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_at_out_during_the_run_is_kept(
    tmp_path: Path, exchange: bool, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(disk, "_rename_by", lambda *_: False)
    real = disk.move_in
    for checked in (True, False):
        out = tmp_path / f"late{checked}"
        with StagedOutput(out, [("w", DTYPES["F64"], (2,))], overwrite=overwrite) as output:
            output.write("w", 0, bytes(16))
            if checked:
                put(out, {"mine.doc": b""})
            else:  # in the instant between the last look and the rename
                monkeypatch.setattr(
                    disk, "move_in", lambda s, o, r, a: (put(o, {"mine.doc": b""}), real(s, o, r, a))
                )
            with pytest.raises(OutputError, match=r"exists already|not replaced"):
                output.commit()
        assert tree(out) == {f"{out}/mine.doc": b""}
        assert not output.staging.exists()


def test_a_swap_cut_short_is_undone_or_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save_model(tmp_path / "out", 1.0)
    aside = tmp_path / ".out.della-old"
    out.rename(aside)
    with pytest.raises(OutputError, match="exists already"), StagedOutput(out, PLAN):
        pass
    assert numbers(out) == [1.0, 1.0], "the old model is back"
    assert os.listdir(tmp_path) == ["out"]
    monkeypatch.setattr(disk, "_rename_by", lambda *_: False)
    with monkeypatch.context() as patch:  # killed behind the second rename
        patch.setattr(StagedOutput, "_close", lambda self: self._staging.release())
        patch.setattr(disk, "remove", lambda path: None)
        patch.setattr(Staging, "remove", lambda self: None)
        save_model(out, 2.0, overwrite="any")
    assert numbers(aside) == [1.0, 1.0]
    save_model(out, 3.0, overwrite="any")
    assert (numbers(out), os.listdir(tmp_path)) == ([3.0, 3.0], ["out"])


def test_an_old_model_put_aside_is_never_removed_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames; then somebody makes another OUT."""
    out, aside = save_model(tmp_path / "out", 1.0), tmp_path / ".out.della-old"
    monkeypatch.setattr(disk, "_rename_by", lambda *_: False)
    real = os.rename

    def once(source: Path, target: Path) -> None:
        if target == out:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OutputError):
        save_model(out, 2.0, overwrite="any")
    monkeypatch.setattr(os, "rename", real)
    assert (out.exists(), numbers(aside)) == (False, [1.0, 1.0])
    out.mkdir()
    with pytest.raises(OutputError) as caught:
        save_model(out, 3.0, overwrite="any")
    assert str(caught.value) == (
        f"{aside}: the old model, from a replacement that was cut short, while something else stands at "
        f"{out}; move one of them away"
    )
    out.rmdir()
    save_model(tmp_path / "out", 3.0, overwrite="any")
    assert (numbers(out), os.listdir(tmp_path)) == ([3.0, 3.0], ["out"])


def test_a_failed_second_rename_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save_model(tmp_path / "out", 1.0)
    monkeypatch.setattr(disk, "_rename_by", lambda *_: False)
    real = os.rename

    def once(source: Path, target: Path) -> None:
        if source.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OutputError, match=r"out: the disk reports an error"):
        save_model(out, 2.0, overwrite="any")
    assert (numbers(out), os.listdir(tmp_path)) == ([1.0, 1.0], ["out"])


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (["notes.doc"], "notes.doc"),
        (["tokenizer.json"], "tokenizer.json"),
        (["config.json", "thesis.tex", "src/"], "src/, thesis.tex"),
        (["model.safetensors", ".git/"], ".git/"),
    ],
)
def test_only_models_are_replaced(tmp_path: Path, names: list[str], held: str) -> None:
    out = tmp_path / "out"
    for name in names:
        (out / name).mkdir(parents=True) if name.endswith("/") else disk_write(out / name)
    assert refusal(out, overwrite="any") == (
        f"{out}: not replaced: it is not a model, or more (it holds {held}); "
        "choose another place, or remove it yourself"
    )


def disk_write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_an_empty_folder_and_a_foreign_model_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty")
    assert os.listdir(tmp_path / "empty") == ["model.safetensors"]
    for name in ("config.json", "model-00001-of-00002.safetensors", "README.md", "tokenizer.model"):
        disk_write(tmp_path / "foreign" / name)
    assert 'overwrite="any"' in refusal(tmp_path / "foreign", overwrite=True)
    save_model(tmp_path / "foreign", overwrite="any")
    assert os.listdir(tmp_path / "foreign") == ["model.safetensors"]


def test_out_may_not_touch_an_input(tmp_path: Path) -> None:
    model = tmp_path / "models/base"
    model.mkdir(parents=True)
    save_file({"w": np.zeros(1)}, model / "model.safetensors")
    (tmp_path / "alias").symlink_to(tmp_path / "models")
    for out in (
        model,
        model / "out",
        tmp_path / "alias/base",
        tmp_path / "alias/base/a/b",
        tmp_path / "models",
    ):
        assert refusal(out, overwrite="any", inputs=[model]) == (
            f"{out}: touches the input {model}; choose another place for the result"
        )
    file = model / "model.safetensors"
    assert "touches the input" in refusal(file, single_file=True, overwrite="any", inputs=[file])
    check_place(model / "beside.safetensors", False, True, [file])
    check_place(tmp_path / "models/other", False, False, [model])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert refusal(tmp_path / "link") == f"{tmp_path}/link: a link; name the place that it leads to"


def test_space_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    needed = sum(math.prod(shape) * dtype.bytes for _, dtype, shape in PLAN) + 2**26

    class Full:
        f_blocks, f_frsize, f_bfree = real.f_blocks, 1, 0
        f_bavail = needed - 1

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    assert refusal(tmp_path / "out") == (
        f"{tmp_path}: the result needs {needed:,} bytes, {needed - 1:,} are free; "
        "free some space, or write to another disk"
    )
    monkeypatch.setattr(Full, "f_bavail", needed)
    save_model(tmp_path / "out")


def test_a_second_run_stops_at_once(tmp_path: Path) -> None:
    with StagedOutput(tmp_path / "out", [("w", DTYPES["F64"], (2,))]) as output:
        assert refusal(tmp_path / "out") == (
            f"{tmp_path}/out: another run is writing there (pid {os.getpid()} on {os.uname().nodename}); "
            "wait for it, or stop it"
        )
        output.write("w", 0, bytes(16))
        output.commit()
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from della.output.writer import StagedOutput
from della.dtypes import DTYPES
plan = [("w", DTYPES["F64"], (2,)), ("v", DTYPES["F64"], (2,))]
with StagedOutput(Path(sys.argv[1]), plan, overwrite="any") as output:
    output.write("w", 0, bytes(16))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("existing", [True, False])
def test_a_killed_run_leaves_out_as_it_was_and_is_taken_over(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    before = tree(save_model(out, 1.0)) if existing else {}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)],
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.della-staging/model/model.safetensors").exists()
    assert tree(out) == before
    save_model(out, 2.0, overwrite="any")
    assert os.listdir(tmp_path) == ["out"]
    assert numbers(out) == [2.0, 2.0]


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (tmp_path / ".out.della-staging").symlink_to(tmp_path / "precious")
    assert refusal(tmp_path / "out") == (
        f"{tmp_path}/.out.della-staging: not a staging folder of della; remove it"
    )
    assert (tmp_path / "precious/file").read_text() == "x"


def test_names_that_cannot_be(tmp_path: Path) -> None:
    twice = [("w", DTYPES["F64"], (2,)), ("v", DTYPES["F64"], ()), ("w", DTYPES["F64"], (2,))]
    assert refusal(tmp_path / "out", twice, shard_bytes=1) == "tensor 'w' would be written twice"
    with pytest.raises(OutputError) as caught:
        StagedOutput(Path("/"), PLAN)
    assert str(caught.value) == ("'/' cannot be the name of a model, which has 1 to 240 bytes and no NUL")
