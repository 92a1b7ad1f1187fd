"""Methods on directions beside `linear`, on the same models and in turn: medians of ratios of pairs of runs.

    python -m benchmarks.methods [--data FOLDER] [--rounds 5] [METHOD...]

Whole processes without fsync, the inputs in the page cache.  Each method is beside a `linear` that reads as
many models as it does: slerp two, the others four.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import BASE, EXPERTS, data_folder

METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.4}, "nuslerp": {}, "multislerp": {}, "karcher": {}, "model_stock": {}, "sce": {},
    "sce, select_topk": {"select_topk": 0.5}, "ram": {}, "nearswap": {"t": 0.001}, "arcee_fusion": {},
}  # fmt: skip
COUNTS = {"slerp": 1, "nearswap": 1, "arcee_fusion": 1, "nuslerp": 2}


def recipe(method: str, data: Path) -> tuple[dict[str, Any], int]:
    """The recipe of a method, and how many models it reads."""
    name = method.split(",")[0]
    experts = EXPERTS[: COUNTS.get(name, len(EXPERTS))]
    listed = (BASE, *experts) if name == "karcher" else experts
    made: dict[str, Any] = {"merge_method": name, "models": [{"model": str(data / each)} for each in listed]}
    made |= {"parameters": METHODS[method]} | ({} if name == "karcher" else {"base_model": str(data / BASE)})
    return made, 1 + len(experts)


def linear(data: Path, count: int) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": str(data / n)} for n in (BASE, *EXPERTS)[:count]]}


def run(made: dict[str, Any], scratch: Path) -> tuple[float, int]:
    """(seconds, most bytes of memory) of one merge."""
    shutil.rmtree(scratch / "out", ignore_errors=True)
    (scratch / "recipe.yml").write_text(json.dumps(made))
    started = time.perf_counter()
    command = [sys.executable, "-m", "della", "merge", str(scratch / "recipe.yml"), str(scratch / "out")]
    process = subprocess.Popen([*command, "--no-fsync", "--quiet"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - started, usage.ru_maxrss << 10


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--data", type=Path, default=data_folder(small=False))
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.data) as folder:
        for method in asked.methods:
            (made, count), ratios, peaks, seconds = recipe(method, asked.data), [], [], []
            (
                run(made, Path(folder)),
                run(linear(asked.data, count), Path(folder)),
            )  # compiled, and in the cache
            for _ in range(asked.rounds):
                ours, peak = run(made, Path(folder))
                ratios.append(ours / run(linear(asked.data, count), Path(folder))[0])
                peaks.append(peak)
                seconds.append(ours)
            said = f"{statistics.median(ratios):.2f} x linear of {count} models"
            print(
                f"{method}: {said}, {statistics.median(seconds):.2f} s, {max(peaks) / 1e6:.0f} MB", flush=True
            )


if __name__ == "__main__":
    main()
