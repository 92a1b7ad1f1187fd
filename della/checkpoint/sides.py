"""What of a model's folder goes beside the weights of a merge, by lists of what programs read; never code."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from della.checkpoint.files import is_file
from della.checkpoint.layout import MOST_CONFIG_BYTES, check_small, confined, read_small, why_no_file
from della.checkpoint.names import why_hostile
from della.checkpoint.strict import json_value
from della.checkpoint.vocabulary import contradicting
from della.errors import CheckpointError, Problem

# Everything a tokenizer or a generation set-up may consist of; never code.
TEXTS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")  # for people
SIDE_FILES = (
    "added_tokens.json", "bpe.codes", "chat_template.jinja", "chat_template.json",
    "config_sentence_transformers.json", "dict.txt", "emoji.txt", "encoder.json", "entity_vocab.json",
    "feature_extractor_config.json", "generation_config.json", "image_processor_config.json",
    "merges.txt", "modules.json", "normalizer.json",
    "preprocessor_config.json", "processor_config.json", "prophetnet.tokenizer", "scheduler_config.json",
    "sentence_bert_config.json", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm",
    "special_tokens_map.json", "spiece.model", "spm.model", "spm_char.model", "target.spm",
    "target_vocab.json", "tekken.json", "tiktoken.model", "tokenizer.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer.model.v7", "tokenizer_config.json",
    "video_preprocessor_config.json", "vocab-src.json", "vocab-tgt.json", "vocab.bpe", "vocab.json",
    "vocab.txt",
)  # fmt: skip
HUB_FILES = (
    *SIDE_FILES,
    *TEXTS,
    "*.tiktoken",
    "config.json",
    "adapter_config.json",
    "*.safetensors.index.json",
)

TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"
# What sentence-transformers' modules keep in their folders, with weights of their own among it.
OF_MODULES = (".json", ".txt", ".model", ".safetensors")
MOST_BYTES = 1 << 30  # of one file in a subfolder
DEEPEST = 4


def checked_side_files(folder: Path) -> dict[str, Path]:
    """Files of the tokenizer, the chat template, the generation settings, and of what stands in
    subfolders of `below`, sorted; with "/" in those of subfolders.

    Old files that contradict newer ones are not among them.  Raises CheckpointError for a link that leaves
    the folder, for what is not a file, and for names that some system takes for something else.
    """
    stale = contradicting(folder)
    names = [p.name for p in folder.iterdir() if p.name in (*SIDE_FILES, *TEXTS) or p.suffix == ".tiktoken"]
    names = [name for name in names if name not in stale]
    for name in names:
        path = confined(folder, name)
        if set(name) & set("\\:") or not name.isprintable():
            raise CheckpointError(
                Problem(f"{name!r} is no name for a file of a model", "rename it", str(folder))
            )
        if not is_file(path):
            raise CheckpointError(Problem(*why_no_file(path), str(folder / name)))
        if name.endswith("_config.json"):
            check_small(path, MOST_CONFIG_BYTES)
    nested = below(folder, list(_files(folder, _folders(folder))))
    for name in nested:
        if why := why_hostile(name, ""):
            raise CheckpointError(Problem(f"{name[:200]!r}: {why}", subject=str(folder)))
        path = confined(folder, name)
        if not is_file(path):
            raise CheckpointError(Problem(*why_no_file(path), str(folder / name)))
        check_small(path, MOST_CONFIG_BYTES if name.endswith(".json") else MOST_BYTES)
    return {name: folder / name for name in sorted((*names, *nested))}


def below(folder: Path, names: Collection[str]) -> list[str]:
    """Those of ``names``, of a model whose modules.json (if any) is in ``folder``, that stand in subfolders
    and go beside the weights.

    These are further chat templates and the tokenizers of a processor's parts, which transformers reads, and
    the modules of sentence-transformers.  Raises CheckpointError for a modules.json that leads elsewhere.
    """
    modules = _modules(folder)
    return [
        name
        for name in names
        for home, _, last in [name.rpartition("/")]
        if (home == TEMPLATES and last.endswith(".jinja"))
        or (home.endswith("_tokenizer") and "/" not in home and last in SIDE_FILES)
        or (name.startswith(modules) and last.endswith(OF_MODULES))
    ]


def _modules(folder: Path) -> tuple[str, ...]:
    """The folders ("1_Pooling/") of what comes after the model, as modules.json names them."""
    where = folder / MODULES
    path = confined(folder, MODULES)
    if not is_file(path):
        return ()
    try:
        rows = json_value(read_small(path, MOST_CONFIG_BYTES), str(where))
    except CheckpointError:
        return ()  # it is copied as it is, and names nothing
    found = []
    for row in rows if isinstance(rows, list) else ():
        home = row.get("path") if isinstance(row, dict) else None
        if not isinstance(home, str) or not home.strip("/"):
            continue  # the model itself
        if why := why_hostile(home.removesuffix("/"), ""):
            raise CheckpointError(Problem(f"names {home[:200]!r}, which {why}", subject=str(where)))
        found.append(home.removesuffix("/") + "/")
    return tuple(found)


def _folders(folder: Path) -> list[str]:
    """The subfolders in which something may be wanted."""
    wanted = {name.partition("/")[0] for name in _modules(folder)} | {TEMPLATES}
    names = (path.name for path in folder.iterdir())
    return [name for name in names if name in wanted or name.endswith("_tokenizer")]


def _files(folder: Path, names: Collection[str], depth: int = 1) -> Iterator[str]:
    """Every file in the subfolders ``names`` of ``folder``.  Raises CheckpointError for a link out of it."""
    for name in names:
        path = confined(folder, name)
        if path.is_dir() and depth < DEEPEST:
            inner = [f"{name}/{entry.name}" for entry in path.iterdir() if not entry.name.startswith(".")]
            yield from _files(folder, inner, depth + 1)
        elif depth > 1:
            yield name
