"""The report of the miniature, of results.json alone: every verdict in it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from della.experiments.demo import EXPERTS
from della.experiments.mini_conditions import conditions
from della.experiments.mini_figures import figure3, figure4, figure6, gains, pruning_table
from della.experiments.pages import (
    LAMBDA,
    VERDICTS,
    Column,
    Found,
    P,
    best_first,
    given,
    listed,
    losses,
    said,
    shown,
    table,
)
from della.experiments.published import BENCHMARKS, published
from della.experiments.results import having
from della.report.page import Report, Section
from della.report.tables import Table, number

Rows = Sequence[Found]
_COMPARED = ("difference, over problems", "over seeds", "here it", "in the paper")
_TITLES = {"lm": "LM perplexity", "math": "Math %", "code": "Code %"}
_ORDER = (
    ("TA < DARE", "Table 1: DARE over TA"),
    ("DARE < DELLA", "Table 1: DELLA over DARE"),
    ("TIES < DELLA", "Table 1: DELLA over TIES"),
    ("TA < DELLA", "Table 1: DELLA over TA"),
)
KEPT = (
    "Kept gain, in percent: the mean over a merge's tasks of (base - merge) / (base - own expert), in loss "
    "per token for LM (that is in log perplexity) and in wrong answers for Math and Code. 0 is the base, "
    "100 is every expert on its own task. The paper averages percentages instead; a perplexity cannot be "
    "averaged with those."
)
INTERVALS = (
    "Intervals are 95 %: over problems by the bootstrap (of means over seeds, drawn within each task, the "
    "ends of the scale held fixed), over seeds by Student, which is how far the random draws alone move a "
    "score. A difference counts only where both its paired intervals, over problems and over seeds, leave "
    "zero out; else it is within noise. Of twenty true ties one would count by chance; and that another "
    "validation split might have chosen another p or lambda is in no interval."
)


def report(found: Found) -> Report:
    """The whole report."""
    spent = found["time"]
    resumed = spent["scores_of_earlier_runs"]
    text = (
        "Three experts of one base of 2.5 million parameters, merged as in the paper's tables and scored on "
        "held-out problems, beside the paper's own numbers.",
        f"Made by `{found['command']}`, seed {found['seed']}: {spent['models_scored']} models scored in "
        f"{spent['seconds'] / 60:.1f} minutes with {spent['threads']} threads"
        + (f"; {resumed} scores are of a run that was cut short." if resumed else "."),
    )
    sections = [_verdict(found), conditions(found), _how(found), _alone(found)]
    sections += [_table1(found), _tables23(found), _table4(found)]
    sections += [_table5(found)] if found["importance"] == "wanda" else []
    sections += [_table6(found), _figure5(found), _table7(found), _beside(found), _claims(found)]
    return Report("The paper's experiment in miniature", text, tuple(sections))


# ---- the verdict ------------------------------------------------------------------------------------------


def _verdict(found: Found) -> Section:
    rows: list[tuple[str, ...]] = []
    for title, claim in _ORDER:
        for one in having(found["claims"], claim=claim):
            rows.append((title, *_difference(one)))
    columns = ("the paper's order", "merge", *_COMPARED)
    order = Table("Does the paper's order hold?", columns, tuple(rows), labels=2, note=(
        "Differences of kept gain in points; in the paper, of its average of percentages."
    ))  # fmt: skip
    return Section("Verdict", (_sentence(found),), (order, _counted(found)))


def _sentence(found: Found) -> str:
    """The paper's order in one sentence, counted."""
    claims = [one for _, claim in _ORDER[:3] for one in having(found["claims"], claim=claim)]
    merges = list(dict.fromkeys(one["group"] for one in claims))
    whole = [m for m in merges if all(one["verdict"] == "holds" for one in claims if one["group"] == m)]
    counted = {verdict: sum(one["verdict"] == verdict for one in claims) for verdict in VERDICTS}
    where = "on no merge" if not whole else f"on {listed(whole)}"
    return (
        f"The paper's order, TA < DARE < DELLA and TIES < DELLA, holds as a whole {where}. Of its "
        f"{len(claims)} single steps {counted['holds']} hold, {counted['within noise']} are within noise, "
        f"{counted['reversed']} are reversed."
    )


def _counted(found: Found) -> Table:
    """Every claim of the report, counted."""
    rows = []
    for claim in sorted(dict.fromkeys(one["claim"] for one in found["claims"]), key=_place):
        ones = [one["verdict"] for one in found["claims"] if one["claim"] == claim]
        if not claim.startswith("Beside"):
            rows.append((claim, str(len(ones)), *(str(ones.count(verdict)) for verdict in VERDICTS)))
    columns = ("claim", "merges, or p", *VERDICTS)
    note = "Each claim says that the first named keeps more; every single difference stands at the end."
    return Table("All claims, counted", columns, tuple(rows), note=note)


