"""Mutated recipes: read, or refused with a RecipeError, and quickly either way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from della.errors import RecipeError
from della.recipe.reader import Recipe, read_recipe
from fuzz.job import Job
from fuzz.mutate import damage

HEAD = "merge_method: della\nbase_model: owner/base\nmodels:\n  - model: owner/math\n"
EXPERT = HEAD + "    parameters: {weight: 1.0, density: 0.5}\n"
VALID = (
    EXPERT + "parameters:\n  epsilon: 0.1\n  lambda: 1.1\ndtype: bf16\n",
    EXPERT + "    input_norms: n.safetensors\nparameters: {importance: wanda, rank_by: tensor}\n",
    "# hm\r\nmerge_method: ties\r\nbase_model: ../b\r\nmodels:\r\n- model: 'a b'\r\n- model: \"\\u00e9\"\r\n",
    HEAD + "parameters:\n  weight: [0, 1]\n  density:\n  - {filter: a, value: [0.5, 0.9]}\n  - value: 0.2\n",
    "merge_method: linear\nmodels:\n- &m\n  model: a\n  parameters: {weight: 1e-3}\n- *m\nname: x\nseed: 7\n",
    '{"merge_method": "dare_ties", "base_model": "b", "models": [{"model": "x"}], "compat": "mergekit"}\n',
    HEAD + "name: |\n  two\n  lines\nseed: 18446744073709551615\nparameters: {rescale: true, fuse: sum}\n",
    HEAD + "parameters: {weight: &w [1, 2], density: [0.4, 0.5], normalize: off}\ntokenizer_source: base\n",
)  # fmt: skip


def _bomb(width: int) -> str:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]\n" for n in range(1, 12)]
    return "a0: &a0 [x]\n" + "".join(levels)


HOSTILE = (
    _bomb(9),
    "a: &a [*a]\n",
    "a: &a {b: &b {c: *a}}\n",
    HEAD + "parameters: &p\n  weight: {value: *p}\n",
    "<<: {merge_method: ties}\n" + HEAD,
    "name: !!python/object/apply:os.system [id]\n",
    "%YAML 1.1\n%TAG !x! tag:x,2000:\n--- !x!y {a: 1}\n...\n--- b\n",
    HEAD + "? [a, b]\n: 1\n? {c: d}\n",
    HEAD + "name: " + "[" * 33 + "]" * 33 + "\n",
    "\tname: x\n",
    HEAD + 'model: "E:\\new\\x"\n',
    "\ufeff" + HEAD + "name: \u2028\x85 \U0001f388\n",
    HEAD.encode("utf-16").decode("latin-1"),
    HEAD + "seed: " + "9" * 5000 + "\nparameters: {weight: 1e999, density: -.inf, lambda: .nan}\n",
    HEAD + "seed: 0x1F\nname: 2001-01-01\nparameters: {weight: 1:30, density: 010, epsilon: 1_000}\n",
    HEAD + "".join(f"merge_method: x{n}\n" for n in range(60)),
    "".join(" " * n + "a:\n" for n in range(60)),
    "'''\n" + HEAD + "'''\n",
)
MEGABYTE = 1 << 20
MOST_SAID = 20_000  # characters of a message
# Near the limits of size, depth and count: (what begins, what is repeated, what ends) up to a megabyte.
LARGE: tuple[tuple[str, str, str], ...] = (
    (HEAD, "# aaaa\n", "name: x\n"),
    (HEAD + "parameters:\n  weight: [", "1,", "1]\n"),
    (HEAD, "  - model: m\n", ""),
    (HEAD, "  - model: m\n", "parameters: {density: 0.1}\n"),
    (HEAD, "  - {model: m, parameters: {weight: [-1, 1]}}\n", ""),
    (HEAD, "a: 1\n", ""),
    ("", "[", ""),
    ("", "{", ""),
    ("", '{"a":', ""),
    ("", "- ", ""),
    ("", "? ", ""),
    (HEAD + "# ", "a", "\nname: " + "[" * 2000),
    (HEAD, "# []\n", "name: " + "[" * 2000),
    (HEAD + "name: '", "[", "'\n"),
    (HEAD + 'name: "', "a\n ", ""),
    (HEAD + "name: ", "!", "\n"),
    (HEAD + "name: |\n", "  a\n", ""),
    (HEAD + "seed: ", "9", "\n"),
    ("", "---\n", ""),
    ("", "\t", ""),
    (HEAD, ": ", ""),
    (HEAD + "parameters: {weight: [", "{filter: a, value: 1},", "]}\n"),
    (HEAD + "parameters: {weight: [", "&a 1,", "1]}\n"),
    (HEAD + "parameters: {weight: [", "&a [*a],", "1]}\n"),
    (HEAD + "x: &a [1,2,3,4,5,6,7,8,9]\ny: [", "*a,", "*a]\n"),
    (HEAD + "name: '", "''", "'\n"),
    ("%TAG ! x\n", "%X y\n", "--- a\n"),
)
SHARES = (0.02, 0.04, 0.10, 0.24, 0.9, 0.999, 1.1)  # of a megabyte
WORDS = (
    *("*a", "&a ", "*m", "<<", "!!int ", "!x ", "? ", ": ", "- ", "---\n", "...\n", "%YAML 9.9\n", "{", "}"),
    *("[", "]", "|\n", ">-\n", "'", '"', "\\", "#", "\t", "\r", "\0", "\x85", "\u2028", "\ufeff", "\ud800"),
    *(
        "null",
        "~",
        "true",
        "off",
        "-0",
        ".nan",
        "1e999",
        "9" * 400,
        "0x10",
        "1:30",
        "inf",
        "weight: ",
        "models: ",
    ),
    *("slices: []\n", "[" * 40, "{a: " * 40, "  ", "\n\n"),
)
OVERRIDES = (
    *(
        "lambda=0.8",
        "density=[0.1, 0.2]",
        "models.0.parameters.weight=0.5",
        "models.9.model=x",
        "seed",
        "=",
        "a=b",
    ),
    *(
        "models=[]",
        "models.0=x",
        "parameters=1",
        "parameters.weight.value=1",
        "merge_method=ties",
        "name={a: [b]}",
    ),
    *(
        "weight={filter: a, value: 1}",
        "seed=" + "9" * 99,
        "models.-1=x",
        "models.0.parameters=&a [*a]",
        "x..y=1",
    ),
    "name=" + "[" * 500,
)


def run(job: Job, most: int) -> None:
    """One recipe with some changes, in a file, per case; a quarter of them with overrides."""
    job.counts.update({"read": 0, "large": 0})
    path = job.folder / "recipe.yml"
    for case in job.numbers(most):
        rng = job.rng(case)
        raw, large = mutated(rng)
        overrides = tuple(rng.choices(OVERRIDES, k=rng.randint(1, 2))) if rng.random() < 0.25 else ()
        path.write_bytes(raw)
        read = job.timed(case, raw, partial(outcome, path, overrides))
        job.counts["read"] += isinstance(read, Recipe)
        job.counts["large"] += large
        if isinstance(read, RecipeError):
            if len(str(read)) > MOST_SAID:
                job.fail(case, f"{overrides}: a message of {len(str(read)):,} characters", raw)
        elif isinstance(read, Exception):
            job.fail(case, f"{overrides} raised {type(read).__name__}: {str(read)[:200]}", raw)
        elif meaning(read) != meaning(outcome(read.text + "\n", ())):
            job.fail(case, f"{overrides}: the text that it keeps does not read back as the same", raw)


def outcome(source: str | Path, overrides: tuple[str, ...]) -> Recipe | Exception:
    """The recipe, or what reading it raises."""
    try:
        return read_recipe(source, overrides=overrides)
    except Exception as error:
        return error


def meaning(read: Recipe | Exception) -> object:
    """What a recipe says, wherever it was written."""
    return replace(read, path=None, text="", notes=()) if isinstance(read, Recipe) else read


def mutated(rng: Random) -> tuple[bytes, bool]:
    """A recipe with up to four changes, and whether it is one of the large ones."""
    if rng.random() < 0.04:
        begin, middle, end = rng.choice(LARGE)
        size = int(rng.choice(SHARES) * MEGABYTE) - len(begin) - len(end)
        raw = (begin + middle * (size // len(middle)) + end).encode()
        return (damage(rng, raw, raw) if rng.random() < 0.3 else raw), True
    text = rng.choice(VALID if rng.random() < 0.7 else HOSTILE)
    other = rng.choice((*VALID, *HOSTILE))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        text = rng.choice(_CHANGES)(rng, text, other)
    raw = text.encode("utf-8", "surrogatepass")
    return (damage(rng, raw, other.encode()) if rng.random() < 0.4 else raw), False


def _lines(rng: Random, text: str, other: str) -> str:
    """A line that is left out, doubled, moved, indented otherwise, or taken from another recipe."""
    lines = text.splitlines(keepends=True) or [""]
    at, to = rng.randrange(len(lines)), rng.randint(0, len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines[to:to] = [lines[at]] * rng.choice((1, 1, 30))
    elif kind == 2:
        lines.insert(min(to, len(lines) - 1), lines.pop(at))
    elif kind == 3:
        lines[at] = " " * rng.choice((1, 2, 4)) + lines[at] if rng.random() < 0.5 else lines[at].lstrip(" ")
    else:
        lines.insert(to, rng.choice(other.splitlines(keepends=True)))
    return "".join(lines)


def _word(rng: Random, text: str, other: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(WORDS) + text[at:]


def _value(rng: Random, text: str, other: str) -> str:
    """Something else behind a colon."""
    parts = text.split(": ")
    at = rng.randrange(len(parts))
    if at == 0:
        return text
    _, end, tail = parts[at].partition(rng.choice(("\n", ",", "}")))
    return ": ".join((*parts[:at], rng.choice(WORDS) + end + tail, *parts[at + 1 :]))


def _joined(rng: Random, text: str, other: str) -> str:
    return text + other[rng.randint(0, len(other)) :]


_CHANGES: tuple[Callable[[Random, str, str], str], ...] = (
    *(_lines, _lines, _word, _word, _value, _value),
    _joined,
)
