"""What messages on recipes advise is done as a user would do it, and gives the merge that it should."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checkpoints import put
from cures import cures

import della
from della.checkpoint.source import open_source
from della.errors import DellaError, RecipeError, unknown

GOOD = """\
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters:
      weight: 0.5
"""
BASE = {"layers.0.w": np.arange(12, dtype=np.float32).reshape(3, 4), "v": np.ones(4, np.float32)}
ONE = {name: array + 2 for name, array in BASE.items()}
TWO = {name: array - 1 for name, array in BASE.items()}
HALF = {name: array + 1 for name, array in BASE.items()}  # base + 0.5 * (one - base)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, tensors in {"base": BASE, "one": ONE, "two": TWO}.items():
        put(tmp_path, {f"{name}/model.safetensors": tensors})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(text: str, **options: object) -> dict[str, np.ndarray]:
    Path("recipe.yml").write_text(text)
    della.merge("recipe.yml", "out", fsync=False, overwrite=True, **options)  # type: ignore[arg-type]
    with open_source("out") as source:
        return {name: view.read().astype(np.float32) for name, view in source.tensors.items()}


def refused(text: str | bytes, *advice: str) -> str:
    """The message, with ``advice`` in the cures that it names."""
    Path("recipe.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DellaError) as caught:
        della.merge("recipe.yml", "out", fsync=False)
    told = " | ".join(problem.fix or "" for problem in caught.value.problems)
    assert all(word in told for word in advice), str(caught.value)
    return str(caught.value)


def check(found: dict[str, np.ndarray], expected: dict[str, np.ndarray] = HALF) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.allclose(found[name], array, atol=1e-6), name


class Edit(NamedTuple):
    """A recipe that is refused: GOOD with ``text`` in place of ``of``; and the edit that its message advises,
    of which GOOD must come or, with ``gives``, that many times HALF's change."""

    key: str
    of: str
    text: str
    advice: str
    old: str
    new: str
    gives: float = 1.0


