"""Everything that can be known to be wrong is told at once, before anything is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import tree
from llamas import EXPERTS, recipe, save

import della
from della.errors import DellaError, OutputError, RecipeError
from della.planning.describe import plan_json, plan_text


def models(folder: Path) -> dict[str, Any]:
    """Three experts with a fault each, and one that cannot be opened."""
    base = {f"model.layers.{n}.w": np.ones((4, 8), np.float32) for n in range(4)}
    tensors: dict[str, dict[str, Any]] = {name: dict(base) for name in ("base", *EXPERTS)}
    del tensors["math"]["model.layers.1.w"]
    tensors["math"]["extra"] = np.ones(3, np.float32)
    tensors["code"]["model.layers.2.w"] = np.ones((4, 8), np.int32)
    tensors["story"]["model.layers.3.w"] = np.ones((4, 9), np.float32)
    save(folder / "models", tensors)
    own = [{"density": [0.9, 0.1], "epsilon": 0.1}, {"density": [0.2, 0.05], "epsilon": 0.1}, {}]
    made = recipe(folder / "models", "della", own, {"density": 0.5, "epsilon": 0.2})
    made["models"].append({"model": str(folder / "absent")})
    return made


def test_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = models(tmp_path)
    real = os.statvfs(tmp_path)

    class Full:
        f_blocks, f_frsize, f_bfree, f_bavail = real.f_blocks, 1, 0, 100

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    out = tmp_path / "models/base/out"
    before = tree(tmp_path)
    with pytest.raises(RecipeError) as caught:
        della.merge(made, out, fsync=False)
    assert tree(tmp_path) == before
    problems = [str(problem) for problem in caught.value.problems]
    base = f"{tmp_path}/models/base"
    wanted = [
        f"{tmp_path}/absent: not found",
        f"{out}: touches the input {base}; choose another place",
        "code: density 0.05",
        f"{tmp_path}/models/math: against {base}: lacks model.layers.1.w",
        f"{tmp_path}/models/math: against {base}: has extra beyond the base's",
        f"{tmp_path}/models/code: against {base}: model.layers.2.w is stored as I32, expected F32",
        f"{tmp_path}/models/story: against {base}: model.layers.3.w has shape [4, 9], expected [4, 8]",
        f"{out.parent}: the result needs 67,109,376 bytes, 100 are free",
    ]
    assert len(problems) == len(wanted), problems
    for text in wanted:
        assert [text in problem for problem in problems].count(True) == 1, (text, problems)
    assert str(caught.value).startswith(f"{len(wanted)} problems:\n  - ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_target_that_may_not_be_written(tmp_path: Path) -> None:
    made = recipe(
        save(tmp_path / "m", {n: {"w": np.ones(3)} for n in ("base", *EXPERTS)}), "ties", [{}] * 3, {}
    )
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(OutputError) as caught:
        della.merge(made, tmp_path / "locked/a/out", fsync=False)
    assert str(caught.value) == (
        f"{tmp_path}/locked: permission denied; choose a place that you may write to"
    )


def test_a_target_below_a_file(tmp_path: Path) -> None:
    made = recipe(
        save(tmp_path / "m", {n: {"w": np.ones(3)} for n in ("base", *EXPERTS)}), "ties", [{}] * 3, {}
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        della.merge(made, tmp_path / "file/a/out", fsync=False)
    assert str(caught.value) == (
        f"{tmp_path}/file: not a folder, so nothing can be written in it; choose another place"
    )


def test_a_bad_target_does_not_hide_a_bad_model(tmp_path: Path) -> None:
    made = models(tmp_path)
    with pytest.raises(DellaError) as caught:
        della.merge(made, tmp_path / "models", fsync=False)
    texts = ("lacks model.layers.1.w", "exists already", "code: density 0.05")
    for text in texts:
        assert any(text in str(problem) for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/", "'/' cannot be the name of a model"),
        ("a\0b", "cannot be the name of a model, which has 1 to 240 bytes and no NUL"),
        ("x" * 241, "cannot be the name of a model, which has 1 to 240 bytes and no NUL"),
        ("y" * 300 + "/out", "File name too long"),
        ("loop/out", "loop: not a folder, so nothing can be written in it; choose another place"),
        ("file/out", "file: not a folder, so nothing can be written in it; choose another place"),
    ],
    ids=["root", "nul", "long", "long parent", "loop", "file"],
)
def test_places_that_cannot_be(tmp_path: Path, name: str, said: str) -> None:
    models = save(tmp_path / "m", {n: {"w": np.ones(3)} for n in ("base", *EXPERTS)})
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        della.merge(recipe(models, "ties", [{}] * 3, {}), tmp_path / name, fsync=False)
    assert said in str(caught.value)
    assert "problems" not in str(caught.value)


def test_a_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = save(tmp_path / "m", {n: {"w": np.ones(3)} for n in ("base", *EXPERTS)})
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(OutputError) as caught:
        della.merge(recipe(models, "ties", [{}] * 3, {}), tmp_path / "out", overwrite="any", fsync=False)
    assert str(caught.value) == (
        f"{tmp_path}/out: a mount point, which cannot be replaced in one step; choose a folder in it"
    )


def test_what_the_system_will_not_rename_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save(tmp_path / "m", {n: {"w": np.ones(3)} for n in ("base", *EXPERTS)})
    (tmp_path / "shared/out").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError) as caught:
        della.merge(
            recipe(models, "ties", [{}] * 3, {}), tmp_path / "shared/out", overwrite="any", fsync=False
        )
    assert str(caught.value) == (
        f"{tmp_path}/shared/out: belongs to another user, so it cannot be replaced; choose another place"
    )


@pytest.mark.parametrize("extra", ["ignore", "copy"])
def test_a_plan_says_the_space_that_a_merge_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    names = ("base", *EXPERTS)
    tensors: dict[str, Any] = {
        name: {"w": np.full((3, 5), n * n, np.float32)} for n, name in enumerate(names)
    }
    tensors["math"]["more"] = np.ones(7, np.float16)
    made = recipe(save(tmp_path / "m", tensors), "ties", [{}] * 3, {}) | {"extra": extra}
    needed = 3 * 5 * 4 + (7 * 2 if extra == "copy" else 0) + 2**26
    with della.plan(made) as plan:
        assert (plan.disk, plan_json(plan, 1)["disk"]) == (needed, needed)
        assert "  disk    67.1 MB free beside OUT" in plan_text(plan, 1)
    real = os.statvfs(tmp_path)

    class Full:
        f_blocks, f_frsize, f_bfree, f_bavail = real.f_blocks, 1, 0, needed - 1

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    with pytest.raises(OutputError, match=f"the result needs {needed:,} bytes, {needed - 1:,} are free"):
        della.merge(made, tmp_path / "out", fsync=False)
    monkeypatch.setattr(Full, "f_bavail", needed)
    della.merge(made, tmp_path / "out", fsync=False)
