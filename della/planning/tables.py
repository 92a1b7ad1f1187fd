"""The tensors of a model that have a row for each token, and where its configuration counts them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from della.checkpoint.source import Source
from della.planning.heads import embeddings_of

OF_THE_VOCABULARY = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|backbone\.embeddings|lm_head"
    r"|embed_out|lm_loss|predictions\.decoder)\.weight$"
    r"|(^|\.)(final_logits_bias|(lm_head|embed_out|lm_loss|predictions|predictions\.decoder)\.bias)$"
)
_LEAST = 1000  # rows by which a tensor of another name is known as one of the vocabulary


def rows_of(source: Source, known: Mapping[str, int]) -> int | None:
    """How many rows the tables of a model have."""
    return next((source.tensors[n].shape[axis] for n, axis in known.items() if n in source.tensors), None)


def tables(source: Source) -> dict[str, int]:
    """The tensors that have a row for each token, with the axis that counts them: by name, or by a size that
    is no other one of the configuration."""
    first = embeddings_of(source)
    if first is None or not source.tensors[first].shape:
        return {}
    rows = source.tensors[first].shape[0]
    telling = rows >= _LEAST and rows not in _sizes(source.config)
    found = {}
    for name, view in source.tensors.items():
        axis = next((n for n, size in enumerate(view.shape) if size != 1), 0)
        known = telling or OF_THE_VOCABULARY.search(name)
        if known and view.dtype.is_float and view.shape[axis : axis + 1] == (rows,):
            found[name] = axis
    return found


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
