"""The loss of a model on texts, in nats a token: of whole texts, or of responses after their prompts.

A text is tokenised once, as one.  Longer ones than the window are read in several; each token counts once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from della.errors import EvaluationError, Problem, unknown
from della.evaluate.backends import DTYPES, Keep, Model
from della.evaluate.options import opt
from della.evaluate.problems import Item, load, parsed
from della.report.intervals import Interval, paired_bootstrap

BACKENDS = ("hf", "numpy")  # servers have no common way to tell a given text's probabilities
WINDOW = 2048
MOST_AT_ONCE = 8192  # tokens of a batch: their logits are what memory is needed for

Window = tuple[Sequence[int], int]  # ids, and how many at their end count


class Scorer(Protocol):
    """A model, ready to tell how likely texts are.

    ``context`` is how many positions it knows (None: any number), ``rows`` how many token ids.
    """

    @property
    def context(self) -> int | None: ...

    @property
    def rows(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer adds to one."""

    def sums(self, windows: Sequence[Window]) -> list[float]:
        """The loss in nats of the tokens that count, a sum for each window; each has a token before them."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a model on texts.

    Args:
        sums: In nats, one for each text.
        tokens: How many tokens of each text count; 0 where it has a single one, which nothing precedes.
        windows: In how many windows each was read.

    >>> loss = Loss((6.0, 2.0), (3, 1), (1, 1))
    >>> loss.value, round(loss.perplexity, 4), loss.interval().low
    (2.0, 7.3891, 2.0)
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    windows: tuple[int, ...]

    @property
    def value(self) -> float:
        """Nats a token: the sum of all losses by the number of all tokens.  NaN or inf if one of them is."""
        return float(np.sum(self.sums)) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        return perplexity(self.value)

    def interval(self, seed: int = 42) -> Interval:
        """`value` with the interval of the bootstrap over texts; NaN where there is one text, or no finite
        loss.
        """
        counted = [(s / n, n) for s, n in zip(self.sums, self.tokens, strict=True) if n]
        if len(counted) < 2 or not math.isfinite(self.value):
            return Interval(self.value, math.nan, math.nan)
        means, weights = zip(*counted, strict=True)
        found = paired_bootstrap(means, [0.0] * len(means), weights=weights, seed=seed)
        return Interval(self.value, found.low, found.high)


def measure(
    model: str | Path | Model | Scorer, data: str | Path | Sequence[Item], *, backend: str = "hf",
    dtype: str = "bfloat16", window: int = WINDOW, batch: int = 8, limit: int | None = None,
) -> Loss:  # fmt: skip
    """The loss of a model on texts, in this process; nothing is written.

    Args:
        model: A folder, a hub id (hf alone), or a `scorer` to be used again.
        data: A file as `della eval --tasks loss --data FILE` takes it, or its texts.
        backend: "hf", or "numpy" for a folder with a small Llama.
        dtype: What hf computes in.
        window: Most tokens the model sees at once; what it knows, if that is less.
        batch: Windows at a time; it changes memory and pace, and no more of the result than rounding.
        limit: Only the first texts of a file.

    Returns:
        `Loss`; its ``value`` is the number to minimise.

    Raises:
        EvaluationError: For a file, a model or a setting that does not do, or if no token counts.
        CheckpointError: For a damaged model (numpy).

    >>> from della.evaluate.problems import Item
    >>> from della.experiments.demo import TRIO
    >>> measure(TRIO / "lm", [Item("0", "loss", "Once upon", " a time")], backend="numpy").tokens
    (2,)
    """
    items = load("loss", Path(data), limit) if isinstance(data, str | Path) else data[:limit]
    if isinstance(model, str | Path):
        model = Model("model", str(model))
    scores = scorer(model, backend, dtype) if isinstance(model, Model) else model
    answers: dict[str, str] = {}
    answer(scores, items, answers.update, window=window, batch=batch)
    return loss_of(answers[item.id] for item in items)


def scorer(model: Model, backend: str, dtype: str = "bfloat16") -> Scorer:
    """A model, loaded; EvaluationError where it cannot be, or the backend tells no probabilities."""
    if backend not in BACKENDS:
        raise EvaluationError(unknown("backend of loss", backend, BACKENDS))
    if dtype not in DTYPES:
        raise EvaluationError(unknown("dtype", dtype, DTYPES))
    if backend == "numpy":
        from della.evaluate.numpy_backend import NumpyScorer

        return NumpyScorer.of(model.reference)
    from della.evaluate.hf import HfScorer

    return HfScorer(model, dtype)


def answer(model: Scorer, items: Sequence[Item], keep: Keep, *, window: int = WINDOW, batch: int = 8) -> None:
    """Give what `loss_of` reads to ``keep``, by item, as soon as it is there: the longest first."""
    size = min(window, model.context or window)
    if size < 2:
        said = f"a window of {size} tokens holds none that another precedes"
        raise EvaluationError(Problem(said, f"give {opt('window', 'N')} of at least 2", parameter="window"))
    lead = model.encode("")
    texts = [_tokenised(model, item) for item in items]
    sums, left, done = [0.0] * len(items), [0] * len(items), [0] * len(items)
    queue: list[tuple[int, Window]] = []
    for at in sorted(range(len(items)), key=lambda at: (-len(texts[at][0]), at)):
        ids, first = texts[at]
        cut = list(windows(ids, first, size, ids[:1] if ids[:1] == lead[:1] else []))
        left[at] = done[at] = len(cut)
        queue += [(at, one) for one in cut]
        if not cut:
            keep({items[at].id: _said(0.0, 0, 0)})
    for group in _groups(queue, batch):
        found = model.sums([one for _, one in group])
        finished = {}
        for (at, _), loss in zip(group, found, strict=True):
            sums[at] += loss
            left[at] -= 1
            if not left[at]:
                finished[items[at].id] = _said(sums[at], len(texts[at][0]) - texts[at][1], done[at])
        if finished:
            keep(finished)


def windows(ids: Sequence[int], first: int, size: int, lead: Sequence[int]) -> Iterator[Window]:
    """A text in windows of at most ``size`` tokens, so that each token from ``first`` on counts in one.

    Behind the first window a token sees at least half a window of those before it, ``lead`` (the token that
    begins every text, if there is one) among them.

    >>> [(ids, count) for ids, count in windows([9, 1, 2, 3, 4, 5, 6], 1, 4, [9])]
    [([9, 1, 2, 3], 3), ([9, 3, 4, 5], 2), ([9, 4, 5, 6], 1)]
    """
    while first < len(ids):
        end = min(len(ids), max(size, first + size // 2))
        begin = max(0, end - size)
        yield ([*lead, *ids[begin + len(lead) : end]] if begin else ids[:end]), end - first
        first = end


def loss_of(answers: Iterator[str] | Sequence[str]) -> Loss:
    """What `answer` has said, read again."""
    told = [parsed(text.encode(), "answer") for text in answers]
    loss = Loss(
        tuple(float(one["loss"]) for one in told), tuple(one["tokens"] for one in told),
        tuple(one["windows"] for one in told),
    )  # fmt: skip
    if not sum(loss.tokens):
        said = f"no token counts in its {len(told)} texts: each is a single token, which nothing precedes"
        raise EvaluationError(Problem(said, "take longer texts, or a prompt before them", "loss"))
    return loss


def perplexity(loss: float) -> float:
    """exp(loss); inf where that is too large for a float."""
    return math.exp(loss) if not loss > 709 else math.inf


def said(loss: float) -> float | str:
    """A loss for JSON, which knows NaN and infinity as texts only."""
    return loss if math.isfinite(loss) else str(loss)


def plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no NaN and no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _tokenised(model: Scorer, item: Item) -> tuple[list[int], int]:
    """The ids of prompt and response as one text, and the first that counts: where they cease to be those of
    the prompt alone, so that a token with letters of both is the response's; never the first of all.
    """
    ids = model.encode(item.instruction + item.reference)
    worst = max(ids, default=0)
    if worst >= model.rows:
        said = f"its tokenizer gives the id {worst}, and the model has {model.rows} rows of embeddings"
        raise EvaluationError(
            Problem(said, "take the tokenizer that belongs to the model", f"text {item.id}")
        )
    prompt = model.encode(item.instruction) if item.instruction else []
    same = next((at for at, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), None)
    return ids, min(len(ids), max(1, min(len(prompt), len(ids)) if same is None else same))


def _groups(queue: Sequence[tuple[int, Window]], batch: int) -> Iterator[list[tuple[int, Window]]]:
    group: list[tuple[int, Window]] = []
    for at, (ids, count) in queue:
        if group and (
            len(group) == batch or (len(group) + 1) * max(len(ids), len(group[0][1][0])) > MOST_AT_ONCE
        ):
            yield group
            group = []
        group.append((at, (ids, count)))
    if group:
        yield group


def _said(loss: float, tokens: int, cut: int) -> str:
    return json.dumps({"loss": said(loss), "tokens": tokens, "windows": cut})
