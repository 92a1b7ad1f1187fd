"""Run all campaigns: python -m crash [--sample N] [--seed N] [--workers N] [--report FILE]"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from crash.campaigns import all_campaigns


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N kills at a call and N/4 of the others, not all"
    )
    parser.add_argument("--seed", type=int, default=0, help="which cases the sample holds (default 0)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the outcome as a Markdown table")
    options = parser.parse_args()
    rows, failed = [], False
    with tempfile.TemporaryDirectory(prefix="della-crash-") as folder:
        started = time.monotonic()
        for outcome in all_campaigns(Path(folder), options.sample, options.workers, options.seed):
            seconds = time.monotonic() - started
            print(f"{outcome.line}, {seconds:.0f} s", flush=True)
            for failure in outcome.failures:
                print(f"  FAILED {failure}", flush=True)
            failed = failed or bool(outcome.failures) or not outcome.tried
            rows.append((outcome, seconds))
            started = time.monotonic()
    if options.report:
        lines = ["| campaign | held | seconds |", "|---|---|---|"]
        lines += [f"| {o.line.replace(': ', ' | ', 1)} | {s:.0f} |" for o, s in rows]
        options.report.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
