"""importance: wanda over files: the reference's bytes, every refusal, and norms as inputs like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from llamas import EXPERTS, Stored, Tensors, as_stored, load, recipe, save, trio
from merged import flip, refused, reseal, spans

import della
from della.api import verify
from della.dtypes import of_array, round_to, widen
from della.errors import CheckpointError, DellaError, OutputError, RecipeError
from della.merging.registry import METHODS
from della.merging.tile import Subject

OWN: list[dict[str, Any]] = [
    {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "gamma": 0.05},
    {"weight": 0.7, "density": 0.6, "epsilon": 0.4, "gamma": 0.1},
    {"weight": -0.3, "density": 0.3, "epsilon": 0.1, "gamma": 0.0},
]
UP = "model.layers.1.mlp.up_proj.weight"
NORMS_DTYPES = (np.float32, ml_dtypes.bfloat16, np.float64)


def norms_of(tensors: Tensors, seed: int, dtype: Any = np.float32) -> Tensors:
    """Norms of the inputs of all matrices but the embeddings."""
    rng = np.random.default_rng(seed)
    return {
        name: np.exp(2 * rng.standard_normal(array.shape[1])).astype(dtype)
        for name, array in tensors.items()
        if array.ndim == 2 and of_array(array).is_float and "embed" not in name and array.size
    }


def make(folder: Path, models: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Models, and a file of norms for each expert, each in another type."""
    save(folder, models)
    norms = {
        name: norms_of(models["base"], seed, dtype)
        for seed, (name, dtype) in enumerate(zip(EXPERTS, NORMS_DTYPES, strict=True))
    }
    put(folder, {f"{name}.norms.safetensors": vectors for name, vectors in norms.items()})
    return norms


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors], dict[str, Tensors]]:
    folder, tensors = tmp_path_factory.mktemp("models"), trio()
    return folder, tensors, make(folder, tensors)


def made(folder: Path, method: str = "della", **shared: Any) -> dict[str, Any]:
    known = METHODS[method].parameters
    own = [{key: value for key, value in mine.items() if key in known} for mine in OWN]
    table = recipe(folder, method, own, {"importance": "wanda", **shared})
    for model, name in zip(table["models"], EXPERTS, strict=True):
        model["input_norms"] = str(folder / f"{name}.norms.safetensors")
    return table


def wanted(tensors: dict[str, Tensors], norms: dict[str, Tensors], method: str, **shared: Any) -> Stored:
    """The merge by the reference, a tensor at a time."""
    picked = METHODS[method]({"importance": "wanda", **shared})
    found: Tensors = {}
    for name, value in tensors["base"].items():
        found[name] = value
        if of_array(value).is_float:
            experts = [
                picked.expert(identity, own, v if v is None else v.astype(np.float32))
                for identity, own in zip(EXPERTS, OWN, strict=True)
                for v in [norms[identity].get(name)]
            ]
            real = np.float64 if value.dtype == np.float64 else np.float32
            wide = [widen(tensors[identity][name]).astype(real) for identity in EXPERTS]
            merged = picked.merge(name, widen(value).astype(real), wide, experts)
            found[name] = round_to(merged, of_array(value))
    return as_stored(found)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("della", {}),
    ("della", {"rank_by": "tensor", "rescale": "l1"}),
    ("della", {"rank_by": "magnitude", "fuse": "calibrated", "coupling": "systematic"}),
    ("della_linear", {"rank_by": "optimal"}),
    ("paper_della", {"ladder": "paper", "lambda_scaling": "row"}),
    ("ties", {}),
    ("ties", {"scope": "row"}),
    ("breadcrumbs", {}),
]


