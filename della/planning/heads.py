"""Embeddings that stand in a model more than once: as a tied head, or under the names of encoder and decoder.

Bytes decide what a tensor is: equal ones are a copy, of which the result has one; a head that differs is a
head, whatever the configuration says (transformers 5.24 uses it so).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from della.checkpoint.source import Source
from della.checkpoint.view import Renamed, TensorView
from della.errors import CheckpointError

HEAD = re.compile(r"(^|\.)(lm_head|embed_out|lm_loss)\.weight$")
EMBEDDINGS = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|backbone\.embeddings)\.weight$"
)
LANGUAGE_MODEL = re.compile(r"CausalLM|LMHead|ConditionalGeneration")
TIED = "tie_word_embeddings"
# Types whose configuration class ties where config.json is silent (transformers 5.24; those that were read).
TIED_TYPES = {
    "albert", "bart", "bert", "blenderbot", "bloom", "cohere", "cohere2", "deberta",
    "deberta-v2", "distilbert", "electra", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_neo",
    "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "opt", "pegasus", "prophetnet", "roberta",
    "t5", "umt5", "xglm", "xlm-roberta",
}  # fmt: skip


def is_tied(source: Source) -> bool:
    """Whether its head is tied to its embeddings: as config.json says; where it is silent, by the default of
    its type, and for a language model by having no head."""
    said = _said(source.config)
    if said is not None:
        return said
    parts = (source.config, source.config.get("text_config"))
    kinds = source.config.get("architectures")
    is_causal = any(LANGUAGE_MODEL.search(str(kind)) for kind in (kinds if isinstance(kinds, list) else ()))
    by_type = any(isinstance(part, dict) and part.get("model_type") in TIED_TYPES for part in parts)
    return by_type or (is_causal and not any(HEAD.search(name) for name in source.tensors))


def _said(config: Mapping[str, Any]) -> bool | None:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get(TIED), bool):
            return bool(part[TIED])
    return None


def settled(base: Source, models: list[Source]) -> tuple[dict[Source, Source], list[str]]:
    """Each source as it takes part: without copies, and with a head of its own where any has one; notes.

    Args:
        base: the template of the result.
        models: all others.

    Returns:
        The new source of each that changes, and a note for each thing that is left out or added.
    """
    notes: list[str] = []
    copied = {source: _copies(source) for source in (base, *models)}
    made = {source: _without(source, copied[source], source is not base, notes) for source in copied}
    heads = {source: next(filter(HEAD.search, now.tensors), None) for source, now in made.items()}
    own = [source for source, head in heads.items() if head is not None]
    was_tied = is_tied(base) or any(HEAD.search(name) for name in copied[base])
    if not own or not was_tied or embeddings_of(made[base]) is None:
        if copied[base] and base.config and _said(base.config) is None:
            made[base] = _with(made[base], True)  # without a head, nobody shall have to guess
        return {source: now for source, now in made.items() if now is not source}, notes
    head = heads[own[0]]
    assert head is not None
    said = f"{head} differs from the embeddings, so it is a head: the result has one, and {TIED}: false"
    notes.append(f"{', '.join(source.reference for source in own)}: {said}")
    tied = {source for source, now in made.items() if is_tied(source) or is_tied(now)}
    made[base] = _with(made[base], False)
    aliases = _tables(made[base], copied[base])
    for source, now in made.items():
        tensor = embeddings_of(now)
        wanted = [*aliases, *([head] if heads[base] is None and source in tied else [])]
        added = [name for name in wanted if tensor and name not in now.tensors]
        if tensor and added:
            made[source] = now.changed(
                {**now.tensors, **{name: Renamed(name, now.tensors[tensor]) for name in added}}
            )
    return {source: now for source, now in made.items() if now is not source}, notes


def _tables(base: Source, copied: Sequence[str]) -> list[str]:
    """The names under which encoder and decoder have the shared embeddings.

    transformers 5.24 ties them to these only as it ties the head, and does not save them then; a BART that is
    untied misses them when it is loaded, and begins with random ones.
    """
    found = [name for name in copied if not HEAD.search(name)]
    shared = embeddings_of(base) or ""
    stem = shared.removesuffix("shared.weight")
    for part in ("encoder", "decoder") if stem != shared else ():
        if any(name.startswith(f"{stem}{part}.") for name in base.tensors):
            found.append(f"{stem}{part}.embed_tokens.weight")
    return list(dict.fromkeys(found))


def embeddings_of(source: Source) -> str | None:
    """The tensor of the embeddings: the shared one, or the first."""
    found = [name for name in source.tensors if EMBEDDINGS.search(name)]
    return next((name for name in found if name.endswith("shared.weight")), found[0] if found else None)


def _copies(source: Source) -> list[str]:
    """The tensors that are the same bytes as the embeddings: a tied head, or one of which config.json says
    nothing; the names of encoder and decoder."""
    first = embeddings_of(source)
    if first is None:
        return []
    view, found = source.tensors[first], []
    silent = bool(source.config) and _said(source.config) is None
    for name, other in source.tensors.items():
        tied = bool(HEAD.search(name)) and (is_tied(source) or silent)
        alias = EMBEDDINGS.search(name) and first.endswith("shared.weight")
        if name != first and (tied or alias) and other.shape == view.shape:
            same = _equal(view, other)
            found += [name] if same or (same is None and tied and not silent) else []
    return found


def _without(source: Source, copies: list[str], tells: bool, notes: list[str]) -> Source:
    """A source without its copies."""
    if not copies:
        return source
    first = embeddings_of(source)
    if tells:
        notes.append(f"{source.reference}: {', '.join(copies)} is a copy of {first}, and left out")
    elif len(copies) > 1 or not HEAD.search(copies[0]):
        notes.append(
            f"{source.reference}: {', '.join(copies)} are copies of {first}; the result has that alone"
        )
    return source.changed({name: each for name, each in source.tensors.items() if name not in copies})


def _equal(a: TensorView, b: TensorView) -> bool | None:
    """Whether two stored tensors hold the same bytes; None where that cannot be read."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    if not (a.parts and b.parts):
        return None
    try:
        return all(x == y for x, y in zip(_pieces(a), _pieces(b), strict=True))
    except (CheckpointError, OSError):
        return None


def _pieces(view: TensorView) -> Iterator[bytes]:
    for part in view.parts:
        for piece in part.pieces():
            yield bytes(piece)


def _with(source: Source, tied: bool) -> Source:
    """A source whose configuration says whether its head is tied."""
    config: dict[str, Any] = {**source.config, TIED: tied}
    part = config.get("text_config")
    if isinstance(part, dict) and TIED in part:
        config["text_config"] = {**part, TIED: tied}
    made = source.changed(source.tensors)
    made.config = config
    return made
