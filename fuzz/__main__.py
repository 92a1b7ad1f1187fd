"""``python -m fuzz``: run the campaigns, print a line for each and a table; exit code 1 if one failed."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from fuzz.campaigns import CAMPAIGNS, run
from fuzz.job import table

FAILURES = Path(__file__).parent / "failures"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; all")
    parser.add_argument("--sample", action="store_true", help="a small part of the cases")
    parser.add_argument("--seed", type=int, default=0, help="0")
    parser.add_argument("--case", type=int, help="only this case, to repeat a failure")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table to FILE as well")
    parser.add_argument("--failures", type=Path, default=FAILURES, metavar="FOLDER", help="fuzz/failures")
    options = parser.parse_args(words)
    unknown = [name for name in options.campaigns if name not in CAMPAIGNS]
    if unknown:
        parser.error(f"no campaign {unknown[0]!r}; there is {', '.join(CAMPAIGNS)}")
    if options.case is not None and len(options.campaigns) != 1:
        parser.error("--case needs the one campaign that it belongs to")
    return options


def main(words: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit code."""
    options = arguments(words)
    jobs = []
    for name in options.campaigns or CAMPAIGNS:
        seed, sample, case = options.seed, options.sample, options.case
        jobs.append(run(name, options.failures, seed=seed, sample=sample, only=case))
        print(jobs[-1].told(), flush=True)
    report = table(jobs)
    print(f"\n{report}")
    if options.report:
        asked = shlex.join(words if words is not None else sys.argv[1:])
        facts = f"Python {platform.python_version()}, safetensors {version('safetensors')}"
        options.report.write_text(f"`{f'scripts/fuzz {asked}'.strip()}` ({facts})\n\n{report}\n")
    return 0 if all(job.passed for job in jobs) else 1


if __name__ == "__main__":
    sys.exit(main())
