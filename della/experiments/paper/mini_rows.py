"""The rows of the miniature's tables and figures, chosen on validation, and the claims about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from della.experiments.paper import mini_grid as grid
from della.experiments.paper.mini_bench import Bench, Chosen, epsilons
from della.experiments.paper.mini_grid import Cell, Grid, Kind
from della.experiments.paper.published import published

PRUNING_CLAIMS = (
    ("Table 6: row over DARE", "row", "DARE"),
    ("Table 6: row over random row", "row", "random row"),
    ("Table 6: layer over random layer", "layer", "random layer"),
    ("Figure 3: MAGPRUNE over top-K", "row", "top-K"),
    ("Figure 3: wide MAGPRUNE over DARE", "row, wide", "DARE"),
    ("Figure 3: wide MAGPRUNE over top-K", "row, wide", "top-K"),
    ("Figure 4: ranks of the row over those of the layer", "row", "layer"),
    ("Figure 4: the same with a wide range", "row, wide", "layer, wide"),
)
# The tables whose p and lambda are chosen: their kinds, and their merges ((): all).
TABLES: dict[str, tuple[tuple[Kind, ...], tuple[str, ...]]] = {
    "1": (grid.TABLE1, ()),
    "2": (grid.TABLE2, ("Math+Code",)),
    "4": (grid.TABLE4, ()),
    "5": (grid.TABLE5, ()),
    "figure 5": (grid.ADAPTIVE, ()),
    "beside": (grid.BESIDE, ("all three",)),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: a cell, merged with so many seeds.  ``group`` is the merge, or p where one expert
    is pruned.
    """

    table: str
    group: str
    label: str
    cell: Cell
    seeds: int

    @property
    def cells(self) -> list[Cell]:
        """The cells whose mean it is."""
        count = self.seeds if self.cell.is_random else 1
        return [replace(self.cell, seed=self.cell.seed + i) for i in range(count)]

    @property
    def paper(self) -> Mapping[str, float]:
        """The paper's scores of this row, by benchmark; {} where it has none."""
        return published(int(self.table), self.group, self.label) if self.table.isdigit() else {}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A claim: that ``better`` keeps more than ``worse``."""

    about: str
    group: str
    better: Row
    worse: Row


@dataclass(slots=True)
class Experiment:
    """All rows and claims, by the choices on validation."""

    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    chosen: dict[str, Chosen] = field(default_factory=dict)  # on validation, by table

    def add(self, *rows: Row) -> None:
        self.rows += rows

    def claim(self, about: str, group: str, better: Row, worse: Row) -> None:
        self.comparisons.append(Comparison(about, group, better, worse))

    def cells(self) -> list[Cell]:
        """What is to be scored on test, each once; merges of three first, as they take longest."""
        found = {cell.key: cell for row in self.rows for cell in row.cells}
        return sorted(found.values(), key=lambda cell: -len(cell.experts))


def choose(bench: Bench, tables: Sequence[str], seeds: int, sweep: int, seed: int) -> Experiment:
    """Choose p, lambda and epsilon of all kinds, and lay out rows and claims.

    tables: which of `TABLES`; table 1 is always among them.  seeds: of each merge of a table, ``sweep`` of
    each point of a figure, and where one expert is pruned; ``seed`` is the first.
    """
    made = Experiment()
    merges = {table: merges or bench.grid.merges for table, (_, merges) in TABLES.items()}

    def wanted(names: Sequence[str]) -> list[tuple[str, Kind, str]]:
        return [(name, kind, merge) for name in names for merge in merges[name] for kind in TABLES[name][0]]

    table1 = bench.choices("table 1", wanted(["1"]))["1"]
    others = wanted([name for name in tables if name != "1"])
    made.chosen = {"1": table1} | bench.choices("the other tables", others, epsilons(table1))
    rows: dict[str, dict[tuple[str, str], Row]] = {}
    for table, chosen in made.chosen.items():
        count = sweep if table.startswith("figure") else seeds
        rows[table] = {
            key: Row(table, key[1], key[0], picked.best.cell, count) for key, picked in chosen.items()
        }
    for found in rows.values():
        made.add(*found.values())
    _claims(made, rows)
    _curves(made, table1, sweep)
    _pruned(made, bench.grid, sweep, seed)
    return made


def _claims(made: Experiment, rows: Mapping[str, Mapping[tuple[str, str], Row]]) -> None:
    """The claims about merges; DELLA of table 1 stands in table 5 and figure 5 too."""
    first = rows["1"]
    for (label, merge), row in first.items():
        made.claim(f"Table 4: {label} with Elect over without", merge, row, rows["4"][label, merge])
    for merge in dict.fromkeys(merge for _, merge in first):
        for better, worse in (("DARE", "TA"), ("DELLA", "DARE"), ("DELLA", "TIES"), ("DELLA", "TA")):
            made.claim(f"Table 1: {better} over {worse}", merge, first[better, merge], first[worse, merge])
        for table, label in (("5", "DELLA"), ("figure 5", "constant")):
            if table in rows:
                made.add(replace(first["DELLA", merge], table=table, label=label))
    for (label, merge), row in rows.get("5", {}).items():
        made.claim(f"Table 5: DELLA over {label}", merge, first["DELLA", merge], row)
    for (label, merge), row in rows["figure 5"].items():
        about = f"Figure 5: constant lambda over lambda_scaling: {label}"
        made.claim(about, merge, first["DELLA", merge], row)
    for (label, merge), row in rows["beside"].items():
        made.claim(f"Beside: {label} over DELLA", merge, row, first["DELLA", merge])
    two = {label: row for (label, _), row in rows["2"].items()}
    made.claim("Table 2: rescale over none", "Math+Code", two["with rescale"], two["without rescale"])


def _curves(made: Experiment, table1: Chosen, sweep: int) -> None:
    """Table 7 and figure 6: DELLA, DARE and TIES over p, lambda chosen for each p."""
    for merge in dict.fromkeys(merge for _, merge in table1):
        rows: dict[tuple[str, float], Row] = {}
        for label in ("DELLA", "DARE", "TIES"):
            for p, choice in table1[label, merge].by_p.items():
                assert p is not None
                table, name = ("7", f"p={p:g}") if label == "DELLA" else ("figure 6", f"{label} p={p:g}")
                rows[label, p] = Row(table, merge, name, choice.cell, sweep)
        made.add(*rows.values())
        for p in table1["DELLA", merge].by_p:
            assert p is not None
            for other, name in (("TIES", "top-K"), ("DARE", "DARE")):
                about = f"Figure 6: MAGPRUNE over {name} in merging"
                made.claim(about, f"{merge}, p={p:g}", rows["DELLA", p], rows[other, p])


def _pruned(made: Experiment, tried: Grid, sweep: int, seed: int) -> None:
    """Tables 3 and 6, figures 3 and 4: one expert alone, at lambda 1."""

    def alone(table: str, expert: str, kinds: Sequence[tuple[Kind, float]], p: float) -> dict[str, Row]:
        cells = {kind.label: kind.cell((expert,), p, 1.0, epsilon, seed) for kind, epsilon in kinds}
        return {label: Row(table, f"p={p:g}", label, cell, sweep) for label, cell in cells.items()}

    for p in tried.pruned:
        rows = alone("3", "code", grid.TABLE3, p)
        made.add(*rows.values())
        for name in ("DARE", "DELLA"):
            about = f"Table 3: {name} with rescale over without"
            made.claim(about, f"p={p:g}", rows[f"{name} with rescale"], rows[f"{name} without rescale"])
        about = "Table 3: DELLA over DARE, with rescale"
        made.claim(about, f"p={p:g}", rows["DELLA with rescale"], rows["DARE with rescale"])
    for p in (*tried.pruned, *tried.pruned_more):
        rows = alone("6", "math", grid.TABLE6, p) | alone("figure 3", "math", grid.FIGURE3, p)
        made.add(*rows.values())
        for about, better, worse in PRUNING_CLAIMS:
            made.claim(about, f"p={p:g}", rows[better], rows[worse])
