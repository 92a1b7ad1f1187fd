"""Tokenizers held against the base's, and what stands beside them: templates, generation settings."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from della.checkpoint.files import is_file
from della.checkpoint.layout import WEIGHTS
from della.checkpoint.pickles import PICKLES
from della.checkpoint.sides import MODULES
from della.checkpoint.source import Source
from della.checkpoint.vocabulary import (
    Read,
    Vocabulary,
    chat_template,
    contradicting,
    read_eos,
    read_vocabulary,
)
from della.errors import CheckpointError, Collector, Problem, some
from della.output.place import MANIFEST
from della.planning.heads import EMBEDDINGS
from della.recipe.tokens import Tokenizer

_OF_WEIGHTS = (*WEIGHTS, ".index.json")
BESIDE = ("generation_config.json", "additional_chat_templates", "modules.json")
# Files of vocabularies whose bytes are compared, as they are not read.
OPAQUE = (
    "tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "merges.txt", "bpe.codes", "vocab.bpe", "encoder.json", "tiktoken.model", "tekken.json",
)  # fmt: skip
FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", *OPAQUE,
)  # fmt: skip


def compare(
    base: Source, models: Sequence[Source], problems: Collector,
    choice: Tokenizer | None = None, read: Read = read_vocabulary, names_template: bool = False,
) -> list[str]:  # fmt: skip
    """A line on each model whose tokenizer is another than the base's; ids without a row are ``problems``.

    With a ``choice`` rows follow tokens, so that other ids are no difference; that of a model is written, and
    nothing is held against the base's.  With ``names_template`` the recipe says which template is written.
    """
    if choice and choice.source not in ("base", "union"):
        return []
    ours, template = read(base.folder), chat_template(base.folder)
    raw = {name: _raw(base.folder / name) for name in FILES}
    notes = [f"{p.subject}: {p.said}" for p in _beyond_rows(base, ours)] if choice is None else []
    if moved := ours.moved:
        token, number, gets = moved[0]
        text = f"{len(moved)} added tokens of tokenizer.json follow a hole in its ids ({token!r} is {number})"
        notes.append(f"{base.reference}: {text}; transformers 5 closes it, and looks for that in row {gets}")
    for model in dict.fromkeys(models):
        if model is base or model.folder == base.folder:
            continue
        changed = [name for name in FILES if _raw(model.folder / name) != raw[name]]
        if changed:
            theirs = read(model.folder)
            if choice:
                ours, theirs = replace(ours, tokens={}), replace(theirs, tokens={})
            elif theirs.tokens != ours.tokens:
                problems.extend(_beyond_rows(model, theirs))
            if said := "; ".join((*_differences(ours, theirs), *_opaque(model, raw, changed))):
                notes.append(
                    f"{model.reference}: another tokenizer than {base.reference}'s, which is written: {said}"
                )
        own = None if names_template else chat_template(model.folder)
        lacking = [*_lacking(base, model), *([own[0]] if own and not template else [])]
        if said := ", ".join(lacking):
            notes.append(f"{model.reference}: has {said}; {base.reference} has none, and so has the result")
        if own and template and own[1] != template[1]:
            notes.append(
                f"{model.reference}: another chat template than {base.reference}'s, which is written"
            )
        notes += [*_ends(base, model), *_subfolders(base, model)]
    return notes


def _subfolders(base: Source, model: Source) -> Iterator[str]:
    """A line on files in subfolders that differ from the base's, which are written."""
    ours, theirs = (_nested(source) for source in (base, model))
    differ = [
        name
        for name, path in ours.items()
        if name in theirs and not filecmp.cmp(path, theirs[name], shallow=False)
    ]
    if differ:
        said = f"{', '.join(differ)} differ from {base.reference}'s, which are written"
        yield f"{model.reference}: {said}"


def _nested(source: Source) -> dict[str, Path]:
    """What of a source's subfolders goes beside the weights, and modules.json, by name."""
    try:
        files = source.side_files()
    except CheckpointError:  # the base's is told, and others' are not written
        return {}
    return {name: path for name, path in files.items() if "/" in name or name == MODULES}


def _opaque(model: Source, raw: Mapping[str, bytes], changed: Sequence[str]) -> Iterator[str]:
    """Vocabularies that both have and whose bytes differ; ``raw`` are the base's."""
    for name in OPAQUE:
        if name in changed and raw[name] and is_file(model.folder / name):
            yield f"{name} differs"


