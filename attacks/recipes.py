"""Rows 17 to 20: recipes that bomb, that are misspelt, out of range, or full of markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import della
from attacks import PAYLOAD, RECIPE, Maker, refused, survived
from attacks.files import RECIPE_TEXT, same_as_undisturbed

WHERE = r"FOLDER/recipe.yml:{}:{}"


def written(text: str | bytes) -> Maker:
    """A maker that writes this recipe; FOLDER in it is the folder."""

    def make(folder: Path) -> None:
        raw = text.encode() if isinstance(text, str) else text
        (folder / "recipe.yml").write_bytes(raw.replace(b"FOLDER", str(folder).encode()))

    return make


def wrong(row: int, name: str, text: str | bytes, *says: str) -> None:
    refused(row, RECIPE, "FOLDER/recipe.yml", *says, name=name)(written(text))


def more(parameters: str) -> str:
    """The good recipe with parameters for all models."""
    return f"{RECIPE_TEXT.replace('task_arithmetic', 'della')}parameters:\n  {parameters}\n"


# ---- row 17: bombs ----------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MAPS = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 40))

wrong(17, "a-billion-laughs", LAUGHS + RECIPE_TEXT, "aliases expand to more than 10,000 values")
wrong(17, "a-billion-laughs-of-mappings", MAPS + RECIPE_TEXT, "expand to more than 10,000|nested more than")
wrong(17, "an-alias-to-itself", "a: &a [*a]\n" + RECIPE_TEXT, WHERE.format(1, 8), "refers to itself")
wrong(17, "merge-keys", "<<: {a: 1}\n" + RECIPE_TEXT, WHERE.format(1, 1), "merge keys")
wrong(17, "more-than-a-mebibyte", RECIPE_TEXT + "#" * (1 << 20), "larger than 1 MiB")
wrong(17, "a-mebibyte-of-values", "a: [" + "1," * 500_000 + "1]\n", "more than 10,000 values")
wrong(17, "a-mebibyte-of-brackets", "a: " + "[" * 1_000_000, "nested more than 32 levels")
wrong(17, "a-mebibyte-of-lists", "- " * 500_000, "nested more than 32 levels|not valid YAML")
wrong(17, "a-mebibyte-of-mappings", "{a: " * 250_000, "nested more than 32 levels")
wrong(17, "a-mebibyte-of-question-marks", "? " * 500_000, "nested more than 32 levels|not valid YAML")
wrong(17, "a-mebibyte-of-one-number", more("lambda: " + "9" * 1_000_000), "lambda")
wrong(17, "a-mebibyte-of-one-word", more("lambda: " + "x" * 1_000_000), "lambda")
wrong(17, "a-very-long-key", "x" * 1000 + ": 1\n" + RECIPE_TEXT, "unknown key 'xxx")
wrong(17, "thirty-three-levels", "a: " + "[" * 33 + "]" * 33 + "\n", "nested more than 32 levels")
wrong(
    17,
    "a-key-twice",
    RECIPE_TEXT + "seed: 1\nseed: 2\n",
    WHERE.format(9, 1),
    "'seed' stands twice",
    "keep one",
)
wrong(
    17,
    "a-key-twice-in-disguise",
    RECIPE_TEXT + 'seed: 1\n"see\\x64": 2\n',
    WHERE.format(9, 1),
    "stands twice",
)
wrong(
    17, "a-tag-that-runs-code",
    f'name: !!python/object/apply:builtins.open ["FOLDER/{PAYLOAD}", "w"]\n{RECIPE_TEXT}',
    WHERE.format(1, 7), "tag", "remove it",
)  # fmt: skip
wrong(17, "two-documents", RECIPE_TEXT + "---\n" + RECIPE_TEXT, "has no name", "a file of its own")
wrong(17, "many-documents", "---\n".join([RECIPE_TEXT] * 101), "one document more", "one file each")
wrong(
    17, "documents-in-a-circle",
    f"name: A\n{RECIPE_TEXT}  - model: B\n---\nname: B\n{RECIPE_TEXT}  - model: A\n", "circle: A -> B -> A",
)  # fmt: skip
wrong(17, "utf-16", RECIPE_TEXT.encode("utf-16"), "save the file as UTF-8")
wrong(17, "not-text", b"\x80\x81" + RECIPE_TEXT.encode(), "not UTF-8")
wrong(17, "a-nul", RECIPE_TEXT + "name: a\0b\n", r"U\+0000", "remove it")
wrong(17, "nothing", b"", "empty")


# ---- row 18: misspelt and misplaced -----------------------------------------------------------------------

wrong(18, "densty", more("densty: 0.5"), WHERE.format(9, 3), "did you mean 'density'")
wrong(
    18,
    "merge-metod",
    RECIPE_TEXT.replace("merge_method", "merge_metod"),
    WHERE.format(1, 1),
    "'merge_method'",
)
wrong(18, "dela", RECIPE_TEXT.replace("task_arithmetic", "dela"), WHERE.format(1, 15), "did you mean 'della'")
wrong(18, "bfloat61", RECIPE_TEXT + "dtype: bfloat61\n", WHERE.format(8, 8), "did you mean 'bfloat16'")
wrong(18, "nomalize", more("nomalize: true"), WHERE.format(9, 3), "did you mean 'normalize'")
wrong(18, "wieght-of-a-model", RECIPE_TEXT.replace("weight", "wieght", 1), WHERE.format(5, 18), "'weight'")
wrong(18, "density-at-the-top", RECIPE_TEXT + "density: 0.5\n", WHERE.format(8, 1), "belongs under")
wrong(
    18, "dtype-among-the-parameters", more("dtype: bfloat16"), WHERE.format(9, 3), "belongs at the top level"
)
wrong(
    18, "lambda-of-a-model", RECIPE_TEXT.replace("{weight", "{lambda: 1, weight", 1), WHERE.format(5, 18),
    "belongs under the recipe's own parameters",
)  # fmt: skip
wrong(
    18, "weight-beside-the-model", RECIPE_TEXT + "    weight: 1\n", WHERE.format(8, 5),
    "belongs under the parameters of model 2",
)  # fmt: skip


def warned(folder: Path, out: Path) -> None:
    same_as_undisturbed(folder, out)
    with della.plan(folder / "recipe.yml") as plan:
        assert any("recipe.yml:9:3: 'density' has no effect" in note for note in plan.notes)


survived(18, warned, name="a-key-that-the-method-does-not-use")(
    written(RECIPE_TEXT + "parameters:\n  density: 0.3\n")
)


# ---- row 19: out of range ---------------------------------------------------------------------------------

wrong(19, "density-above-one", more("density: 1.5"), WHERE.format(9, 12), "between 0 and 1, found 1.5")
wrong(19, "density-below-zero", more("density: -0.1"), "between 0 and 1, found -0.1")
wrong(19, "density-not-a-number", more("density: .nan"), "finite number")
wrong(19, "infinite-weight", RECIPE_TEXT.replace("0.5", ".inf", 1), WHERE.format(5, 26), "finite number")
wrong(19, "weight-that-overflows", RECIPE_TEXT.replace("0.5", "1e999", 1), "finite number")
wrong(19, "end-of-a-gradient", more("density: [0.2, 0.5, 1.01]"), WHERE.format(9, 23), "between 0 and 1")
wrong(19, "a-case-for-one-tensor", more("density: [{filter: norm, value: 2}, {value: 1}]"), "between 0 and 1")
wrong(
    19, "middle-of-two-gradients", more("density: [0.9, 0.7, 0.9]\n  epsilon: [0.05, 0.4, 0.05]"),
    "layer [123]", "density", "epsilon",
)  # fmt: skip
wrong(19, "density-too-near-to-zero", more("density: 0.05\n  epsilon: 0.1"), "density", "epsilon")
wrong(19, "negative-epsilon", more("density: 0.5\n  epsilon: -0.1"), "epsilon")
wrong(19, "negative-seed", RECIPE_TEXT + "seed: -1\n", WHERE.format(8, 7), "seed")
wrong(19, "seed-of-65-bits", RECIPE_TEXT + "seed: 18446744073709551616\n", WHERE.format(8, 7), "seed")
wrong(19, "text-for-a-number", more("density: half"), "must be a number, found 'half'")
wrong(19, "an-empty-gradient", more("density: []"), "empty list")


# ---- row 20: markup ---------------------------------------------------------------------------------------

NAME = "a`b```c---<script>alert(1)<!--*_#|[x](javascript:y)~~~ é\u202e"
NOISE = """\
---
# ---
# license: mine
# ---
# ``` ```` ~~~ ~~~~ </code></pre><script>alert(2)</script> {{ 7 * 7 }} ${HOME} $(id)
name: 'text
  ```
  ---
  </code></pre><script>alert(3)</script>'
"""


def nothing_but_text(folder: Path, out: Path) -> None:
    """One front matter, with the keys it should have; markup only inside the recipe's own fence."""
    same_as_undisturbed(folder, out)
    recipe = (folder / "recipe.yml").read_bytes().decode()
    card = (out / "README.md").read_bytes().decode()
    lines = card.split("\n")
    assert lines[0] == "---"
    front = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    assert set(front) <= {"base_model", "base_model_relation", "library_name", "tags"}, front
    body = "\n".join(lines[lines.index("---", 1) + 1 :])
    fence = re.search(r"^(`{3,})yaml\n(.*?)^\1$", body, re.MULTILINE | re.DOTALL)
    assert fence is not None
    assert fence[2].rstrip("\n") == recipe.rstrip("\n"), "the recipe stands in one fence, whole"
    rest = body.replace(fence[0], "")
    assert "<script" not in rest
    assert "<!--" not in rest
    assert not re.search(r"^(---|```|~~~)", rest, re.MULTILINE)
    assert not re.search(r"(?<!\\)\[x\]", rest)
    assert json.loads((out / "della.json").read_text())["recipe"] == recipe


