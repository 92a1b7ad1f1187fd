"""The campaigns: kills at a call or at any moment, full and failing disks, two writers, permutations."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import della
from crash.scene import EXPERTS, SCENARIOS, Scenario, Scene, run, save_model, tensors, tree
from crash.trace import Call, not_synced, record, sabotaged

Case = tuple[Scenario, Call]


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
    """A scene, the calls that each scenario makes in it, and workers that each have a folder of their own."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.scene = Scene(folder).build()
        self.folder, self.workers = folder, workers
        self.calls: dict[str, list[Call]] = {}
        self.lock = threading.Lock()
        site = folder / "site0"
        for scenario in SCENARIOS:
            self.scene.set_up(site, scenario)
            self.calls[scenario.name] = record(
                self.scene.command(site, scenario), folder / "strace.log", scenario.swaps
            )

    def cases(self, *, near: bool, scenarios: Sequence[Scenario] = SCENARIOS) -> list[Case]:
        """The calls that touch OUT's surroundings (``near``); or all others: the start of Python, the reading
        of recipes and models.
        """
        return [
            (scenario, call)
            for scenario in scenarios
            for call in self.calls[scenario.name]
            if ("/site0" in call.text) == near
        ]

    def spread(self, outcome: Outcome, work: Callable[[Path, Case], str], cases: Sequence[Case]) -> Outcome:
        """``work`` on every case, in several workers; what it returns is a failure."""

        def mine(number: int) -> None:
            site = self.folder / f"site{number}"
            for scenario, call in cases[number :: self.workers]:
                self.scene.set_up(site, scenario)
                wrong = work(site, (scenario, call))
                told, resumed = self.scene.again(site, scenario)
                with self.lock:
                    outcome.tried += 1
                    outcome.count("tensors found done", resumed)
                    if wrong or told:
                        at = f"{scenario.name}, {call.name} number {call.number} ({call.text})"
                        outcome.failures.append(f"{at}: {wrong or told}")

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(mine, range(self.workers)))
        return outcome


def kills(stage: Stage, most: int | None, rng: random.Random) -> Outcome:
    """Killed at every call near OUT, and at 200 of the others (or at ``most`` in all)."""
    outcome = Outcome("killed at a system call")
    others = stage.cases(near=False)
    cases = stage.cases(near=True) + rng.sample(others, min(len(others), 200))
    cases = cases if most is None else rng.sample(cases, most)

    def work(site: Path, case: Case) -> str:
        scenario, call = case
        command = sabotaged(stage.scene.command(site, scenario), call, "signal=SIGKILL", scenario.swaps)
        done = run(command)
        state = stage.scene.state(site, scenario)
        with stage.lock:
            outcome.count(f"then {state}" if state in stage.scene.trees else "then wrong")
        if state not in (scenario.start, scenario.end):
            return state
        if done.returncode not in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return f"was not killed, but ended with {done.returncode}: {done.stderr}"
        return ""

    return stage.spread(outcome, work, cases)


def errors(stage: Stage, code: str, most: int | None, rng: random.Random) -> Outcome:
    """A call near OUT fails with ``code``: one sentence, exit code not 0, OUT as it was, resumable."""
    outcome = Outcome(f"{code} from a system call")
    scenarios = [scenario for scenario in SCENARIOS if scenario.swaps]
    cases = stage.cases(near=True, scenarios=scenarios)
    cases = cases if most is None else rng.sample(cases, most)
    site0 = stage.folder / "site0"
    committed = {scenario.name: _commit(stage.calls[scenario.name], site0) for scenario in scenarios}

    def work(site: Path, case: Case) -> str:
        scenario, call = case
        done = run(sabotaged(stage.scene.command(site, scenario), call, f"error={code}"))
        is_after = stage.calls[scenario.name].index(call) > committed[scenario.name]
        lines = done.stderr.splitlines()
        state = stage.scene.state(site, scenario)
        with stage.lock:
            outcome.count("after the commit" if is_after else "before the commit")
        if done.returncode == 0:
            return "the exit code is 0"
        if len(lines) != 1 or not lines[0].startswith("della: ") or "a defect" in lines[0]:
            return f"not one sentence: {lines}"
        return "" if state == (scenario.end if is_after else scenario.start) else f"OUT: {state}"

    return stage.spread(outcome, work, cases)