def _ends(base: Source, model: Source) -> Iterator[str]:
    """Lines on other ends of text than the base's."""
    eos, base_eos = (_eos(source) for source in (model, base))
    if eos != base_eos and eos is not None:
        yield f"{model.reference}: eos_token_id {eos} against {base_eos}, which is written"
    now, then = read_eos(model.folder), read_eos(base.folder)
    if now is not None and now != then and is_file(base.folder / "generation_config.json"):
        said = f"generation_config.json: eos_token_id {now} against {then}"
        yield f"{model.reference}: {said}, which is written"


def _eos(source: Source) -> object:
    part = source.config.get("text_config")
    nested = part.get("eos_token_id") if isinstance(part, dict) else None
    return source.config.get("eos_token_id", nested)


def left_behind(base: Source) -> list[str]:
    """A line on the files beside the base's weights that the result does not get; none where it is a file."""
    if base.path != base.folder:
        return []
    stale, nested = contradicting(base.folder), _nested(base)
    kept = base.side_files().keys() | {"config.json", "README.md", MANIFEST, *stale}
    homes = {name.partition("/")[0] for name in nested if "/" in name}
    kept |= {name for name, made in base.instead.items() if made is not None}
    left = [
        entry.name + "/" * entry.is_dir()
        for entry in sorted(base.folder.iterdir())
        if entry.name not in kept | homes
        and not entry.name.startswith(".")
        and not entry.name.endswith(_OF_WEIGHTS)
    ]
    inner = (path for home in sorted(homes) for path in sorted((base.folder / home).rglob("*")))
    names = (path.relative_to(base.folder).as_posix() for path in inner if is_file(path))
    left += [name for name in names if name not in nested]
    notes = [f"{base.reference}: {some(left, what='files')} left behind"] if left else []
    if own := [name for name in nested if name.endswith(WEIGHTS)]:
        said = f"{', '.join(own)}: weights of what follows the model are copied from it, and not merged"
        notes.append(f"{base.reference}: {said}")
    if any("/" in name and name.endswith(tuple(PICKLES)) for name in left):
        said = "sentence-transformers may not load the result without the pickles that are left behind"
        notes.append(f"{base.reference}: {said}; its save_pretrained writes them as safetensors")
    if stale:
        said = f"{', '.join(stale)} contradicts tokenizer_config.json or tokenizer.json, and is left out"
        notes.append(f"{base.reference}: {said}; transformers 5 would believe it")
    return notes


def _raw(path: Path) -> bytes:
    try:
        return path.read_bytes() if is_file(path) else b""
    except OSError:
        return b""


def _beyond_rows(source: Source, vocabulary: Vocabulary) -> Iterator[Problem]:
    name = next((name for name in source.tensors if EMBEDDINGS.search(name)), None)
    if name is None or not vocabulary.tokens:
        return
    rows = source.tensors[name].shape[0] if source.tensors[name].shape else 0
    beyond = sorted(number for number in vocabulary.tokens if number >= rows)
    if beyond:
        token = vocabulary.tokens[beyond[0]]
        said = f"its tokenizer has {len(beyond)} ids without a row of {name} ({rows} rows): "
        said += f"{beyond[0]} is {token!r}"
        yield Problem(
            said, "resize its embeddings to the tokenizer, or give its own tokenizer", source.reference, name
        )


def _differences(ours: Vocabulary, theirs: Vocabulary) -> Iterator[str]:
    if ours.tokens and theirs.tokens:
        other = sorted(
            n for n in ours.tokens.keys() & theirs.tokens.keys() if ours.tokens[n] != theirs.tokens[n]
        )
        if other:
            a, b = theirs.tokens[other[0]], ours.tokens[other[0]]
            yield f"{len(other)} ids are other tokens ({other[0]} is {a!r} against {b!r})"
        for count, whose in (
            (len(theirs.tokens.keys() - ours.tokens.keys()), "more"),
            (len(ours.tokens.keys() - theirs.tokens.keys()), "fewer"),
        ):
            if count:
                yield f"{count} tokens {whose}"
    if ours.rules and theirs.rules:
        rules = [key for key in ours.rules if ours.rules[key] != theirs.rules[key]]
        if rules:
            yield f"{', '.join(rules)} of tokenizer.json differ"
    for key in dict.fromkeys((*ours.special, *theirs.special)):
        mine, base = theirs.special.get(key), ours.special.get(key)
        if mine and mine != base:
            yield f"{key} {mine!r} against {base!r}"


def _lacking(base: Source, model: Source) -> Iterator[str]:
    for name in BESIDE:
        if (model.folder / name).exists() and not (base.folder / name).exists():
            yield name
