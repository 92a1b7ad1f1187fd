"""What messages on small models and on the files of experiments advise is done as it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import PEAS, lines
from cures import cures

from della.errors import EvaluationError
from della.evaluate.backends import Model
from della.evaluate.loss import loss_of
from della.evaluate.numpy_backend import NumpyModel
from della.evaluate.templates import Prompt
from della.experiments.demo import TRIO
from della.experiments.full_data import MBPP_TRAIN, calibration, split
from della.experiments.options import read_file
from della.experiments.small_data import check_data


@pytest.mark.parametrize("what", ["place", "tokenizer", "ends", "kind"])
@cures("evaluate/numpy_backend.py:load", "evaluate/numpy_backend.py:load", "evaluate/numpy_backend.py:load")
@cures("evaluate/numpy_backend.py:_ends")
def test_a_small_model_in_a_folder(tmp_path: Path, what: str) -> None:
    pytest.importorskip("tokenizers")
    folder = tmp_path / "m"

    def answered() -> dict[str, str]:
        found: dict[str, str] = {}
        model = NumpyModel(str(folder), batch=1, max_tokens=3)
        model.answer([Prompt("0", "2 + 3 =", False)], found.update)
        return found

    if what != "place":
        shutil.copytree(TRIO / "math", folder)
    config: dict[str, Any] = json.loads((TRIO / "math/config.json").read_text())
    if what == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif what == "ends":
        del config["eos_token_id"]
        (folder / "generation_config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "kind":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    advice = {
        "place": "local models only", "tokenizer": "the numpy backend needs it",
        "ends": "add it", "kind": 'backend="hf"',
    }[what]  # fmt: skip
    with pytest.raises(EvaluationError) as caught:
        answered()
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)
    if what == "kind":
        pytest.importorskip("transformers", reason="needs torch and transformers")
        from della.evaluate.hf import HfModel

        found: dict[str, str] = {}
        model = HfModel(Model("m", str(folder)), dtype="float32", batch=1, max_tokens=3)
        model.answer([Prompt("0", "2 + 3 =", False)], found.update)
        assert found.keys() == {"0"}
        return
    shutil.copytree(TRIO / "math", folder, dirs_exist_ok=True)
    assert answered().keys() == {"0"}


@cures("evaluate/loss.py:loss_of")
def test_texts_in_which_something_counts() -> None:
    empty = json.dumps({"loss": 0.0, "tokens": 0, "windows": 0})
    with pytest.raises(EvaluationError, match="take longer texts, or a prompt before them"):
        loss_of([empty])
    assert loss_of([empty, json.dumps({"loss": 1.5, "tokens": 3, "windows": 1})]).tokens == (0, 3)


@cures("experiments/options.py:read_file", "experiments/options.py:read_file")
@pytest.mark.parametrize(
    ("wrong", "advice"), [("sede", "did you mean 'seed'"), ("zzzz", "options are scale")]
)
def test_options_in_a_file(tmp_path: Path, wrong: str, advice: str) -> None:
    file = tmp_path / "options.yml"
    file.write_text(f"scale: mini\n{wrong}: 3\n")
    with pytest.raises(EvaluationError) as caught:
        read_file(file)
    assert any(advice in (problem.fix or "") for problem in caught.value.problems), str(caught.value)
    file.write_text("scale: mini\nseed: 3\n")
    assert read_file(file) == {"scale": "mini", "seed": 3}


FIX = "correct the file, or take the published one"


@cures("experiments/full_data.py:_records", "experiments/full_data.py:_write")
@cures("experiments/full_data.py:calibration")
@pytest.mark.parametrize("what", ["no objects", "none of this split", "nothing to calibrate with"])
def test_files_of_the_full_experiment(tmp_path: Path, what: str) -> None:
    code = {"task_id": MBPP_TRAIN[0], "text": "Add", "code": "def add(): pass"}
    file, rest = tmp_path / "mbpp.jsonl", {"test_list": ["assert 1"], "test_setup_code": ""}
    data = {"mbpp": lines(file, *([1] if what == "no objects" else [code | {"task_id": 11}]))}
    with pytest.raises(EvaluationError, match=FIX):
        _ = split(data, ["mbpp"], tmp_path) if "split" in what else calibration(data, "code", tmp_path)
    every = [
        code | rest | {"task_id": number, "text": f"Add {number}."} for number in (11, 511, MBPP_TRAIN[0])
    ]
    lines(file, *every)
    assert (
        calibration(data, "code", tmp_path).read_text()
        == f'{{"text": "Add {MBPP_TRAIN[0]}.\\ndef add(): pass"}}\n'
    )
    found = split(data, ["mbpp"], tmp_path)
    assert {name: json.loads(files["mbpp"].read_text())["text"] for name, files in found.items()} == {
        "validation": "Add 511.", "test": "Add 11.",
    }  # fmt: skip


@cures("experiments/small_data.py:check_data")
def test_files_of_the_small_experiment(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected JSONL files TASK\.SPLIT\.jsonl of lines") as caught:
        check_data(tmp_path)
    for name in caught.value.problems[0].said.removesuffix(" not found").split(", "):
        lines(tmp_path / name, {"prompt": PEAS["question"], "response": "5"})
    check_data(tmp_path)
