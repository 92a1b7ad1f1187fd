"""Docstrings: every example in them runs, and every public name says what it takes and gives."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put

import della
from della.options import declared

ROOT = Path(__file__).resolve().parent.parent / "della"
OPTIONAL = {"datasets", "openai", "peft", "tokenizers", "torch", "transformers", "vl_convert"}

# What the authors of a method, a view or a tool meet beside `della.__all__`.
MET = {
    "della.checkpoint.source": ("Source", "open_source"),
    "della.checkpoint.view": ("Hashes", "Stored", "TensorView"),
    "della.errors": ("Collector", "DellaError", "Location", "Problem"),
    "della.merging.method": ("Method", "Parameter"),
    "della.merging.tile": ("Expert", "Subject", "Tile"),
    "della.options": ("Changes", "Checks", "Execution", "Permissions", "Share", "Spec", "Target"),
    "della.planning.job": ("Job", "Operand", "Plan"),
    "della.running.run": ("Progress", "Result"),
    "della.running.verify": ("Verdict",),
}


def _with_examples() -> list[str]:
    """The modules whose docstrings hold an example, found without importing any."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if any(isinstance(node, documented) and ">>>" in (ast.get_docstring(node) or "") for node in nodes):
            name = ".".join(("della", *path.relative_to(ROOT).with_suffix("").parts))
            found.append(name.removesuffix(".__init__"))
    return found


def _folder(folder: Path) -> Path:
    """Where an example starts: two small models and recipe.yml."""
    weights = (("one", 1), ("two", 3))
    models = [{"model": f"./{name}", "parameters": {"weight": weight}} for name, weight in weights]
    return put(folder, {
        "one/model.safetensors": {"w": np.array([1, 2], np.float32)},
        "two/model.safetensors": {"w": np.array([3, 4], np.float32)},
        "recipe.yml": {"merge_method": "linear", "models": models},
    })  # fmt: skip


@pytest.mark.parametrize("name", _with_examples())
def test_every_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    tests = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert tests
    for number, test in enumerate(tests):
        monkeypatch.chdir(_folder(tmp_path / str(number)))
        said: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert not said, "".join(said)


def _lacking(value: Any) -> list[str]:
    """What a docstring should say, and does not; the fields of a class of options say it themselves."""
    text = inspect.getdoc(value) or ""
    blocks = ["Args:"] if inspect.isclass(value) else ["Args:", "Returns:", "Raises:"]
    named = [
        parameter.name
        for parameter in inspect.signature(value).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if inspect.isclass(value) and is_dataclass(value) and any(map(declared(value).get, named)):
        named = [name for name in named if name not in declared(value)]
    if not named and inspect.isclass(value):
        blocks = []
    _, _, arguments = text.partition("\nArgs:\n")
    missing = [block for block in blocks if f"\n{block}\n" not in text]
    missing += ["an example"] * (">>> " not in text)
    return missing + [parameter for parameter in named if f"\n    {parameter}: " not in f"\n{arguments}"]


def test_public_names_say_what_they_take_and_give() -> None:
    met = [(home, name) for home, names in MET.items() for name in names]
    met += [("della", name) for name in della.__all__ if name != "__version__"]
    values = {name: getattr(importlib.import_module(home), name) for home, name in met}
    errors = [name for name, value in values.items() if _is_kind_of_error(value)]
    assert all(inspect.getdoc(values[name]) for name in errors)
    lacking = {name: _lacking(value) for name, value in values.items() if name not in errors}
    assert {name: lacks for name, lacks in lacking.items() if lacks} == {}


def _is_kind_of_error(value: Any) -> bool:
    """Whether it is an error that only says for what it stands: it is made as a DellaError is."""
    return inspect.isclass(value) and issubclass(value, della.DellaError) and value is not della.DellaError
