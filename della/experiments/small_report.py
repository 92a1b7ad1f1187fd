"""The report of the 135 M experiment: tables, plots and words, of results.json alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from della.experiments.demo import EXPERTS as TASKS
from della.experiments.pages import LAMBDA, VERDICTS, Found, P, best_first, losses, mark, said, shown, table
from della.experiments.results import having
from della.experiments.tables import SMALL, SMALL_VARIANTS, STEPS
from della.report.page import Report, Section
from della.report.plots import Mark, dots, lines
from della.report.tables import Table, number

NAMES = {"base": "base", "lm": "LM expert", "math": "Math expert", "code": "Code expert"}
LOSSES = ("LM", "Math", "Code")
KEPT = (
    "Kept gain is the mean over tasks of (base - merge) / (base - own expert) in loss per response token: 0 "
    "is the base, 1 every expert on its own task. Intervals are 95 %: over items by the paired bootstrap (of "
    "the mean over seeds, drawn within each task, with the two ends of the scale held fixed), and over seeds "
    "by Student. That the choice of p and lambda might have been another is in no interval."
)
DIFFERENCES = "Bars are 95 % intervals of the paired difference over items, of means over seeds."
TITLES = [kind.label for kind in (*SMALL.values(), *SMALL_VARIANTS.values())]
TA, WIDE = SMALL["ta"].label, SMALL["della-wide"].label
STEP_TITLES = [SMALL[name].label for name in STEPS]
OVER_LAMBDA = [SMALL[name].label for name in ("ta", "ties", "dare", "della", "della-wide")]
WORDS = dict(zip(VERDICTS, ("better", "within noise", "worse"), strict=True))
SHARE = 0.01  # results.json has percent
METHOD = said("method", "label")
COLUMNS = (
    METHOD, P, LAMBDA,
    *((name, lambda row, task=task: number(row["tasks"][task]["loss"], 4))
      for task, name in zip(TASKS, LOSSES, strict=True)),
    ("kept gain, over items", lambda row: shown(row["value"], 4, SHARE)),
    ("over seeds", lambda row: shown(row["over_seeds"], 4, SHARE)),
)  # fmt: skip


def report(found: Found) -> Report:
    """The whole report."""
    text = (
        "Three experts of one small real base, merged by every method and scored by loss per response token "
        f"on held-out items ({_items(found, 'test')}). Seeds of the methods that draw: {found['seeds']}.",
        KEPT,
        f"Made by `{found['command']}`; merges and scores took {found['time']['seconds'] / 60:.0f} minutes.",
    )
    sections = (_first_look(found), _alone(found), _tuned(found), _equal(found), _precision(found))
    return Report("DELLA on a real model of 135 M", text, (*sections, _over_lambda(found)))


def _items(found: Found, split: str) -> str:
    counts = found["items"][split]
    return ", ".join(f"{counts[task]['items']} {NAMES[task].split()[0]}" for task in TASKS)


def _first_look(found: Found) -> Section:
    """The first look's order in words, counted."""
    rows = {row["label"]: row for row in having(found["rows"], table="tuned")}
    best = best_first(list(rows.values()))[0]
    lambdas = ", ".join(f"{rows[title]['model']['lambda']:g} for {title}" for title in STEP_TITLES)
    text = (
        f"A first look had found {' < '.join(STEP_TITLES)} at equal p and "
        f"lambda. Here, at lambda 1: {_counted(found, 'equal')}. With p and lambda chosen for each method on "
        f"validation: {_counted(found, 'tuned')}.",
        f"Lambda 1 is not the same place for all: validation chose {lambdas}. A mean of fewer, rescaled "
        "deltas is longer than a mean of all, so at lambda 1 what drops more stands elsewhere on its curve.",
        f"Best of all at its own choice: {best['label']}, {SHARE * best['value']['value']:.3f}; "
        f"{TA} {SHARE * rows[TA]['value']['value']:.3f}.",
    )
    return Section("What was found", text)


def _steps(found: Found, setting: str) -> list[Found]:
    """The claims of the first look, one step after the other."""
    steps = list(itertools.pairwise(STEP_TITLES))
    claims = [c for c in having(found["claims"], claim=setting) if (c["worse"], c["better"]) in steps]
    return sorted(claims, key=lambda c: (c["group"], steps.index((c["worse"], c["better"]))))


def _counted(found: Found, setting: str) -> str:
    verdicts = [claim["verdict"] for claim in _steps(found, setting)]
    counts = ", ".join(f"{verdicts.count(verdict)} {word}" for verdict, word in WORDS.items())
    return f"of {len(verdicts)} steps {counts}"


