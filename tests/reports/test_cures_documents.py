"""What messages on recipes of several documents advise is done as it is written, and the merge that should
come does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkpoints import put
from cures import cures
from safetensors.numpy import load_file

import della
from della.errors import DellaError
from della.output.between import Between
from della.recipe.reader import read_recipe
from della.recipe.text import MAX_DOCUMENTS

BASE = np.arange(6, dtype=np.float32).reshape(2, 3)
DELTAS = {"base": 0.0, "one": 0.5, "two": -1.0, "three": 2.0}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, delta in DELTAS.items():
        put(tmp_path, {f"{name}/model.safetensors": {"w": BASE + np.float32(delta)}})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(name: str, *models: str) -> str:
    """A document that gives the mean of ``models``."""
    listed = "".join(f"- {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    return f"{name and f'name: {name}'}\nmerge_method: linear\nmodels:\n{listed}"


def several(*documents: str) -> str:
    return "---\n".join(documents)


def check(text: str, delta: float, out: str = "out", **options: object) -> None:
    Path("recipe.yml").write_text(text)
    della.merge("recipe.yml", out, fsync=False, overwrite=True, **options)  # type: ignore[arg-type]
    assert np.allclose(load_file(f"{out}/model.safetensors")["w"], BASE + np.float32(delta), atol=1e-6)


def refused(text: str, advice: str, **options: object) -> None:
    Path("recipe.yml").write_text(text)
    with pytest.raises(DellaError) as caught:
        della.merge("recipe.yml", "out", fsync=False, **options)  # type: ignore[arg-type]
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)


class Mended(NamedTuple):
    """A recipe that is refused, the advice, and what a user makes of it, with its distance from BASE."""

    key: str
    broken: str
    advice: str
    mended: str
    delta: float


A, B = linear("A", "one"), linear("B", "two")
LINKS = [
    Mended("recipe/documents.py:_Links.__init__", several(A, linear("A", "two"), linear("", "A", "B")),
           "a name of its own", several(A, B, linear("", "A", "B")), -0.25),
    Mended("recipe/documents.py:_Links._needed", several(linear("First", "one"), linear("", "Frist", "two")),
           "did you mean 'First'", several(linear("First", "one"), linear("", "First", "two")), -0.25),
    Mended("recipe/documents.py:_Links._needed", several(A, linear("", "zzzz", "two")), "there is A",
           several(A, linear("", "A", "two")), -0.25),
    Mended("recipe/documents.py:_Links._visit", several(linear("A", "B"), linear("B", "A", "two"),
           linear("", "A", "three")), "name a model instead", several(linear("A", "one"),
           linear("B", "A", "two"), linear("", "B", "three")), (-0.25 + 2) / 2),
    Mended("recipe/documents.py:_Links.order", several(A, B, linear("", "A", "base")),
           "name it as a model of another one", several(A, B, linear("", "A", "base", "B")), -0.5 / 3),
    Mended("recipe/documents.py:_Links.order", several(linear("", "one"), linear("", "two")),
           "give it one, and name it in another one", several(A, linear("", "two", "A")), -0.25),
    Mended("recipe/documents.py:_Links.order", several(A, B, linear("", "A", "base")),
           "a file of its own", several(A, linear("", "A", "base")), 0.25),
]  # fmt: skip


@pytest.mark.parametrize("case", LINKS, ids=[f"{c.key}-{c.advice}" for c in LINKS])
def test_documents_that_lead_to_one_model(case: Mended) -> None:
    refused(case.broken, case.advice)
    check(case.mended, case.delta)
    if "of its own" in case.advice:
        check(B, -1.0, "second")


@cures("recipe/documents.py:read_documents")
def test_an_override_of_one_document() -> None:
    change = (
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n- model: {}\n  parameters: {weight: 1}\n"
    )
    text = several("name: A\n" + change.replace("{}", "one"), change.replace("{}", "A"))
    for advice in ("change it in the file", "such as lambda=0.9"):
        refused(text, advice, overrides=["models.0.parameters.weight=2"])
    check(text, 0.5 * 0.5 * 0.5, overrides=["lambda=0.5"])
    check(text.replace("weight: 1", "weight: 2", 1), 1.0)


@cures("recipe/text.py:_Composer.documents")
def test_a_file_for_each_document(folder: Path) -> None:
    refused(several(*[linear(f"n{k}", "one") for k in range(MAX_DOCUMENTS + 1)]), "one file each")
    with pytest.raises(DellaError, match="use one file each"):
        read_recipe(several(A, linear("", "A", "two")))
    check(A, 0.5, "A")
    check(linear("", "./A", "two"), -0.25)


@cures("running/documents.py:run_documents")
@pytest.mark.parametrize("option", [{"part": (1, 2)}, {"finish": True}])
def test_documents_have_no_parts(option: dict[str, object]) -> None:
    text = several(A, linear("", "A", "two"))
    for advice in (f"leave out {next(iter(option))}", "a file of its own"):
        refused(text, advice, **option)
    check(text, -0.25)
    check(A, 0.5, "A")
    Path("recipe.yml").write_text(linear("", "./A", "two"))
    for part in ((1, 2), (2, 2)):
        della.merge("recipe.yml", "parts", fsync=False, part=part)
    check(linear("", "./A", "two"), -0.25, "parts", finish=True)


@cures("output/between.py:Between._hold", "output/between.py:Between._hold")
@pytest.mark.parametrize("who", ["at work", "a stranger"])
def test_who_holds_what_lies_between(folder: Path, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = several(A, linear("", "A", "two"))
    if who == "at work":
        with Between(folder / "out"):
            refused(text, "wait for it")
    else:
        folder.chmod(0o777)
        Path(".out.della-between").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("della.output.disk.user", lambda: 12345)
            refused(text, "choose another place, or remove it")
        folder.chmod(0o755)
        check(text, -0.25, "other")
        Path(".out.della-between").rmdir()
    check(text, -0.25)
