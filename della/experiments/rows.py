"""Rows and claims: what the tables of a report consist of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from della.experiments.cells import Cell
from della.experiments.published import published


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: cells to choose among, of which the best is merged with so many seeds.

    ``group`` is the merge, or p where one expert is pruned.
    """

    table: str
    group: str
    label: str
    candidates: tuple[Cell, ...]
    seeds: int = 1

    @property
    def cell(self) -> Cell:
        """What was chosen, where that is known; else the first candidate, which stands for it."""
        return self.candidates[0]

    @property
    def cells(self) -> list[Cell]:
        """The cells whose mean it is."""
        return self.cell.seeded(self.seeds)

    @property
    def paper(self) -> Mapping[str, float]:
        """The paper's scores of this row, by benchmark; {} where it has none."""
        return published(int(self.table), self.group, self.label) if self.table.isdigit() else {}


@dataclass(frozen=True, slots=True)
class Claim:
    """That ``better`` keeps more than ``worse``."""

    about: str
    group: str
    better: Row
    worse: Row
