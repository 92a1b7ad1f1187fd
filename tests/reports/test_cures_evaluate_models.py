"""What messages on models of an evaluation, or on an older staging, advise is done as it is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_files import PEAS, lines
from commands import Command
from cures import cures
from numpy_llamas import CONFIGS, in_torch, make_config, random_tensors
from safetensors.numpy import load_file

import della
from della.errors import EvaluationError, OutputError
from della.evaluate.calibration import calibrate
from della.evaluate.llama import Llama
from della.evaluate.loss import measure
from della.evaluate.numpy_backend import NumpyScorer
from della.evaluate.problems import Item
from della.experiments.demo import TRIO

OLDER = Path(__file__).parents[1] / "data/format2"


class Letters:
    """A tokenizer of ``count`` letters behind a begin token."""

    def __init__(self, count: int) -> None:
        self.count = count

    def encode(self, sequence: str) -> Any:
        return SimpleNamespace(ids=[1, *(2 + ord(letter) % self.count for letter in sequence)])

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def token_to_id(self, token: str) -> int | None:
        raise NotImplementedError


def nats(config: dict[str, Any], tensors: dict[str, Any], ids: list[int]) -> float:
    """The loss of all tokens but the first, by transformers in float64."""
    torch = pytest.importorskip("torch", reason="needs torch")
    with torch.inference_mode():
        logits = in_torch(config, tensors).double()(torch.tensor([ids])).logits[0].numpy()
    rows = logits[:-1] - logits[:-1].max(axis=1, keepdims=True)
    return float((np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids[1:]]).sum())


@cures("evaluate/loss.py:_tokenised")
def test_a_tokenizer_of_another_model() -> None:
    config = make_config(CONFIGS["plain"]) | {"vocab_size": 20}
    tensors = random_tensors(config)
    text = [Item("0", "loss", "", "abcz")]
    with pytest.raises(EvaluationError, match="take the tokenizer that belongs to the model"):
        measure(NumpyScorer(Letters(59), Llama(config, tensors)), text)
    found = measure(NumpyScorer(Letters(18), Llama(config, tensors)), text)
    assert found.tokens == (4,)
    assert found.sums[0] == pytest.approx(nats(config, tensors, Letters(18).encode("abcz").ids), rel=1e-4)


@cures("evaluate/loss.py:answer")
def test_a_window_of_one_token() -> None:
    config = make_config(CONFIGS["plain"])
    tensors = random_tensors(config)
    model, text = NumpyScorer(Letters(50), Llama(config, tensors)), [Item("0", "loss", "", "a")]
    with pytest.raises(EvaluationError, match="give window=N of at least 2"):
        measure(model, text, window=1)
    ids = Letters(50).encode("a").ids
    assert measure(model, text, window=2).sums[0] == pytest.approx(nats(config, tensors, ids), rel=1e-4)


@cures("evaluate/calibration.py:calibrate")
@pytest.mark.parametrize("cure", ["remove it", "choose another name"])
def test_norms_that_are_there_already(tmp_path: Path, cure: str) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    texts, out = tmp_path / "texts.txt", tmp_path / "norms.safetensors"
    texts.write_text("What is 3 + 4?\n")
    out.write_bytes(b"mine")
    with pytest.raises(EvaluationError, match=cure):
        calibrate(str(TRIO / "base"), texts, out, backend="numpy")
    assert out.read_bytes() == b"mine"
    if cure == "remove it":
        out.unlink()
    else:
        out = tmp_path / "other.safetensors"
    calibrate(str(TRIO / "base"), texts, out, backend="numpy")
    norms = load_file(out)
    assert norms
    assert all(np.isfinite(each).all() and (each >= 0).all() for each in norms.values())


@cures("evaluate/numpy_backend.py:load")
def test_a_tokenizer_that_the_numpy_backend_needs(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    folder = Path(shutil.copytree(TRIO / "lm", tmp_path / "lm"))
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "A dog ran."}) + "\n")
    with pytest.raises(EvaluationError, match=r"tokenizer\.json.*the numpy backend needs it"):
        measure(folder, text, backend="numpy")
    shutil.copy(TRIO / "lm/tokenizer.json", folder)
    assert measure(folder, text, backend="numpy") == measure(TRIO / "lm", text, backend="numpy")


@cures("output/staging.py:Staging._make_ready")
def test_a_staging_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLDER, tmp_path / "site")
    monkeypatch.chdir(tmp_path / "site")
    staging = Path("part-staging").rename(".part.della-staging")
    recipe = json.loads(Path("out/della.json").read_text())["recipe"]
    with pytest.raises(OutputError, match="another version of della") as caught:
        della.merge(recipe, "part", fsync=False)
    assert "remove the folder to begin anew" in str(caught.value)
    named = re.search(r"(\S*\.part\.della-staging)", str(caught.value))
    assert named
    assert Path(named[1].rstrip(":")).samefile(staging)
    shutil.rmtree(staging)
    made = della.merge(recipe, "part", fsync=False).out
    then = json.loads(Path("out/della.json").read_text())["tensors"]
    assert json.loads((made / "della.json").read_text())["tensors"] == then


@cures("evaluate/numpy_backend.py:NumpyModel.answer", "evaluate/hf.py:HfModel._encoded")
@cures("evaluate/hf.py:HfModel._encoded", "evaluate/problems.py:_hub")
def test_a_chat_that_a_model_cannot_have(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("torch", reason="needs torch")
    shutil.copytree(TRIO / "math", tmp_path / "m")
    (tmp_path / "one.jsonl").write_bytes(lines(tmp_path / "x.jsonl", PEAS).read_bytes())
    settings = tmp_path / "m/tokenizer_config.json"

    def said(*words: str) -> tuple[int, str]:
        given = ("eval", "m", "--tasks", "gsm8k", "--max-tokens", "8", "--out", "scores", *words)
        done = command(tmp_path, *given)
        return done.returncode, done.stdout + done.stderr

    file, chat = ("--data", "gsm8k=one.jsonl"), ("--template", "chat")
    code, text = said("--backend", "numpy")
    assert code == 6
    assert "give a local file with --data gsm8k=FILE" in text
    code, text = said("--backend", "numpy", *file, *chat)
    assert (code, "use --backend hf" in text) == (6, True), text
    code, text = said("--backend", "hf", *file, *chat)
    assert (code, "no chat template; choose another --template" in text) == (6, True), text
    told = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(told | {"chat_template": "{{ raise_exception('not so') }}"}))
    code, text = said("--backend", "hf", *file, *chat)
    assert (code, "chat template fails" in text, "choose another --template" in text) == (6, True, True), text
    code, text = said("--backend", "hf", *file, "--template", "alpaca")
    assert code == 0, text
    assert re.search(r"gsm8k.*\b[01] of 1\b", text), text


@cures("evaluate/problems.py:_hub")
def test_texts_of_a_loss(tmp_path: Path, command: Command) -> None:
    given = ("eval", TRIO / "lm", "--tasks", "loss", "--backend", "numpy", "--out", "scores")
    refused = command(tmp_path, *given)
    assert refused.returncode == 6
    assert "give --data loss=FILE" in refused.stderr
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "A dog ran."}) + "\n")
    done = command(tmp_path, *given, "--data", "loss=t.jsonl")
    assert done.returncode == 0, done.stderr
