"""README.md tells the truth: its recipe reads, its Python runs, its commands, options and methods exist."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from della.cli.main import _with_values, app
from della.experiments.demo.run import SETTINGS, folder
from della.merging.catalogue import PAGES, written
from della.merging.registry import ALL_PARAMETERS, METHODS
from della.recipe.reader import read_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = re.findall(r"^\| (.*?) \|", README, re.MULTILINE)


def block(language: str) -> str:
    """The one fenced block in ``language``."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(text)


def test_the_recipe_is_read_without_a_note() -> None:
    recipe = read_recipe(block("yaml"))
    assert recipe.merge_method == "della"
    assert recipe.notes == ()
    shared, models = recipe.resolve("model.layers.0.mlp.up_proj.weight", 0.0)
    assert shared["lambda"] == 1.1
    assert [m["epsilon"] for m in models] == [0.1, 0.1]


def test_the_python_runs() -> None:
    names: dict[str, object] = {}
    exec(compile(block("python"), "README.md", "exec"), names)
    merged, base, pruned = (np.asarray(names[k]) for k in ("merged", "base", "pruned"))
    assert merged.shape == base.shape
    assert merged.dtype == np.float32
    assert 0.3 < np.count_nonzero(pruned) / pruned.size < 0.7


def test_every_command_exists() -> None:
    commands = set(re.findall(r"della (\w+) (?:recipe\.yml|out/|MODEL|--scale|ties)", README))
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert commands == {"merge", "plan", "verify", "methods", "calibrate", "eval", "paper"} == known
    for script in re.findall(r"scripts/(\w+)", README):
        assert (ROOT / "scripts" / script).stat().st_mode & 0o111, script
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("line", re.findall(r"^    della (.*?)(?: +#.*)?$", README, re.MULTILINE))
def test_every_command_is_understood(line: str) -> None:
    name, *words = _with_values(line.split())
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert commands[name].make_context(name, words).params


def test_the_commands_after_the_demo_name_what_it_makes() -> None:
    (merged,) = set(re.findall(r"della verify (demo-out/\w+)", README))
    assert Path(merged) in [folder(Path("demo-out"), name) for name in SETTINGS]
    assert f"della plan {merged}.yml" in README


@pytest.mark.parametrize("option", re.findall(r"(--[a-z-]+)", " ".join(TABLES)))
def test_every_option_exists(option: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    known = {
        name for key in ("merge", "verify") for parameter in commands[key].params for name in parameter.opts
    }
    assert option in known


def test_the_tables_name_every_method_and_parameter() -> None:
    named = set(re.findall(r"`(\w+)`", " ".join(TABLES)))
    assert set(METHODS) <= named
    prose = set(re.findall(r"`(\w+)`", README))
    assert set(ALL_PARAMETERS) - {"int8_mask"} <= prose
    for parameter in ALL_PARAMETERS.values():
        assert set(parameter.choices) <= prose, parameter.name


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_methods_are_up_to_date(page: str) -> None:
    """`python -m della.merging.catalogue` makes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- methods -->" in text
    assert written(text) == text
