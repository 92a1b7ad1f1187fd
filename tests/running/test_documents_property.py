"""Random documents that name each other, in any order: the result is what NumPy makes of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import put
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import della

MODELS = ("one", "two", "three")
TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
WEIGHTS = st.sampled_from([0.25, 0.5, 1.0, 2.0])
Document = dict[str, float]


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[Document], list[int]]:
    """The models of each document with their weights, the last one the result's; and an order in the file."""
    made: list[Document] = []
    names = st.sampled_from
    for number in range(draw(st.integers(1, 3))):
        known = [*MODELS, *(f"stage {k}" for k in range(number))]
        chosen = draw(st.lists(names(known), min_size=2, max_size=3, unique=True))
        made.append({name: draw(WEIGHTS) for name in chosen})
    named = {name for document in made for name in document}
    ends = [f"stage {k}" for k in range(len(made)) if f"stage {k}" not in named]
    made.append({name: draw(WEIGHTS) for name in [*ends, draw(names(MODELS))]})
    return made, draw(st.permutations(range(len(made))))


def merged(made: list[Document], models: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """By hand: weighted means, one document after the other."""
    known: dict[str, dict[str, Any]] = dict(models)
    for number, document in enumerate(made):
        weights = {name: weight / sum(document.values()) for name, weight in document.items()}
        known[f"stage {number}"] = {
            tensor: sum(w * known[name][tensor].astype(np.float64) for name, w in weights.items())
            for tensor in TENSORS
        }
    return known[f"stage {len(made) - 1}"]


@settings(max_examples=12, deadline=None)
@given(documents())
def test_random_documents(drawn: tuple[list[Document], list[int]]) -> None:
    made, order = drawn
    rng = np.random.default_rng(len(made))
    models = {m: {t: rng.standard_normal((4, 3)).astype(np.float32) for t in TENSORS} for m in MODELS}
    texts = []
    for number, document in enumerate(made):
        listed = "".join(f"- {{model: {m}, parameters: {{weight: {w}}}}}\n" for m, w in document.items())
        name = f"name: stage {number}\n" if number < len(made) - 1 else ""
        texts.append(f"{name}merge_method: linear\nmodels:\n{listed}")
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        for model, tensors in models.items():
            put(site / model, {"model.safetensors": tensors, "config.json": {"model_type": "llama"}})
        (site / "recipe.yml").write_text("---\n".join(texts[number] for number in order))
        with della.plan(site / "recipe.yml") as plan:
            every = [*plan.before, plan]
            assert len(every) == len(made)
            for each in every:
                assert sorted(job.name for job in each.jobs) == sorted(TENSORS)
        della.merge(site / "recipe.yml", site / "out", fsync=False, threads=1)
        found, wanted = load_file(site / "out/model.safetensors"), merged(made, models)
        assert sorted(p.name for p in site.iterdir()) == sorted((*MODELS, "out", "recipe.yml"))
    for tensor in TENSORS:
        assert np.allclose(found[tensor], wanted[tensor], atol=1e-6)
