"""The tensors of a model that have a row for each token, and where its configuration counts them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.vocabulary import Read, Vocabulary
from della.errors import Problem, clip
from della.planning.heads import embeddings_of

OF_THE_VOCABULARY = re.compile(
    r"(^|\.)((shared|embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|token_embedding|embeddings)\.weight"
    r"|(lm_head|embed_out|lm_loss|predictions|vocab_projector|generator_lm_head|pred_layer\.proj|proj_out"
    r"|output)(\.decoder)?\.(weight|bias)|final_logits_bias)$"
)
_LEAST = 1000  # rows by which a tensor of another name is known as one of the vocabulary


@dataclass
class Known:
    """The vocabulary of a model, as far as it has rows for it."""

    source: Source
    vocabulary: Vocabulary
    rows: int
    ids: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = self.vocabulary.tokens
        for number in sorted(tokens, reverse=True):  # of two ids of one token the lower one
            if number < self.rows:
                self.ids[tokens[number]] = number

    def found(self, names: Sequence[str | None]) -> list[int]:
        """Its row of each token, by its number in the result: the same number before another; -1 where it has
        none.  Of no token: its own row of that number, if it is of none."""
        own, ids, rows = self.vocabulary.tokens.get, self.ids.get, self.rows
        return [
            i if i < rows and own(i) == w else -1 if w is None else ids(w, -1) for i, w in enumerate(names)
        ]


def rows_of(source: Source, known: Mapping[str, int]) -> int | None:
    """How many rows the tables of a model have."""
    return next((source.tensors[n].shape[axis] for n, axis in known.items() if n in source.tensors), None)


def tables(source: Source) -> dict[str, int]:
    """The tensors that have a row for each token, with the axis that counts them: by name, or by a size that
    is no other one of the configuration."""
    first = embeddings_of(source) or next(_sized(source), None)
    if first is None or not source.tensors[first].shape:
        return {}
    rows = source.tensors[first].shape[0]
    telling = rows >= _LEAST and rows not in _sizes(source.config)
    found = {}
    for name, view in source.tensors.items():
        axis = next((n for n, size in enumerate(view.shape) if size == rows or size != 1), 0)
        known = telling or OF_THE_VOCABULARY.search(name)
        if known and view.dtype.is_float and view.shape[axis : axis + 1] == (rows,):
            found[name] = axis
    return found


def _sized(source: Source) -> Iterator[str]:
    """Embeddings of another name: of as many rows as the configuration counts tokens."""
    part = source.config.get("text_config")
    count = source.config.get("vocab_size", part.get("vocab_size") if isinstance(part, dict) else None)
    for name, view in source.tensors.items():
        if "embed" in name and len(view.shape) == 2 and view.shape[0] == count:
            yield name


def sideways(source: Source, known: Mapping[str, int]) -> str | None:
    """A tensor with a column for each token, which is gathered nowhere."""
    rows = rows_of(source, known) or 0
    if rows < _LEAST or rows in _sizes(source.config):
        return None
    floats = ((name, view) for name, view in source.tensors.items() if view.dtype.is_float)
    return next((name for name, view in floats if rows in view.shape and name not in known), None)


def _sizes(config: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of a configuration but those of its vocabulary."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif isinstance(value, int) and "vocab" not in key:
            yield value


def resized(config: Mapping[str, Any], old: int, rows: int) -> dict[str, Any]:
    """A configuration, and its parts, that counts ``rows`` tokens where it counted ``old``."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            made[key] = resized(value, old, rows)
        else:
            made[key] = rows if "vocab" in key and value == old and type(value) is int else value
    return made


def unequal(base: Source, models: Iterable[Source], read: Read) -> Iterator[Problem]:
    """Of each model with another number of rows than the base, where both tokenizers are known: what a union
    would do."""
    known = tables(base)
    ours, first = rows_of(base, known), next(iter(known), "")
    for model in models:
        theirs = rows_of(model, known)
        if (
            theirs is None
            or theirs == ours
            or model.tensors[first].shape[1:] != base.tensors[first].shape[1:]
        ):
            continue
        mine, other = read(base.folder), read(model.folder)
        if not mine.tokens or not other.tokens:
            continue
        have = set(mine.tokens.values())
        more = [token for token in other.tokens.values() if token not in have]
        new = [token for token in more if token in other.added]
        does = "rows follow tokens, and padding is the base's"
        if new:
            does = f"{len(new)} added tokens ({clip(new[0])!r}, ...) of it get rows behind the base's tokens"
        if len(more) > len(new):
            left = len(more) - len(new)
            does += f", and {left} ordinary {'one is' if left == 1 else 'ones are'} left out"
        said = f"against {base.reference}: {first} has {theirs} rows, expected {ours}"
        yield Problem(said, f"write 'tokenizer_source: union': {does}", model.reference, first)