M, W = "task_arithmetic", "      weight: 0.5\n"
LONG = "x" * 100_000
ECHO = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
EDITS = [
    Edit("recipe/reader.py:_Reader.recipe", GOOD, GOOD.replace("models:", "experts:"), "under 'models'",
         "experts:", "models:"),
    Edit("recipe/reader.py:_Reader._refuse_strange_keys", "models:", "modles:", "did you mean 'models'",
         "modles:", "models:"),
    Edit("recipe/reader.py:_Reader._method", f"merge_method: {M}\n", "", "there is", "base_model",
         f"merge_method: {M}\nbase_model"),
    Edit("recipe/reader.py:_Reader._method", M, "task_arithmatic", f"did you mean '{M}'", "task_arithmatic",
         M),
    Edit("recipe/reader.py:_Reader._method", M, "zzzzqqqq", f"{M}, ", "zzzzqqqq", M),
    Edit("recipe/reader.py:_Reader._dtype", W, W + "dtype: floa32\n", "'float32'", "floa32", "float32"),
    Edit("recipe/reader.py:_Reader._dtype", W, W + "dtype: zzzz\n", "float32", "zzzz", "float32"),
    Edit("recipe/reader.py:_Reader._reference", "model: one", 'model: "./\\none"',
         "in single quotes or with /", '"./\\none"', "'./one'"),
    Edit("recipe/reader.py:_Reader._reference", "model: one", "model: base+adapter",
         "merge the adapter into its base", "base+adapter", "one"),
    Edit("recipe/reader.py:_Reader._parameters", W, "      wieght: 0.5\n", "did you mean 'weight'", "wieght",
         "weight"),
    Edit("recipe/reader.py:_Reader._models", "model: one", "model: base", "add at least one expert",
         "base\n    param", "base\n  - model: one\n    param"),
    Edit("recipe/reader.py:_Reader._model", GOOD[GOOD.index("  - model"):],
         "  - one\nparameters: {weight: 0.5}\n", "write '- model: one'", "- one", "- model: one"),
    Edit("recipe/reader.py:_Reader._model", "  - model: one\n    param", "  - param", "add 'model: NAME'",
         "- param", "- model: one\n    param"),
    Edit("recipe/settings.py:_unfiltered", "0.5", "[]", "at least one value", "[]", "[0.5]"),
    Edit("recipe/settings.py:_filtered", "0.5", "[{fliter: w, value: 1}, {value: 0.5}]",
         "did you mean 'filter'", "[{fliter: w, value: 1}, ", "[{filter: v, value: 0.5}, "),
    Edit("recipe/settings.py:_filtered", "0.5", "[{value: 0.5}, {filter: v, value: 0.5}]",
         "without filter last", "[{value: 0.5}, {filter: v, value: 0.5}]",
         "[{filter: v, value: 0.5}, {value: 0.5}]"),
    Edit("recipe/text.py:_decode", "merge_method", "```yaml\nmerge_method", "remove the line with ```",
         "```yaml\n", ""),
    Edit("recipe/text.py:_Composer.node", "0.5", "!!float 0.5", "remove it", "!!float ", ""),
    Edit("recipe/text.py:_Composer.entry", "base_model", "[1, 2]: 3\nbase_model", "a word such as",
         "[1, 2]: 3", "name: word"),
    Edit("recipe/text.py:_Composer.entry", W, "      <<: {weight: 0.5}\n", "write the keys out",
         "<<: {weight: 0.5}", "weight: 0.5"),
    Edit("recipe/text.py:_Composer.entry", W, W + W.replace("0.5", "0.7"), "keep one of them",
         W.replace("0.5", "0.7"), ""),
    Edit("recipe/values.py:checked", W, W + "missing: bsae\n", "did you mean 'base'", "bsae", "base"),
    Edit("recipe/models.py:Recipe.check_cases", "0.5", "[{filter: v, value: 0.5}]", "'- value: 0.5'", "0.5}]",
         "0.5}, {value: 0.5}]"),
    Edit("recipe/models.py:Recipe.check_cases", "0.5", "[{filter: 'layers.*', value: 0.5}, {value: 0.5}]",
         "such as 'layers.'", "layers.*", "layers."),
    Edit("recipe/models.py:Recipe._idle_norms", "parameters",
         "input_norms: norms.safetensors\n    parameters", "remove it",
         "input_norms: norms.safetensors\n    ", ""),
    Edit("recipe/models.py:Recipe.check_cases", "0.5", "[{filter: lyers, value: 0.5}, {value: 0.5}]",
         "did you mean 'layers'", "lyers", "layers"),
    Edit("recipe/templates.py:read_template", W, W + "chat_template: [x]\n", "'chat_template: auto'",
         "[x]", "auto"),
    Edit("recipe/templates.py:read_template", W, W + "chat_template: catml\n", "did you mean 'chatml'",
         "catml", "chatml"),
    Edit("recipe/templates.py:read_template", W, W + "chat_template: zzzz\n", "write one of auto, ", "zzzz",
         "auto"),
    Edit("recipe/templates.py:read_template", W, W + f"chat_template: \"{ECHO}{LONG}\"\n", "right file?",
         LONG, ""),
    Edit("recipe/references.py:named_model", "model: one", "model: {paht: one}", "did you mean 'path'",
         "paht", "path"),
    Edit("recipe/references.py:named_model", "model: one", "model: {model: base, lora: two}",
         "merge the adapter into its base", "{model: base, lora: two}", "one"),
    Edit("recipe/references.py:named_model", "model: one", "model: {revision: main}",
         "write the model as text", "{revision: main}", "one"),
    Edit("recipe/references.py:named_model", "model: one", "model: {model: one, override_architecture: x}",
         "remove it", "{model: one, override_architecture: x}", "one"),
    Edit("recipe/reader.py:_Reader._unknown", W, W + "random_seed: 3\n", "write 'seed'", "random_seed",
         "seed"),
    Edit("recipe/reader.py:_Reader._unknown", W, W + "sead: 3\n", "did you mean 'seed'", "sead", "seed"),
    Edit("recipe/text.py:_explain", W, "\t" + W, "indented with spaces", "\t", ""),
    Edit("recipe/text.py:_explain", "model: one", 'model: "C:\\one"', "in single quotes, or with /",
         '"C:\\one"', "'one'"),
    Edit("recipe/text.py:_explain", "0.5", "@0.5", "put it into quotes", "@0.5", "'0.5'"),
    Edit("recipe/text.py:_explain", GOOD[GOOD.index("  - model"):],
         "  - model: one\n   parameters: {weight: 0.5}\n", "stands under its first key", "\n   param",
         "\n    param"),
    Edit("recipe/tree.py:forbidden", "weight: 0.5", "weight: 0.5\x00", "remove it", "\x00", ""),
]  # fmt: skip
TOKENS = [
    Edit("recipe/tokens.py:read_tokenizer", W, W + "tokenizer_source: base\ntokenizer: {source: base}\n",
         "keep 'tokenizer' alone", "tokenizer_source: base\n", ""),
    Edit("recipe/tokens.py:read_tokenizer", W, W + "tokenizer: base\n", "'tokenizer_source: base'",
         "tokenizer: base", "tokenizer_source: base"),
    Edit("recipe/tokens.py:_Reader.table", W, W + "tokenizer: {source: base, tokens: [a]}\n",
         "write 'tokens: {", ", tokens: [a]", ', tokens: {"<|b|>": {source: base}}'),
    Edit("recipe/tokens.py:_Reader.strange", W, W + "tokenizer: {suorce: base}\n", "did you mean 'source'",
         "suorce", "source"),
    Edit("recipe/tokens.py:_Reader.strange", W, W + "tokenizer: {source: base, zzzz: 1}\n", "there is",
         ", zzzz: 1", ", pad_to_multiple_of: 1"),
    Edit("recipe/tokens.py:_Reader.row", W, W + "tokenizer: {source: base, tokens: {<|b|>: 3}}\n",
         "{source: {kind: zero}}", ">: 3", ">: {source: {kind: zero}}"),
    Edit("recipe/tokens.py:_Reader.row", W, W + "tokenizer: {source: base, tokens: {<|b|>: {force: true}}}\n",
         "add 'source: MODEL'", "{force: true}", "{force: true, source: base}"),
    Edit("recipe/tokens.py:_Reader.source", W,
         W + "tokenizer: {source: base, tokens: {<|b|>: {source: {kind: zreo}}}}\n", "did you mean 'zero'",
         "zreo", "zero"),
    Edit("recipe/tokens.py:_Reader.source", W,
         W + "tokenizer: {source: base, tokens: {<|b|>: {source: {kind: qqq}}}}\n", "there is", "qqq",
         "zero"),
    Edit("recipe/tokens.py:_Reader.source", W,
         W + "tokenizer: {source: base, tokens: {<|b|>: {source: {kind: model_token}}}}\n",
         "write {kind: model_token, model: MODEL", "{kind: model_token}",
         "{kind: model_token, model: base, token: <|a|>}"),
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=[f"{e.key}-{e.advice}" for e in EDITS])
def test_edited_as_the_message_says(edit: Edit) -> None:
    assert edit.of in GOOD
    broken = GOOD.replace(edit.of, edit.text)
    refused(broken, edit.advice)
    assert edit.old in broken
    found = merged(broken.replace(edit.old, edit.new))
    check(found, {name: BASE[name] + edit.gives * (HALF[name] - BASE[name]) for name in BASE})