@pytest.mark.parametrize(("method", "shared"), CASES, ids=str)
def test_files_and_state_dicts_give_the_bytes_of_the_reference(
    models: tuple[Path, dict[str, Tensors], dict[str, Tensors]], tmp_path: Path, method: str,
    shared: dict[str, Any],
) -> None:  # fmt: skip
    folder, tensors, norms = models
    expected = wanted(tensors, norms, method, **shared)
    for number, (threads, tile) in enumerate(((1, 1 << 18), (3, 50))):
        out = tmp_path / str(number)
        della.merge(made(folder, method, **shared), out, threads=threads, tile=tile, fsync=False)
        assert load(out) == expected
    columns = {"weights": "weight", "density": "density", "epsilon": "epsilon", "gamma": "gamma"}
    own = {ours: [mine[name] for mine in OWN] for ours, name in columns.items()}
    merged = della.merge_state_dicts(
        tensors["base"], [tensors[name] for name in EXPERTS], method=method, names=EXPERTS,
        input_norms=[norms[name] for name in EXPERTS], importance="wanda", **own, **shared,
    )  # fmt: skip
    assert as_stored(merged) == expected
    plain = made(folder, method, **shared | {"importance": "magnitude"})
    for model in plain["models"]:
        del model["input_norms"]
    assert load(della.merge(plain, tmp_path / "plain", fsync=False).out) != expected


def test_float64_models_go_by_the_same_scores(tmp_path: Path) -> None:
    tensors = trio(np.float64)
    norms = make(tmp_path, tensors)
    for method, shared in CASES[:2] + CASES[5:7]:
        out = tmp_path / f"{method}{len(shared)}.safetensors"
        della.merge(made(tmp_path, method, **shared), out, fsync=False, overwrite=True)
        assert load(out) == wanted(tensors, norms, method, **shared)


def test_scope_model_takes_the_largest_scores_of_all_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 8), "b.weight": (5, 8), "c.weight": (8,)}
    delta = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base = {name: np.zeros_like(values) for name, values in delta.items()}
    norms = {name: np.exp(rng.standard_normal(8)).astype(np.float32) for name in ("a.weight", "b.weight")}
    put(
        tmp_path,
        {"b.safetensors": base, "e.safetensors": delta, "n.safetensors": {k: norms[k] for k in norms}},
    )
    text = (
        "merge_method: ties\nbase_model: b.safetensors\n"
        "models: [{model: e.safetensors, input_norms: n.safetensors}]\n"
        "parameters: {scope: model, importance: wanda, density: 0.25}\n"
    )
    (tmp_path / "recipe.yml").write_text(text)
    out = della.merge(tmp_path / "recipe.yml", tmp_path / "o.safetensors", fsync=False).out
    found = {name: np.frombuffer(raw, np.float32) for name, (_, _, raw) in load(out).items()}
    scores = np.concatenate([(np.abs(delta[n]) * norms.get(n, np.float32(1))).ravel() for n in shapes])
    kept = np.concatenate([found[name] != 0 for name in shapes])
    assert sorted(np.flatnonzero(kept)) == sorted(np.argsort(-scores)[: int(0.25 * scores.size)])
    with della.plan(tmp_path / "recipe.yml") as plan:
        assert plan.notes[-2:] == (
            "e.safetensors: 2 of 3 tensors are ranked by |delta| times input norms; "
            "the others have none, and are ranked by |delta|",
            "scope: model compares saliency with and without input norms, which is of different scales",
        )


def test_the_plan_lists_norms_and_says_how_many_tensors_have_some(
    models: tuple[Path, dict[str, Tensors], dict[str, Tensors]],
) -> None:
    from della.planning.describe import plan_json, plan_text

    folder, tensors, norms = models
    table = made(folder, importance=[{"filter": "mlp", "value": "wanda"}, {"value": "magnitude"}])
    with della.plan(table) as plan:
        text, listed = plan_text(plan, 1), plan_json(plan, 1)
    # gate, up and down of three layers; the stacked experts (mlp.experts.up) have three axes and no norms
    assert (
        f"  - {folder}/math: 9 of 10 tensors are ranked by |delta| times input norms; "
        "the others have none, and are ranked by |delta|" in text
    )
    assert "  - importance: wanda ranks |delta| times input norms (mergekit: |delta|)" in text
    assert f"input_norms {folder}/math.norms.safetensors" in text
    up = next(tensor for tensor in listed["tensors"] if tensor["name"] == UP)
    assert up["parameters"]["importance"] == "wanda"
    assert up["models"][f"{folder}/code"]["input_norms"] == f"{folder}/code.norms.safetensors"
    others = sum(job.bytes_read for job in plan.jobs if "mlp" not in job.name)
    assert listed["bytes_read"] - others == sum(
        sum(each[name].nbytes for each in tensors.values())
        + sum(each[name].nbytes for each in norms.values() if name in each)
        for name in tensors["base"]
        if "mlp" in name
    )


