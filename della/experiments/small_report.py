"""The report of the 135 M experiment: tables, plots and words, of results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from della.experiments.demo import EXPERTS as TASKS
from della.experiments.results import interval
from della.experiments.tables import STEPS, TITLES
from della.report.page import Report, Section
from della.report.plots import Mark, Plot, dots, lines
from della.report.tables import Table, number, with_interval

Found = Mapping[str, Any]
NAMES = {"base": "base", "lm": "LM expert", "math": "Math expert", "code": "Code expert"}
LOSSES = ("LM", "Math", "Code")
KEPT = (
    "Kept gain is the mean over tasks of (base - merge) / (base - own expert) in loss per response token: 0 "
    "is the base, 1 every expert on its own task. Intervals are 95 %: over items by the paired bootstrap (of "
    "the mean over seeds, drawn within each task, with the two ends of the scale held fixed), and over seeds "
    "by Student. That the choice of p and lambda might have been another is in no interval."
)
DIFFERENCES = "Bars are 95 % intervals of the paired difference over items, of means over seeds."
COLUMNS = ("method", "p", "lambda", *LOSSES, "kept gain, over items", "over seeds")
OVER_LAMBDA = ("ta", "ties", "dare", "della", "della-wide")


def report(found: Found) -> Report:
    """The whole report."""
    test = found["items"]["test"]
    counts = ", ".join(f"{test[t]['items']} {NAMES[t].split()[0]}" for t in TASKS)
    text = (
        "Three experts of one small real base, merged by every method and scored by loss per response token "
        f"on held-out items ({counts}). Seeds of the methods that draw: {found['seeds']}.",
        KEPT,
        f"Made by `{found['command']}`; merges and scores took {found['time']['seconds'] / 60:.0f} minutes.",
    )
    sections = (_first_look(found), _alone(found), _tuned(found), _equal(found), _precision(found))
    return Report("DELLA on a real model of 135 M", text, (*sections, _over_lambda(found)))


def _first_look(found: Found) -> Section:
    """The first look's order in words, counted."""
    rows = {row["method"]: row for row in found["tuned"]}
    best = max(found["tuned"], key=lambda row: float(row["kept"]["value"]))
    lambdas = ", ".join(f"{rows[method]['lambda']:g} for {TITLES[method]}" for method in STEPS)
    text = (
        f"A first look had found {' < '.join(TITLES[method] for method in STEPS)} at equal p and "
        f"lambda. Here, at lambda 1: {_counted(found, 'equal')}. With p and lambda chosen for each method on "
        f"validation: {_counted(found, 'tuned')}.",
        f"Lambda 1 is not the same place for all: validation chose {lambdas}. A mean of fewer, rescaled "
        "deltas is longer than a mean of all, so at lambda 1 what drops more stands elsewhere on its curve.",
        f"Best of all at its own choice: {best['title']}, {best['kept']['value']:.3f}; "
        f"{TITLES['ta']} {rows['ta']['kept']['value']:.3f}.",
    )
    return Section("What was found", text)


def _counted(found: Found, setting: str) -> str:
    verdicts = [claim["verdict"] for claim in found["claims"] if claim["setting"] == setting]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("better", "within noise", "worse"))
    return f"of {len(verdicts)} steps {counts}"


def _alone(found: Found) -> Section:
    rows = [(NAMES[name], *_losses(loss)) for name, loss in found["singles"].items()]
    note = "Nats per response token on the test items, lower is better."
    tables = [Table("The models alone", ("model", *LOSSES), tuple(rows), note=note)]
    training = found["training"]
    if training:
        made = [
            (NAMES[task], number(row["loss_before"], 3), number(row["loss_after"], 3),
             number(row["relative_delta"], 5), str(row["training_tokens"]))
            for task, row in training.items()
        ]  # fmt: skip
        columns = ("expert", "loss before", "after", "size of the delta", "tokens seen")
        note = "Loss per response token on validation; the delta's norm over the base's."
        tables.append(Table("How they were trained", columns, tuple(made), note=note))
    return Section("Base and experts", (), tuple(tables))


def _tuned(found: Found) -> Section:
    rows = sorted(found["tuned"], key=lambda row: -float(row["kept"]["value"]))
    scores = Table("Lambda and p chosen on validation, scored on test", COLUMNS, tuple(map(_row, rows)))
    columns = ("method", "less TA, over items", "over seeds", "which is",
               "less DELLA wide, over items", "over seeds", "which is")  # fmt: skip
    cells = [
        (row["title"], *_difference(row["less_ta"], row["method"] == "ta"),
         *_difference(row["less_della_wide"], row["method"] == "della-wide"))
        for row in rows
    ]  # fmt: skip
    note = "Better or worse only where the intervals of the difference over items and seeds both exclude 0."
    differences = Table("Kept gain against TA and against DELLA wide", columns, tuple(cells), note=note)
    marks = [_mark(row["less_ta"]["items"], row["title"]) for row in rows if row["method"] != "ta"]
    title = "Kept gain less that of TA, each at the p and lambda chosen on validation"
    plot = dots("tuned", title, DIFFERENCES, marks, "difference of kept gain")
    claims = _claims(found, "tuned", "Is one step better than the one before, each at its own choice?")
    return Section("Each method at its best", (), (scores, differences, claims), (plot,))


