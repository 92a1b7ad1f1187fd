"""Whatever the slices and modules: each tensor of the result is planned once, from a source that exists, and
passthrough copies its bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from layered import as_bytes, kept, layered, merged, renumbered
from llamas import Tensors

import della
from della.recipe.text import to_yaml

MODELS = ("a", "b", "c")
SIDES = {"text": "language_model.layers", "vision": "vision_tower.layers"}
Cut = tuple[str, int, int]  # a model, its first layer, and the one that is not taken any more


@st.composite
def slices(draw: st.DrawFn, counts: dict[str, int]) -> list[Cut]:
    """Some of models that have so many layers."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        model = draw(st.sampled_from(sorted(counts)))
        first = draw(st.integers(0, counts[model] - 1))
        found.append((model, first, draw(st.integers(first + 1, counts[model]))))
    return found


def put_together(models: dict[str, Tensors], cuts: list[Cut], stack: str) -> Tensors:
    """What slices make, by hand."""
    before = stack.rpartition(".")[0]
    wanted: Tensors = {}
    offset = 0
    for model, first, end in cuts:
        wanted |= renumbered(models[model], first, end, offset, stack)
        offset += end - first
    for (model, _, _), tails in ((cuts[0], ("embed_tokens",)), (cuts[-1], ("norm", "lm_head"))):
        for tail in tails:
            name = "lm_head.weight" if tail == "lm_head" else f"{before}.{tail}.weight"
            wanted |= {name: models[model][name]} if name in models[model] else {}
    return wanted


def listed(cuts: list[Cut]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": [first, end]}]} for m, first, end in cuts]


def check(site: Path, made: dict[str, Any], wanted: Tensors) -> dict[str, Any]:
    found, config = merged(site, to_yaml(made), allow_idle=True)
    assert found == as_bytes(wanted)
    with della.plan(site / "recipe.yml", allow_idle=True) as plan:
        assert sorted(job.name for job in plan.jobs) == sorted(wanted), "each once"
        for job in plan.jobs:
            (part,) = job.parts
            source = next(s for s in plan.sources if s.folder == part.file.parent)
            assert source.parts[part.name] is part
    return config


@settings(max_examples=15, deadline=None)
@given(st.data(), st.tuples(*(st.integers(1, 4) for _ in MODELS)))
def test_slices(data: st.DataObject, layers: tuple[int, ...]) -> None:
    counts = dict(zip(MODELS, layers, strict=True))
    cuts = data.draw(slices(counts))
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for k, name in enumerate(MODELS):
            kinds = [f"{name}{n}" for n in range(counts[name])]
            models[name] = kept(Path(folder), name, layered(k, counts[name]), kinds=kinds)
        made = {"merge_method": "passthrough", "slices": listed(cuts)}
        config = check(Path(folder), made, put_together(models, cuts, "model.layers"))
        assert config["num_hidden_layers"] == sum(end - first for _, first, end in cuts)
        assert config["kinds"] == [f"{m}{n}" for m, first, end in cuts for n in range(first, end)]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_modules(data: st.DataObject) -> None:
    """Each made of slices, or left to the base."""
    counts = {side: {name: data.draw(st.integers(1, 3)) for name in "ab"} for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, dict[str, Tensors]] = {}
        for k, name in enumerate("ab"):
            own[name] = {s: layered(k, counts[s][name], stack, head=False) for s, stack in SIDES.items()}
            config: dict[str, Any] = {f"{s}_config": {"num_hidden_layers": counts[s][name]} for s in SIDES}
            tensors = own[name]["text"] | own[name]["vision"]
            kept(Path(folder), name, tensors, **config, num_hidden_layers=None)
        made: dict[str, Any] = {"merge_method": "passthrough", "base_model": "a", "modules": {}}
        wanted: Tensors = {}
        numbers = {}
        sliced = data.draw(st.sets(st.sampled_from(sorted(SIDES)), min_size=1))
        for side, stack in SIDES.items():
            cuts = data.draw(slices(counts[side])) if side in sliced else [("a", 0, counts[side]["a"])]
            wanted |= put_together({name: own[name][side] for name in own}, cuts, stack)
            numbers[side] = sum(end - first for _, first, end in cuts)
            if side in sliced:
                made["modules"][stack.split(".")[0]] = {"slices": listed(cuts)}
        config = check(Path(folder), made, wanted)
        assert {s: config[f"{s}_config"]["num_hidden_layers"] for s in SIDES} == numbers
