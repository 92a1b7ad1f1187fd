"""Every attack of attacks/ on the real thing: what is said, what is on the disk afterwards, what ran."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import Command

import della
from attacks import INPUT, OUTPUT, PAYLOAD, RECIPE, ROWS, Attack, all_attacks
from attacks.__main__ import write
from attacks.files import good, same_as_undisturbed
from della.errors import CheckpointError, DellaError, OutputError, RecipeError

ROOT = Path(__file__).parent.parent
KINDS: dict[int, type[DellaError]] = {RECIPE: RecipeError, INPUT: CheckpointError, OUTPUT: OutputError}
ATTACKS = all_attacks()
TITLES = [attack.title for attack in ATTACKS]
# What to do about a model or a place; a recipe's errors say where and what is expected, misfits both shapes.
FIX = re.compile(
    "again|convert|expected a|download|[;,:] (so )?(give|write|choose|name|move|merge|untie|put|save|smaller)"
)


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder; contents, but of links, pipes and the largest files only what they are."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        is_small = stat.S_ISREG(status.st_mode) and status.st_size < 20_000_000
        content = path.read_bytes() if is_small else status.st_size
        found[str(path.relative_to(folder))] = status.st_mode, content
    return found


def payloads(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name == PAYLOAD]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an attack is made; also the working directory, in which relative payloads would make files."""
    site = tmp_path / "attack"
    site.mkdir()
    monkeypatch.chdir(site)
    return site


def attacked(attack: Attack, folder: Path) -> Path:
    folder.rmdir()
    write(attack, folder)
    os.chdir(folder)
    return folder


def test_what_is_attacked_works(folder: Path) -> None:
    good(folder)
    della.merge(folder / "recipe.yml", folder / "out", fsync=False)
    same_as_undisturbed(folder, folder / "out")


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.exit_code], ids=lambda attack: attack.title)
def test_refused(attack: Attack, folder: Path) -> None:
    attacked(attack, folder)
    before = snapshot(folder)
    with pytest.raises(KINDS[attack.exit_code]) as caught:
        della.merge(folder / "recipe.yml", folder / attack.out, overwrite=attack.overwrite, fsync=False)
    assert caught.value.exit_code == attack.exit_code
    message = str(caught.value).replace(str(folder), "FOLDER")
    for pattern in attack.says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    if attack.exit_code != RECIPE and attack.row not in (6, 7, 10):
        assert FIX.search(message), message
    assert len(message) < 5000
    assert snapshot(folder) == before
    assert payloads(folder.parent) == []


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if a.exit_code in (RECIPE, INPUT) and a.row != 6], ids=lambda a: a.title
)
def test_refused_before_the_work(attack: Attack, folder: Path) -> None:
    """By the headers alone; only numbers have to be read."""
    attacked(attack, folder)
    with pytest.raises(KINDS[attack.exit_code]):
        della.plan(folder / "recipe.yml").opened.close()


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not a.exit_code], ids=lambda attack: attack.title)
def test_survived(attack: Attack, folder: Path) -> None:
    attacked(attack, folder)
    before, out = snapshot(folder), folder / attack.out
    della.merge(folder / "recipe.yml", out, fsync=False)
    assert attack.check is not None
    attack.check(folder, out)
    assert payloads(folder.parent) == []
    shutil.rmtree(out)
    assert snapshot(folder) == before


COMMANDS = (
    "01-last-byte-missing", "02-overlap", "14-the-base-itself", "16-bin-zipped", "17-a-billion-laughs",
    "18-densty", "20-markup-in-both",
)  # fmt: skip


def answers_alike(attack: Attack, run: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert run.returncode == attack.exit_code, run.stderr
    message = run.stderr.replace(str(folder), "FOLDER")
    for pattern in attack.says:
        pattern = pattern.replace("FOLDER/recipe.yml", "recipe.yml")
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    assert "Traceback" not in message
    assert payloads(folder.parent) == []


@pytest.mark.parametrize("title", COMMANDS)
def test_the_command_answers_alike(command: Command, title: str, folder: Path) -> None:
    attack = ATTACKS[TITLES.index(title)]
    attacked(attack, folder)
    overwrite = ["--overwrite"] * attack.overwrite
    answers_alike(attack, command(folder, "merge", "recipe.yml", attack.out, *overwrite), folder)


def test_a_process_imports_nothing_from_where_it_starts(folder: Path) -> None:
    attack = ATTACKS[TITLES.index("22-modules-of-well-known-names")]
    attacked(attack, folder)
    program = "import sys; sys.path.remove(''); from della.cli.main import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", program, "merge", "recipe.yml", attack.out],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    answers_alike(attack, run, folder)


def test_every_row_is_attacked() -> None:
    assert sorted({attack.row for attack in ATTACKS}) == sorted(ROWS)
    assert [title for title, count in Counter(TITLES).items() if count > 1] == []


def test_all_can_be_written_for_other_tools(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "attacks", str(tmp_path / "all")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{len(ATTACKS)} attacks in {tmp_path / 'all'}")
    table = json.loads((tmp_path / "all/attacks.json").read_text())
    assert list(table) == TITLES
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted([*TITLES, "attacks.json"])
    for attack in ATTACKS:
        assert os.path.lexists(tmp_path / "all" / attack.title / "recipe.yml")
    assert payloads(tmp_path) == []
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "is not empty; name another folder" in again.stderr
