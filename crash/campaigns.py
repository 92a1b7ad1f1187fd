"""The campaigns: kills, full and failing disks, two writers, permutations."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import della
from crash.scene import EXPERTS, OPTIONS, Scene, run, save_model, tensors, tree
from crash.trace import Call, not_synced, record, sabotaged

STARTS = ("absent", "old")
Case = tuple[str, Call]


@dataclass
class Outcome:
    """Of one campaign: cases tried, what failed, and what else is worth telling."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def count(self, what: str, by: int = 1) -> None:
        self.seen[what] = self.seen.get(what, 0) + by

    @property
    def line(self) -> str:
        """The outcome as one line."""
        more = ", ".join(f"{key} {value}" for key, value in sorted(self.seen.items()))
        held = f"{self.name}: {self.tried - len(self.failures)} of {self.tried}"
        return f"{held} ({more})" if more else held


class Stage:
    """A scene, the calls that a merge makes in it, and workers that each have a place of their own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.scene = Scene(folder).build()
        self.folder, self.workers = folder, workers
        self.calls: dict[str, list[Call]] = {}
        self.unsafe: list[str] = []
        for start in STARTS:
            place = folder / "place0"
            self.scene.set_up(place, start)
            self.calls[start] = record(self.scene.command(place, start), folder / "strace.log")
            self.unsafe += not_synced(self.calls[start], place)

    def near(self, start: str) -> list[Call]:
        """The calls that touch OUT's surroundings."""
        return [call for call in self.calls[start] if "/place0" in call.text]

    def far(self, start: str) -> list[Call]:
        """All other calls: the start of Python, the reading of recipes and models."""
        return [call for call in self.calls[start] if "/place0" not in call.text]

    def spread(self, work: Callable[[Path, Case], None], cases: Sequence[Case]) -> None:
        """``work`` on every case, in several workers."""

        def mine(number: int) -> None:
            place = self.folder / f"place{number}"
            for case in cases[number :: self.workers]:
                work(place, case)

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(mine, range(self.workers)))


def kills(stage: Stage, most: int | None, rng: random.Random) -> Outcome:
    """Killed at every call near OUT, and at as many of the others as make 500 (or at ``most`` in all)."""
    outcome = Outcome("killed at a system call")
    cases = [(start, call) for start in STARTS for call in stage.near(start)]
    others = [(start, call) for start in STARTS for call in stage.far(start)]
    cases += rng.sample(others, min(len(others), max(50, 500 - len(cases))))
    cases = cases if most is None else rng.sample(cases, most)

    def work(place: Path, case: Case) -> None:
        start, call = case
        stage.scene.set_up(place, start)
        done = run(sabotaged(stage.scene.command(place, start), call, "signal=SIGKILL"))
        outcome.tried += 1
        state = stage.scene.state(place)
        wrong = state if state not in ("new", start) else ""
        if done.returncode == 0:
            wrong = wrong or "was not killed"
        elif done.returncode not in (-signal.SIGKILL, 128 + signal.SIGKILL):
            wrong = wrong or f"ended with {done.returncode}: {done.stderr}"
        told, resumed = stage.scene.again(place, start)
        outcome.count(f"then {state}" if not wrong else "then wrong")
        outcome.count("tensors found done", resumed)
        if wrong or told:
            outcome.failures.append(f"{start}, {call.name} number {call.number}: {wrong or told}")

    stage.spread(work, cases)
    return outcome


def errors(stage: Stage, code: str, most: int | None, rng: random.Random) -> Outcome:
    """A call near OUT fails with ``code``: one sentence, exit code not 0, OUT as it was, resumable."""
    outcome = Outcome(f"{code} from a system call")
    cases = [(start, call) for start in STARTS for call in stage.near(start)]
    cases = cases if most is None else rng.sample(cases, most)
    committed = {start: _commit(stage.calls[start]) for start in STARTS}

    def work(place: Path, case: Case) -> None:
        start, call = case
        stage.scene.set_up(place, start)
        done = run(sabotaged(stage.scene.command(place, start), call, f"error={code}"))
        outcome.tried += 1
        is_after = stage.calls[start].index(call) > committed[start]
        lines = done.stderr.splitlines()
        state = stage.scene.state(place)
        wrong = ""
        if done.returncode == 0:
            wrong = "the exit code is 0"
        elif len(lines) != 1 or not lines[0].startswith("della: ") or "a defect" in lines[0]:
            wrong = f"not one sentence: {lines}"
        elif state != ("new" if is_after else start):
            wrong = f"OUT: {state}"
        outcome.count("after the commit" if is_after else "before the commit")
        told, resumed = stage.scene.again(place, start)
        outcome.count("tensors found done", resumed)
        if wrong or told:
            at = f"{start}, {call.name} number {call.number} ({call.text})"
            outcome.failures.append(f"{at}: {wrong or told}")

    stage.spread(work, cases)
    return outcome


