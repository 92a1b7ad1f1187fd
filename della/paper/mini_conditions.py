"""What would have to be true for the paper's order to hold in the miniature, and how far it is from that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from della.paper.page import Section
from della.paper.tables import Table, number

Found = Mapping[str, Any]
_STEPS = ("Table 1: DARE over TA", "Table 1: DELLA over DARE", "Table 1: DELLA over TIES")
_OTHERS = ("TA", "DARE", "TIES")
# By column, the claims that MAGPRUNE keeps more than DARE at one p.
_BY_P = {
    "merges": "Figure 6: MAGPRUNE over DARE in merging",
    "one expert": "Table 6: row over DARE",
    "one expert, wide range": "Figure 3: wide MAGPRUNE over DARE",
}


def conditions(found: Found) -> Section:
    """The section, of results.json; every number in it is computed."""
    shares = [_share(found, merge, "TA") for merge in found["grid"]["merges"]]
    ours, papers = [one for one, _ in shares if one is not None], [paper for _, paper in shares]
    chosen = [row["model"]["p"] for row in found["rows"] if (row["table"], row["label"]) == ("1", "DELLA")]
    text = (
        "Merging would have to break more. Dropping and electing can only win back what the experts take "
        f"from each other: TA keeps {_range(ours)} % of what DELLA keeps here, in the paper "
        f"{_range(papers)} %.",
        "Or more problems would have to be scored: a difference of the size found here, if it is true, needs "
        "as many as the second table says. More seeds do not help, they narrow the other interval.",
        "Or so much would have to be dropped that it matters what is: the third table has MAGPRUNE less DARE "
        f"for each p. Validation chose p of {_range(chosen, 1)} for DELLA, so that what happens near p = .9 "
        "is not in table 1.",
    )
    return Section("What would have to be true for it to hold", text, (
        _lost(found), _problems(found), _dropped(found),
    ))  # fmt: skip


def _lost(found: Found) -> Table:
    """How much of what DELLA keeps the others keep too."""
    rows = []
    for merge in found["grid"]["merges"]:
        shares = [_share(found, merge, label) for label in _OTHERS]
        rows.append((merge, *(number(share, 0) for pair in shares for share in pair)))
    columns = ("merge", *(name for label in _OTHERS for name in (f"{label} here", "in the paper")))
    note = "Kept gain in percent of DELLA's; in the paper, the average in percent of DELLA's."
    return Table("What the others keep of what DELLA keeps", columns, tuple(rows), note=note)


def _problems(found: Found) -> Table:
    rows = []
    for claim in _STEPS:
        for one in _of(found, claim):
            difference = one["over_items"]
            half = (difference["high"] - difference["low"]) / 2
            enough = ""
            if difference["value"] > 0:
                enough = f"{_rounded(found['items']['test'] * (half / difference['value']) ** 2):,}"
            rows.append((
                claim.partition(": ")[2], one["group"], number(difference["value"], sign=True),
                f"± {half:.1f}", enough,
            ))  # fmt: skip
    columns = ("step", "merge", "difference", "interval", "problems a task that would tell")
    note = (
        f"Intervals narrow with the root of the number of problems, {found['items']['test']} here. None is "
        "told where the difference is against the order."
    )
    return Table("How many problems would tell", columns, tuple(rows), labels=2, note=note)


def _dropped(found: Found) -> Table:
    """MAGPRUNE less DARE by p: the mean over merges, and one expert alone."""
    by_p: dict[float, list[str]] = {}
    claims = {column: _of(found, claim) for column, claim in _BY_P.items()}
    for p in sorted({_p(one) for ones in claims.values() for one in ones}):
        by_p[p] = [_mean([one for one in ones if _p(one) == p]) for ones in claims.values()]
    rows = tuple((f"{p:g}", *cells) for p, cells in by_p.items())
    note = "Points; the mean over merges, with how many hold and how many are reversed where any does."
    return Table("MAGPRUNE less DARE, over the drop rate", ("p", *claims), rows, note=note)


def _mean(claims: Sequence[Found]) -> str:
    if not claims:
        return ""
    mean = sum(one["over_items"]["value"] for one in claims) / len(claims)
    counts = {word: sum(one["verdict"] == word for one in claims) for word in ("holds", "reversed")}
    told = ", ".join(
        f"{count} of {len(claims)} {word}" if len(claims) > 1 else word
        for word, count in counts.items()
        if count
    )
    return number(mean, sign=True) + (f" ({told})" if told else "")


def _share(found: Found, merge: str, label: str) -> tuple[float | None, float]:
    """What a method of table 1 keeps in percent of what DELLA keeps: here (None where DELLA keeps nothing),
    and in the paper.
    """
    rows = {
        row["label"]: row for row in found["rows"] if row["table"] == "1" and row["group"] == merge
    }  # fmt: skip
    own, della = rows[label], rows["DELLA"]
    kept = della["value"]["value"]
    here = 100 * own["value"]["value"] / kept if kept > 0 else None
    return here, 100 * own["paper"]["average"] / della["paper"]["average"]


def _of(found: Found, claim: str) -> list[Found]:
    return [one for one in found["claims"] if one["claim"] == claim]


def _p(claim: Found) -> float:
    return float(claim["group"].rpartition("p=")[2])


def _range(values: Sequence[float], digits: int = 0) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else "nothing"


def _rounded(count: float) -> int:
    """Two leading digits; the estimate has no more."""
    step = 10.0 ** max(0, int(math.log10(max(count, 1))) - 1)
    return int(math.ceil(count / step) * step)
