"""Measure della beside mergekit on one machine, in one run: what must be, the aims, and what was measured.

    python -m benchmarks.compare [--report FILE] [--rounds 3] [--methods della,ties] [--threads N] [--small]

Whole processes are measured, alternately, with the inputs in the page cache and the outputs on their file
system.  scripts/bench makes all that this needs; docs/benchmarks.md says how it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import BASE, EXPERTS, data_folder, missing
from benchmarks.measure import Failed, Installation, Run, installation, read_all, run
from benchmarks.report import (
    FSYNC,
    IN_TURN,
    OURS,
    TARGETS,
    THEIRS,
    Measured,
    document,
    figures,
    machine,
    table,
    with_threads,
)

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = (0.5, 0.3, 0.2)
PARAMETERS: dict[str, dict[str, float]] = {
    "della": {"density": 0.5, "epsilon": 0.15},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "task_arithmetic": {},
    "linear": {},
}
HELP_RUNS = 5


def recipe(method: str, data: Path) -> dict[str, Any]:
    """The recipe of a method, which both tools read: a base and three experts, bf16 in and out.

    linear takes the base as a fourth model: the comparison of methods is on the same inputs.
    """
    models = [
        {"model": str(data / name), "parameters": {"weight": weight, **PARAMETERS[method]}}
        for name, weight in zip(EXPERTS, WEIGHTS, strict=True)
    ]
    base: dict[str, Any] = {"base_model": str(data / BASE)}
    if method == "linear":
        models.append({"model": base.pop("base_model"), "parameters": {"weight": 1.0}})
    return {"models": models, "merge_method": method, **base, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Bench:
    """The two tools, the data, and a scratch folder on the file system of the data."""

    della: Path
    mergekit: Path | None
    data: Path
    scratch: Path
    threads: int | None
    measured: Measured

    @property
    def environment(self) -> dict[str, str]:
        """For both tools: bytecode may be cached, nothing is looked up on the network."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        return kept | {"HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": str(self.scratch / "kernels")}

    def ours(self, method: str, *, threads: int | None = None, fsync: bool = False) -> Run:
        """One `della merge`."""
        threads = threads or self.threads
        options = ["--json", *([] if fsync else ["--no-fsync"])]
        options += ["--threads", str(threads)] if threads else []
        return self._merge([str(self.della), "merge", *self._places(method), *options])

    def theirs(self, method: str) -> Run:
        """One `mergekit-yaml`, which never waits for the disk."""
        options = ["--quiet", *(["--num-threads", str(self.threads)] if self.threads else [])]
        return self._merge([str(self.mergekit), *self._places(method), *options])

    def keep(self, method: str, who: str, result: Run) -> None:
        """Note a run, and tell it."""
        self.measured.runs.setdefault((method, who), []).append(result)
        tell(method, who, result)

    def help(self) -> None:
        """`--help` of both tools, in turn; the first of each, which may write bytecode, is not counted."""
        tools = [(OURS, self.della)] + ([(THEIRS, self.mergekit)] if self.mergekit else [])
        for number in range(HELP_RUNS + 1):
            for who, tool in tools:
                result = run([str(tool), "--help"], self.environment, self.scratch)
                if number:
                    self.measured.help.setdefault(who, []).append(result)
                    tell("--help", who, result)

    def cold(self, methods: Sequence[str]) -> None:
        """Compile the kernels of every method into an empty cache; the first method finds none at all."""
        shutil.rmtree(self.scratch / "kernels", ignore_errors=True)
        for method in methods:
            result = self.ours(method)
            if method == "della":
                self.measured.cold = result
            tell(method, "della, kernels not compiled" if method == methods[0] else "della, warm-up", result)

    def alternate(self, method: str, rounds: int) -> None:
        """mergekit, ours, mergekit, ours ...; then ours with fsync."""
        for _ in range(rounds):
            if self.mergekit and method in TARGETS:
                self.keep(method, THEIRS, self.theirs(method))
            self.keep(method, OURS, self.ours(method))
        for _ in range(rounds):
            self.keep(method, FSYNC, self.ours(method, fsync=True))

    def in_turn(self, rounds: int) -> None:
        """Our della and our linear, alternately: the machine's speed drifts between the methods."""
        for _ in range(rounds):
            for method in ("della", "linear"):
                self.keep(method, IN_TURN, self.ours(method))

    def scale(self, method: str, rounds: int) -> None:
        """Ours on one thread and on two, alternately."""
        for _ in range(rounds):
            for threads in (1, 2):
                who = with_threads(threads)
                result = self.ours(method, threads=threads)
                self.measured.compute.setdefault((method, who), []).append(compute_seconds(result))
                self.keep(method, who, result)

    def _places(self, method: str) -> tuple[str, str]:
        path = self.scratch / f"{method}.yml"
        path.write_text(json.dumps(recipe(method, self.data)))  # JSON is YAML
        return str(path), str(self.scratch / "out")

    def _merge(self, argv: Sequence[str]) -> Run:
        """Run a merge; before it, untimed, the old output goes and all that is unwritten goes to disk."""
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        result = run(argv, self.environment, self.scratch)
        expected, found = weight_bytes(self.data / BASE), weight_bytes(out)
        if abs(found - expected) > expected // 100:
            raise Failed(f"{' '.join(argv)}\nwrote {found:,} bytes of weights, expected about {expected:,}")
        shutil.rmtree(out)
        return result