def _equal(found: Found) -> Section:
    rows = sorted(found["equal"], key=lambda row: (row["p"] or 0, float(row["kept"]["value"])))
    table = Table("At lambda 1 and equal p", COLUMNS, tuple(map(_row, rows)))
    marks = [_mark(row["less_ta"]["items"], row["title"], f"p = {row['p']:g}") for row in rows if row["p"]]
    title = "Kept gain less that of TA, all at lambda 1"
    plot = dots("equal", title, DIFFERENCES, marks, "difference of kept gain")
    claims = _claims(found, "equal", "The order of the first look, step by step")
    return Section("At equal p and lambda", (), (table, claims), (plot,))


def _claims(found: Found, setting: str, title: str) -> Table:
    rows = [
        ("own choice" if claim["p"] is None else f"p {claim['p']:g}",
         f"{TITLES[claim['better']]} over {TITLES[claim['than']]}",
         _signed(claim["items"]), _signed(claim["seeds"]), claim["verdict"])
        for claim in found["claims"] if claim["setting"] == setting
    ]  # fmt: skip
    columns = ("at", "step", "difference, over items", "over seeds", "which is")
    return Table(title, columns, tuple(rows), labels=2)


def _over_lambda(found: Found) -> Section:
    rows = [row for row in found["validation"] if row["method"] in OVER_LAMBDA]
    drops = sorted({row["p"] for row in rows if row["p"]})
    marks = [
        Mark(row["title"], row["kept"], row["kept"], row["kept"], x=row["lambda"], panel=f"p = {p:g}")
        for p in drops
        for row in sorted(rows, key=lambda row: (OVER_LAMBDA.index(row["method"]), row["lambda"]))
        if row["p"] in (None, p)
    ]
    title = "Kept gain on validation over lambda"
    plot: Plot = lines(
        "lambda", title, "One seed; TA has no p and stands in both.", marks, "lambda", "kept gain"
    )
    ordered = sorted(
        found["validation"],
        key=lambda row: (list(TITLES).index(row["method"]), row["p"] or 0, row["lambda"]),
    )
    cells = [(row["title"], _p(row), f"{row['lambda']:g}", number(row["kept"], 4)) for row in ordered]
    table = Table("All that was tried on validation", ("method", "p", "lambda", "kept gain"), tuple(cells))
    return Section("The choice of lambda", (), (table,), (plot,))


def _precision(found: Found) -> Section:
    rows = [
        (row["title"], _p(row), f"{row['lambda']:g}", number(row["bfloat16"], 4), number(row["float32"], 4),
         number(row["float32"] - row["bfloat16"], 4, sign=True))
        for row in sorted(found["precision"], key=lambda row: -float(row["float32"]))
    ]  # fmt: skip
    text = (
        "A merge is stored in float32 and rounded to bfloat16 to be scored. A small change of a weight that "
        "is itself one of bfloat16 is then lost, a large one is not: this takes from methods that change "
        "many weights a little, more than from those that drop most changes and enlarge the others."
    )
    items = found["items"]["exact"]
    counts = ", ".join(f"{items[t]['items']} {NAMES[t].split()[0]}" for t in TASKS)
    columns = ("method", "p", "lambda", "kept gain in bfloat16", "in float32", "difference")
    table = Table(f"The first seed on fewer items ({counts})", columns, tuple(rows))
    return Section("What bfloat16 does to the scores", (text,), (table,))


def _p(row: Found) -> str:
    return "" if row["p"] is None else f"{row['p']:g}"


def _losses(loss: Mapping[str, float]) -> Sequence[str]:
    return [number(loss[task], 4) for task in TASKS]


def _row(row: Found) -> tuple[str, ...]:
    kept = with_interval(interval(row["kept"]), 4)
    seeds = with_interval(interval(row["kept_over_seeds"]), 4) if len(row["kept_by_seed"]) > 1 else ""
    return (row["title"], _p(row), f"{row['lambda']:g}", *_losses(row["loss"]), kept, seeds)


def _difference(found: Found, itself: bool) -> tuple[str, ...]:
    return ("", "", "") if itself else (_signed(found["items"]), _signed(found["seeds"]), found["verdict"])


def _mark(found: Mapping[str, float], label: str, panel: str = "") -> Mark:
    return Mark("", found["value"], found["low"], found["high"], label=label, panel=panel)


def _signed(found: Mapping[str, float]) -> str:
    return with_interval(interval(found), 4, sign=True)
