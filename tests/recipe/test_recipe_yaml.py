"""Hostile, broken and wild YAML: told in one sentence with its location, soon, and nothing else is raised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from della.errors import Collector, RecipeError
from della.recipe import text as recipe_yaml
from della.recipe.reader import read_recipe
from della.recipe.text import dump, parse
from della.recipe.tree import Leaf, Table

HEAD = "merge_method: della\nbase_model: owner/base\nmodels:\n  - model: owner/math\n"
LOST_INDENT = (
    "the indentation does not fit the lines before it; what belongs to a list item stands under its first "
    "key:\n"
    "      - model: NAME\n        parameters:\n          density: 0.5"
)
TAB = "a tab stands here; YAML is indented with spaces only"
COLON = "a ':' cannot stand here: the line is indented too far, or a text with ': ' in it needs quotes"
BACKSLASH = "in double quotes a backslash begins an escape; write a path in single quotes, or with / instead"
BRACKET = "a bracket before this is not closed, or a comma is missing"
NOT_A_MAPPING = "a recipe is a mapping that begins with a key such as 'models:', but this"


def told(source: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(source)
    return str(caught.value)


def bomb(width: int = 9) -> str:
    lines = ["a: &a [" + ", ".join(["lol"] * width) + "]"]
    lines += [
        f"{b}: &{b} [{', '.join(['*' + a] * width)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(params=["CSafeLoader", "SafeLoader"])
def either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """libyaml and PyYAML's own parser word their complaints differently; ours must not."""
    monkeypatch.setattr(recipe_yaml, "_LOADER", getattr(yaml, request.param))


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "\tname: x\n", f"5:1: {TAB}"),
        ("models:\n\t- model: x\n", f"2:1: {TAB}"),
        ("name: a: b\n", f"1:8: {COLON}"),
        ("name: a\n  dtype: b\n", f"2:8: {COLON}"),
        ('base_model: "E:\\mergekit\\base"\n', f"1:13: {BACKSLASH}"),
        ('base_model: "E:\\xyz\\base"\n', f"1:13: {BACKSLASH}"),
        ("models:\n\n- model: X\nparameters:\ndensity: 0.5\n- model: Y\n", f"6:1: {LOST_INDENT}"),
        ("models:\n  - model: x\n  parameters:\n    density: 1\n", f"3:3: {LOST_INDENT}"),
        ("models:\n  - model: x\n   parameters: 1\n", f"3:4: {LOST_INDENT}"),
        ("name: @x\n", "1:7: a value cannot begin with '@'; put it into quotes"),
        ("name: 'x\ndtype: y\n", "1:7: the quote that opens here is never closed"),
        ("weight: [1, 2\ndtype: x\n", f"2:6: {BRACKET}"),
        ("weight: [1, 2]]\n", "1:15: this ']' closes nothing"),
        ("merge_method: della\nname\n", "2:1: this line is not of the form 'key: value'"),
        ("name: *x\n", "1:7: the alias *x has no anchor &x before it"),
        ("name: &x [*x]\n", "1:11: the alias *x refers to itself"),
        ("name: !!python/name:os.system x\n", ("1:7: the tag !!python/name:os.system is not read in a "
                                               "recipe; remove it")),
        ("name: !mine x\n", "1:7: the tag !mine is not read in a recipe; remove it"),
        ("? [a]\n: b\n", "1:3: a list cannot be a key; a key is a word such as 'weight'"),
        (HEAD + "<<: {a: b}\n", "5:1: merge keys (<<) are not read in a recipe; write the keys out here"),
        (HEAD + "name: a\nname: b\n", ("6:1: the key 'name' stands twice, here and in line 5; keep one of "
                                       "them")),
        (
            "name: a\n---\nname: b\n",
            ("2:1: one document more (---) begins here than can be read; use one file "
             "each"),
        ),
        (
            "'''yaml\nmodels:\n'''\n",
            (f"1:1: {NOT_A_MAPPING} begins with \"'''yaml\"; remove the line with ''' at the beginning and "
             "the one at "
            "the end"),
        ),
        (
            "\n```\nmodels:\n```\n",
            (f"2:1: {NOT_A_MAPPING} begins with '```'; remove the line with ``` at the beginning and the "
             "one at the end"),
        ),
        ("- a\n", f"1:1: {NOT_A_MAPPING} is a list"),
        ("recipe.yml\n", f"1:1: {NOT_A_MAPPING} is 'recipe.yml'"),
        ("# nothing\n", f"1:1: {NOT_A_MAPPING} is empty"),
        ("name: a\x01b\n", "1:8: the character U+0001 is not allowed in a recipe; remove it"),
        ("name: \ud800\n", "1:7: not UTF-8 (byte 0xed); save the file as UTF-8"),
        ('name: "a\\0b"\n', "1:7: the character U+0000 is not allowed in a recipe; remove it"),
        ("name: " + "[" * 99_000 + "\n", "1:38: nested more than 32 levels deep, which no recipe is"),
        (bomb(), "5:8: aliases expand to more than 10,000 values, which no recipe needs"),
    ],
)  # fmt: skip
def test_broken_and_hostile_text(text: str, message: str) -> None:
    assert told(text) == f"recipe:{message}"


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize("more", ["", "x" * 900, "[" * 2_000])
@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("[" * 40, "1:33"),
        ("a:\n  b:\n    - " + "[" * 40, "3:36"),
        ("# [[[\na: '[[['\nb: [[]," + "[" * 40, "3:38"),
        ('{"[": "\\"[", a: [], b: [\'[\', ' + "[" * 40, "1:60"),
        ("[[[ # [\n" + "{" * 40, "2:30"),
        ("[1, 2, [3], {a: 4}, " + '{"a":' * 40, "1:172"),
    ],
)
def test_nesting_is_refused_where_it_gets_too_deep(text: str, location: str, more: str) -> None:
    # libyaml gives up on its own behind a thousand levels, before it has told of the first one.
    assert told(f"{text}{more}\n").startswith(f"recipe:{location}: nested more than 32 levels deep")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEAD.encode("utf-16"), "1:1: saved as UTF-16; save the file as UTF-8"),
        ("name: é\nbase_model: dé\n".encode("latin-1"), "1:7: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b"name: a\nbase_model: \xc3\xa9\xff\n", "2:14: not UTF-8 (byte 0xff); save the file as UTF-8"),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(data)
    assert told(path) == f"{path}:{message}"


def test_byte_order_mark_crlf_and_no_last_line_break_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.strip().replace("\n", "\r\n").encode())
    assert read_recipe(path).models[0].identity == "math"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert told(tmp_path) == f"{tmp_path}: this is a folder; name the recipe file in it"
    assert told("no/recipe.yml") == "no/recipe.yml: no such file"
    assert told("name: x") == "name: x: no such file; YAML given as text must hold a line break"
    assert told("a\0b").endswith("cannot be read: embedded null byte")
    big = tmp_path / "big.yml"
    big.write_text("#" * ((1 << 20) + 1))
    assert told(big) == f"{big}: larger than 1 MiB, which no recipe is; is this the right file?"


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        bomb(99),
        "[" * 500_000 + "\n",
        "{a: " * 250_000 + "\n",
        "- " * 500_000 + "\n",
        "&a [" * 30 + "]" * 30 + "\n",
        "a: 1\n" * 200_000,
        "".join(f"k{i}: 1\n" for i in range(70_000)),
        "x" * 500_000 + ": 1\n",
        "'" + "\n" * 500_000,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_is_refused(text: str) -> None:
    # Refused by bounds on size, depth and expansion: without them these take minutes, or all memory.
    told(text)