def tell(method: str, who: str, result: Run) -> None:
    """One line on the terminal for one run."""
    sizes = f"{result.wall:8.2f} s wall {result.cpu:8.2f} s CPU {result.peak / 1e6:6.0f} MB"
    print(f"{method:16}{who:28}{sizes}", flush=True)


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files in ``folder``."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compute_seconds(result: Run) -> float:
    """The seconds in which `della merge --json` says that it merged tensors."""
    events = (json.loads(line) for line in result.said.splitlines() if line.startswith("{"))
    return next(float(event["merging_seconds"]) for event in events if event.get("event") == "done")


def fresh_installation(scratch: Path, env: Mapping[str, str]) -> Installation:
    """della with its core dependencies in a new virtual environment, removed again."""
    venv = scratch / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", str(ROOT)], check=True, env=dict(env))
    found = installation(venv)
    shutil.rmtree(venv)
    return found


def versions(mergekit: Path | None) -> Iterator[tuple[str, str]]:
    """The versions of both sides."""
    names = ("della", "numpy", "numba", "ml_dtypes")
    yield OURS, ", ".join(["Python " + sys.version.split()[0], *(f"{n} {version(n)}" for n in names)])
    if mergekit:
        code = (
            "import sys; from importlib.metadata import version as v\n"
            "print('Python', sys.version.split()[0] + ', mergekit', v('mergekit') + ', torch', v('torch'))"
        )
        command = [str(mergekit.parent / "python"), "-c", code]
        yield THEIRS, subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    here = Path(sys.executable).parent
    parser = argparse.ArgumentParser(description="Measure della beside mergekit.")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--methods", default=",".join(PARAMETERS), help="comma-separated (default: all)")
    parser.add_argument("--threads", type=int, help="for both tools (default: what each takes by itself)")
    parser.add_argument("--small", action="store_true", help="the small checkpoints: to try this script out")
    parser.add_argument("--data", type=Path, help="where the checkpoints are, or shall be made")
    parser.add_argument("--della", type=Path, default=here / "della", help="the della command")
    parser.add_argument("--mergekit", type=Path, default=ROOT / ".venv-mergekit/bin/mergekit-yaml")
    parser.add_argument("--ours-only", action="store_true", help="leave mergekit out")
    parser.add_argument("--no-install", action="store_true", help="leave the fresh installation out")
    options = parser.parse_args()
    options.methods = [name for name in PARAMETERS if name in options.methods.split(",")]
    options.data = (options.data or data_folder(options.small)).resolve()
    if not options.methods or options.rounds < 1:
        parser.error(f"at least one round, and of these methods: {', '.join(PARAMETERS)}")
    if options.ours_only:
        options.mergekit = None
    elif not options.mergekit.is_file():
        parser.error(f"no mergekit in {options.mergekit}; scripts/mergekit-venv installs it")
    return options


def make_data(options: argparse.Namespace) -> None:
    """Generate the checkpoints where they are missing; in another process, as this one must stay small."""
    if missing(options.data):
        command = [sys.executable, "-m", "benchmarks.checkpoints", "--out", str(options.data)]
        subprocess.run([*command, *(["--small"] if options.small else [])], check=True, cwd=ROOT)


@contextmanager
def scratch_folder(data: Path) -> Iterator[Path]:
    """A folder beside the data, so that every output lies on their file system."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=data.parent) as name:
        yield Path(name)


def facts(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What a reader needs to know to judge the figures or to repeat them."""
    size = weight_bytes(options.data / BASE) / 2e6
    words = [word.replace(f"{ROOT}/", "") for word in sys.argv[1:]]
    return [
        ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("command", f"`python -m benchmarks.compare {shlex.join(words)}`"),
        *machine(),
        ("load before the first run", f"{os.getloadavg()[0]:.2f}"),
        *versions(options.mergekit),
        ("data", f"a base and {len(EXPERTS)} experts of {size:.0f} million parameters each, bf16"),
        ("rounds", f"{options.rounds}, medians"),
    ]


def main() -> None:
    """Measure everything that was asked for, print the table and write the report."""
    options = arguments()
    make_data(options)
    told, measured = facts(options), Measured()
    with scratch_folder(options.data) as scratch:
        bench = Bench(options.della, options.mergekit, options.data, scratch, options.threads, measured)
        if not options.no_install:
            measured.installed[OURS] = fresh_installation(scratch, bench.environment)
            if options.mergekit:
                measured.installed[THEIRS] = installation(options.mergekit.parent.parent)
        read_all([path for name in (BASE, *EXPERTS) for path in (options.data / name).glob("*.safetensors")])
        bench.help()
        bench.cold(options.methods)
        for method in options.methods:
            bench.alternate(method, options.rounds)
        if "della" in options.methods:
            bench.scale("della", options.rounds)
        if {"della", "linear"} <= set(options.methods):
            bench.in_turn(options.rounds)
    print(f"\n{table(figures(measured))}")
    if options.report:
        options.report.write_text(document(measured, told))
        print(f"\nThe report: {options.report}")


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"benchmarks.compare: {error}")