def _place(claim: str) -> tuple[bool, bool, str]:
    """Tables first, then figures, then what stands beside the paper."""
    return claim.startswith("Beside"), claim.startswith("Figure"), claim.partition(":")[0]


# ---- how, and what it starts from -------------------------------------------------------------------------


def _how(found: Found) -> Section:
    items, grid = found["items"], found["grid"]
    if found["code"]["scored_by"] == "sandbox":
        spent = found["time"]
        code = f"Code is pass@1: the functions ran in a kernel sandbox ({spent['sandbox']})."
        if spent["programs_asked"]:
            code += (
                f" Each text ran once: {spent['programs_run']} texts of {spent['programs_asked']} answers."
            )
    else:
        code = f"Code was read as arithmetic and not executed: {found['code']['why']}."
    text = (
        "Problems of three splits are held apart by a hash of what is asked. Chosen on "
        f"{items['validation']} validation problems a task, by kept gain with one draw of a seed apart, "
        f"and at last among the three best of all p on {items['final']}; "
        f"reported on {items['test']} test problems a task. LM is the perplexity of stories, Math the exact "
        "match of worked word problems.",
        code,
        f"p is one of {_numbers(grid['drops'])}; lambda is climbed to along {_numbers(grid['lambdas'])} (no "
        "Elect: times the number of experts, as the mean is then over all; calibrated: times the inflation "
        "that it takes out); epsilon of DELLA, the half-width of its range, is one of "
        f"{_numbers(grid['epsilons'])} as far as p has room, chosen for each p after lambda. Variants of "
        "DELLA keep its epsilon and choose p and lambda anew.",
        f"Methods that draw are merged with {found['seeds']} seeds, figures and pruning with "
        f"{found['sweep_seeds']}. Weights are rounded to bfloat16, as a merge on disk would be.",
        KEPT,
        INTERVALS,
    )  # fmt: skip
    return Section("How it was done", text)


def _alone(found: Found) -> Section:
    names = {"base": "base", "lm": "LM expert", "math": "Math expert", "code": "Code expert"}
    rows: list[tuple[str, ...]] = [
        (names[name], *(_score(scores[task], task) for task in EXPERTS),
         *losses(scores, 3),
         _paper({"paper": published(1, name, "alone")}))
        for name, scores in found["singles"].items()
    ]  # fmt: skip
    columns = ("model", *_TITLES.values(), "loss LM", "Math", "Code", "paper")
    note = "Loss in nats per token of the right answer. The paper's: AlpacaEval / GSM8K / MBPP."
    return Section("Base and experts", (), (Table("", columns, tuple(rows), note=note),))


# ---- tables of merges -------------------------------------------------------------------------------------


def merges_table(title: str, rows: Rows, note: str = "", label: str = "method") -> Table:
    """Merges with all their scores, beside the paper's."""
    columns = (
        said("merge", "group"), said(label, "label"), P, LAMBDA,
        ("epsilon", lambda row: given(row["model"]["epsilon"] or None)),
        *(_of_task(name, task, _score) for task, name in _TITLES.items()),
        ("kept gain", lambda row: shown(row["value"])),
        ("over seeds", lambda row: _spread(row["over_seeds"])),
        *(_of_task(name, task, lambda scores, _: number(scores["loss"], 3))
          for task, name in zip(EXPERTS, ("loss LM", "Math", "Code"), strict=True)),
    )  # fmt: skip
    if any(row["paper"] for row in rows):
        average: Column = ("average", lambda row: number(row["paper"].get("average")))
        columns = (*columns, ("paper", _paper), average)
    return table(title, rows, columns, labels=2, note=note)


def _of_task(head: str, task: str, text: Callable[[Found, str], str]) -> Column:
    return head, lambda row: text(row["tasks"][task], task) if task in row["tasks"] else ""


def _section(
    title: str, rows: Rows, text: str = "", plot: tuple[str, str] = ("", ""), note: str = "",
    label: str = "method",
) -> Section:  # fmt: skip
    """A table of merges under its title, with a plot of their kept gains."""
    plots = (gains(*plot, rows),) if plot[0] else ()
    return Section(title, (text,) if text else (), (merges_table("", rows, note, label),), plots)


def _table1(found: Found) -> Section:
    return _section(
        "Table 1: Drop, Elect, Fuse", having(found["rows"], table="1"),
        "TA, DARE and TIES with Elect and the mean, as in the paper (paper_ta, paper_dare, paper_ties).",
        ("table1", "Table 1: kept gain of the four methods"),
        "The paper's scores are AlpacaEval / GSM8K / MBPP, and their average.",
    )  # fmt: skip


