"""What would have to be true for the paper's order to hold in the miniature, and how far it is from that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from della.experiments.pages import Found
from della.experiments.published import BENCHMARKS, MERGES, published
from della.experiments.results import having, interval
from della.report.page import Section
from della.report.tables import Table, number

_STEPS = ("Table 1: DARE over TA", "Table 1: DELLA over DARE", "Table 1: DELLA over TIES")
# By column, the claims that MAGPRUNE keeps more than DARE, of one expert at one p and lambda 1.
_BY_P = {"the release's range": "Table 6: row over DARE", "wide range": "Figure 3: wide MAGPRUNE over DARE"}
# Problems for an interval that leaves zero out four times of five, over those that put its end there.
_POWER = ((1.959964 + 0.841621) / 1.959964) ** 2


def conditions(found: Found) -> Section:
    """The section, of results.json; every number in it is computed."""
    left = {merge: _left(found, merge) for merge in found["grid"]["merges"]}
    most, less = _most_dropped(found)
    text = (
        "What TA loses would have to be won back: DELLA wins "
        f"{_shares((won, of) for of, won, *_ in left.values())} % of it here, in the paper "
        f"{_shares((won, of) for *_, of, won in left.values())} % (first table). Most of what it wins there "
        "is MBPP, of which TA keeps nothing where LM and Code meet.",
        "Differences as small as these would have to be true, and then more problems be scored: as many as "
        "the second table says. Where the seeds leave a doubt as well, more of them too.",
        "Or so much would have to be dropped that it matters what is. One expert alone, at lambda 1, shows "
        "that (third table). In merges it does not help the order: with lambda chosen, DELLA at "
        f"p = {most:g} less TA is {_range(less)} points.",
    )
    tables = (_lost(left), _problems(found), _dropped(found))
    return Section("What would have to be true for it to hold", text, tables)


def _left(found: Found, merge: str) -> tuple[float, float, float, float]:
    """What the experts alone have above TA, and what DELLA wins of it: here in points of kept gain, and in
    the paper in points of its average.
    """
    rows = {row["label"]: row for row in having(found["rows"], table="1", group=merge)}
    ta, della = rows["TA"], rows["DELLA"]
    alone = [published(1, expert, "alone")[BENCHMARKS[expert]] for expert in MERGES[merge]]
    here = 100 - ta["value"]["value"], della["value"]["value"] - ta["value"]["value"]
    paper = ta["paper"]["average"], della["paper"]["average"]
    return *here, sum(alone) / len(alone) - paper[0], paper[1] - paper[0]


def _most_dropped(found: Found) -> tuple[float, list[float]]:
    """The largest p of the sweep, and DELLA there less TA, by merge."""
    sweep = having(found["rows"], table="7")
    most = max(row["model"]["p"] for row in sweep)
    ta = {row["group"]: row["value"]["value"] for row in having(found["rows"], table="1", label="TA")}
    return most, [row["value"]["value"] - ta[row["group"]] for row in sweep if row["model"]["p"] == most]


def _lost(left: Mapping[str, tuple[float, ...]]) -> Table:
    rows = tuple((merge, *map(number, values)) for merge, values in left.items())
    columns = ("merge", "TA leaves here", "DELLA wins", "TA leaves in the paper", "DELLA wins")
    note = (
        "Here in points of kept gain, of which the experts alone have 100; in the paper in points of its "
        "average, of which they have that of their own scores."
    )
    return Table("What is left to win", columns, rows, note=note)


def _problems(found: Found) -> Table:
    rows = []
    for claim in _STEPS:
        for one in having(found["claims"], claim=claim):
            over, seeds = one["over_items"], one["over_seeds"]
            half = (over["high"] - over["low"]) / 2
            enough = ""
            if over["value"] > 0:
                enough = f"{_rounded(found['items']['test'] * _POWER * (half / over['value']) ** 2):,}"
                enough += " and seeds" if seeds and interval(seeds).holds_zero else ""
            value = number(over["value"], sign=True)
            rows.append((claim.partition(": ")[2], one["group"], value, f"± {half:.1f}", enough))
    columns = ("step", "merge", "difference", "interval", "problems a task that would tell")
    note = (
        f"So many that an interval leaves zero out four times of five, {found['items']['test']} here; it "
        "narrows with the root of their number. None is told where the difference is against the order."
    )
    return Table("How many problems would tell", columns, tuple(rows), labels=2, note=note)


def _dropped(found: Found) -> Table:
    """MAGPRUNE less DARE by p, one expert alone."""
    claims = {
        column: {_p(one): one for one in having(found["claims"], claim=claim)}
        for column, claim in _BY_P.items()
    }
    drops = sorted({p for ones in claims.values() for p in ones})
    rows = tuple((f"{p:g}", *(_told(ones.get(p)) for ones in claims.values())) for p in drops)
    note = "Points of right answers."
    return Table("MAGPRUNE less DARE in one expert, over the drop rate", ("p", *claims), rows, note=note)


def _told(claim: Found | None) -> str:
    if claim is None:
        return ""
    verdict = f" ({claim['verdict']})" if claim["verdict"] != "within noise" else ""
    return number(claim["over_items"]["value"], sign=True) + verdict


def _p(claim: Found) -> float:
    return float(claim["group"].rpartition("p=")[2])


def _range(values: Sequence[float], digits: int = 1) -> str:
    return f"{number(min(values), digits)} to {number(max(values), digits)}"


def _shares(pairs: Iterable[tuple[float, float]]) -> str:
    shares = [100 * won / of for won, of in pairs if of > 0]
    return _range(shares, 0) if shares else "0"


def _rounded(count: float) -> int:
    """Two leading digits; the estimate has no more."""
    step = 10.0 ** max(0, int(math.log10(max(count, 1))) - 1)
    return int(math.ceil(count / step) * step)
