"""Measuring della beside mergekit: `checkpoints` makes the data, `compare` runs both tools and reports."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
BASE = "base"
EXPERTS = ("expert-a", "expert-b", "expert-c")


def data_folder(small: bool) -> Path:
    """Where the checkpoints of a size lie by default."""
    return DATA / ("small" if small else "full")


def missing(folder: Path) -> list[str]:
    """The models that are not in ``folder``; one that is there is complete, as it came in by one rename."""
    return [name for name in (BASE, *EXPERTS) if not (folder / name / "config.json").is_file()]