def _commit(calls: Sequence[Call], site: Path) -> int:
    """Which call is the commit; past the end where there is none."""
    return next((i for i, call in enumerate(calls) if call.puts(site)), len(calls))


def durable(stage: Stage) -> Outcome:
    """Every file, its folder, and the folder of OUT are synced before success is told."""
    outcome = Outcome("fsync of every file and folder before success")
    for scenario in SCENARIOS:
        outcome.tried += 1
        written, missing = not_synced(stage.calls[scenario.name], stage.folder / "site0")
        outcome.count("files", written)
        if missing or written < (1 if scenario.single else 3):
            outcome.failures.append(f"{scenario.name}: {written} files, not synced: {missing}")
    return outcome


# A command that waits, fully loaded, for a line on stdin.
WAITING = (
    "import della.running.run, della.planning.planner, della.cli.main as c; "
    "print(flush=True); input(); c.main()"
)


def _waiting(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", WAITING, *arguments]


def writers(folder: Path, rounds: int) -> Outcome:
    """Two merges into one OUT at the same moment: one wins, the other names it at once."""
    outcome = Outcome("two writers at once")
    for seed, name in enumerate(("base", *EXPERTS)):
        save_model(folder / "large" / name, tensors(4, 600, seed))
    models = [{"model": f"large/{expert}", "parameters": {"density": 0.5}} for expert in EXPERTS]
    recipe = {"merge_method": "della", "base_model": "large/base", "models": models}
    (folder / "large.yml").write_text(json.dumps(recipe))
    out = folder / "contested/out"
    command = _waiting(["merge", str(folder / "large.yml"), str(out), "--quiet"])
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


def moments(folder: Path, most: int, rng: random.Random) -> Outcome:
    """Merges of two threads, killed at moments that no call marks, ``most`` times.  One that ended before its
    kill is none: it is counted, and another moment is drawn; 10 times, then it is a failure.
    """
    outcome = Outcome("two threads, killed at any moment")
    scene = Scene(folder, layers=8, width=800, shard=6_000_000, threads=2).build()
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in ("absent", "old", "one file")]
    site = folder / "site"
    span = {scenario.name: _killed(scene, site, scenario, 120.0)[1] for scenario in scenarios}
    for number in range(most):
        scenario = scenarios[number % len(scenarios)]
        for _ in range(10):
            moment = rng.uniform(0, span[scenario.name])
            is_killed, _ = _killed(scene, site, scenario, moment)
            state = scene.state(site, scenario)
            if is_killed or state != scenario.end:
                break
            outcome.count("ended before the kill, drawn again")
        told, resumed = scene.again(site, scenario)
        wrong = "" if is_killed else "was never killed"
        wrong = wrong or (state if state not in (scenario.start, scenario.end) else told)
        outcome.tried += 1
        outcome.count(f"then {state}" if state in scene.trees else "then wrong")
        outcome.count("tensors found done", resumed)
        outcome.count("killed between the first tensor and the last", bool(resumed))
        if wrong:
            outcome.failures.append(f"{scenario.name}, killed after {moment:.3f} s: {wrong}")
    return outcome


def _killed(scene: Scene, site: Path, scenario: Scenario, moment: float) -> tuple[bool, float]:
    """Start the scenario's command and kill it after ``moment`` seconds of merging; whether it came to that,
    and after how many seconds it ended.
    """
    scene.set_up(site, scenario)
    with subprocess.Popen(_waiting(scene.arguments(site, scenario)), stdin=-1, stdout=-1, text=True) as merge:
        assert merge.stdin is not None
        assert merge.stdout is not None
        merge.stdout.readline()
        started = time.monotonic()
        merge.stdin.write("\n")
        merge.stdin.flush()
        try:
            merge.wait(moment)
        except subprocess.TimeoutExpired:
            merge.kill()
    return merge.returncode == -signal.SIGKILL, time.monotonic() - started


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
        options: dict[str, Any] = {**stage.scene.options, "threads": threads}
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
    yield moments(folder / "moments", 200 if most is None else max(3, most // 4), rng)
