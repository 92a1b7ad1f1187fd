"""The rows of the miniature's tables and figures, chosen on validation, and the claims about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from della.merging.methods import METHODS
from della.paper import mini_grid as grid
from della.paper.mini_bench import Bench, Choice, best, epsilons
from della.paper.mini_grid import MERGES, Cell, Grid, Kind
from della.paper.published import published

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
Chosen = dict[tuple[str, str], dict[float | None, Choice]]


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


def choose(bench: Bench, importance: str, seeds: int, sweep: int, seed: int) -> Experiment:
    """Choose p, lambda and epsilon of all kinds, and lay out rows and claims.

    seeds: of each chosen merge; ``sweep`` of each point of a curve.  ``seed`` is the first.
    importance: what ranks deltas in all tables but table 5, which has both.
    """

    def ranked(kinds: Sequence[Kind]) -> list[Kind]:
        return [_ranked(kind, importance) for kind in kinds]

    made = Experiment()
    merges = bench.grid.merges
    table1 = bench.choices("table 1 on validation", _pairs(ranked(grid.TABLE1), merges))
    shared = epsilons(table1)
    rest = {
        "2": bench.choices("table 2 on validation", _pairs(ranked(grid.TABLE2), ["Math+Code"]), shared),
        "4": bench.choices("table 4 on validation", _pairs(ranked(grid.TABLE4), merges), shared),
        "5": bench.choices("table 5 on validation", _pairs(grid.TABLE5, merges), shared),
        "figure 5": bench.choices("figure 5 on validation", _pairs(ranked(grid.ADAPTIVE), merges), shared),
        "beside": bench.choices("other methods", _pairs(ranked(grid.BESIDE), ["all three"]), shared),
    }
    made.chosen = {"1": table1} | rest
    first = {key: Row("1", key[1], key[0], best(by_p).cell, seeds) for key, by_p in table1.items()}
    made.add(*first.values())
    _merged(made, first, {table: _best(table, chosen, seeds) for table, chosen in rest.items()})
    _curves(made, table1, sweep)
    _pruned(made, bench.grid, importance, sweep, seed)
    return made


def _ranked(kind: Kind, importance: str) -> Kind:
    """The kind with deltas ranked by ``importance``, as far as it ranks any."""
    ranks = "importance" in METHODS[kind.method].parameters
    is_random = ("rank_by", "random") in kind.settings or ("rank_by", grid.RANDOM_LAYER) in kind.settings
    if importance == "magnitude" or not ranks or is_random:
        return kind
    return replace(kind, settings=(*kind.settings, ("importance", importance)))


def _pairs(
    kinds: Sequence[Kind], merges: Sequence[str] | Mapping[str, object]
) -> list[tuple[Kind, str, tuple[str, ...]]]:
    return [(kind, name, MERGES[name]) for name in merges for kind in kinds]


def _best(table: str, chosen: Chosen, seeds: int) -> dict[tuple[str, str], Row]:
    return {key: Row(table, key[1], key[0], best(by_p).cell, seeds) for key, by_p in chosen.items()}


def _merged(
    made: Experiment, first: dict[tuple[str, str], Row], rest: dict[str, dict[tuple[str, str], Row]]
) -> None:
    """Tables 1, 2, 4 and 5, figure 5, and the other methods."""
    for rows in rest.values():
        made.add(*rows.values())
    for merge in dict.fromkeys(merge for _, merge in first):
        for better, worse in (("DARE", "TA"), ("DELLA", "DARE"), ("DELLA", "TIES"), ("DELLA", "TA")):
            made.claim(f"Table 1: {better} over {worse}", merge, first[better, merge], first[worse, merge])
        for kind in grid.TABLE1:
            row, other = first[kind.label, merge], rest["4"][kind.label, merge]
            made.claim(f"Table 4: {kind.label} with Elect over without", merge, row, other)
        della = first["DELLA", merge]
        made.add(Row("5", merge, "DELLA", della.cell, della.seeds))
        for kind in grid.TABLE5:
            made.claim(f"Table 5: DELLA over {kind.label}", merge, della, rest["5"][kind.label, merge])
        made.add(Row("figure 5", merge, "constant", della.cell, della.seeds))
        for kind in grid.ADAPTIVE:
            about = f"Figure 5: constant lambda over lambda_scaling: {kind.label}"
            made.claim(about, merge, della, rest["figure 5"][kind.label, merge])
    two = rest["2"]
    made.claim(
        "Table 2: rescale over none",
        "Math+Code",
        two["with rescale", "Math+Code"],
        two["without rescale", "Math+Code"],
    )
    for (label, merge), row in rest["beside"].items():
        made.claim(f"Beside: {label} over DELLA", merge, row, first["DELLA", merge])


def _curves(made: Experiment, table1: Chosen, sweep: int) -> None:
    """Table 7 and figure 6: DELLA, DARE and TIES over p, lambda chosen for each p."""
    for merge in dict.fromkeys(merge for _, merge in table1):
        rows: dict[tuple[str, float], Row] = {}
        for label in ("DELLA", "DARE", "TIES"):
            for p, choice in table1[label, merge].items():
                assert p is not None
                table, name = ("7", f"p={p:g}") if label == "DELLA" else ("figure 6", f"{label} p={p:g}")
                rows[label, p] = Row(table, merge, name, choice.cell, sweep)
        made.add(*rows.values())
        for p in table1["DELLA", merge]:
            assert p is not None
            for other, name in (("TIES", "top-K"), ("DARE", "DARE")):
                about = f"Figure 6: MAGPRUNE over {name} in merging"
                made.claim(about, f"{merge}, p={p:g}", rows["DELLA", p], rows[other, p])


def _pruned(made: Experiment, tried: Grid, importance: str, sweep: int, seed: int) -> None:
    """Tables 3 and 6, figures 3 and 4: one expert alone, at lambda 1."""

    def alone(table: str, expert: str, kinds: Sequence[tuple[Kind, float]], p: float) -> dict[str, Row]:
        ranked = [(_ranked(kind, importance), epsilon) for kind, epsilon in kinds]
        cells = {kind.label: kind.cell((expert,), p, 1.0, epsilon, seed) for kind, epsilon in ranked}
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
