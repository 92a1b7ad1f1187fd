"""The examples of the public functions run, in a folder with two small models and recipe.yml."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
from checkpoints import put

import della


@pytest.mark.parametrize("name", ["merge", "plan", "verify"])
def test_an_example_shows_what_happens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [
        {"model": "./one", "parameters": {"weight": 1}},
        {"model": "./two", "parameters": {"weight": 3}},
    ]
    put(tmp_path, {
        "one/model.safetensors": {"w": np.array([1, 2], np.float32)},
        "two/model.safetensors": {"w": np.array([3, 4], np.float32)},
        "recipe.yml": {"merge_method": "linear", "models": models},
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(della, name), name)
    assert test.examples
    said: list[str] = []
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)