def test_a_large_honest_text_is_read() -> None:
    models = "".join(f"  - model: owner/same\n    parameters: {{weight: {i}}}\n" for i in range(1_400))
    recipe = read_recipe("merge_method: linear\nmodels:\n" + models)
    assert len({m.identity for m in recipe.models}) == 1_400


def test_more_values_than_any_recipe_has() -> None:
    text = "name: [" + "1, " * 30_000 + "1]\n"
    assert told(text) == "recipe:1:29999: more than 10,000 values, which no recipe has"


def test_anchors_used_a_few_times_are_fine() -> None:
    text = (
        HEAD
        + "    parameters: &p {weight: &w 0.5}\n  - model: x\n    parameters: *p\nparameters: {lambda: *w}\n"
    )
    recipe = read_recipe(text)
    shared, models = recipe.resolve("x", 0.0)
    assert (shared["lambda"], [m["weight"] for m in models]) == (0.5, [0.5, 0.5])


WILD = {
    "integers in a gradient, drive letters": """
models:
  - model: G:/9B/Ataraxy
    parameters:
      weight: [1,1,.75,.5,.25,.05,.01]
merge_method: dare_ties
base_model: E:/Dark-Writer
dtype: bfloat16
""",
    "unquoted backslashes, comments, trailing spaces": """
# my best merge yet
models:
  - model: E:\\mergekit\\nbeerbower_gutenberg-12B   # good prose
    parameters:
      weight: 0.12
      density: 0.5
#  - model: someone/dropped-this
merge_method: della_linear
base_model: E:\\mergekit\\Nemo-Base-2407
parameters:
  epsilon: 0.05
  lambda: 1
dtype: bfloat16
tokenizer_source: base
""",
    "quoted path with spaces, one-space indents, list at the margin": """
base_model: "D:/Uni/Masterarbeit Code/base"
models:
- model: "D:/Uni/Masterarbeit Code/remerge 2"
  parameters:
   weight: 1.0
   density: 0.7
merge_method: della
parameters:
 epsilon: 2e-1
 normalize: yes
""",
    "filters": """
models:
  - model: a/math
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: a/base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
}


@pytest.mark.usefixtures("either_parser")
@pytest.mark.parametrize("text", WILD.values(), ids=WILD)
def test_recipes_as_people_write_them(text: str) -> None:
    recipe = read_recipe(text)
    assert len(recipe.models) == 1
    assert recipe.base_model
    shared, (own,) = recipe.resolve("model.layers.0.mlp.up_proj.weight", 0.0)
    assert own["weight"] in (1.0, 0.12, 0.5)
    again = read_recipe(text, overrides=["seed=42"])
    assert (again.models, again.parameters, again.resolve("mlp", 0.0)) == (
        recipe.models,
        recipe.parameters,
        (shared, (own,)),
    )


WORDS = (
    "models: parameters: weight: density: filter: value: 0.5 .nan null 1e5 &a *a - [ ] { } , & * ! | > ' % @"
)
SCRAPS = st.sampled_from(
    [
        *WORDS.split(" "),
        *("`", "#"),
        *(
            '"',
            "?",
            "---",
            "...",
            "<<",
            "\t",
            " ",
            "  ",
            "\n",
            "\n  - ",
            "\n    ",
            ": ",
            "\\",
            "\x85",
            "\u2028",
            "\r",
        ),
        *("model: a/b", "merge_method: della", "base_model: c", "é", "\U0001f600"),
    ]
)


def survives(source: Any) -> None:
    with contextlib.suppress(RecipeError):
        read_recipe(source)


@given(st.lists(SCRAPS, max_size=60).map("".join))
def test_whatever_the_text_only_a_recipe_error(text: str) -> None:
    survives(text + "\n")
    survives(HEAD + text + "\n")


@given(st.text(max_size=200), st.integers(0, len(HEAD)))
def test_whatever_is_spliced_into_a_recipe(text: str, at: int) -> None:
    survives(HEAD[:at] + text + HEAD[at:])


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_whatever_bytes_a_file_holds(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yml"
    path.write_bytes(data)
    survives(path)


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_override(key: str, value: str) -> None:
    for override in (f"{key}={value}", f"lambda={value}", f"models.0.{key}={value}", key):
        with contextlib.suppress(RecipeError):
            read_recipe(HEAD, overrides=[override])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)


@given(
    st.recursive(
        LEAVES,
        lambda children: (
            st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_whatever_objects_only_a_recipe_error(value: Any) -> None:
    survives({"merge_method": "della", "base_model": "b", "models": [{"model": "x"}], "parameters": value})
    survives({"models": value, "merge_method": value})


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_quoted_text_survives_the_dump(text: str) -> None:
    try:
        name = read_recipe(
            {"merge_method": "ties", "base_model": "b", "models": [{"model": "m"}], "name": text}
        )
    except RecipeError:
        return
    assert read_recipe(name.text).name == text


@pytest.mark.parametrize(
    "plain", ["1e-10", "010", "1:30", "yes", "No", "0x10", "2024-01-01", "~", "a b", "=", "1_000", "é"]
)
@pytest.mark.parametrize("quote", ["", "'", '"'])
@pytest.mark.parametrize("dumper", [yaml.SafeDumper, yaml.CSafeDumper])
def test_scalars_survive_the_dump(
    plain: str, quote: str, dumper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_yaml, "_DUMPER", dumper)

    def leaf(text: str) -> tuple[str, bool, Any]:
        root = parse(text, "recipe", Collector(RecipeError))
        assert isinstance(root, Table)
        node = root.entries["name"].node
        assert isinstance(node, Leaf)
        return node.text, isinstance(node.value, str), node.value

    text = f"name: {quote}{plain}{quote}\n"
    assert leaf(dump(parse(text, "recipe", Collector(RecipeError)))) == leaf(text)
