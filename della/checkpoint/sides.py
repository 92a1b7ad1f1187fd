"""Files beside the weights of a model: of its tokenizer, chat template and generation settings."""

from __future__ import annotations

from pathlib import Path

from della.checkpoint.layout import MOST_CONFIG_BYTES, check_small, confined, why_no_file
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


def checked_side_files(folder: Path) -> list[Path]:
    """What `Source.side_files` has of a folder."""
    stale = contradicting(folder)
    names = [p.name for p in folder.iterdir() if p.name in (*SIDE_FILES, *TEXTS) or p.suffix == ".tiktoken"]
    names = [name for name in names if name not in stale]
    for name in names:
        path = confined(folder, name)
        if set(name) & set("\\:") or not name.isprintable():
            raise CheckpointError(
                Problem(f"{name!r} is no name for a file of a model", "rename it", str(folder))
            )
        if not path.is_file():
            raise CheckpointError(Problem(*why_no_file(path), str(folder / name)))
        if name.endswith("_config.json"):
            check_small(path, MOST_CONFIG_BYTES)
    return [folder / name for name in sorted(names)]
