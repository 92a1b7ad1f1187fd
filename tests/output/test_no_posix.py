"""What Windows has not is hidden in a process of its own: the same bytes, the same promises."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from llamas import recipe, save, trio

import della
from della.checkpoint.names import is_windows_name
from della.errors import OutputError
from della.output.place import check_place
from della.output.staging import Staging

ROOT = Path(__file__).parents[2]
OWN = [{"density": 0.5}, {"density": 0.6}, {"density": 0.3}]
SIZE = ("--shard-size", "9000B")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, two recipes, and what an ordinary merge of each gives: quiet, quiet-2."""
    home = tmp_path_factory.mktemp("no posix")
    save(home, trio())
    for name, seed in (("", 0), ("-2", 2)):
        made = recipe(Path(), "della", OWN, {}, seed=seed)
        (home / f"recipe{name}.yml").write_text(json.dumps(made))
        della.merge(home / f"recipe{name}.yml", home / f"quiet{name}", shard_bytes=9000, threads=1)
    return home


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def start(*arguments: object, **stops: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "warn_default_encoding", str(ROOT / "tests/no_posix.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | stops
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, text=True, stdin=-1, stdout=-1, stderr=-1
    )


def run(*arguments: object, **stops: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    process = start(*arguments, **stops)
    said = "".join(process.communicate(timeout=120))
    return process.returncode, said


def merge(home: Path, out: Path, *more: object, which: str = "", **stops: str) -> tuple[int, str]:
    return run("merge", home / f"recipe{which}.yml", out, *SIZE, "--threads", 1, *more, **stops)


def same_model(home: Path, out: Path, which: str = "") -> bool:
    found, wanted = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (out, home / f"quiet{which}"))
    return found == wanted


def same(home: Path, out: Path, which: str = "") -> bool:
    """Whether ``out`` is to the byte what an ordinary merge gives, and nothing lies beside it."""
    assert os.listdir(out.parent) == [out.name]
    return same_model(home, out, which)


def test_merge_plan_verify_overwrite(home: Path, out: Path) -> None:
    code, said = run("plan", home / "recipe.yml", "--json")
    assert (code, json.loads(said)["merge_method"] if code == 0 else said) == (0, "della")
    code, said = merge(home, out)
    assert code == 0, said
    assert same(home, out)
    code, said = run("verify", out, "--sources=100%", "--inputs", "--from", home)
    assert code == 0, said
    assert merge(home, out, which="-2")[0] == 4, "OUT exists"
    code, said = merge(home, out, "--overwrite", which="-2")
    assert code == 0, said
    assert same(home, out, "-2")


def test_killed_and_resumed(home: Path, out: Path) -> None:
    assert merge(home, out, DIE_AT="20")[0] == 9
    assert not out.exists()
    code, said = merge(home, out)
    assert code == 0, said
    assert "20 of " in said
    assert same(home, out)


def test_killed_while_the_old_one_stands_aside(home: Path, out: Path) -> None:
    assert merge(home, out)[0] == 0
    assert merge(home, out, "--overwrite", which="-2", DIE_AT="rename:2")[0] == 9
    assert not out.exists()
    code, said = run("verify", out)
    assert code != 0
    assert ".out.della-old" in said
    code, said = merge(home, out, "--overwrite", which="-2")
    assert code == 0, said
    assert same(home, out, "-2")


def test_an_old_model_that_is_in_use_stays(home: Path, out: Path) -> None:
    assert merge(home, out)[0] == 0
    with open(out / "della.json", "rb"):
        code, said = merge(home, out, "--overwrite", which="-2")
    assert code == 4
    assert str(out) in said
    assert same_model(home, out)
    code, said = merge(home, out, "--overwrite", which="-2")
    assert code == 0, said
    assert same(home, out, "-2")


def test_two_writers(home: Path, out: Path) -> None:
    first = start("merge", home / "recipe.yml", out, *SIZE, "--threads", 1, WAIT_AT="3")
    assert first.stdout is not None
    while "waiting" not in (line := first.stdout.readline()):
        assert line or first.poll() is None
    code, said = merge(home, out)
    assert code == 4
    assert f"pid {first.pid} on {platform.node()}" in said
    assert first.communicate("\n", timeout=120)
    assert first.returncode == 0
    assert same(home, out)


def test_parts_side_by_side(home: Path, out: Path) -> None:
    part = ("merge", home / "recipe.yml", out, *SIZE, "--threads", 1)
    first = start(*part, "--part", "1/2", WAIT_AT="3")
    assert first.stdout is not None
    while "waiting" not in (line := first.stdout.readline()):
        assert line or first.poll() is None
    code, said = run(*part, "--part", "1/2")
    assert code == 4
    assert f"pid {first.pid}" in said
    assert run(*part, "--finish")[0] == 4
    code, said = run(*part, "--part", "2/2")
    assert code == 0, said
    assert first.communicate("\n", timeout=120)
    assert first.returncode == 0
    code, said = run(*part, "--finish")
    assert code == 0, said
    assert same(home, out)


def test_one_file(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out/one.safetensors"
    for more in ((), ("--overwrite",)):
        code, said = run("merge", home / "recipe.yml", out, *more)
        assert code == 0, said
        assert os.listdir(out.parent) == [out.name]
    della.merge(home / "recipe.yml", tmp_path / "one.safetensors", fsync=False)
    assert out.read_bytes() == (tmp_path / "one.safetensors").read_bytes()


NAMES = [
    *("model.safetensors", "out", "a b", "console", "com10", "x.tiktoken", "nul", "NUL.txt", "con .x"),
    *("Aux", "com1.safetensors", "LPT9", "out.", "out ", "a:b", "a*", "a?b", "a\\b", "a|b", 'a"b'),
    *("a<b", "a\x1fb"),
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_windows_takes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Python's own knowledge of Windows' names, for a result, a side file and what a manifest names."""
    known = not PureWindowsPath(name).is_reserved() and PureWindowsPath("x", name).name == name
    known = known and not set(name) & set(':*?"<>|\x1f') and name[-1] not in ". "
    assert is_windows_name(name) == known
    monkeypatch.setattr(sys, "platform", "win32")
    if known:
        check_place(tmp_path / name, False, name.endswith(".safetensors"))
    else:
        with pytest.raises(OutputError, match="Windows"):
            check_place(tmp_path / name, False, name.endswith(".safetensors"))


@pytest.mark.parametrize(
    "text", ["C:\\models\\out", "C:/models/out", "\\\\host\\share\\out", ".\\a\\out", "./a\\out"]
)
def test_what_stands_beside_a_windows_path(text: str) -> None:
    out: Any = PureWindowsPath(text)
    staging = Staging(out, "")
    for beside in (staging.folder, staging.aside):
        assert beside.parent == out.parent, "on the same drive, or no rename is one step"
        assert is_windows_name(beside.name)


def test_everything_but_the_inside_of_the_sandbox_is_imported() -> None:
    inside = ("sandbox.guard", "sandbox.harness", "experiments.demo.__main__")
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "della").rglob("*.py"))
    ]
    names = [name for name in names if not name.endswith(inside)]
    program = (
        f"import no_posix; no_posix.hide(); import {', '.join(names)}\n"
        "from della.errors import EvaluationError\n"
        "from della.sandbox.walls import open_sandbox\n"
        "try: open_sandbox()\n"
        "except EvaluationError as error: print(error)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no sandbox for generated code works here" in done.stdout
