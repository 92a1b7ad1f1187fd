"""Make Llama-shaped checkpoints to measure with: a base and three experts of it, seeded, in bf16.

    python -m benchmarks.checkpoints [--small] [--out FOLDER]

The base is N(0, 0.02), norms are ones; an expert is the base plus N(0, 0.001), rounded to bf16, so that its
deltas lie on a lattice, as those of real bf16 fine-tunes do: a few hundred distinct magnitudes in a row of
4,096.  The full size has 468 million parameters in three shards of each model, 3.7 GB in all.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks import BASE, EXPERTS, data_folder, missing
from della.dtypes import DTYPES
from della.output.writer import StagedOutput

SHARDS = 3
BASE_SCALE, DELTA_SCALE = 0.02, 0.001
CHUNK = 1 << 20  # elements drawn at a time: they stay in the processor's caches


@dataclass(frozen=True)
class Size:
    """The shape of a Llama without grouped queries and with a head of its own."""

    hidden: int
    wide: int
    layers: int
    heads: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes, in the order of the forward pass."""
        square, norm = (self.hidden, self.hidden), (self.hidden,)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            shapes[f"{name}.input_layernorm.weight"] = norm
            shapes |= {f"{name}.self_attn.{part}_proj.weight": square for part in "qkvo"}
            shapes[f"{name}.post_attention_layernorm.weight"] = norm
            shapes |= {f"{name}.mlp.{part}_proj.weight": (self.wide, self.hidden) for part in ("gate", "up")}
            shapes[f"{name}.mlp.down_proj.weight"] = (self.hidden, self.wide)
        return shapes | {"model.norm.weight": norm, "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


FULL = Size(hidden=1024, wide=4096, layers=24, heads=16, vocabulary=32000)
SMALL = Size(hidden=256, wide=1024, layers=15, heads=4, vocabulary=8192)


def generate(out: Path, size: Size, seed: int = 0) -> None:
    """Write the base and the experts into ``out``; the bytes depend on the size and the seed alone."""
    tensors = [(name, DTYPES["BF16"], shape) for name, shape in size.tensors().items()]
    sizes = [2 * math.prod(shape) for _, _, shape in tensors]
    shard_bytes = sum(sizes) // SHARDS + max(sizes)  # so that no tensor's size can bring in one shard more
    with ExitStack() as stack:
        models = [
            stack.enter_context(StagedOutput(out / name, tensors, shard_bytes, overwrite="any", fsync=False))
            for name in (BASE, *EXPERTS)
        ]
        for number, (name, _, shape) in enumerate(tensors):
            for start, pieces in _values(seed, number, shape):
                for model, piece in zip(models, pieces, strict=True):
                    model.write(name, 2 * start, piece.view(np.uint8).data)
        for model in models:
            if len(model.shards) != SHARDS:
                raise AssertionError(f"{len(model.shards)} shards, expected {SHARDS}")
            for file, content in _side_files(size).items():
                model.add_file(file, content)
            model.commit()


def _values(seed: int, number: int, shape: tuple[int, ...]) -> Iterator[tuple[int, list[npt.NDArray[Any]]]]:
    """Pieces of one tensor: (first element, the bf16 values of the base and of each expert from there on)."""
    streams = [np.random.default_rng([seed, number, model]) for model in range(1 + len(EXPERTS))]
    elements = math.prod(shape)
    for start in range(0, elements, CHUNK):
        count = min(CHUNK, elements - start)
        if len(shape) == 1:
            base = np.ones(count, np.float32)
        else:
            base = streams[0].standard_normal(count, np.float32) * np.float32(BASE_SCALE)
        pieces = [base.astype(ml_dtypes.bfloat16)]
        wide = pieces[0].astype(np.float32)
        for stream in streams[1:]:
            delta = stream.standard_normal(count, np.float32) * np.float32(DELTA_SCALE)
            pieces.append((wide + delta).astype(ml_dtypes.bfloat16))
        yield start, pieces


def _side_files(size: Size) -> dict[str, bytes]:
    """config.json and a tokenizer of whole words, which both tools accept and carry over."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"word{number}" for number in range(len(special), size.vocabulary)]
    marks = [
        {"id": number, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number, word in enumerate(special)
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": marks,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "unk_token": special[0],
            "vocab": {word: number for number, word in enumerate(words)},
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True)),
    }
    contents = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings, "config.json": size.config()}
    return {name: (json.dumps(content, indent=1) + "\n").encode() for name, content in contents.items()}


def main() -> None:
    """Make the checkpoints, unless they are there."""
    parser = argparse.ArgumentParser(description="Make the checkpoints that benchmarks.compare merges.")
    parser.add_argument("--small", action="store_true", help="20 million parameters instead of 468")
    parser.add_argument("--out", type=Path, help="where to (default: benchmarks/data/full, or small)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size, out = SMALL if options.small else FULL, options.out or data_folder(options.small)
    if not missing(out):
        print(f"{out}: the checkpoints are there already")
        return
    models = 1 + len(EXPERTS)
    print(f"{out}: making {models} models of {size.parameters / 1e6:.1f} million parameters", flush=True)
    generate(out, size, options.seed)


if __name__ == "__main__":
    main()
