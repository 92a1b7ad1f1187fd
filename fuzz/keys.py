"""Misspelt keys of recipes: each is refused in its line, and the key that was meant is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from della.errors import RecipeError
from della.merging.registry import ALL_PARAMETERS, METHODS
from della.recipe.reader import _MODEL_KEYS, _TOP_KEYS, read_recipe
from della.recipe.settings import CASE_KEYS
from fuzz.job import Job, attempt

_HINT = re.compile(r"did you mean (.*)\?$")


@dataclass(frozen=True)
class Spot:
    """A key where it may stand: ``text`` is the recipe with {} for it; ``known`` all that may stand there."""

    key: str
    text: str
    known: tuple[str, ...]

    @property
    def line(self) -> int:
        return self.text[: self.text.index("{}")].count("\n") + 1


def spots() -> Iterator[Spot]:
    """Every key wherever it may stand, from della's own tables."""
    head = "merge_method: {method}\nbase_model: owner/base\nmodels:\n  - model: owner/math\n"
    plain = head.replace("{method}", "della")
    for key in _TOP_KEYS:
        lines = [line for line in plain.splitlines(keepends=True) if not line.startswith(f"{key}:")]
        text = "".join(lines) + "{}: x\n"
        if key == "models":
            text = plain.replace("models:", "{}:")
        yield Spot(key, text, _TOP_KEYS)
    for key in _MODEL_KEYS:
        more = (
            "  - {}: owner/code\n" if key == "model" else "  - model: owner/code\n    {}:\n      weight: 1\n"
        )
        yield Spot(key, plain + more, _MODEL_KEYS)
    for key in CASE_KEYS:
        other = {"filter": "value: 1", "value": "filter: mlp"}.get(key, "value: 1")
        yield Spot(key, plain + f"parameters:\n  weight:\n    - {other}\n      {{}}: 1\n", CASE_KEYS)
    every = tuple(ALL_PARAMETERS)
    for method in METHODS.values():
        start = head.replace("{method}", method.name)
        for key, parameter in method.parameters.items():
            yield Spot(key, start + "parameters:\n  {}: 1\n", every)
            if parameter.scope == "model":
                own = tuple(name for name, p in ALL_PARAMETERS.items() if p.scope == "model")
                yield Spot(key, start + "    parameters:\n      {}: 1\n", own)


def _dropped(word: str) -> set[str]:
    return {word[:i] + word[i + 1 :] for i in range(len(word))}


def _doubled(word: str) -> set[str]:
    return {word[:i] + word[i] + word[i:] for i in range(len(word))}


def _swapped(word: str) -> set[str]:
    return {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}


def _replaced(word: str) -> set[str]:
    return {word[:i] + letter + word[i + 1 :] for i in range(len(word)) for letter in "aeinrstz"}


def _dressed(word: str) -> set[str]:
    dashed = {word.replace("_", "-"), word.replace("_", "")} if "_" in word else set()
    return dashed | {word.upper(), word.title(), word[:1].upper() + word[1:]}


EDITS: dict[str, Callable[[str], set[str]]] = {
    "a letter left out": _dropped,
    "a letter doubled": _doubled,
    "two letters swapped": _swapped,
    "a wrong letter": _replaced,
    "case or dashes": _dressed,
}


def run(job: Job, most: int) -> None:
    """One misspelt key per case."""
    job.counts.update({"spots": 0, "skipped as ambiguous": 0})
    everything = {*_TOP_KEYS, *_MODEL_KEYS, *CASE_KEYS, *ALL_PARAMETERS}
    case = -1
    for spot in spots():
        job.counts["spots"] += 1
        for edit in EDITS.values():
            case += 1
            if case >= most or job.only not in (None, case):
                continue
            slip = misspelt(spot, edit, everything, job.rng(case))
            if slip is None:
                job.counts["skipped as ambiguous"] += 1
            else:
                _check(job, case, spot, slip)


def misspelt(spot: Spot, edit: Callable[[str], set[str]], everything: set[str], rng: Random) -> str | None:
    """One misspelling that is no key, and to which the key that is meant is the nearest of its table."""
    slips = sorted(edit(spot.key) - everything)
    rng.shuffle(slips)
    for slip in slips:
        plain = slip.lower().replace("-", "_")
        others = min(distance(plain, key) for key in spot.known if key != spot.key)
        if distance(plain, spot.key) < others and plain and plain not in everything - {spot.key}:
            return slip
    return None


def distance(a: str, b: str) -> int:
    """Letters to add, leave out, change, or swap with the next one to turn ``a`` into ``b``."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            steps = [row[j - 1] + 1, rows[-1][j] + 1, rows[-1][j - 1] + (x != y)]
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                steps.append(rows[-2][j - 2] + 1)
            row.append(min(steps))
        rows.append(row)
    return rows[-1][-1]


def _check(job: Job, case: int, spot: Spot, slip: str) -> None:
    text = spot.text.replace("{}", slip)
    raw = text.encode()
    error = job.timed(case, raw, lambda: attempt(lambda: read_recipe(text)))
    what = f"{slip!r} for {spot.key!r} in line {spot.line}"
    if not isinstance(error, RecipeError):
        job.fail(case, f"{what}: {'accepted' if error is None else repr(error)[:200]}", raw)
        return
    said = str(error)
    if not said.startswith(f"recipe:{spot.line}:") or f"unknown key {slip!r}" not in said:
        job.fail(case, f"{what}: {said[:300]}", raw)
        return
    hint = _HINT.search(said)
    if hint is None or repr(spot.key) not in hint[1].split(" or "):
        job.fail(case, f"{what}: not suggested: {said[:300]}", raw)
    elif hint[1] != repr(spot.key):
        job.fail(case, f"{what}: suggested beside others that are not as near: {said[:300]}", raw)
