"""Time and memory of `della plan` on four models of 60 shards and 3,000 tensors each, as sparse files.

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
from pathlib import Path

from della.checkpoint.header import build_header
from della.dtypes import DTYPES

SHARDS, PER_SHARD, SHAPE = 60, 50, (1024, 1024)
MODELS = ("base", "a", "b", "c")


def make(folder: Path) -> Path:
    """The models, which take next to nothing on the disk; the recipe."""
    for model in MODELS:
        (folder / model).mkdir()
        homes: dict[str, str] = {}
        for number in range(SHARDS):
            shard = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
            names = [f"model.layers.{number}.part{k}.weight" for k in range(PER_SHARD)]
            header, spans = build_header([(name, DTYPES["BF16"], SHAPE) for name in names])
            with (folder / model / shard).open("wb") as file:
                file.write(header)
                file.truncate(len(header) + max(end for _, end in spans.values()))
            homes |= dict.fromkeys(names, shard)
        config = {"model_type": "llama", "num_hidden_layers": SHARDS}
        (folder / model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
        (folder / model / "config.json").write_text(json.dumps(config))
    experts = "".join(f"  - model: {name}\n    parameters: {{density: 0.5}}\n" for name in MODELS[1:])
    recipe = folder / "recipe.yml"
    recipe.write_text(f"merge_method: della\nbase_model: base\nmodels:\n{experts}")
    return recipe


def main() -> None:
    """Print the median of some rounds, and the most memory of any."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        recipe = make(Path(folder))
        seconds, peak = [], 0
        for _ in range(rounds):
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "della", "plan", recipe], stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds.append(time.perf_counter() - started)
            peak = max(peak, usage.ru_maxrss << 10)
            assert process.returncode == 0
    print(f"della plan: {statistics.median(seconds):.2f} s (must: 1.5), {peak / 1e6:.0f} MB (must: 250)")


if __name__ == "__main__":
    main()
