"""Docstrings: every example in them runs, and every public name says what it takes and gives."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
from checkpoints import put

import della

ROOT = Path(__file__).resolve().parent.parent / "della"
OPTIONAL = {"datasets", "openai", "peft", "tokenizers", "torch", "transformers", "vl_convert"}

# Public names whose docstrings lack something.  This list only shrinks.
LACKING: list[str] = []


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


def _folder(place: Path) -> Path:
    """Where an example starts: two small models and recipe.yml."""
    weights = (("one", 1), ("two", 3))
    models = [{"model": f"./{name}", "parameters": {"weight": weight}} for name, weight in weights]
    return put(place, {
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


def _lacking(name: str) -> list[str]:
    """What the docstring of a public name should say, and does not."""
    value = getattr(della, name)
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        return [] if text else ["a docstring"]
    signature = inspect.signature(value)
    named = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    _, _, arguments = text.partition("\nArgs:\n")
    missing = [block for block in ("Args:", "Returns:", "Raises:") if f"\n{block}\n" not in text]
    missing += ["an example"] * (">>> " not in text)
    return missing + [parameter for parameter in named if f"\n    {parameter}: " not in f"\n{arguments}"]


def test_public_names_say_what_they_take_and_give() -> None:
    lacking = {name: _lacking(name) for name in della.__all__ if name != "__version__"}
    assert [name for name, lacks in lacking.items() if lacks] == LACKING, lacking
