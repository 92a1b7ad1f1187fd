"""The rows of the miniature's tables and figures, chosen on validation, and the claims about them.

Of each kind and p, lambda is found by climbing, then DELLA's epsilon along its own grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from della.experiments import tables
from della.experiments.bench import Bench
from della.experiments.cells import FIRST, Cell, Kind
from della.experiments.choice import Choice, ordered, tried
from della.experiments.published import MERGES
from della.experiments.rows import Experiment, Found, Row
from della.experiments.tables import Grid

# On validation another draw than those that are reported: a lucky one would be chosen and then reported.
APART = 1_000_000
FINALISTS = 3  # that are compared on more problems
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
    "1": (tables.TABLE1, ()),
    "2": (tables.TABLE2, ("Math+Code",)),
    "4": (tables.TABLE4, ()),
    "5": (tables.TABLE5, ()),
    "figure 5": (tables.ADAPTIVE, ()),
    "beside": (tables.BESIDE, ("all three",)),
}


@dataclass(frozen=True, slots=True)
class Picked:
    """What validation chose for a kind and a merge: the best of every p, and of all that was tried the one to
    report, with its kept gain on the larger split.
    """

    by_p: dict[float | None, Choice]
    best: Choice


Chosen = dict[tuple[str, str], Picked]  # by label of the kind, and name of the merge
Wanted = tuple[str, Kind, str]  # table, kind, name of the merge


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses p, lambda and epsilon on validation; ``seed`` is the first of those that are reported."""

    bench: Bench
    grid: Grid
    seed: int

    def choices(
        self, doing: str, wanted: Sequence[Wanted],
        epsilons: Mapping[tuple[str, float | None], float] | None = None,
    ) -> dict[str, Chosen]:  # fmt: skip
        """What is chosen for each of ``wanted``, by table.

        epsilons: those to take, by (name of the merge, p); without them they are chosen too.
        """
        units = [(*one, p) for one in wanted for p in one[1].places(self.grid.drops)]
        long_first = sorted(units, key=lambda unit: -len(MERGES[unit[2]]))

        def work(unit: tuple[str, Kind, str, float | None]) -> list[Choice]:
            _, kind, merge, p = unit
            epsilon = None if epsilons is None else epsilons.get((merge, p), FIRST)
            return self.choose(kind, MERGES[merge], p, epsilon)

        found = dict(
            zip(long_first, self.bench.each(f"{doing}, on validation", work, long_first), strict=True)
        )
        by_p: dict[Wanted, dict[float | None, list[Choice]]] = {one: {} for one in wanted}
        for table, kind, merge, p in units:
            by_p[table, kind, merge][p] = found[table, kind, merge, p]
        groups = [ordered(c for choices in by_p[one].values() for c in choices)[:FINALISTS] for one in wanted]
        made: dict[str, Chosen] = {}
        for one, best in zip(wanted, self._lasts(doing, groups), strict=True):
            table, kind, merge = one
            firsts = {p: choices[0] for p, choices in by_p[one].items()}
            made.setdefault(table, {})[kind.label, merge] = Picked(firsts, best)
        return made

    def choose(
        self, kind: Kind, experts: tuple[str, ...], p: float | None, epsilon: float | None
    ) -> list[Choice]:
        """What is tried for a kind at one p, the best first: lambda, and without a given epsilon DELLA's too,
        once lambda is found.
        """
        ladder = [float(f"{x:.3g}") for x in kind.ladder(self.grid.lambdas, p, len(experts))]
        start = self.grid.lambdas.index(1.0)
        return ordered(tried(
            kind, experts, p, ladder, start, lambda cell: self.kept(cell, "validation"),
            first=FIRST if epsilon is None else epsilon,
            epsilons=self.grid.epsilons if epsilon is None and kind.has_range else (), seed=self.seed,
        ))  # fmt: skip

    def kept(self, cell: Cell, split: str) -> float:
        """The kept gain of a cell, with a draw apart."""
        return self.bench.kept(replace(cell, seed=cell.seed + APART), split)

    def _lasts(self, doing: str, finalists: Sequence[Sequence[Choice]]) -> list[Choice]:
        """Of each group the best on the split "final"."""
        flat = [choice.cell for group in finalists for choice in group]
        kept = self.bench.each(f"{doing}, finalists", lambda cell: self.kept(cell, "final"), flat)
        known = dict(zip(flat, kept, strict=True))
        return [
            ordered(Choice(choice.cell, known[choice.cell]) for choice in group)[0] for group in finalists
        ]


