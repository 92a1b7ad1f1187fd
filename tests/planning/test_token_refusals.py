"""What of a tokenizer cannot be is refused in a sentence, and the cure that it names works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers", reason="needs tokenizers")

import numpy as np
import tokenizers
from checkpoints import put
from safetensors.numpy import load_file, save_file
from vocabularies import ADDED, CORPORA, family, ids, recipe, trained, write

import della
from della.errors import CheckpointError, DellaError, RecipeError
from della.options import Target
from della.planning.planner import make_plan
from della.recipe.reader import read_recipe


def refused(folder: Path, kind: type[DellaError] = RecipeError, **more: Any) -> str:
    with pytest.raises(kind) as caught:
        della.plan(recipe(folder, **more))
    return str(caught.value)


def planned(folder: Path, **more: Any) -> list[str]:
    with della.plan(recipe(folder, **more)) as plan:
        return list(plan.notes)


def test_a_recipe_file_is_told_by_its_line(tmp_path: Path) -> None:
    family(tmp_path, "bpe")
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps(recipe(tmp_path))[1:-1].replace('"models"', '\n"models"') + "\n")
    text = f"""\
merge_method: task_arithmetic
base_model: {tmp_path}/base
models: [{{model: {tmp_path}/one}}, {{model: {tmp_path}/two}}]
tokenizer:
  source: union
  tokens:
    "<|q|>": {{}}
    "<|c|>": {{source: {{kind: model_token, model: {tmp_path}/one, token: "<|q|>"}}}}
    "<|b|>": {{source: {tmp_path}/three}}
"""
    with pytest.raises(RecipeError) as caught:
        della.plan(text)
    said = str(caught.value)
    assert [problem.location.line for problem in caught.value.problems if problem.location] == [7, 8, 9]
    assert "no model has the token '<|q|>'; did you mean '<|a|>'" in said
    assert f"{tmp_path}/one has no token '<|q|>'; did you mean '<|a|>'" in said
    assert "is none of the models of this recipe; did you mean" in said
    cured = text.replace('"<|q|>": {}', '"<|a|>": {}').replace('token: "<|q|>"', 'token: "<|a|>"')
    della.plan(cured.replace("three", "two")).close()


@pytest.mark.parametrize(
    ("tokenizer", "said", "cured"),
    [
        ({"sorce": "base"}, "unknown key 'sorce' in 'tokenizer'; did you mean 'source'?", {"source": "base"}),
        ({"tokens": ["<|a|>"]}, "'tokens' must map tokens", {"tokens": {"<|a|>": {}}}),
        ({"tokens": {"<|a|>": "x"}}, "must be a mapping, found 'x'", {"tokens": {"<|a|>": {}}}),
        (
            {"tokens": {"<|a|>": {"force": True}}}, "replaces its row everywhere, and needs a 'source'",
            {"tokens": {"<|a|>": {"force": True, "source": {"kind": "zero"}}}},
        ),
        (
            {"tokens": {"<|a|>": {"source": {"kind": "zeros"}}}}, "did you mean 'zero'",
            {"tokens": {"<|a|>": {"source": {"kind": "zero"}}}},
        ),
        ({"pad_to_multiple_of": 0}, "'pad_to_multiple_of' must lie between 1", {"pad_to_multiple_of": 1}),
        ({"pad_to_multiple_of": 2.5}, "must be a whole number", {"pad_to_multiple_of": 2}),
        (
            {"source": "base", "tokens": {"<|a|>": {"source": {"kind": "zero"}}}}, "write 'source: union'",
            {"source": "union", "tokens": {"<|a|>": {"source": {"kind": "zero"}}}},
        ),
    ],
)  # fmt: skip
def test_mistakes_of_the_mapping(tmp_path: Path, tokenizer: Any, said: str, cured: Any) -> None:
    family(tmp_path, "bpe")
    assert said in refused(tmp_path, tokenizer=tokenizer)
    planned(tmp_path, tokenizer=cured)


def test_kind_model_token_needs_model_and_token(tmp_path: Path) -> None:
    family(tmp_path, "bpe")
    source: dict[str, Any] = {"kind": "model_token", "model": str(tmp_path / "one")}
    said = refused(tmp_path, tokenizer={"tokens": {"<|c|>": {"source": source}}})
    assert "needs 'model', and one of 'token' and 'token_id'" in said
    size = len(ids(tmp_path / "one"))
    said = refused(tmp_path, tokenizer={"tokens": {"<|c|>": {"source": source | {"token_id": size}}}})
    assert f"has {size} rows, and none for id {size}; name a smaller id" in said
    planned(tmp_path, tokenizer={"tokens": {"<|c|>": {"source": source | {"token_id": size - 1}}}})


def test_a_token_without_a_row_in_any_model(tmp_path: Path) -> None:
    """A tokenizer that is none of the models', and has more tokens."""
    family(tmp_path, "bpe")
    made = trained("bpe", CORPORA["base"], ["<|q|>"])
    put(tmp_path / "other", {"tokenizer.json": json.loads(made.to_str())})
    said = refused(tmp_path, tokenizer_source=str(tmp_path / "other"))
    assert (
        "1 tokens of the tokenizer have no row in any model: '<|q|>'; say where their rows come from" in said
    )
    assert "{'<|q|>': {source: {kind: zero}}}" in said
    zero = {"<|q|>": {"source": {"kind": "zero"}}}
    notes = planned(tmp_path, tokenizer={"source": str(tmp_path / "other"), "tokens": zero})
    assert any(f"{len(ids(tmp_path / 'other'))} tokens" in note for note in notes)


