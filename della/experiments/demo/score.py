"""Scores of a model on the demo's three tasks, with NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from della.evaluate.llama import Llama
from della.evaluate.tokenizer import Tokenizer, load_tokenizer
from della.experiments.demo import tasks

MOST_NEW_TOKENS = 48
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
    return {
        "lm_loss": story_loss(model, tokenizer, tasks.items("lm", split, items)),
        "math": share_correct(model, tokenizer, tasks.items("math", split, items)),
        "code": share_correct(model, tokenizer, tasks.items("code", split, items)),
    }


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


def story_loss(model: Llama, tokenizer: Tokenizer, problems: Sequence[tasks.Item]) -> float:
    """Mean loss in nats over all answer tokens of the problems."""
    pairs = []
    for item in problems:
        prompt, text = tokenizer.encode(item.prompt).ids, tokenizer.encode(item.prompt + item.answer).ids
        pairs.append((prompt, text[len(prompt) :]))
    return float(np.concatenate(model.losses(pairs)).mean())


def share_correct(model: Llama, tokenizer: Tokenizer, problems: Sequence[tasks.Item]) -> float:
    """The share of Math or Code problems whose greedy answer is right."""
    end = tokenizer.token_to_id("</s>")
    if end is None:
        raise ValueError("the tokenizer has no </s>, which ends the demo's answers")
    answers = model.greedy([tokenizer.encode(item.prompt).ids for item in problems], MOST_NEW_TOKENS, end)
    right = [tasks.correct(item, tokenizer.decode(ids)) for item, ids in zip(problems, answers, strict=True)]
    return sum(right) / len(right)