def _tables23(found: Found) -> Section:
    two = merges_table("Table 2: rescale in a merge, lambda 1", having(found["rows"], table="2"))
    three = pruning_table(
        "Table 3: rescale, the Code expert alone, percent right", having(found["rows"], table="3"),
        "The paper names neither expert nor task.",
    )  # fmt: skip
    return Section("Tables 2 and 3: rescale", (), (two, three))


def _table4(found: Found) -> Section:
    rows = having(found["rows"], table="4")
    return _section("Table 4: without Elect", rows, "", ("table4", "Table 4: kept gain without Elect"))


def _table5(found: Found) -> Section:
    text = (
        "Scores |delta| times the norm of the input instead of |delta|; norms over "
        f"{found['calibration_items']} training texts of each expert's own task."
    )
    return _section("Table 5: WANDA scores", _by_merge(found, "5"), text, ("table5", "Table 5: kept gain"))


def _table6(found: Found) -> Section:
    text = (
        "The Math expert alone, at lambda 1. The range has the half-width of the release, .07; wide is .3; "
        "both as far as p has room. What the paper's figures 3 and 4 show is known from its text only; "
        "they are rebuilt by subject."
    )
    six = pruning_table("Table 6: percent right", having(found["rows"], table="6"), "")
    title = "Table 6 and figures 3 and 4: pruning one expert"
    return Section(title, (text,), (six,), (figure3(found), figure4(found)))


def _figure5(found: Found) -> Section:
    rows = _by_merge(found, "figure 5", first="constant")
    text = (
        "Constant lambda, chosen on validation, against the factors of each row or tensor that take its "
        "place; the authors' release cannot run these. Rebuilt by subject."
    )
    plot = ("figure5", "Figure 5: DELLA with constant and with adaptive lambda")
    return _section("Figure 5: constant and adaptive lambda", rows, text, plot, label="lambda is")


def _table7(found: Found) -> Section:
    text = "Lambda and epsilon chosen for each p. Figure 6, MAGPRUNE and top-K over p, is rebuilt by subject."
    seven = merges_table("Table 7: DELLA over p", having(found["rows"], table="7"), label="drop rate")
    return Section("Table 7 and figure 6: over p", (text,), (seven,), (figure6(found),))


def _beside(found: Found) -> Section:
    first = [
        row | {"label": f"{row['label']} (table 1)"}
        for row in having(found["rows"], table="1", group="all three")
    ]
    rows = [row | {"paper": {}} for row in (*first, *having(found["rows"], table="beside"))]
    text = "Every method, each with p and lambda chosen on validation, best first. DELLA is that of table 1."
    plot = ("beside", "All three experts: kept gain of every method")
    return _section("Beside the paper: every method", best_first(rows), text, plot)


def _claims(found: Found) -> Section:
    ordered = sorted(found["claims"], key=lambda one: _place(one["claim"]))
    rows = [(one["claim"], *_difference(one)) for one in ordered]
    columns = ("claim", "where", *_COMPARED)
    note = "In points of kept gain, or of right answers where one expert is pruned."
    return Section("All differences", (), (Table("", columns, tuple(rows), labels=2, note=note),))


# ---- text of single cells ---------------------------------------------------------------------------------


def _by_merge(found: Found, table: str, first: str = "") -> Rows:
    """The rows of a table, those of one merge together, the one called ``first`` before its others."""
    merges = list(found["grid"]["merges"])
    rows = having(found["rows"], table=table)
    return sorted(rows, key=lambda row: (merges.index(row["group"]), bool(first) and row["label"] != first))


def _score(scores: Mapping[str, float], task: str) -> str:
    return number(scores["perplexity"], 3) if task == "lm" else number(scores["percent"])


def _paper(row: Found) -> str:
    scores = [row["paper"].get(benchmark) for benchmark in BENCHMARKS.values()]
    return " / ".join("-" if score is None else number(score) for score in scores) if row["paper"] else ""


def _difference(one: Found) -> tuple[str, ...]:
    """Where, the difference over problems and over seeds, the verdict, and the paper's difference."""
    paper = number(one["paper"], 1, sign=True)
    over = (shown(one[of], sign=True) for of in ("over_items", "over_seeds"))
    return (one["group"], *over, one["verdict"], paper)


def _spread(found: Mapping[str, float] | None) -> str:
    """Half of the interval of the mean over seeds."""
    return "" if found is None else f"± {number((found['high'] - found['low']) / 2)}"


def _numbers(values: Sequence[float]) -> str:
    return listed([f"{value:g}" for value in values])