def named(old: str, new: str, noise: str = "") -> Callable[[Path], None]:
    """Renames a model, in the recipe too."""

    def make(folder: Path) -> None:
        (folder / old).rename(folder / new)
        quoted: Any = json.dumps(f"./{new}", ensure_ascii=False)
        (folder / "recipe.yml").write_text(noise + RECIPE_TEXT.replace(f"./{old}", quoted))

    return make


survived(20, nothing_but_text, name="markup-in-the-name-of-the-base")(named("base", NAME))
survived(20, nothing_but_text, name="markup-in-the-name-of-an-expert")(named("math", NAME))
survived(20, nothing_but_text, name="markup-in-the-recipe")(written(NOISE + RECIPE_TEXT))
survived(20, nothing_but_text, name="markup-in-both")(named("code", NAME, NOISE))
survived(20, nothing_but_text, name="markup-in-the-name-of-the-result", out=NAME)(written(RECIPE_TEXT))
survived(20, nothing_but_text, name="a-result-whose-name-is-not-text", out="out\udcff")(written(RECIPE_TEXT))
survived(20, nothing_but_text, name="carriage-returns")(
    written(f'{RECIPE_TEXT}# \r# ---\r# ```\rname: "x\r```\r<script>\r````\r<!--"\n')
)
wrong(
    20, "a-line-break-in-a-name", RECIPE_TEXT.replace("./math", '"./math\\n---\\nlicense: mine\\n---\\n"'),
    WHERE.format(4, 12), "line break", "single quotes",
)  # fmt: skip
wrong(
    20, "an-escape-sequence-in-a-name", RECIPE_TEXT.replace("./math", '"./math\\e[2J\\e]0;x\\a"'),
    WHERE.format(4, 12), "control character|not allowed",
)  # fmt: skip
