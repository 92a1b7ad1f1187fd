"""The table of campaigns.  A new one is a function of a Job and a row here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzz import flips, headers, keys, names, recipes, truncations
from fuzz.job import Job


@dataclass(frozen=True)
class Campaign:
    """``run`` does at most the number of cases it is given; ``bar`` is in CPU seconds per case."""

    run: Callable[[Job, int], None]
    full: int
    sample: int
    bar: float | None = None


CAMPAIGNS: dict[str, Campaign] = {
    "headers": Campaign(headers.run, 100_000, 5_000, 0.050),
    "truncations": Campaign(truncations.run, 100_000, 100_000),
    "names": Campaign(names.run, 40, 40),
    "keys": Campaign(keys.run, 100_000, 100_000),
    "yaml": Campaign(recipes.run, 20_000, 300, 0.100),
    "flips": Campaign(flips.run, 1_000, 100),
}


def run(
    name: str,
    failures_to: Path,
    *,
    seed: int = 0,
    sample: bool = False,
    most: int | None = None,
    only: int | None = None,
    hold_times: bool = True,
) -> Job:
    """Run one campaign: at its size, at ``most`` cases, or the case ``only``."""
    campaign = CAMPAIGNS[name]
    size = campaign.sample if sample else campaign.full
    bar = campaign.bar if hold_times else None
    with TemporaryDirectory(prefix="fuzz-") as folder:
        job = Job(name, seed, sample, Path(folder).resolve(), failures_to, bar, only)
        start = time.perf_counter()
        campaign.run(job, size if most is None else most)
        job.seconds = time.perf_counter() - start
    return job
