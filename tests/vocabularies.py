"""Small models with real tokenizers of four kinds, and what rows of a merge must be, by token."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from checkpoints import put
from safetensors.numpy import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH = 4
KINDS = ("bpe", "bytes", "unigram", "wordpiece")
WORDS = ("cat", "concat", "tact", "attic", "cocoa", "octet", "toccata", "a", "o", "ice", "coat", "taco")
TEXTS = [" ".join(words) for words in itertools.islice(itertools.permutations(WORDS, 3), 0, 1200, 6)]
CORPORA = {"base": WORDS[:6], "one": WORDS[4:], "two": ("dodo", "dice", "acid", *WORDS[8:])}
ADDED = {"base": (), "one": ("<|a|>", "<|b|>"), "two": ("<|b|>", "<|c|>")}
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


def trained(kind: str, corpus: Sequence[str], added: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer of the kind, trained on the corpus, with added tokens."""
    special = ["<unk>", "</s>"]
    options: dict[str, Any] = {"vocab_size": 60, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = tokenizers.Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
        if kind == "bytes":
            made.pre_tokenizer, made.decoder = (
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                decoders.ByteLevel(),
            )
        else:
            made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(**options)
    made.train_from_iterator([" ".join(corpus)] * 8, trainer)
    made.add_special_tokens(list(added))
    return made


def write(
    folder: Path, tokenizer: tokenizers.Tokenizer, seed: int, pad: int = 0, **config: Any
) -> dict[str, Array]:
    """A model whose tables have a row for each token and ``pad`` more; its tensors."""
    rng = np.random.default_rng(seed)
    rows = tokenizer.get_vocab_size() + pad
    tensors = {name: rng.standard_normal((rows, WIDTH)).astype(np.float32) for name in TABLES[:2]}
    tensors |= {TABLES[2]: rng.standard_normal(rows).astype(np.float32)}
    tensors["model.norm.weight"] = rng.standard_normal(WIDTH).astype(np.float32)
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"model_type": "llama", "vocab_size": rows, "hidden_size": WIDTH, "tie_word_embeddings": False}
    about |= {"num_attention_heads": 2}
    files = {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": settings}
    put(folder, {"model.safetensors": tensors, "config.json": about | config, **files})
    return tensors


def family(folder: Path, kind: str, pad: int = 0) -> dict[str, dict[str, Array]]:
    """A base and two models whose tokenizers are others, each with its tensors."""
    return {
        name: write(folder / name, trained(kind, CORPORA[name], ADDED[name]), seed, pad)
        for seed, name in enumerate(CORPORA)
    }


def ids(folder: Path) -> dict[str, int]:
    """The ids of all tokens, as the tokenizers library has them."""
    found: dict[str, int] = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(True)
    return found


def rows(
    folder: Path, tensors: Mapping[str, Mapping[str, Array]], table: str, token: str
) -> dict[str, Array]:
    """The row of a token in each model, by the rule: its own, its only owner's, the base's, the mean."""
    own = {}
    for name, held in tensors.items():
        number = ids(folder / name).get(token)
        if number is not None and number < len(held[table]):
            own[name] = held[table][number].astype(np.float64)
    if len(own) == 1:
        rest = next(iter(own.values()))
    else:
        rest = own["base"] if "base" in own else np.mean(list(own.values()), axis=0)
    return {name: own.get(name, rest) for name in tensors}


def recipe(folder: Path, method: str = "task_arithmetic", weight: float = 0.5, **more: Any) -> dict[str, Any]:
    """Of base, one and two."""
    listed = [{"model": str(folder / name), "parameters": {"weight": weight}} for name in ("one", "two")]
    return {"merge_method": method, "base_model": str(folder / "base"), "models": listed, **more}


def loaded(out: Path) -> dict[str, Array]:
    """The tensors of a result."""
    return load_file(out / "model.safetensors")