def test_unequal_rows_name_the_union(tmp_path: Path) -> None:
    tokenizer = trained("bpe", CORPORA["base"])
    for seed, name in enumerate(CORPORA):
        write(tmp_path / name, trained("bpe", CORPORA["base"], ADDED[name]), seed)
    assert tokenizer.get_vocab_size() == len(ids(tmp_path / "base"))
    said = refused(tmp_path, CheckpointError)
    assert "write 'tokenizer_source: union'" in said
    assert "2 added tokens ('<|a|>', ...) of it get rows" in said
    assert any("3 of them new" in note for note in planned(tmp_path, tokenizer_source="union"))


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    family(tmp_path, "bpe")
    (tmp_path / "one" / "tokenizer.json").rename(tmp_path / "one" / "kept")
    said = refused(tmp_path, CheckpointError, tokenizer_source="union")
    assert "has no tokenizer that can be read, and" in said
    assert "put its tokenizer.json beside it" in said
    (tmp_path / "one" / "kept").rename(tmp_path / "one" / "tokenizer.json")
    planned(tmp_path, tokenizer_source="union")
    for name in ("base", "one", "two"):
        write(tmp_path / name, trained("bpe", CORPORA["base"]), 3)
    (tmp_path / "one" / "tokenizer.json").unlink()
    notes = planned(tmp_path, tokenizer_source="base")
    assert any("its rows are taken as those of" in note for note in notes)
    (tmp_path / "base" / "tokenizer.json").rename(tmp_path / "base" / "kept")
    assert "has no tokenizer that can be read; put" in refused(tmp_path, CheckpointError, tokenizer={})
    (tmp_path / "base" / "kept").rename(tmp_path / "base" / "tokenizer.json")
    planned(tmp_path, tokenizer={})


def test_tables_of_different_sizes_in_one_model(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")["one"]
    save_file(tensors | {"lm_head.bias": tensors["lm_head.bias"][:-1]}, tmp_path / "one/model.safetensors")
    said = refused(tmp_path, CheckpointError, tokenizer_source="union")
    assert "which tokens have both is not known" in said
    save_file(tensors, tmp_path / "one/model.safetensors")
    planned(tmp_path, tokenizer_source="union")


def test_ordinary_tokens_are_told(tmp_path: Path) -> None:
    family(tmp_path, "bpe")
    notes = planned(tmp_path, tokenizer_source="union")
    left = ids(tmp_path / "one").keys() - ids(tmp_path / "base").keys() - set(ADDED["one"])
    assert any(f"one: {len(left)} ordinary tokens that" in note for note in notes)
    more = [
        each
        for each in planned(tmp_path, tokenizer_source="union", compat="mergekit")
        if "ordinary tokens that" in each
    ]
    assert more == []
    assert any(
        "ordinary ones of other models" in note for note in planned(tmp_path, tokenizer={}, compat="mergekit")
    )
    assert not any("ordinary ones of" in note for note in notes)


def test_one_file_has_no_tokenizer(tmp_path: Path) -> None:
    family(tmp_path, "bpe")
    target = Target(tmp_path / "one.safetensors")
    with make_plan(read_recipe(recipe(tmp_path, tokenizer={})), target=target) as plan:
        assert any("one file has no tokenizer beside it" in note for note in plan.notes)
    assert not any("one file" in note for note in planned(tmp_path, tokenizer={}))


def test_columns_of_tokens_cannot_follow(tmp_path: Path) -> None:
    """A table that has its tokens along the second axis."""
    for seed, (name, added) in enumerate({"base": [], "one": ["<|a|>"], "two": []}.items()):
        words = {f"w{n}": n for n in range(1100)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
        tokenizer.add_special_tokens(added)
        tensors = write(tmp_path / name, tokenizer, seed)
        save_file(
            tensors | {"odd": np.zeros((2, 1100 + len(added)), np.float32)},
            tmp_path / name / "model.safetensors",
        )
    said = refused(tmp_path, CheckpointError, tokenizer_source="union")
    assert "odd has tokens along another axis" in said
    put(tmp_path / "one", {"tokenizer.json": json.loads((tmp_path / "base/tokenizer.json").read_text())})
    tensors = {n: t[:1100] for n, t in load_file(tmp_path / "one/model.safetensors").items() if n != "odd"}
    save_file(tensors | {"odd": np.zeros((2, 1100), np.float32)}, tmp_path / "one/model.safetensors")
    planned(tmp_path, tokenizer_source="union")


def test_a_head_by_another_name(tmp_path: Path) -> None:
    tensors = family(tmp_path, "bpe")
    names = {
        "model.embed_tokens.weight": "text.token_embedding.weight",
        "lm_head.weight": "lm_head.decoder.weight",
    }
    for name, held in tensors.items():
        renamed = {names.get(tensor, tensor): values for tensor, values in held.items()}
        save_file(renamed, tmp_path / name / "model.safetensors")
    with della.plan(recipe(tmp_path, tokenizer={})) as plan:
        counts = {job.name: job.shape[0] for job in plan.jobs if "norm" not in job.name}
    assert set(counts.values()) == {len(ids(tmp_path / "base")) + 3}
    assert set(counts) == {*names.values(), "lm_head.bias"}
