"""How many sandboxed runs a second there are on one core: python -m benchmarks.sandbox [--seconds 5]

An empty program, a scored program (two sandboxes each) and a batch of 120 small functions, on every sandbox
that works here.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from della.errors import EvaluationError
from della.sandbox.programs import calls, check
from della.sandbox.walls import NAMES, open_sandbox

PROGRAM = "def area(a, b):\n    return a * b\n"
TESTS = [f"assert area({n}, {n + 1}) == {n * (n + 1)}" for n in range(3)]
FUNCTIONS = [(f"def calc(x):\n    return x * {n} - 4\n", "calc") for n in range(120)]


def rate(act: Callable[[], object], seconds: float) -> float:
    """How often ``act`` can be done in a second."""
    act()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        act()
        count += 1
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Print a table, and where nothing can be measured, why."""
    parser = argparse.ArgumentParser(description="Measure the sandbox.")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    seconds = parser.parse_args().seconds
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # its children inherit it
    print("| sandbox | runs a second | programs scored a second | batch of 120 functions |")
    print("|---|---|---|---|")
    for name in NAMES:
        try:
            sandbox = open_sandbox(name)
        except EvaluationError as error:
            print(f"| {name} | {error} | | |")
            continue
        runs = rate(lambda: sandbox.run("pass"), seconds)  # noqa: B023
        scored = rate(lambda: check(sandbox, PROGRAM, TESTS), seconds)  # noqa: B023
        batches = rate(lambda: calls(sandbox, FUNCTIONS, range(6)), seconds)  # noqa: B023
        print(f"| {name} | {runs:.0f} | {scored:.0f} | {1000 / batches:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
