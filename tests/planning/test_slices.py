"""Slices: layers of several models in one, renumbered; embeddings, norm and head, gradients, config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from layered import PARTS, as_bytes, kept, layered, merged, renumbered
from llamas import Tensors, listing

import della
from della.errors import DellaError, RecipeError
from della.planning.describe import plan_json, plan_text

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
FRANKEN = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 6]}]
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path


def two(site: Path, **config: Any) -> tuple[Tensors, Tensors]:
    return kept(site, "a", layered(1, 4), **config), kept(site, "b", layered(2, 6), **config)


def test_layers_of_two_models_in_one(site: Path) -> None:
    a, b = two(site)
    found, config = merged(site, FRANKEN)
    wanted = renumbered(a, 0, 3, 0) | renumbered(b, 2, 6, 3) | {EMBED: a[EMBED]}
    assert found == as_bytes(wanted | {name: b[name] for name in (NORM, HEAD)})
    assert config["num_hidden_layers"] == 7
    with della.plan(site / "recipe.yml") as plan:
        covered = {each.reference: (each.merged, each.of) for each in plan.coverage}
        assert covered == {"a": (13, 19), "b": (18, 27)}
        text = plan_text(plan, 1)
        assert "slice 1: passthrough of a layers 0-2 -> layers 0-2" in text
        assert "slice 2: passthrough of b layers 2-5 -> layers 3-6" in text
        methods = {tensor["name"]: list(tensor["models"]) for tensor in plan_json(plan, 1)["tensors"]}
        assert methods["model.layers.3.mlp.up_proj.weight"] == ["b"]


def test_lists_of_the_configuration_are_cut_and_joined(site: Path) -> None:
    """Of every name, nested too; what only happens to be as long is not a list of layers."""
    for name, seed, count in (("a", 1, 4), ("b", 2, 6)):
        kinds = [f"{name}{n}" for n in range(count)]
        text = {
            "num_hidden_layers": count,
            "layer_types": kinds,
            "no_rope_layers": [n % 2 for n in range(count)],
        }
        text |= {"mlp_only_layers": [0, count - 1], "hybrid_override_pattern": ("M*-M*-")[:count]}
        more = {"text_config": text, "architectures": ["X"] * count, "eos_token_id": list(range(count))}
        kept(site, name, layered(seed, count), num_hidden_layers=None, **more)
    _, config = merged(site, FRANKEN)
    text = config["text_config"]
    assert text["num_hidden_layers"] == 7
    assert text["layer_types"] == ["a0", "a1", "a2", "b2", "b3", "b4", "b5"]
    assert text["no_rope_layers"] == [0, 1, 0, 0, 1, 0, 1]
    assert text["mlp_only_layers"] == [0, 6]
    assert text["hybrid_override_pattern"] == "M*-" + "-M*-"
    assert (config["architectures"], config["eos_token_id"]) == (["X"] * 4, [0, 1, 2, 3])
    with della.plan(site / "recipe.yml") as plan:
        assert any("layer_types" in line and "mergekit" in line for line in plan.departures)


def test_a_list_that_one_model_lacks_is_left_out_and_told(site: Path) -> None:
    kept(site, "a", layered(1, 4), layer_types=["full"] * 4)
    kept(site, "b", layered(2, 6))
    _, config = merged(site, FRANKEN)
    assert "layer_types" not in config
    with della.plan(site / "recipe.yml") as plan:
        assert any(note.startswith("b: ") and "layer_types" in note for note in plan.notes)


def test_gradients_run_over_each_slice(site: Path) -> None:
    """Depth restarts; one layer has the last value, what is outside of the layers the first."""
    a, b = two(site)
    c = kept(site, "c", layered(3, 6))
    found, _ = merged(
        site,
        "merge_method: linear\nparameters: {normalize: false}\nslices:\n"
        "  - sources:\n"
        "      - {model: a, layer_range: [0, 3], parameters: {weight: [1, 3]}}\n"
        "      - {model: b, layer_range: [1, 4], parameters: {weight: [{filter: mlp, value: 0.5}]}}\n"
        "    parameters: {weight: 0.25}\n"
        "  - sources:\n"
        "      - {model: b, layer_range: [5, 6], parameters: {weight: [10, 20]}}\n"
        "      - {model: c, layer_range: [0, 1], parameters: {weight: 0.125}}\n",
    )
    wanted: Tensors = {EMBED: a[EMBED] + np.float32(0.25) * b[EMBED]}
    for n in range(3):
        for part in (*PARTS, "input_layernorm"):
            name, other = (f"model.layers.{m}.{part}.weight" for m in (n, n + 1))
            weight = np.float32(0.5 if "mlp" in part else 0.25)
            wanted[name] = np.float32(1 + n) * a[name] + weight * b[other]
    for name in [n for n in b if n.startswith("model.layers.5.")]:
        first, last = name.replace(".5.", ".0."), name.replace(".5.", ".3.")
        wanted[last] = np.float32(20) * b[name] + np.float32(0.125) * c[first]
    wanted |= {n: np.float32(10) * b[n] + np.float32(0.125) * c[n] for n in (NORM, HEAD)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.allclose(np.frombuffer(found[name], np.float32), value.reshape(-1), atol=1e-5), name


def test_the_head_comes_from_all_sources_of_the_last_slice(site: Path) -> None:
    _, b = two(site)
    c = kept(site, "c", layered(3, 6))
    found, _ = merged(
        site,
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 4]}]\n"
        "  - sources: [{model: b, layer_range: [5, 6]}, {model: c, layer_range: [5, 6]}]\n",
    )
    for name in (NORM, HEAD):
        assert np.allclose(np.frombuffer(found[name], np.float32), ((b[name] + c[name]) / 2).reshape(-1))
    with della.plan(site / "recipe.yml") as plan:
        assert any("head" in line and "all 2 sources of slice 2" in line for line in plan.departures)


def test_a_slice_has_its_own_method_and_the_base_need_not_be_listed(site: Path) -> None:
    a, b = two(site)
    c = kept(site, "c", layered(3, 4))
    found, _ = merged(
        site,
        "merge_method: task_arithmetic\nbase_model: a\nparameters: {weight: 0.5}\nslices:\n"
        "  - sources: [{model: c, layer_range: [1, 3]}]\n"
        "  - sources: [{model: b, layer_range: [2, 4]}]\n    merge_method: passthrough\n"
        "  - sources: [{model: a, layer_range: [0, 1]}, {model: c, layer_range: [3, 4]}]\n",
    )
    half = np.float32(0.5)
    for n, m in ((1, 0), (2, 1)):
        name, new = (f"model.layers.{x}.mlp.up_proj.weight" for x in (n, m))
        assert found[new] == (a[name] + half * (c[name] - a[name])).tobytes()
    assert found["model.layers.2.mlp.up_proj.weight"] == b["model.layers.2.mlp.up_proj.weight"].tobytes()
    one, four = (f"model.layers.{x}.mlp.up_proj.weight" for x in (0, 3))
    assert found["model.layers.4.mlp.up_proj.weight"] == (a[one] + half * (c[four] - a[one])).tobytes()
    with della.plan(site / "recipe.yml") as plan:
        (line,) = (line for line in plan.departures if "base_model is not among" in line)
        assert line.startswith("slice 1:")
        assert not plan.notes


def test_the_same_model_over_and_over(site: Path) -> None:
    a, _ = two(site)
    text = FRANKEN.replace("model: b, layer_range: [2, 6]", "model: a, layer_range: [1, 4]")
    found, config = merged(site, text)
    wanted = renumbered(a, 0, 3, 0) | renumbered(a, 1, 4, 3) | {n: a[n] for n in (EMBED, NORM, HEAD)}
    assert found == as_bytes(wanted)
    assert config["num_hidden_layers"] == 6
    manifest = json.loads((site / "out/della.json").read_text())
    assert [model["identity"] for model in manifest["inputs"]["models"]] == ["a"]


def test_overrides_reach_every_slice(site: Path) -> None:
    two(site)
    text = FRANKEN.replace("[0, 3]}", "[0, 3], parameters: {scale: 3}}")
    found, _ = merged(site, text, overrides="scale=1")
    plain, _ = merged(site, FRANKEN)
    assert found == plain


def test_a_slice_with_a_base_of_its_own(site: Path) -> None:
    """Which is an input like any other: verified, and looked at before it is read."""
    a, b = two(site)
    c = kept(site, "c", layered(3, 6))
    text = FRANKEN.replace(
        "- sources: [{model: b", "- base_model: c\n    merge_method: task_arithmetic\n    sources: [{model: b"
    )
    found, _ = merged(site, text + "base_model: a\n")
    name, new = (f"model.layers.{n}.mlp.up_proj.weight" for n in (5, 6))
    assert found[new] == (c[name] + (b[name] - c[name])).tobytes()
    assert found["model.layers.0.mlp.up_proj.weight"] == a["model.layers.0.mlp.up_proj.weight"].tobytes()
    kept(site, "c", {n: v + 1 for n, v in c.items()})
    bad = della.verify(site / "out", inputs=True, base_dir=site).bad
    assert bad
    assert all(str(site / "c") in line for line in bad)


@pytest.mark.parametrize("cured", [False, True])
def test_what_is_learnt_of_a_whole_model_is_of_the_same_models(site: Path, cured: bool) -> None:
    two(site)
    kept(site, "c", layered(3, 6))
    text = "merge_method: ties\nbase_model: b\nparameters: {density: 0.5, scope: model}\nslices:\n"
    text += "  - sources: [{model: c, layer_range: [0, 2]}]\n  - sources: [{model: d, layer_range: [2, 6]}]\n"
    kept(site, "d", layered(4, 6))
    if cured:
        merged(site, text.replace("model: d", "model: c"))
        merged(site, text.replace("scope: model", "scope: tensor"))
    else:
        assert re.search(r":3:\d+: scope: model .* same sources", told(site, text, RecipeError))


# ---- mistakes ----------------------------------------------------------------------------------------------

LAST = "  - sources: [{model: b, layer_range: [2, 6]}]\n"
# What is wrong: (the recipe's change, where, words of the sentence, the change of the cure).
MISTAKES = [
    (
        *("[2, 6]", "[2, 9]", "4:15", ["b ends beyond", "6 layers of model.layers", "[2, 6]"]),
        ("[2, 9]", "[2, 6]"),
    ),
    ("[2, 6]", "[6, 2]", "4:39", ["[6, 2]", "upwards", "[2, 6]"], ("[6, 2]", "[2, 6]")),
    ("[2, 6]", "[2]", "4:39", ["two whole numbers", "[2]", "[0, 8]"], ("[2]", "[0, 6]")),
    ("[2, 6]", "[2, 6.5]", "4:39", ["two whole numbers", "[2, 6.5]"], ("[2, 6.5]", "[2, 6]")),
    (
        *(", layer_range: [2, 6]", "", "4:15", ["model 1 of slice 2", "which layers"]),
        ("b}", "b, layer_range: [0, 4]}"),
    ),
    (
        "{model: b, layer_range: [2, 6]}",
        "{model: b, layer_range: [2, 6]}, {model: a, layer_range: [0, 3]}",
        "4:72",
        ["model 2 of slice 2 gives 3 layers", "4 ([2, 6])", "[0, 4]"],
        ("{model: a, layer_range: [0, 3]}]\nparameters", "{model: a, layer_range: [0, 4]}]\nparameters"),
    ),
    (
        *("sources: [{model: b, layer_range: [2, 6]}]", "sources: []", "4:14", ["slice 2 needs 'sources'"]),
        ("sources: []", LAST[4:-1]),
    ),
    (
        *("sources: [{model: b", "source: [{model: b", "4:5", ["unknown key 'source' in slice 2"]),
        ("source:", "sources:"),
    ),
    (
        *("model: b,", "model: b, scale: 1,", "4:26", ["parameters of model 1 of slice 2"]),
        ("scale: 1, layer_range: [2, 6]", "layer_range: [2, 6], parameters: {scale: 1}"),
    ),
    (
        *(LAST, LAST + "models: [{model: a}]\n", "5:1", ["'models' and 'slices'", "keep one"]),
        ("models: [{model: a}]\n", ""),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "at", "words", "cure"), MISTAKES)
def test_a_mistake_is_told_with_a_cure_that_works(
    site: Path, command: Command, old: str, new: str, at: str, words: list[str], cure: tuple[str, str]
) -> None:
    two(site)
    method = "linear" if "gives 3" in words[0] else "passthrough"
    text = FRANKEN.replace("passthrough", method).replace(old, new)
    text += "parameters: {weight: 1}\n" if method == "linear" else ""
    (site / "recipe.yml").write_text(text)
    before = listing(site)
    done = command(site, "merge", "recipe.yml", "out")
    assert done.returncode == 2, done.stderr
    assert f"recipe.yml:{at}: " in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert listing(site) == before
    (site / "recipe.yml").write_text(text.replace(*cure))
    assert command(site, "plan", "recipe.yml").returncode == 0


def told(site: Path, text: str, kind: type[DellaError] = DellaError) -> str:
    (site / "recipe.yml").write_text(text)
    with pytest.raises(kind) as caught:
        della.plan(site / "recipe.yml")
    return str(caught.value)


def test_all_slices_are_read_before_anything_is_told(site: Path) -> None:
    two(site)
    text = FRANKEN.replace("[0, 3]", "[3, 0]").replace("model: b", "modle: b")
    said = told(site, text, RecipeError)
    assert re.search(r":3:\d+: .*\[3, 0\]", said)
    assert re.search(r":4:\d+: .*modle", said)


def test_ranges_that_do_not_say_which_layers_of_the_base(site: Path) -> None:
    two(site)
    kept(site, "c", layered(3, 6))
    slices = "  - sources: [{model: b, layer_range: [0, 2]}, {model: c, layer_range: [2, 4]}]\n"
    text = f"merge_method: ties\nbase_model: a\nslices:\n{slices}"
    said = told(site, text, RecipeError)
    assert ":4:5: " in said
    cure = re.search(r"list it too: '- (.*)'$", said)
    assert cure is not None
    (site / "recipe.yml").write_text(text.replace("[{model: b", f"[{cure[1]}, {{model: b"))
    della.plan(site / "recipe.yml").close()


@pytest.mark.parametrize("change", ["shape", "more", "type"])
def test_layers_of_another_kind_are_refused(site: Path, change: str) -> None:
    kept(site, "a", layered(1, 4))
    other = layered(2, 6)
    if change == "shape":
        other = {n: v[:3] if "up_proj" in n else v for n, v in other.items()}
    elif change == "more":
        other |= {n.replace("weight", "bias"): v[0] for n, v in other.items() if "o_proj" in n}
    kept(site, "b", other, **({"model_type": "qwen2"} if change == "type" else {}))
    said = told(site, FRANKEN)
    words = {"shape": r"slice 2.*up_proj.*\[3, 4\].*\[4, 4\]", "more": "o_proj.bias", "type": "qwen2.*llama"}
    assert re.search(words[change], said), said


@pytest.mark.parametrize("first", [1, 3])
def test_layers_whose_kind_goes_by_their_number(site: Path, first: int) -> None:
    """As DeepSeek's: the first layer is dense, the others are mixtures."""
    mixed = {n: v for n, v in layered(1, 5).items() if "mlp" not in n or ".0." in n}
    mixed |= {f"model.layers.{n}.mlp.experts.0.w": np.ones((2, 2), np.float32) for n in range(1, 5)}
    kept(site, "a", mixed, first_k_dense_replace=1)
    text = "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 4]}]\n"
    merged(site, text + f"  - sources: [{{model: a, layer_range: [{first}, 5]}}]\n")
    said = told(
        site, text.replace("[0, 4]", f"[{first}, 5]") + "  - sources: [{model: a, layer_range: [0, 2]}]\n"
    )
    assert re.search(r"slice 1: layer 0 of the result is of another kind .* keep their numbers", said)


