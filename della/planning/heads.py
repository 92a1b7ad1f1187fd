"""Embeddings that stand in a model more than once: as a tied head, or under the names of encoder and decoder.

Bytes decide what a tensor is: equal ones are a copy, of which the result has one; a head that differs is a
head, whatever the configuration says (transformers 5.24 uses it so).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.view import Renamed, TensorView
from della.errors import CheckpointError

HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
EMBEDDINGS = re.compile(r"(^|\.)(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
TIED = "tie_word_embeddings"
# Types whose configuration class ties where config.json is silent (transformers 5.24; those that were read).
TIED_TYPES = {
    "albert", "bart", "bert", "blenderbot", "bloom", "codegen", "cohere", "cohere2", "deberta",
    "deberta-v2", "distilbert", "electra", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neo",
    "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "opt", "pegasus", "prophetnet", "roberta",
    "t5", "umt5", "xglm", "xlm-roberta",
}  # fmt: skip


def is_tied(source: Source) -> bool:
    """Whether its configuration ties the head to the embeddings; its type's default where it does not say."""
    parts = [part for part in (source.config, source.config.get("text_config")) if isinstance(part, dict)]
    said = [part[TIED] for part in parts if isinstance(part.get(TIED), bool)]
    return said[0] if said else any(part.get("model_type") in TIED_TYPES for part in parts)


def settled(base: Source, models: list[Source]) -> tuple[dict[Source, Source], list[str]]:
    """Each source as it takes part: without copies, and with a head of its own where any has one; notes.

    Args:
        base: the template of the result.
        models: all others.

    Returns:
        The new source of each that changes, and a note for each thing that is left out or added.
    """
    notes: list[str] = []
    made = {source: _without_copies(source, source is not base, notes) for source in (base, *models)}
    heads = {source: next(filter(HEAD.search, now.tensors), None) for source, now in made.items()}
    own = [source for source, head in heads.items() if head is not None]
    embeddings = _embeddings(made[base])
    if own and embeddings and (heads[base] is None or is_tied(base)) and is_tied(base):
        head = heads[own[0]]
        assert head is not None
        told = ", ".join(source.reference for source in own)
        notes.append(
            f"{told}: {head} differs from the embeddings, so it is a head: the result has one, and "
            f"{TIED}: false"
        )
        made[base] = _untied(made[base])
        for source, now in made.items():
            tensor = _embeddings(now)
            if heads[source] is None and tensor and is_tied(source) and heads[base] is None:
                made[source] = now.changed({**now.tensors, head: Renamed(head, now.tensors[tensor])})
    return {source: now for source, now in made.items() if now is not source}, notes


def _embeddings(source: Source) -> str | None:
    """The tensor of the embeddings: the shared one, or the first."""
    found = [name for name in source.tensors if EMBEDDINGS.search(name)]
    return next((name for name in found if name.endswith("shared.weight")), found[0] if found else None)


def _without_copies(source: Source, tells: bool, notes: list[str]) -> Source:
    """A source without what is the same bytes as its embeddings."""
    first = _embeddings(source)
    if first is None:
        return source
    view, copies, unknown = source.tensors[first], [], []
    for name, other in source.tensors.items():
        tied = HEAD.search(name) and is_tied(source)
        alias = EMBEDDINGS.search(name) and first.endswith("shared.weight")
        if name != first and (tied or alias) and other.shape == view.shape:
            same = _equal(view, other)
            copies += [name] if same or (same is None and tied) else []
            unknown += [name] if same is None and tied else []
    if not copies:
        return source
    end = " (which could not be compared, as the file is not here)" if unknown else ""
    if tells:
        notes.append(f"{source.reference}: {', '.join(copies)} is a copy of {first}{end}, and left out")
    elif len(copies) > 1 or not HEAD.search(copies[0]):
        notes.append(
            f"{source.reference}: {', '.join(copies)} are copies of {first}; the result has that alone"
        )
    return source.changed({name: each for name, each in source.tensors.items() if name not in copies})


def _equal(a: TensorView, b: TensorView) -> bool | None:
    """Whether two stored tensors hold the same bytes; None where that cannot be read."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    try:
        return all(x == y for x, y in zip(_pieces(a), _pieces(b), strict=True))
    except (CheckpointError, OSError):
        return None


def _pieces(view: TensorView) -> Iterator[bytes]:
    for part in view.parts:
        for piece in part.pieces():
            yield bytes(piece)


def _untied(source: Source) -> Source:
    """A source whose configuration says that its head is its own."""
    config: dict[str, Any] = {**source.config, TIED: False}
    part = config.get("text_config")
    if isinstance(part, dict) and TIED in part:
        config["text_config"] = {**part, TIED: False}
    made = source.changed(source.tensors)
    made.config = config
    return made