# ---- what is refused --------------------------------------------------------------------------------------


RECIPE = """\
merge_method: della
base_model: base
models:
  - model: math
    input_norms: math.norms.safetensors
  - model: code
    input_norms: code.norms.safetensors
parameters:
  density: 0.5
  importance: wanda
"""


def said(folder: Path, text: str, kind: type[DellaError] = RecipeError, **options: Any) -> str:
    path = folder / "recipe.yml"
    path.write_text(text)
    with pytest.raises(kind) as caught:
        della.plan(path, **options)
    return str(caught.value).replace(f"{path}:", "")


IDLE = "'input_norms' has no effect without 'importance: wanda' in the recipe's own parameters"
RANDOM = "importance: wanda has no part in rank_by: random, which ranks nothing; remove one"
BESIDE = "'input_norms' names a file of one model, so it belongs beside 'model:' in an entry of 'models'"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "    input_norms: code.norms.safetensors\n", "",
            "6:5: code: importance: wanda needs the norms of each model's inputs; write "
            "'input_norms: FILE' beside 'model:' (`della calibrate` makes the file)",
        ),
        (
            "  importance: wanda\n", "",
            "2 problems:\n"
            f"  - 5:18: {IDLE}\n"
            f"  - 7:18: {IDLE}",
        ),
        (
            "della", "task_arithmetic",
            "2 problems:\n"
            "  - 5:18: 'input_norms' has no effect with merge_method task_arithmetic; remove it\n"
            "  - 7:18: 'input_norms' has no effect with merge_method task_arithmetic; remove it",
        ),
        (
            "wanda", "wnada",
            "10:15: 'importance' must be one of magnitude, wanda, found 'wnada'; did you mean 'wanda'?",
        ),
        (
            "wanda\n", "wanda\n  rank_by: random\n",
            f"10:15: {RANDOM}",
        ),
        (": code.norms.safetensors", ": [a, b]", "7:18: 'input_norms' of model 2 must be text, found a list"),
        ("input_norms: code", "input_norm: code", "7:5: unknown key 'input_norm' in model 2; did you mean "
         "'input_norms'?"),
        ("parameters:\n", "input_norms: x\nparameters:\n", f"8:1: {BESIDE}"),
        ("density: 0.5\n", "density: 0.5\n  input_norms: x\n", f"10:3: {BESIDE}"),
        (
            "    input_norms: code.norms.safetensors\n", "    parameters: {input_norms: x}\n",
            f"7:18: {BESIDE}",
        ),
        (
            "wanda\n", "wanda\ncompat: mergekit\n",
            "10:15: compat: mergekit has no importance: wanda; remove it, or do without compat (of the "
            "recipe, or compat=True)",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(
    models: tuple[Path, dict[str, Tensors], dict[str, Tensors]], old: str, new: str, message: str
) -> None:
    assert RECIPE.count(old) == 1
    assert said(models[0], RECIPE.replace(old, new)) == message


def test_the_base_among_the_models_needs_no_norms(
    models: tuple[Path, dict[str, Tensors], dict[str, Tensors]],
) -> None:
    folder = models[0]
    (folder / "recipe.yml").write_text(
        RECIPE.replace("  - model: code\n", "  - model: base\n").replace("code.norms", "nowhere")
    )
    with della.plan(folder / "recipe.yml") as plan:
        assert plan.notes[0] == (
            f"{folder}/recipe.yml:7:5: model 2 is the base model itself, so its input norms have no effect"
        )


CODE = "code.norms.safetensors"
FILES: dict[str, tuple[Any, str]] = {
    "missing": (
        None,
        f"7:18: {CODE}: no such file; tried {{folder}}/{CODE}, ",
    ),
    "a folder": ({"x": {}}, f"7:18: {{folder}}/{CODE}: expected a .safetensors file"),
    "damaged": (b"{}", f"7:18: {{folder}}/{CODE}: truncated: expected at least 8 bytes"),
    "shape": (
        {UP: np.ones(40, np.float32)},
        f"{CODE}: input norms: {UP} has norms of shape [40], expected [24], one for each input feature",
    ),
    "two axes": (
        {UP: np.ones((1, 24), np.float32)},
        f"{CODE}: input norms: {UP} has norms of shape [1, 24], expected [24], one for each input feature",
    ),
    "a vector": (
        {"model.norm.weight": np.ones(24, np.float32)},
        f"{CODE}: input norms: model.norm.weight has shape [24]; only a matrix (out, in) has input norms",
    ),
    "a strange name": (
        {UP.replace("up", "ap"): np.ones(24, np.float32)},
        f"{CODE}: input norms: {UP.replace('up', 'ap')} is not a tensor of base; did you mean '{UP}'?",
    ),
    "integers": (
        {UP: np.ones(24, np.int64)}, f"{CODE}: input norms: {UP} is stored as I64, expected floats",
    ),
    "norms of integers": (
        {"buffer.mask": np.ones(2, np.float32)},
        f"{CODE}: input norms: buffer.mask is stored as BOOL in base, and only floats are ranked",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_norms_of_the_model(tmp_path: Path, kind: str) -> None:
    content, message = FILES[kind]
    make(tmp_path, trio())
    (tmp_path / CODE).unlink()
    if isinstance(content, dict) and "x" in content:
        (tmp_path / CODE).mkdir()
    elif content is not None:
        put(tmp_path, {CODE: content})
    told = said(tmp_path, RECIPE, CheckpointError)
    assert told.startswith(message.format(folder=tmp_path))


def test_nothing_is_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, trio())
    monkeypatch.setattr("della.checkpoint.source.fetch", lambda *_, **__: pytest.fail("the network"))
    told = said(tmp_path, RECIPE.replace("code.norms", "owner/code"), CheckpointError)
    assert "owner/code.safetensors: no such file" in told


@pytest.mark.parametrize(
    ("value", "found"), [(-1.0, "-1.0"), (np.nan, "nan"), (np.inf, "inf"), (1e300, "inf")], ids=str
)
def test_values_that_are_no_norms(tmp_path: Path, value: float, found: str) -> None:
    norms = make(tmp_path, trio())
    vector = norms["code"][UP].astype(np.float64)
    vector[[3, 5]] = value
    put(tmp_path, {CODE: norms["code"] | {UP: vector}})
    (tmp_path / "recipe.yml").write_text(RECIPE)
    with pytest.raises(CheckpointError) as caught:
        della.merge(tmp_path / "recipe.yml", tmp_path / "out", fsync=False)
    assert str(caught.value).startswith(
        f"{tmp_path}/{CODE}: tensor {UP}: an input norm must be a finite number from 0 up, and 2 of 24 are "
        f"not (feature 3: {found}); calibrate again"
    )


# ---- norms are inputs -------------------------------------------------------------------------------------


def test_norms_are_in_the_manifest_and_verified(tmp_path: Path) -> None:
    norms = make(tmp_path, trio())
    (tmp_path / "recipe.yml").write_text(RECIPE)
    for form in ("out", "one.safetensors"):
        out = tmp_path / form
        manifest = della.merge(tmp_path / "recipe.yml", out, fsync=False).manifest
        recorded = [model["input_norms"] for model in manifest["inputs"]["models"]]
        assert [each["reference"] for each in recorded] == ["math.norms.safetensors", CODE]
        assert [sorted(each["tensors"]) for each in recorded] == [sorted(norms["math"])] * 2
        found = verify(out, inputs=True, sources=1, base_dir=tmp_path)
        assert (found.bad, found.recomputed) == ([], found.tensors)
    raw = (tmp_path / CODE).read_bytes()
    flip(tmp_path / CODE, len(raw) - 1)
    found = verify(tmp_path / "out", inputs=True, base_dir=tmp_path)
    (last,) = (name for name, (_, end) in spans(tmp_path / CODE).items() if end == len(raw))
    assert found.bad == [f"{tmp_path}/{CODE}: tensor {last!r} is not what was merged"]
    (tmp_path / CODE).unlink()
    assert f"{CODE}: no such file" in refused(
        CheckpointError, tmp_path / "out", inputs=True, base_dir=tmp_path
    )


def test_an_output_does_not_replace_norms(tmp_path: Path) -> None:
    make(tmp_path, trio())
    (tmp_path / "recipe.yml").write_text(RECIPE)
    with pytest.raises(OutputError, match=re.escape(CODE)):
        della.merge(tmp_path / "recipe.yml", tmp_path / CODE, fsync=False, overwrite=True)


def cut_short(tmp_path: Path, table: Path, **options: Any) -> None:
    def stop(progress: Any) -> None:
        if progress.tensors == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        della.merge(table, tmp_path / "out", fsync=False, threads=1, progress=stop, **options)


@pytest.mark.parametrize("changed", [False, True])
def test_staged_work_is_of_these_norms(tmp_path: Path, changed: bool) -> None:
    tensors = trio()
    norms = make(tmp_path, tensors)
    table = tmp_path / "recipe.yml"
    table.write_text(RECIPE)
    cut_short(tmp_path, table)
    if changed:
        norms["code"] = norms_of(tensors["base"], 99, NORMS_DTYPES[1])
        put(tmp_path, {CODE: norms["code"]})
    resumed = della.merge(table, tmp_path / "out", fsync=False).resumed
    assert (resumed == 0) == changed
    once = della.merge(table, tmp_path / "once", fsync=False).out
    assert load(tmp_path / "out") == load(once)


def test_parts_give_the_bytes_of_one_run(tmp_path: Path) -> None:
    make(tmp_path, trio())
    table = tmp_path / "recipe.yml"
    for text in (RECIPE, RECIPE.replace("della", "ties").replace("wanda", "wanda\n  scope: model")):
        table.write_text(text)
        options: dict[str, Any] = {"fsync": False, "shard_bytes": 12_000, "overwrite": True}
        whole = della.merge(table, tmp_path / "whole", **options).out
        for part in (2, 1):
            della.merge(table, tmp_path / "out", part=(part, 2), **options)
        della.merge(table, tmp_path / "out", finish=True, **options)
        assert load(tmp_path / "out") == load(whole)


def test_a_manifest_that_does_not_tell_of_its_norms(tmp_path: Path) -> None:
    make(tmp_path, trio())
    (tmp_path / "recipe.yml").write_text(RECIPE)
    della.merge(tmp_path / "recipe.yml", tmp_path / "out", fsync=False)
    reseal(tmp_path / "out", lambda manifest: manifest["inputs"]["models"][1].pop("input_norms"))
    assert verify(tmp_path / "out", inputs=True, base_dir=tmp_path).bad == [
        f"{tmp_path}/out: code: input norms are in its recipe or in its manifest, and not in both"
    ]
    reseal(
        tmp_path / "out", lambda manifest: manifest["inputs"]["models"][0].update(input_norms="math.norms")
    )
    (bad,) = verify(tmp_path / "out", inputs=True, base_dir=tmp_path).bad
    assert "'input_norms' is missing or of a wrong type" in bad
    assert json.loads((tmp_path / "out/della.json").read_text())["format"] == 2


# ---- arrays -----------------------------------------------------------------------------------------------


ONE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: della.merge_tensors(ONE, [ONE], importance="wanda"), "importance='wanda' needs input_norms"),
        (
            lambda: della.merge_tensors(ONE, [ONE], input_norms=[np.ones(3)]),
            "importance='wanda' is needed where input_norms are given",
        ),
        (
            lambda: della.merge_tensors(ONE, [ONE], method="linear", input_norms=[np.ones(3)]),
            "input_norms has no effect with method linear; remove it",
        ),
        (
            lambda: della.merge_tensors(ONE, [ONE, ONE], importance="wanda", input_norms=[np.ones(3), None]),
            "input_norms: expected an array or a mapping for each of 2 experts",
        ),
        (
            lambda: della.merge_state_dicts({"w": ONE}, [{"w": ONE}], importance="wanda", input_norms={}),
            "input_norms: expected an array or a mapping for each of 1 experts",
        ),
        (
            lambda: della.merge_state_dicts(
                {"w": ONE}, [{"w": ONE}], importance="wanda", input_norms={"w": np.ones(3)}
            ),
            "input_norms: expected an array or a mapping for each of 1 experts",
        ),
        (
            lambda: della.merge_state_dicts(
                {"w": ONE}, [{"w": ONE}], importance="wanda", input_norms=[{"v": np.ones(3)}]
            ),
            "input norms of expert 1: v is not a tensor of the base",
        ),
        (
            lambda: della.merge_tensors(ONE, [ONE], importance="wanda", input_norms=[np.ones(2)], name="w"),
            "input norms of expert 1: w has norms of shape [2], expected [3], one for each input feature",
        ),
        (
            lambda: della.magprune(ONE[0], 0.5, input_norms=np.ones(3), name="w"),
            "input_norms: w has shape [3]; only a matrix (out, in) has input norms",
        ),
        (
            lambda: della.magprune(ONE, 0.5, input_norms=np.array([1.0, -2.0, 3.0]), name="w"),
            "input_norms: tensor w: an input norm must be a finite number from 0 up, and 1 of 3 is not "
            "(feature 1: -2.0); calibrate again",
        ),
        (
            lambda: della.magprune(ONE, 0.5, input_norms=np.ones(3), rank_by="random"),
            RANDOM,
        ),
        (
            lambda: della.magprune(ONE, 0.5, input_norms="x"),
            "input_norms: dtype <U1 is not one that models are stored in",
        ),
    ],
)  # fmt: skip
def test_arrays_that_are_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(DellaError) as caught:
        call()
    assert str(caught.value) == message