@pytest.mark.parametrize(("one", "other"), [(True, True), (True, False), (False, True)])
def test_tied_heads(site: Path, one: bool, other: bool) -> None:
    """A tied model's head is its embeddings, where the result has a head."""
    a = kept(site, "a", layered(1, 4, head=not one), tie_word_embeddings=one)
    b = kept(site, "b", layered(2, 6, head=not other), tie_word_embeddings=other)
    found, config = merged(site, FRANKEN)
    assert found[EMBED] == a[EMBED].tobytes()
    if one and other:
        assert (HEAD in found, config["tie_word_embeddings"]) == (False, True)
    else:
        assert found[HEAD] == b[EMBED if other else HEAD].tobytes()
        assert config["tie_word_embeddings"] is False
    with della.plan(site / "recipe.yml") as plan:
        assert all(each.merged <= each.of for each in plan.coverage)


@pytest.mark.parametrize(("name", "cure"), [(HEAD, "as many rows"), (NORM, "of the same sizes")])
def test_tables_of_other_sizes_are_refused_with_a_cure_that_works(site: Path, name: str, cure: str) -> None:
    _, b = two(site)
    kept(site, "b", {**b, name: np.concatenate([b[name], b[name]])})
    said = told(site, FRANKEN)
    assert re.search(rf"b: slice 2: {name} has shape .* of a .*{cure}", said), said
    kept(site, "b", b)
    merged(site, FRANKEN)