def _alone(found: Found) -> Section:
    rows = [(NAMES[name], *losses(tasks, 4)) for name, tasks in found["singles"].items()]
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
    rows = best_first(having(found["rows"], table="tuned"))
    scores = table("Lambda and p chosen on validation, scored on test", rows, COLUMNS)
    columns = ("method", "less TA, over items", "over seeds", "which is",
               "less DELLA wide, over items", "over seeds", "which is")  # fmt: skip
    claims = {(c["better"], c["worse"]): c for c in having(found["claims"], claim="tuned")}

    def less(title: str, other: str) -> Sequence[str]:
        return ("", "", "") if title == other else _difference(claims[title, other])

    titles = [row["label"] for row in rows]
    cells = [(title, *less(title, TA), *less(title, WIDE)) for title in titles]
    note = "Better or worse only where the intervals of the difference over items and seeds both exclude 0."
    differences = Table("Kept gain against TA and against DELLA wide", columns, tuple(cells), note=note)
    marks = [
        mark(claims[title, TA]["over_items"], label=title, unit=SHARE) for title in titles if title != TA
    ]
    title = "Kept gain less that of TA, each at the p and lambda chosen on validation"
    plot = dots("tuned", title, DIFFERENCES, marks, "difference of kept gain")
    steps = _claims(found, "tuned", "Is one step better than the one before, each at its own choice?")
    return Section("Each method at its best", (), (scores, differences, steps), (plot,))


def _equal(found: Found) -> Section:
    rows = sorted(
        having(found["rows"], table="equal"),
        key=lambda row: (row["model"]["p"] or 0, float(row["value"]["value"])),
    )
    claims = {(c["better"], c["group"]): c for c in having(found["claims"], claim="equal", worse=TA)}
    marks = [
        mark(claims[row["label"], row["group"]]["over_items"], "", row["label"],
             f"p = {row['model']['p']:g}", unit=SHARE)
        for row in rows if row["group"]
    ]  # fmt: skip
    title = "Kept gain less that of TA, all at lambda 1"
    plot = dots("equal", title, DIFFERENCES, marks, "difference of kept gain")
    steps = _claims(found, "equal", "The order of the first look, step by step")
    shown_rows = table("At lambda 1 and equal p", rows, COLUMNS)
    return Section("At equal p and lambda", (), (shown_rows, steps), (plot,))


def _claims(found: Found, setting: str, title: str) -> Table:
    rows = [
        (claim["group"].replace("=", " ") or "own choice", f"{claim['better']} over {claim['worse']}",
         *_difference(claim))
        for claim in _steps(found, setting)
    ]  # fmt: skip
    columns = ("at", "step", "difference, over items", "over seeds", "which is")
    return Table(title, columns, tuple(rows), labels=2)


def _over_lambda(found: Found) -> Section:
    rows = sorted(found["chosen"], key=lambda row: (TITLES.index(row["label"]), row["p"] or 0, row["lambda"]))
    drops = sorted({row["p"] for row in rows if row["label"] in OVER_LAMBDA and row["p"]})
    marks = [
        Mark(row["label"], kept := SHARE * row["kept"], kept, kept, x=row["lambda"], panel=f"p = {p:g}")
        for p in drops
        for row in sorted(rows, key=lambda row: row["lambda"])
        if row["label"] in OVER_LAMBDA and row["p"] in (None, p)
    ]
    marks.sort(key=lambda one: (one.panel, OVER_LAMBDA.index(one.series)))
    title = "Kept gain on validation over lambda"
    plot = lines("lambda", title, "One seed; TA has no p and stands in both.", marks, "lambda", "kept gain")
    cells = [{"label": row["label"], "model": row, "kept": row["kept"]} for row in rows]
    kept = ("kept gain", lambda row: number(SHARE * row["kept"], 4))
    shown_rows = table("All that was tried on validation", cells, (METHOD, P, LAMBDA, kept))
    return Section("The choice of lambda", (), (shown_rows,), (plot,))


def _precision(found: Found) -> Section:
    def share(row: Found, of: str, less: str = "") -> str:
        value = row[of] - (row[less] if less else 0)
        return number(SHARE * value, 4, sign=bool(less))

    text = (
        "A merge is stored in float32 and rounded to bfloat16 to be scored. A small change of a weight that "
        "is itself one of bfloat16 is then lost, a large one is not: this takes from methods that change "
        "many weights a little, more than from those that drop most changes and enlarge the others."
    )
    columns = (
        METHOD, P, LAMBDA, ("kept gain in bfloat16", lambda row: share(row, "bfloat16")),
        ("in float32", lambda row: share(row, "float32")),
        ("difference", lambda row: share(row, "float32", "bfloat16")),
    )  # fmt: skip
    rows = sorted(found["precision"], key=lambda row: -float(row["float32"]))
    title = f"The first seed on fewer items ({_items(found, 'exact')})"
    return Section("What bfloat16 does to the scores", (text,), (table(title, rows, columns),))


def _difference(claim: Found) -> tuple[str, str, str]:
    """Over items, over seeds, and which it is; of one seed the difference itself."""
    items = claim["over_items"]
    seeds = claim["over_seeds"] or dict.fromkeys(items, items["value"])
    texts = (shown(one, 4, SHARE, sign=True) for one in (items, seeds))
    return *texts, WORDS[claim["verdict"]]  # type: ignore[return-value]
