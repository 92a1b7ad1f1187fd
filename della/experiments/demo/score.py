"""Scores of a model on the demo's three tasks, with NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from della.evaluate.llama import Llama
from della.evaluate.tokenizer import Tokenizer, load_tokenizer
from della.experiments.demo import tasks

Right = Callable[[Sequence[tasks.Item], Sequence[str]], list[float]]
MOST_NEW_TOKENS = 48
_ROWS = {"lm": 12, "math": 40, "code": 40}  # of a batch: what was fastest
ITEMS = 120


def score(model_folder: str | Path, split: str = "test", items: int = ITEMS) -> dict[str, float]:
    """Score a model folder on ``items`` problems a task.

    Returns ``lm_loss`` (nats per token of held-out stories, lower is better), ``math`` (share of exact
    matches) and ``code`` (pass@1, greedy), the last two in 0..1.
    """
    return score_model(Llama.from_folder(model_folder), load_tokenizer(model_folder), split, items)


def score_model(
    model: Llama, tokenizer: Tokenizer, split: str = "test", items: int = ITEMS
) -> dict[str, float]:
    """The same for a model in memory."""
    found = {}
    for task in ("lm", "math", "code"):
        problems = problems_of(tokenizer, tasks.items(task, split, items))
        scored = score_problems(model, tokenizer, task, problems)
        if task == "lm":
            found["lm_loss"] = sum(scored["loss"]) / sum(problems.tokens)
        else:
            found[task] = sum(scored["right"]) / len(scored["right"])
    return found


@dataclass(frozen=True, slots=True)
class Problems:
    """The problems of one task and split, as tokens: pairs of prompt and answer."""

    items: tuple[tasks.Item, ...]
    pairs: tuple[tuple[list[int], list[int]], ...]

    @property
    def tokens(self) -> list[int]:
        """Answer tokens by problem."""
        return [len(answer) for _, answer in self.pairs]

    def followed_by(self, more: Problems) -> Problems:
        return Problems(self.items + more.items, self.pairs + more.pairs)


def problems_of(tokenizer: Tokenizer, items: Sequence[tasks.Item]) -> Problems:
    """The problems as tokens, the shortest first."""
    paired = []
    for item in items:
        prompt = tokenizer.encode(item.prompt).ids
        text = tokenizer.encode(item.prompt + item.answer).ids
        paired.append((item, (prompt, text[len(prompt) :])))
    paired.sort(key=lambda pair: len(pair[1][0]) + len(pair[1][1]))
    return Problems(tuple(item for item, _ in paired), tuple(pair for _, pair in paired))


def score_problems(
    model: Llama, tokenizer: Tokenizer, task: str, problems: Problems, right: Right | None = None
) -> dict[str, list[float]]:
    """By problem the loss of the answer in nats, and of Math and Code whether the greedy answer is right.

    right: tells it of the task's answers; by default `tasks.correct`, which executes nothing.
    """
    if task == "lm":
        return {"loss": _sums(model.losses(problems.pairs, _ROWS[task]))}
    end = tokenizer.token_to_id("</s>")
    if end is None:
        raise ValueError("the tokenizer has no </s>, which ends the demo's answers")
    losses, answers = model.answers(problems.pairs, MOST_NEW_TOKENS, end, _ROWS[task])
    texts = [tokenizer.decode(ids) for ids in answers]
    return {"loss": _sums(losses), "right": (right or correct)(problems.items, texts)}


def correct(items: Sequence[tasks.Item], texts: Sequence[str]) -> list[float]:
    """Of each problem, whether its answer is right, read without executing anything."""
    return [float(tasks.correct(item, text)) for item, text in zip(items, texts, strict=True)]


def _sums(losses: Sequence[Any]) -> list[float]:
    """Losses of whole answers; rounded, as the last digits depend on the machine."""
    return [round(float(np.sum(one, dtype=np.float64)), 5) for one in losses]


def kept_gains(
    merged: Mapping[str, float], base: Mapping[str, float], experts: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """By task, (merge - base) / (own expert - base): 0 is the base, 1 the expert; 0 if that gained nothing.

    All arguments are scores as `score` returns them; ``experts`` has those of lm, math and code.
    """
    kept = {}
    for task, key, sign in (("lm", "lm_loss", -1), ("math", "math", 1), ("code", "code", 1)):
        whole = sign * (experts[task][key] - base[key])
        kept[task] = sign * (merged[key] - base[key]) / whole if whole > 0 else 0.0
    return kept
