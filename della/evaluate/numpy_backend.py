"""Answers and losses of a small Llama by the demo's forward pass: NumPy in float32, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from della.errors import CheckpointError, DellaError, EvaluationError, Problem
from della.evaluate.backends import Keep, batches
from della.evaluate.llama import Llama
from della.evaluate.options import opt
from della.evaluate.problems import parsed, read_limited
from della.evaluate.templates import Prompt
from della.evaluate.tokenizer import Tokenizer, load_tokenizer


def load(folder: str) -> tuple[Tokenizer, Llama]:
    """The tokenizer and the model of a folder; CheckpointError for damaged files."""
    path = Path(folder)
    if not path.is_dir():
        raise EvaluationError(
            Problem("no such folder", "the numpy backend reads local models only", str(folder))
        )
    try:
        tokenizer = load_tokenizer(path)
    except DellaError as error:
        raise EvaluationError(
            Problem(
                "the numpy backend needs the package tokenizers", "pip install '.[eval]' in della's checkout"
            )
        ) from error
    except Exception as error:  # the package raises plain ones
        raise EvaluationError(
            Problem(f"cannot be read ({error})", "the numpy backend needs it", str(path / "tokenizer.json"))
        ) from error
    try:
        return tokenizer, Llama.from_folder(path)
    except CheckpointError as error:
        if any(path.glob("*.safetensors")):
            raise
        said = "has no safetensors, and the numpy backend reads nothing else"
        raise EvaluationError(Problem(said, f"try {opt('backend', 'hf')}", str(folder))) from error
    except KeyError as error:
        raise EvaluationError(
            Problem(f"its config.json or its weights lack {error}", subject=str(folder))
        ) from error
    except OSError as error:
        raise EvaluationError(
            Problem(f"cannot be read ({error.strerror})", subject=str(error.filename))
        ) from error
    except (ValueError, TypeError) as error:
        raise EvaluationError(Problem(str(error), f"try {opt('backend', 'hf')}", str(folder))) from error


class NumpyModel:
    """A folder with a Llama and its tokenizer.json, in memory."""

    def __init__(self, folder: str, *, batch: int, max_tokens: int) -> None:
        self._batch, self._most = batch, max_tokens
        self._tokenizer, self._model = load(folder)
        self._ends = _ends(Path(folder))

    def answer(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        """Greedy answers, a batch at a time."""
        if any(prompt.is_chat for prompt in prompts):
            raise EvaluationError(
                Problem("the numpy backend knows no chat templates", f"use {opt('backend', 'hf')}")
            )
        ids = [self._tokenizer.encode(prompt.text).ids for prompt in prompts]
        for chosen in batches(prompts, ids, self._batch):
            answers = self._model.greedy([ids[at] for at in chosen], self._most, self._ends[0])
            keep({
                prompts[at].id: self._tokenizer.decode(_until(answer, self._ends))
                for at, answer in zip(chosen, answers, strict=True)
            })  # fmt: skip


@dataclass(frozen=True, slots=True)
class NumpyScorer:
    """How likely texts are by a Llama in memory; ``context``: how many positions it knows."""

    tokenizer: Tokenizer
    llama: Llama
    context: int | None = None

    @staticmethod
    def of(folder: str) -> NumpyScorer:
        """From a folder with a Llama and its tokenizer.json."""
        tokenizer, llama = load(folder)
        path = Path(folder) / "config.json"
        known = parsed(read_limited(path), str(path)).get("max_position_embeddings")
        return NumpyScorer(tokenizer, llama, known if isinstance(known, int) and known > 0 else None)

    @property
    def rows(self) -> int:
        return self.llama.vocabulary

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def sums(self, windows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """The loss in nats of the last so many tokens of each window."""
        pairs = [(ids[:-count], ids[-count:]) for ids, count in windows]
        with np.errstate(over="ignore", invalid="ignore"):  # a loss that is no number is told as such
            return [float(one.sum(dtype=np.float64)) for one in self.llama.losses(pairs, len(pairs))]


def _ends(folder: Path) -> list[int]:
    """The tokens that end an answer: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        config = parsed(read_limited(path), str(path)) if path.is_file() else {}
        ends = config.get("eos_token_id") if isinstance(config, dict) else None
        ends = ends if isinstance(ends, list) else [ends]
        if ends and all(isinstance(end, int) for end in ends):
            return list(map(int, ends))
    raise EvaluationError(
        Problem("no eos_token_id in its config.json, so no answer would end", "add it", str(folder))
    )


def _until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    at = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:at])
