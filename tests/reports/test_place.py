"""Where a merge goes, and what of it is verified: nothing foreign is replaced, no file is promised that is
not written, and a model card may be edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import della
from della.cli.main import _with_values, app
from della.errors import OutputError

BASE: dict[str, Any] = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    put(tmp_path, {"base/model.safetensors": BASE, "base/config.json": {"model_type": "x"}})
    put(tmp_path, {"one/model.safetensors": {"w": BASE["w"] + 1}})
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: one}]\n"
    (tmp_path / "recipe.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return "recipe.yml"


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, _with_values(list(words)))
    return done.exit_code, done.stdout + done.stderr


@pytest.mark.parametrize(
    "suffix", [".gguf", ".GGUF", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".onnx", ".SafeTensors"]
)
def test_no_folder_is_called_as_a_file(recipe: str, suffix: str) -> None:
    code, said = run("merge", recipe, f"out/x{suffix}")
    assert code == 4
    assert "safetensors" in said
    assert not Path("out").exists()
    assert run("merge", recipe, "out/v1.5")[0] == 0


def test_an_empty_folder_is_taken(recipe: str) -> None:
    Path("out").mkdir()
    assert run("merge", recipe, "out")[0] == 0
    assert np.array_equal(load_file("out/model.safetensors")["w"], BASE["w"] + 1)
    assert run("merge", recipe, "out")[0] == 4, "it is not empty any more"
    assert not [path for path in Path().iterdir() if "staging" in path.name]


@pytest.mark.parametrize("out", ["foreign", "foreign.safetensors"])
def test_a_model_of_others_is_replaced_only_by_any(recipe: str, out: str) -> None:
    other = {"z": np.zeros((3, 3), np.float32)}
    if out == "foreign":
        put(Path(), {"foreign/model.safetensors": other, "foreign/config.json": {}})
    else:
        save_file(other, out)
    where = Path(out) / "model.safetensors" if out == "foreign" else Path(out)
    for words in ((), ("--overwrite",)):
        code, said = run("merge", recipe, out, *words)
        assert code == 4
        assert ("--overwrite=any" in said) == bool(words)
    with pytest.raises(OutputError, match="della has not made it"):
        della.merge(recipe, out, overwrite=True, fsync=False)
    assert list(load_file(where)) == ["z"]
    assert run("merge", recipe, out, "--overwrite=any")[0] == 0
    assert list(load_file(where)) == ["w"]
    assert run("merge", recipe, "--overwrite", out)[0] == 0, "now it is della's own"
    della.merge(recipe, out, overwrite=True, fsync=False)


def test_what_overwrite_may_be(recipe: str) -> None:
    code, said = run("merge", recipe, "out", "--overwrite=all")
    assert (code, "--overwrite=any" in said) == (2, True)
    put(Path(), {"notes/thesis.tex": b"x"})
    for words in (("--overwrite",), ("--overwrite=any",)):
        assert run("merge", recipe, "notes", *words)[0] == 4, "no model, whatever is asked for"
    assert Path("notes/thesis.tex").exists()


def test_a_model_card_may_be_edited(recipe: str) -> None:
    run("merge", recipe, "out")
    card = Path("out/README.md")
    card.write_text("---\nlicense: mit\n" + card.read_text().removeprefix("---\n"))
    code, said = run("verify", "out")
    assert (code, "README.md: edited since the merge" in said) == (0, True)
    assert run("verify", "out", "--strict")[0] == 5
    assert della.verify("out").is_well
    assert not della.verify("out", strict=True).is_well
    card.unlink()
    assert run("verify", "out")[0] == 5
    card.write_text("new")
    config = Path("out/config.json")
    config.write_text(config.read_text() + " ")
    assert run("verify", "out")[0] == 5, "configuration and weights are what is verified"
