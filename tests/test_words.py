"""Messages name options as their reader writes them: flags on the command line, arguments in Python.  Every
option that a message names is tried, on both."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from typer.main import get_command
from typer.testing import CliRunner

import della
from della import options
from della.cli.main import _with_values, app
from della.errors import DellaError, command_line
from della.evaluate.options import EvaluationOptions, opt

HOME = Path(della.__file__).parent
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = {flag for command in COMMANDS.values() for each in command.params for flag in each.opts}
PUBLIC = (della.merge, della.plan, della.verify)
ARGUMENTS = {name for function in PUBLIC for name in inspect.signature(function).parameters}
# Modules that read or make command lines, where flags are written as they are.
OF_COMMAND_LINES = (
    "cli/", "sandbox/", "experiments/", "options.py", "evaluate/options.py", "evaluate/vllm_server.py",
)  # fmt: skip
# What only the command prints.
PRINTED = {"planning/describe.py": ["--all"]}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """(function, call) of everything by which a message names an option."""
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                yield node.func.id, node


def named() -> Iterator[tuple[str, str]]:
    """(command line, Python) of every option that a message names."""
    for name, call in calls():
        values: list[Any] = [each.value for each in call.args if isinstance(each, ast.Constant)]
        if name == "either" and len(values) == 2 and values[0].startswith("--"):
            yield values[0], values[1]
        elif name in ("spelt", "opt") and values:
            owner = call.args[0].id if isinstance(call.args[0], ast.Name) else ""
            cls = getattr(options, owner) if owner else EvaluationOptions
            python = options.spelt(cls, *values)
            with command_line():
                yield options.spelt(cls, *values), python


def test_what_messages_name_exists_on_both_sides() -> None:
    found = list(dict.fromkeys(named()))
    assert ("--allow-pickle", "allow_pickle=True") in found
    assert ("--overwrite=any", 'overwrite="any"') in found
    assert ("--from FOLDER", "base_dir=FOLDER") in found
    assert ("--compat mergekit", "compat=True") in found
    known = ARGUMENTS | {each.name for each in dataclasses.fields(EvaluationOptions)}
    for flag, python in found:
        assert re.split("[= ]", flag)[0] in FLAGS, flag
        words = set(re.findall(r"\w+", python.partition("=")[0]))
        assert words & known, python


def test_no_other_message_names_a_flag() -> None:
    for path in HOME.rglob("*.py"):
        module = path.relative_to(HOME).as_posix()
        if module.startswith(OF_COMMAND_LINES):
            continue
        tree = ast.parse(path.read_text())
        inside = {
            id(leaf)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "either"
            for leaf in ast.walk(node)
        }
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if hasattr(node, "body")
            and isinstance(node.body, list)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside | docs
        ]
        flags = [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)]
        assert flags == PRINTED.get(module, []), module


def test_an_evaluation_names_its_own() -> None:
    assert (opt("score_only"), opt("backend", "hf"), opt("fresh", True)) == (
        "score_only", 'backend="hf"', "fresh=True",
    )  # fmt: skip
    with command_line():
        assert (opt("score_only"), opt("backend", "hf")) == ("--score-only", "--backend hf")


# ---- cures ------------------------------------------------------------------------------------------------

W = np.arange(12, dtype=np.float32).reshape(3, 4)
WRITTEN = {
    "overwrite": "--overwrite", "allow_idle": "--allow-idle", "allow_pickle": "--allow-pickle",
    "finish": "--finish", "part": "--part", "shard_bytes": "--shard-size", "base_dir": "--from",
    "compat": "--compat", "sources": "--sources", "overrides": "--set",
}  # fmt: skip
Do = Callable[..., str]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = {"w": W, "v": W + 5}
    put(tmp_path, {"base/model.safetensors": base, "base/config.json": {"model_type": "x"}})
    put(tmp_path, {"one/model.safetensors": {"w": W + 1, "v": W}, "recipe.yml": recipe("one").encode()})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(*models: str, more: str = "") -> str:
    listed = "".join(f"- model: {model}\n" for model in models)
    return f"merge_method: task_arithmetic\nbase_model: base\n{more}models:\n{listed}"


def by_python(what: str, *words: str, **given: Any) -> str:
    given = {"fsync": False, "tell": print, **given} if what == "merge" else given
    if "part" in given:
        given["part"] = tuple(map(int, given["part"].split("/")))
    try:
        found = getattr(della, what)(*words, **given)
        return "" if what != "verify" or found.is_well else "\n".join(map(str, found.problems))
    except DellaError as error:
        return str(error)


def by_command(what: str, *words: str, **given: Any) -> str:
    line = [what, *words]
    for name, value in given.items():
        flag = WRITTEN[name]
        line += {True: [flag], "any": [f"{flag}=any"]}.get(value, [flag, str(value)])
    if given.get("compat"):
        line[line.index("--compat") + 1 : line.index("--compat") + 1] = ["mergekit"]
    done = CliRunner().invoke(app, _with_values(line))
    return "" if done.exit_code == 0 else done.stderr


@pytest.fixture(params=["python", "command"])
def do(request: pytest.FixtureRequest, site: Path) -> Do:
    return by_python if request.param == "python" else by_command


def says(do: Do, said: str, flag: str, python: str) -> bool:
    """Whether a message has one of the two, and not the other."""
    mine, other = (python, flag) if do is by_python else (flag, python)
    return mine in said and other not in said


def test_overwrite(do: Do, site: Path) -> None:
    assert do("merge", "recipe.yml", "out") == ""
    assert says(do, do("merge", "recipe.yml", "out"), "replaced: --overwrite", "replaced: overwrite=True")
    assert do("merge", "recipe.yml", "out", overwrite=True) == ""
    put(site, {"theirs/model.safetensors": {"z": W}, "theirs/config.json": {}})
    said = do("merge", "recipe.yml", "theirs", overwrite=True)
    assert says(do, said, "--overwrite=any", 'overwrite="any"')
    assert do("merge", "recipe.yml", "theirs", overwrite="any") == ""


def test_allow_idle(do: Do, site: Path) -> None:
    Path("recipe.yml").write_text(recipe("one") + "- {model: base2, parameters: {weight: 0}}\n")
    put(site, {"base2/model.safetensors": {"w": W - 1, "v": W}})
    assert says(do, do("plan", "recipe.yml"), "--allow-idle", "allow_idle=True")
    assert do("plan", "recipe.yml", allow_idle=True) == ""
    assert says(do, do("merge", "recipe.yml", "out"), "--allow-idle", "allow_idle=True")
    assert do("merge", "recipe.yml", "out", allow_idle=True) == ""
    Path("recipe.yml").write_text(recipe("one", "same"))
    put(site, {"same/model.safetensors": {"w": W, "v": W + 5}})
    assert says(do, do("merge", "recipe.yml", "late"), "--allow-idle", "allow_idle=True"), "told at the end"
    assert do("merge", "recipe.yml", "late", allow_idle=True) == ""


def test_allow_pickle(do: Do, site: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    Path("old").mkdir()
    torch.save({"w": torch.tensor(W + 1), "v": torch.tensor(W)}, "old/pytorch_model.bin")
    Path("recipe.yml").write_text(recipe("old"))
    for what in (("plan", "recipe.yml"), ("merge", "recipe.yml", "out")):
        assert says(do, do(*what), "--allow-pickle", "allow_pickle=True")
        assert do(*what, allow_pickle=True) == ""


def test_finish_and_part(do: Do, capsys: pytest.CaptureFixture[str]) -> None:
    said = do("merge", "recipe.yml", "out", finish=True, part="1/2")
    assert says(do, said, "leave out --part", "leave out part")
    said = do("merge", "recipe.yml", "out", finish=True)
    assert says(do, said, "leave out --finish", "leave out finish")
    assert do("merge", "recipe.yml", "out") == ""
    assert says(do, do("merge", "recipe.yml", "x", part="3/2"), "such as 2/7", "such as (2, 7)")


def test_shards(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    for number in (1, 2):
        della.merge("recipe.yml", "out", part=(number, 2), tell=told.append, fsync=False)
        done = CliRunner().invoke(app, ["merge", "recipe.yml", "too", "--part", f"{number}/2"])
        told += [line for line in done.stderr.splitlines() if "smaller" in line]
    assert len(told) == 2
    assert "a smaller shard_bytes makes more" in told[0]
    assert "a smaller --shard-size makes more" in told[1]
    told.clear()
    for number in (1, 2):
        della.merge("recipe.yml", "a", part=(number, 2), shard_bytes=1, tell=told.append, fsync=False)
    assert not told


def test_where_paths_of_a_recipe_start(
    do: Do, site: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert do("merge", "recipe.yml", "out") == ""
    away = tmp_path_factory.mktemp("away")  # della looks in the folders above OUT by itself
    shutil.move("out", away / "out")
    monkeypatch.chdir(away)
    said = do("verify", "out", sources=1.0)
    assert says(do, said, "--from FOLDER", "base_dir=FOLDER")
    assert do("verify", "out", sources=1.0, base_dir=str(site)) == ""


def test_compat(do: Do) -> None:
    text = recipe("one", more="parameters: {ladder: paper, density: 0.5}\n")
    Path("recipe.yml").write_text(text.replace("task_arithmetic", "della"))
    said = do("plan", "recipe.yml", compat=True)
    assert says(do, said, "or --compat mergekit", "or compat=True")
    assert do("plan", "recipe.yml") == ""


def test_changes_of_a_recipe(do: Do) -> None:
    said = do("plan", "recipe.yml", overrides="wieght=2")
    assert says(do, said, "--set wieght=2: ", "overrides wieght=2: ")
    assert "'weight'" in said
    assert do("plan", "recipe.yml", overrides="weight=2") == ""
