"""Recipes of several documents: read, planned, merged one after the other, resumed, verified."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from commands import Command
from recipes import told as _told
from safetensors.numpy import load_file

import della
from della.errors import CheckpointError, OutputError, RecipeError
from della.output.between import Between
from della.planning.describe import plans_json, plans_text
from della.recipe.documents import read_documents

BASE = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
DELTAS = {"one": 0.5, "two": -1.0, "three": 2.0}
NAME = "model.layers.0.mlp.up_proj.weight"
RECIPE = """\
name: First
merge_method: task_arithmetic
base_model: base
models:
- {model: one, parameters: {weight: 1}}
- {model: two, parameters: {weight: 0.25}}
---
name: Second stage/2
merge_method: linear
models:
- {model: First, parameters: {weight: 1}}
- {model: three, parameters: {weight: 3}}
---
merge_method: task_arithmetic
base_model: First
models:
- {model: Second stage/2, parameters: {weight: 2}}
"""
FIRST = BASE + 1 * 0.5 + 0.25 * -1.0
SECOND = (FIRST + 3 * (BASE + 2.0)) / 4
LAST = FIRST + 2 * (SECOND - FIRST)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with models and recipe.yml."""
    monkeypatch.chdir(tmp_path)
    for name, delta in {"base": 0.0, **DELTAS}.items():
        config = {"model_type": "llama", "num_hidden_layers": 1, "torch_dtype": "float32"}
        files: dict[str, Any] = {"model.safetensors": {NAME: BASE + np.float32(delta)}, "config.json": config}
        put(tmp_path / name, files | {"generation_config.json": {"top_k": 7}})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


def weights(out: Path) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = load_file(out / "model.safetensors")[NAME]
    return found


