"""Time and memory of `della plan` on sparse files: four models of 3,000 tensors each; slices; a union.

python -m benchmarks.planning [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

from della.checkpoint.header import build_header
from della.dtypes import DTYPES

SHARDS, PER_SHARD, SHAPE = 60, 50, (1024, 1024)
MODELS = ("base", "a", "b", "c")
WIDE, INNER, KEYS = 8192, 28672, 1024  # a Llama of 70 B
LAYER = {
    "self_attn.q_proj": (WIDE, WIDE), "self_attn.k_proj": (KEYS, WIDE), "self_attn.v_proj": (KEYS, WIDE),
    "self_attn.o_proj": (WIDE, WIDE), "mlp.gate_proj": (INNER, WIDE), "mlp.up_proj": (INNER, WIDE),
    "mlp.down_proj": (WIDE, INNER), "input_layernorm": (WIDE,), "post_attention_layernorm": (WIDE,),
}  # fmt: skip
Shape = tuple[int, ...]


def model(folder: Path, shards: Sequence[Mapping[str, Shape]], layers: int) -> None:
    """A model of zeros, which takes next to nothing on the disk."""
    folder.mkdir()
    homes: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, spans = build_header([(name, DTYPES["BF16"], shape) for name, shape in tensors.items()])
        with (folder / shard).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + max(end for _, end in spans.values()))
        homes |= dict.fromkeys(tensors, shard)
    config = {"model_type": "llama", "num_hidden_layers": layers, "tie_word_embeddings": False}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (folder / "config.json").write_text(json.dumps(config))


def experts(folder: Path) -> Path:
    """The recipe of four models of 3,000 tensors each."""
    for name in MODELS:
        parts = [
            {f"model.layers.{number}.part{k}.weight": SHAPE for k in range(PER_SHARD)}
            for number in range(SHARDS)
        ]
        model(folder / name, parts, SHARDS)
    listed = "".join(f"  - model: {name}\n    parameters: {{density: 0.5}}\n" for name in MODELS[1:])
    recipe = folder / "experts.yml"
    recipe.write_text(f"merge_method: della\nbase_model: base\nmodels:\n{listed}")
    return recipe


def stack(folder: Path, name: str, layers: int, scale: int, slices: int) -> Path:
    """The recipe of ``slices`` slices of 20 layers, each 10 layers on, of two models of a Llama's layers."""
    for k in "xy":
        shards: list[dict[str, Shape]] = [
            {
                f"model.layers.{number}.{part}.weight": tuple(size // scale for size in shape)
                for number in range(first, min(first + 5, layers))
                for part, shape in LAYER.items()
            }
            for first in range(0, layers, 5)
        ]
        ends = {"model.embed_tokens": (32000, WIDE), "model.norm": (WIDE,), "lm_head": (32000, WIDE)}
        shards.append(
            {f"{key}.weight": tuple(size // scale for size in shape) for key, shape in ends.items()}
        )
        model(folder / f"{name}-{k}", shards, layers)
    recipe = folder / f"{name}.yml"
    sources = (
        f"  - sources: [{{model: {name}-{'xy'[k % 2]}, layer_range: [{10 * k}, {10 * k + 20}]}}]\n"
        for k in range(slices)
    )
    recipe.write_text(f"merge_method: passthrough\nslices:\n{''.join(sources)}")
    return recipe


def union(folder: Path, count: int = 150_000) -> Path:
    """The recipe of a union of two BPE vocabularies: each has some merges and added tokens of its own."""
    for name in ("p", "q"):
        shape = (count + 64, KEYS)
        model(folder / name, [{"model.embed_tokens.weight": shape, "lm_head.weight": shape}], 0)
        letters = [chr(0x100 + k) for k in range(256)]
        merges = [(a, b) for a in letters for b in letters]
        more = ((a + b, c) for c in letters for a, b in merges)  # the last 500 are the model's own
        merges = [*merges, *islice(more, count - len(letters) - len(merges) - 500)]
        merges += islice(more, 500 * (name == "q"), 500 + 500 * (name == "q"))
        tokens = [*letters, *("".join(pair) for pair in merges)]
        made = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
        made.add_special_tokens([f"<|{name}{k}|>" for k in range(64)])
        made.save(str(folder / name / "tokenizer.json"))
    recipe = folder / "union.yml"
    listed = "base_model: p\nmodels: [{model: q, parameters: {weight: 0.5}}]\ntokenizer_source: union\n"
    recipe.write_text(f"merge_method: task_arithmetic\n{listed}")
    return recipe


def measured(recipe: Path, rounds: int) -> tuple[float, float]:
    """Seconds (the median) and megabytes (the most) of planning a recipe."""
    seconds, peak = [], 0
    for _ in range(rounds):
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "della", "plan", recipe], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(time.perf_counter() - started)
        peak = max(peak, usage.ru_maxrss << 10)
        assert process.returncode == 0
    return statistics.median(seconds), peak / 1e6


def main() -> None:
    """Print the median of some rounds, and the most memory of any."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes: tuple[tuple[str, Callable[[], Path], float], ...] = (
            ("four models of 3,000 tensors", lambda: experts(folder), 1.5),
            ("120 layers of two models of 70 B", lambda: stack(folder, "giant", 80, 1, 6), 2.0),
            ("1,000 layers of two models of 1,000", lambda: stack(folder, "deep", 1000, 64, 50), 5.0),
            ("a union of two vocabularies of 150,000 tokens", lambda: union(folder), 3.0),
        )
        for title, make, most in recipes:
            seconds, peak = measured(make(), rounds)
            room = 500 if title.startswith("a union") else 250
            print(f"della plan, {title}: {seconds:.2f} s (must: {most}), {peak:.0f} MB (must: {room})")


if __name__ == "__main__":
    main()