def test_other_tokenizers_are_told_with_a_cure_that_works(site: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    from vocabularies import TABLES, loaded, trained, write

    words = ["a few words for a tokenizer", "and some more of them"]
    for name, seed, added in (("a", 1, ()), ("b", 2, ("<|x|>", "<|y|>"))):
        tensors = write(site / name, trained("bpe", words, added), seed)
        kept(site, name, tensors | {n: v for n, v in layered(seed, 6).items() if ".layers." in n})
    assert "tokenizer_source: union" in told(site, FRANKEN)
    (site / "recipe.yml").write_text(FRANKEN + "tokenizer_source: union\n")
    found = loaded(della.merge(site / "recipe.yml", site / "out", fsync=False).out)
    assert len({len(found[table]) for table in TABLES}) == 1


def test_several_stacks_are_refused_with_their_names(site: Path) -> None:
    both = layered(1, 4, "encoder.layers") | layered(2, 4, "decoder.layers")
    kept(site, "a", both, num_hidden_layers=None, encoder_layers=4, decoder_layers=4)
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\n"
    said = told(site, text)
    assert "encoder.layers: 4" in said
    assert "decoder.layers: 4" in said
    assert "modules" in said


def test_a_filter_holds_in_one_slice_at_least(site: Path) -> None:
    two(site)
    scale = "parameters: {scale: [{filter: layers.6.mlp.up, value: 2}]}\n"
    (site / "recipe.yml").write_text(FRANKEN + scale)
    with della.plan(site / "recipe.yml") as plan:
        assert [row["tensors"] for row in plan_json(plan, 1)["filters"]] == [1]
    said = told(site, FRANKEN + scale.replace("6", "7"), RecipeError)
    assert "layers.7.mlp.up" in said
    own = FRANKEN.replace("[0, 3]}", "[0, 3], parameters: {scale: [{filter: layers.6.mlp.up, value: 2}]}}")
    assert "layers.6.mlp.up" in told(site, own, RecipeError)


def slerp(base: Any, other: Any, t: float) -> Any:
    one, two = base.astype(float).ravel(), other.astype(float).ravel()
    angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * other) / np.sin(angle)


