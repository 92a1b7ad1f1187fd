"""What hashing, checks and journal cost in merge time: python -m benchmarks.safety [--rounds 7]

The same merges with and without them (benchmarks/bare.py), in turn, on the checkpoints of benchmarks.compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import BASE, EXPERTS, data_folder
from benchmarks.compare import PARAMETERS, compute_seconds, make_data, recipe
from benchmarks.measure import Run, read_all, run

KINDS = ("nothing", "finite", "all")


def measure(scratch: Path, data: Path, method: str, kind: str, fsync: bool) -> Run:
    """One merge without ``kind``; the old output is removed and the disk is quiet before it."""
    (scratch / "recipe.yml").write_text(json.dumps(recipe(method, data)))
    shutil.rmtree(scratch / "out", ignore_errors=True)
    os.sync()
    options = ["--json", *([] if fsync else ["--no-fsync"])]
    command = [sys.executable, "-m", "benchmarks.bare", kind, "merge", str(scratch / "recipe.yml")]
    return run([*command, str(scratch / "out"), *options], dict(os.environ), scratch)


def main() -> None:
    """Print a table: medians of merge time, of the whole process and of its CPU time, and how much longer
    they are than without safety.
    """
    parser = argparse.ArgumentParser(description="Measure what safety costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default="della,ties,dare_ties,task_arithmetic,linear")
    parser.add_argument("--small", action="store_true", help="the small checkpoints: to try this script out")
    parser.add_argument("--fsync", action="store_true", help="wait for the disk, as the command does")
    options = parser.parse_args()
    options.data = data_folder(options.small).resolve()
    make_data(options)
    read_all([path for name in (BASE, *EXPERTS) for path in (options.data / name).glob("*.safetensors")])
    print("| method | merging | NaN and Inf | all safety | whole process | all safety | CPU | all safety |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="run-", dir=options.data.parent) as name:
        for method in (m for m in options.methods.split(",") if m in PARAMETERS):
            runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
            for kind in KINDS:
                measure(Path(name), options.data, method, kind, options.fsync)  # compiles its kernels
            for _ in range(options.rounds):
                for kind in KINDS:
                    runs[kind].append(measure(Path(name), options.data, method, kind, options.fsync))
            print(row(method, runs), flush=True)


def row(method: str, runs: dict[str, list[Run]]) -> str:
    """One line of the table."""
    merging = {kind: statistics.median(map(compute_seconds, runs[kind])) for kind in KINDS}
    wall = {kind: statistics.median(each.wall for each in runs[kind]) for kind in KINDS}
    cpu = {kind: statistics.median(each.cpu for each in runs[kind]) for kind in KINDS}

    def share(seconds: dict[str, float], kind: str) -> str:
        return f"{100 * (seconds['nothing'] / seconds[kind] - 1):.1f} %"

    cells = [f"`{method}`", f"{merging['nothing']:.2f} s", share(merging, "finite"), share(merging, "all")]
    cells += [f"{wall['nothing']:.2f} s", share(wall, "all"), f"{cpu['nothing']:.2f} s", share(cpu, "all")]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