def _commit(calls: Sequence[Call]) -> int:
    return next(i for i, call in enumerate(calls) if call.name.startswith("rename"))


def durable(stage: Stage) -> Outcome:
    """Every file, its folder, and the folder of OUT are synced before success is told."""
    return Outcome("fsync of every file and folder before success", len(STARTS), stage.unsafe)


# A command that waits, fully loaded, for a line on stdin.
WAITING = "import sys, della.run, della.planning, della.cli as c; print(flush=True); input(); c.main()"


def writers(folder: Path, rounds: int) -> Outcome:
    """Two merges into one OUT at the same moment: one wins, the other names it at once."""
    outcome = Outcome("two writers at once")
    for seed, name in enumerate(("base", *EXPERTS)):
        save_model(folder / "large" / name, tensors(4, 600, seed))
    models = [{"model": f"large/{expert}", "parameters": {"density": 0.5}} for expert in EXPERTS]
    recipe = {"merge_method": "della", "base_model": "large/base", "models": models}
    (folder / "large.yml").write_text(json.dumps(recipe))
    out = folder / "contested/out"
    command = [sys.executable, "-c", WAITING, "merge", str(folder / "large.yml"), str(out), "--quiet"]
    wanted: dict[str, bytes] = {}
    for _ in range(rounds):
        both = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
        for each in both:
            assert each.stdout is not None
            each.stdout.readline()
        for each in both:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        told = [each.communicate()[1] for each in both]
        codes = [each.returncode for each in both]
        outcome.tried += 1
        wanted = wanted or tree(out)
        winner = codes.index(0) if 0 in codes else 0
        named = f"(pid {both[winner].pid} on {os.uname().nodename})"
        if sorted(codes) != [0, 4] or named not in told[1 - winner]:
            outcome.failures.append(f"exit codes {codes}, said {told}, expected {named}")
        elif tree(out) != wanted or sorted(os.listdir(out.parent)) != ["out"]:
            outcome.failures.append(f"the result differs, or is not alone: {os.listdir(out.parent)}")
        shutil.rmtree(out.parent)
    return outcome


def permutations(stage: Stage) -> Outcome:
    """Threads x parts x orders of the experts: the same files, but for the recipe's text."""
    outcome = Outcome("threads x parts x orders")
    recipe = json.loads((stage.folder / "new.yml").read_text())
    recipe["base_model"] = str(stage.folder / "models/base")
    orders = list(itertools.permutations([str(stage.folder / "models" / e) for e in EXPERTS]))
    combinations = list(itertools.product((1, 2, 4), (1, 2, 7), orders))
    chosen = [combinations[i * len(combinations) // 20] for i in range(20)]
    found: list[dict[str, bytes]] = []
    for threads, parts, order in chosen:
        out = stage.folder / "permuted/out"
        listed = {**recipe, "models": [{"model": m, "parameters": {"density": 0.5}} for m in order]}
        options: dict[str, Any] = {**OPTIONS, "threads": threads, "fsync": False}
        for part in reversed(range(1, parts + 1)) if parts > 1 else ():
            della.merge(listed, out, part=(part, parts), **options)
        della.merge(listed, out, finish=parts > 1, **options)
        files = {n: raw for n, raw in tree(out).items() if n not in ("README.md", "della.json")}
        found.append(files)
        outcome.tried += 1
        if files != found[0]:
            outcome.failures.append(f"{threads} threads, {parts} parts, {order}")
        shutil.rmtree(out.parent)
    return outcome


def all_campaigns(folder: Path, most: int | None, workers: int, seed: int) -> Iterator[Outcome]:
    """Every campaign in turn; ``most`` limits each to so many cases."""
    rng = random.Random(seed)
    stage = Stage(folder, workers)
    yield durable(stage)
    yield permutations(stage)
    few = None if most is None else max(2, most // 4)
    yield writers(folder, 100 if few is None else few)
    yield errors(stage, "ENOSPC", few, rng)
    yield errors(stage, "EIO", few, rng)
    yield kills(stage, most, rng)