def test_slerp_as_most_recipes_in_the_wild_write_it(site: Path) -> None:
    """Both models whole, as the sources of one slice; t by part and by layer."""
    a, _ = two(site)
    c = kept(site, "c", layered(3, 4))
    found, _ = merged(
        site,
        "slices:\n  - sources:\n      - {model: a, layer_range: [0, 4]}\n"
        "      - {model: c, layer_range: [0, 4]}\n"
        "merge_method: slerp\nbase_model: a\nparameters:\n  t:\n"
        "    - {filter: self_attn, value: [0, 0.3, 0.6, 0.9]}\n    - {filter: mlp, value: 0.2}\n"
        "    - value: 0.5\n",
    )
    for name, values in a.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        t = 0.3 * layer if "self_attn" in name else 0.2 if "mlp" in name else 0.5
        made = np.frombuffer(found[name], np.float32).reshape(values.shape)
        np.testing.assert_allclose(made, slerp(values, c[name], t), rtol=0, atol=2e-6)


def test_a_base_that_a_method_can_do_without_counts_in_slices_too(site: Path) -> None:
    a, b = two(site)
    c = kept(site, "c", layered(3, 4))
    found, _ = merged(
        site,
        "merge_method: nuslerp\nbase_model: a\nslices:\n"
        "  - sources: [{model: b, layer_range: [0, 4]}, {model: c, layer_range: [0, 4]}]\n",
    )
    name = "model.layers.2.mlp.up_proj.weight"
    made = np.frombuffer(found[name], np.float32).reshape(4, 4)
    wanted = a[name] + slerp(b[name] - a[name], c[name] - a[name], 0.5)
    np.testing.assert_allclose(made, wanted, rtol=0, atol=2e-6)