def test_norms_change_who_survives_and_nothing_else() -> None:
    """With density 0.5 and epsilon 0.5 the least of a row is never kept, the largest always."""
    delta = np.random.default_rng(0).standard_normal((50, 9)).astype(np.float32)
    norms = np.array([1, 1, 1, 1e6, 1, 1, 1, 0, 1], np.float32)
    for kind in (np.float32, np.float64):
        pruned = della.magprune(delta.astype(kind), 0.5, 0.5, input_norms=norms)
        assert np.array_equal(pruned[:, 3], delta[:, 3])
        assert not pruned[:, 7].any()
    same = della.magprune(delta, 0.5, 0.3, input_norms=np.full(9, 4.0))
    assert same.tobytes() == della.magprune(delta, 0.5, 0.3).tobytes(), "equal norms change no rank"
    kept = della.merge_tensors(
        np.zeros_like(delta), [delta], method="ties", density=1 / 9, scope="row", importance="wanda",
        input_norms=[{"tensor": norms}],
    )  # fmt: skip
    assert np.array_equal(np.flatnonzero(kept.any(axis=0)), [3])


def test_optimal_has_the_least_variance_of_the_outputs() -> None:
    """E |x . (delta' - delta)|^2 summed over the tokens whose norms were given, for unbiased samplers of one
    density: less than that of `optimal` without norms, and than that of DELLA's ladder.
    """
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 30)) * np.exp(rng.standard_normal(30))
    delta = rng.standard_normal((1, 30)).astype(np.float32)
    norms = np.sqrt((x**2).sum(axis=0)).astype(np.float32)

    def variance(rank_by: str, vector: Any) -> float:
        method = METHODS["della_linear"]({"rank_by": rank_by})
        made = method.expert("a", {"density": 0.5, "epsilon": 0.3}, vector)
        subject = Subject("x", delta.shape, (made,))
        q = method.drop.reference(subject, 0, delta)[1].astype(np.float64)  # type: ignore[attr-defined]
        assert q.mean() == pytest.approx(0.5, abs=1e-6)
        return float(((delta.astype(np.float64) * norms) ** 2 * (1 / q - 1)).sum())

    best = variance("optimal", norms)
    assert best < variance("optimal", None)
    assert best < variance("row", norms)