@cures("recipe/reader.py:_Reader.recipe")
def test_no_base_where_the_method_has_none() -> None:
    broken = "merge_method: linear\nmissing: base\nmodels: [{model: one}, {model: two}]\n"
    refused(broken, "remove it")
    found = merged(broken.replace("missing: base\n", ""))
    check(found, {name: (ONE[name] + TWO[name]) / 2 for name in BASE})


@cures("recipe/text.py:_decode", "recipe/text.py:_decode")
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_saved_as_utf8(encoding: str) -> None:
    text = "# modèles\n" + GOOD
    refused(text.encode(encoding), "UTF-8")
    check(merged(text))


@cures("recipe/text.py:load_text", "recipe/text.py:load_text", "recipe/text.py:load_text")
def test_which_file(folder: Path) -> None:
    (folder / "recipe.yml").write_text(GOOD)
    for given, advice in (("merge_method: linear", "line break"), (".", "recipe file in it")):
        with pytest.raises(RecipeError, match=advice):
            della.plan(given)
    (folder / "large.yml").write_text("# " + "x" * (1 << 20))
    with pytest.raises(RecipeError, match="the right file"):
        della.plan("large.yml")
    della.merge(GOOD, "out", fsync=False)  # text that holds a line break
    check(merged(GOOD))


@cures("recipe/tree.py:from_objects.convert")
def test_a_part_of_itself() -> None:
    models: list[object] = [{"model": "one", "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": M, "base_model": "base", "models": models}
    models.append({"model": models})
    with pytest.raises(RecipeError, match="part of itself"):
        della.plan(recipe)
    del models[-1]
    della.merge(recipe, "out", fsync=False)


@cures("recipe/overrides.py:apply_overrides")
def test_an_override() -> None:
    with pytest.raises(RecipeError, match="did you mean 'lambda'"):
        merged(GOOD, overrides=["lamdba=2"])
    check(merged(GOOD, overrides=["lambda=2"]), ONE)


@cures("errors.py:unknown")
def test_a_choice_is_named() -> None:
    with pytest.raises(DellaError, match="did you mean 'gsm8k'") as caught:
        raise RecipeError(unknown("task", "gsm8", ["gsm8k", "mbpp"]))
    assert caught.value.problems[0].parameter == "task"


@pytest.mark.parametrize("edit", TOKENS, ids=[f"{e.key}-{e.advice}" for e in TOKENS])
def test_tokenizers_are_written_as_the_message_says(edit: Edit, folder: Path) -> None:
    """Rows of tokens: what the base has stays as it is merged, and a row of zeros is what is asked for."""
    vocabulary = {"<|a|>": 0, "<|b|>": 1}
    table = {"model.embed_tokens.weight": np.ones((2, 4), np.float32)}
    for name, by in (("base", 0), ("one", 2)):
        tensors = {key: array + np.float32(by) for key, array in table.items()}
        tokenizer = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|a|>"}}
        put(folder, {f"{name}/model.safetensors": tensors, f"{name}/tokenizer.json": tokenizer})
    broken = GOOD.replace(edit.of, edit.text)
    refused(broken, edit.advice)
    assert edit.old in broken
    found = merged(broken.replace(edit.old, edit.new))["model.embed_tokens.weight"]
    assert np.allclose(found[0], 2), "base + 0.5 * (one - base)"