def lay_out(chooser: Chooser, names: Sequence[str], seeds: int, sweep: int) -> Experiment:
    """Choose p, lambda and epsilon of all kinds, and lay out rows and claims.

    names: which of `TABLES`; table 1 is always among them.  seeds: of each merge of a table, ``sweep`` of
    each point of a figure, and where one expert is pruned.
    """
    made = Experiment()
    merges = {table: merges or chooser.grid.merges for table, (_, merges) in TABLES.items()}

    def wanted(names: Sequence[str]) -> list[Wanted]:
        return [(name, kind, merge) for name in names for merge in merges[name] for kind in TABLES[name][0]]

    table1 = chooser.choices("table 1", wanted(["1"]))["1"]
    others = wanted([name for name in names if name != "1"])
    chosen = {"1": table1} | chooser.choices("the other tables", others, epsilons(table1))
    made.chosen = _stated(chosen)
    rows: dict[str, dict[tuple[str, str], Row]] = {}
    for table, of_table in chosen.items():
        count = sweep if table.startswith("figure") else seeds
        rows[table] = {
            key: Row(table, key[1], key[0], (picked.best.cell,), count) for key, picked in of_table.items()
        }
        made.rows += rows[table].values()
    _claims(made, rows)
    _curves(made, table1, sweep)
    _pruned(made, chooser.grid, sweep, chooser.seed)
    return made


def _stated(chosen: Mapping[str, Chosen]) -> list[Found]:
    """What was best on validation for each p, and of all, with kept gains there in percent."""
    return [
        {
            "table": table, "group": merge, "label": label, "of": of, **choice.cell.stated(),
            "kept": round(100 * choice.kept, 3),
        }
        for table, of_table in chosen.items()
        for (label, merge), picked in of_table.items()
        for of, choice in (*(("p", each) for each in picked.by_p.values()), ("all", picked.best))
    ]  # fmt: skip


def epsilons(chosen: Chosen) -> dict[tuple[str, float | None], float]:
    """DELLA's epsilon by merge and p, for the rows that share it."""
    return {
        (merge, p): choice.cell.epsilon
        for (label, merge), picked in chosen.items()
        if label == tables.DELLA.label
        for p, choice in picked.by_p.items()
        if choice.cell.epsilon is not None
    }


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
                made.rows.append(replace(first["DELLA", merge], table=table, label=label))
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
                rows[label, p] = Row(table, merge, name, (choice.cell,), sweep)
        made.rows += rows.values()
        for p in table1["DELLA", merge].by_p:
            assert p is not None
            for other, name in (("TIES", "top-K"), ("DARE", "DARE")):
                about = f"Figure 6: MAGPRUNE over {name} in merging"
                made.claim(about, f"{merge}, p={p:g}", rows["DELLA", p], rows[other, p])


def _pruned(made: Experiment, grid: Grid, sweep: int, seed: int) -> None:
    """Tables 3 and 6, figures 3 and 4: one expert alone, at lambda 1."""

    def alone(table: str, expert: str, kinds: Sequence[Kind], p: float) -> dict[str, Row]:
        cells = {kind.label: kind.cell((expert,), p, seed=seed) for kind in kinds}
        rows = {label: Row(table, f"p={p:g}", label, (cell,), sweep) for label, cell in cells.items()}
        made.rows += rows.values()
        return rows

    for p in grid.pruned:
        rows = alone("3", "code", tables.TABLE3, p)
        for name in ("DARE", "DELLA"):
            about = f"Table 3: {name} with rescale over without"
            made.claim(about, f"p={p:g}", rows[f"{name} with rescale"], rows[f"{name} without rescale"])
        about = "Table 3: DELLA over DARE, with rescale"
        made.claim(about, f"p={p:g}", rows["DELLA with rescale"], rows["DARE with rescale"])
    for p in (*grid.pruned, *grid.pruned_more):
        rows = alone("6", "math", tables.TABLE6, p) | alone("figure 3", "math", tables.FIGURE3, p)
        for about, better, worse in PRUNING_CLAIMS:
            made.claim(about, f"p={p:g}", rows[better], rows[worse])