def told(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_documents(text)
    return str(caught.value)


# ---- merging ----------------------------------------------------------------------------------------------


def test_documents_are_merged_one_after_the_other(here: Path) -> None:
    lines: list[str] = []
    result = della.merge("recipe.yml", "out", tell=lines.append)
    assert np.allclose(weights(here / "out"), LAST, atol=1e-6)
    assert json.loads((here / "out/config.json").read_text())["model_type"] == "llama"
    assert (here / "out/generation_config.json").exists()
    assert result.manifest["recipe"] == RECIPE
    assert [entry for entry in os.listdir(here) if entry.startswith(".out")] == []
    assert [line for line in lines if "document 1 of 3: First" in line]
    assert della.verify("out").is_well


def test_the_order_in_the_file_does_not_matter(here: Path) -> None:
    documents = RECIPE.split("---\n")
    della.merge("---\n".join(reversed(documents)), "out")
    assert np.allclose(weights(here / "out"), LAST, atol=1e-6)
    with della.plan("---\n" + "---\n".join([documents[1], documents[2], documents[0]]) + "---\n") as plan:
        assert [each.recipe.name for each in plan.before] == ["First", "Second stage/2"]


def test_a_recipe_of_one_document_is_as_before(here: Path) -> None:
    with della.plan("---\n" + RECIPE.split("---\n")[0]) as plan:
        assert plan.before == ()
        assert "documents" not in plans_json(plan, 1)


def test_settings_of_the_command_hold_for_each_document(here: Path) -> None:
    della.merge("recipe.yml", "out", overrides="lambda=0", allow_idle=True)
    assert np.allclose(weights(here / "out"), BASE, atol=1e-6)  # First is the base, the result is First
    assert "lambda: 0" in json.loads((here / "out/della.json").read_text())["recipe"]
    with pytest.raises(RecipeError, match="leads into one document"):
        della.plan("recipe.yml", overrides="models.0.parameters.weight=1")


def test_a_single_file_can_be_the_result(here: Path) -> None:
    della.merge("recipe.yml", "out.safetensors")
    assert np.allclose(load_file(here / "out.safetensors")[NAME], LAST, atol=1e-6)
    assert sorted(p.name for p in here.iterdir() if "della" in p.name) == []


def test_absolute_paths_of_all_documents_stay_out_of_the_manifest(here: Path) -> None:
    text = RECIPE.replace("model: one", f"model: {here}/one")
    text = text.replace("base_model: base", f"base_model: {here}/base")
    della.merge(text, "out")
    recorded = (here / "out/della.json").read_text() + (here / "out/README.md").read_text()
    assert str(here) not in recorded


# ---- planning ---------------------------------------------------------------------------------------------


def test_a_plan_shows_every_document(here: Path, command: Command) -> None:
    with della.plan("recipe.yml") as plan:
        found = plans_json(plan, 1)["documents"]
        text = plans_text(plan, 1)
    assert [each["name"] for each in found] == ["First", "Second stage/2", None]
    assert [each["merge_method"] for each in found] == ["task_arithmetic", "linear", "task_arithmetic"]
    assert found[2]["tensors"][0]["shape"] == [2, 2]
    assert found[2]["bytes_read"] == 32
    assert text.index("Document 1 of 3: First") < text.index("Document 3 of 3")
    done = command(here, "plan", "recipe.yml", "--json")
    assert [each["name"] for each in json.loads(done.stdout)["documents"]] == [
        "First",
        "Second stage/2",
        None,
    ]
    assert not [entry for entry in os.listdir(here) if entry.startswith(".")]


def test_what_is_wrong_with_a_later_document_is_told_before_the_first_is_merged(here: Path) -> None:
    put(here / "three", {"model.safetensors": {NAME: np.zeros((2, 3), np.float32)}})
    with pytest.raises(CheckpointError, match=r"three.*\[2, 3\]"):
        della.merge("recipe.yml", "out")
    assert not [entry for entry in os.listdir(here) if entry.startswith((".", "out"))]


def test_a_type_that_a_document_gives_is_known_to_the_next(here: Path) -> None:
    text = RECIPE.replace("name: First\n", "name: First\ndtype: bfloat16\n")
    with della.plan(text) as plan:
        assert plan.jobs[0].dtype.torch_name == "bfloat16"
        assert plan.bytes_written == 8


# ---- what is wrong is told at once ------------------------------------------------------------------------


def named(name: str, *models: str) -> str:
    listed = "".join(f"- {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    return f"{name and f'name: {name}'}\nmerge_method: linear\nmodels:\n{listed}"


def test_names_that_lead_nowhere(here: Path) -> None:
    found = told(RECIPE.replace("model: First", "model: Frist"))
    assert "recipe:11:11: 'Frist' is the name of no document" in found
    assert "did you mean 'First'" in found
    assert read_documents(RECIPE).others[0].name == "First"


def test_a_circle(here: Path) -> None:
    found = told(
        "---\n".join([named("A", "C", "one"), named("B", "A", "one"), named("C", "B"), named("", "C")])
    )
    assert "in a circle: A -> C -> B -> A" in found
    assert "let one of them name a model" in found
    mended = "---\n".join([named("A", "two", "one"), named("B", "A", "one"), named("C", "B"), named("", "C")])
    assert [each.name for each in read_documents(mended).others] == ["A", "B", "C"]
    assert "circle: A -> A" in told("---\n".join([named("A", "A"), named("", "A")]))


def test_two_equal_names(here: Path) -> None:
    found = told("---\n".join([named("A", "one"), named("A", "two"), named("", "A", "one")]))
    assert "two documents are called 'A', here and in line 1" in found
    assert "recipe:6:1" in found


def test_a_document_that_no_other_names(here: Path) -> None:
    found = told("---\n".join([named("A", "one"), named("B", "two"), named("", "A", "one")]))
    assert "no other document names 'B'" in found
    assert "no name" in told("---\n".join([named("", "one"), named("", "two")]))


def test_all_of_it_is_told_together(here: Path) -> None:
    text = "---\n".join(
        [named("A", "A", "nowhere"), named("A", "two") + "densty: 1\n", named("", "A", "one")]
    )
    found = told(text)
    for words in ("circle", "'nowhere'", "two documents are called", "'densty'"):
        assert words in found


def test_parts_are_for_one_document(here: Path) -> None:
    with pytest.raises(RecipeError, match="leave out"):
        della.merge("recipe.yml", "out", part=(1, 2))
    with pytest.raises(RecipeError, match="leave out"):
        della.merge("recipe.yml", "out", finish=True)


# ---- kept, resumed, verified ------------------------------------------------------------------------------


def test_results_between_are_kept_where_that_is_asked_for(here: Path) -> None:
    lines: list[str] = []
    della.merge("recipe.yml", "out", keep_intermediates=True, tell=lines.append)
    between = here / ".out.della-between"
    assert [line for line in lines if str(between) in line]
    assert np.allclose(weights(between / "1-First"), FIRST, atol=1e-6)
    assert np.allclose(weights(between / "2-Second_stage_2"), SECOND, atol=1e-6)
    assert della.verify(between / "1-First").is_well
    assert della.verify(between / "1-First", sources=1.0, inputs=True).is_well
    verdict = della.verify("out", sources=1.0, inputs=True)
    assert verdict.is_well
    assert verdict.recomputed == 1
    assert [note for note in verdict.notes if str(between) in note]
    again: list[str] = []
    della.merge("recipe.yml", "out", overwrite=True, tell=again.append)
    assert len([line for line in again if "was merged before" in line]) == 2
    assert not between.exists()


def test_verify_says_what_it_cannot_do(here: Path) -> None:
    della.merge("recipe.yml", "out")
    assert della.verify("out").is_well
    with pytest.raises(OutputError, match=r"'First' was not kept.*keep_intermediates"):
        della.verify("out", sources=1.0)
    della.merge("recipe.yml", "out", overwrite=True, keep_intermediates=True)  # the cure
    assert della.verify("out", sources=1.0).is_well


def interrupted(here: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """A run that stops in document ``stage``, whose input is as if it could not be read."""
    from della.running import documents

    seen: list[int] = []

    def run(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == stage:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    real = vars(documents)["run"]
    with monkeypatch.context() as patch:
        patch.setattr(documents, "run", run)
        with pytest.raises(KeyboardInterrupt):
            della.merge("recipe.yml", "out")


def test_a_run_is_resumed_between_documents(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(here, monkeypatch, 3)
    assert not (here / "out").exists()
    lines: list[str] = []
    della.merge("recipe.yml", "out", tell=lines.append)
    assert len([line for line in lines if "was merged before" in line]) == 2
    assert np.allclose(weights(here / "out"), LAST, atol=1e-6)
    assert not (here / ".out.della-between").exists()


@pytest.mark.parametrize("change", ["recipe", "input", "damage", "tokenizer"])
def test_what_has_changed_is_merged_again(here: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    interrupted(here, monkeypatch, 3)
    first = here / ".out.della-between/1-First"
    wanted, again = LAST, 2
    if change == "recipe":  # of the second document alone
        (here / "recipe.yml").write_text(RECIPE.replace("weight: 3", "weight: 1"))
        second = (FIRST + BASE + 2.0) / 2
        wanted, again = FIRST + 2 * (second - FIRST), 1
    elif change == "input":
        put(here / "one", {"model.safetensors": {NAME: BASE + np.float32(1.5)}})
        os.utime(here / "one/model.safetensors", (time.time() + 5,) * 2)
        start = BASE + 1.5 - 0.25
        wanted, again = start + 2 * ((start + 3 * (BASE + 2.0)) / 4 - start), 0
    elif change == "damage":
        file = first / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
        again = 0  # the second was merged from another file
    else:
        (here / "base/generation_config.json").write_text('{"top_k": 1234}')
        again = 0
    lines: list[str] = []
    della.merge("recipe.yml", "out", tell=lines.append)
    assert np.allclose(weights(here / "out"), wanted, atol=1e-6)
    assert len([line for line in lines if "was merged before" in line]) == again
    if change == "tokenizer":
        assert "1234" in (here / "out/generation_config.json").read_text()


def test_a_second_run_is_told_who_is_at_work(here: Path) -> None:
    told_by = rf"another run is writing there \(pid {os.getpid()} on "
    with Between(here / "out"), pytest.raises(OutputError, match=told_by):
        della.merge("recipe.yml", "out")
    assert not (here / ".out.della-between").exists()
    della.merge("recipe.yml", "out")


def test_what_is_not_ours_is_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(here, monkeypatch, 2)
    (here / ".out.della-between/notes.txt").write_text("mine")
    della.merge("recipe.yml", "out")
    assert os.listdir(here / ".out.della-between") == ["notes.txt"]
    shutil.rmtree(here / ".out.della-between")
    (here / "elsewhere").mkdir()
    (here / ".out.della-between").symlink_to(here / "elsewhere")
    with pytest.raises(OutputError):
        della.merge("recipe.yml", "out", overwrite=True)
    assert os.listdir(here / "elsewhere") == []


def test_an_old_result_stays_until_the_new_one_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    della.merge(RECIPE.split("---\n")[0], "out")
    before = (here / "out/model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        della.merge("recipe.yml", "out")
    interrupted_at = KeyboardInterrupt
    from della.running import documents

    real = vars(documents)["run"]

    def run(made: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        if target.out == Path("out"):
            raise interrupted_at
        return real(made, target, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "run", run)
        with pytest.raises(KeyboardInterrupt):
            della.merge("recipe.yml", "out", overwrite=True)
    assert (here / "out/model.safetensors").read_bytes() == before
    della.merge("recipe.yml", "out", overwrite=True)
    assert np.allclose(weights(here / "out"), LAST, atol=1e-6)


def test_the_command_merges_documents(here: Path, command: Command) -> None:
    done = command(here, "merge", "recipe.yml", "out", "--keep-intermediates")
    assert done.returncode == 0
    assert "document 2 of 3: Second stage/2" in done.stderr
    assert command(here, "verify", "out", "--sources", "100%").returncode == 0
    shutil.rmtree(here / ".out.della-between")
    done = command(here, "verify", "out", "--sources", "100%")
    assert done.returncode == 4
    assert "--keep-intermediates" in done.stderr


def test_read_recipe_takes_one_document(here: Path) -> None:
    assert "one document more" in _told(RECIPE)


def test_the_example_of_the_page(here: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/documents.md").read_text(encoding="utf-8")
    (text,) = (each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "\n---\n" in each)
    della.merge(text, "out")
    assert np.allclose(weights(here / "out"), SECOND, atol=1e-6)
