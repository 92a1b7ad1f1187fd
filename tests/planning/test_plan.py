"""What a plan tells: every value of every tensor, bytes, memory, departures from mergekit, by headers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import put
from llamas import EXPERTS, Tensors, save, weights

import della
from della.checkpoint.header import build_header
from della.dtypes import DTYPES
from della.planning.describe import plan_json, plan_text
from della.planning.job import Plan
from della.planning.planner import make_plan
from della.recipe.reader import read_recipe

NAMED = {
    "model.embed_tokens.weight": (8, 4),
    **{f"model.layers.{n}.{part}.weight": (4, 4) for n in range(3) for part in ("mlp.up", "self_attn.q")},
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}
COUNT = np.array([1, 2, 3])

GRADIENTS = """\
merge_method: della
base_model: base
models:
  - model: ./math
    parameters:
      density: [0.2, 0.8]
      weight:
        - filter: mlp
          value: [1, 0.5, 2]
        - value: 0.7
  - model: code/
    parameters: {density: 0.6, epsilon: 0.15}
  - model: ./math
parameters:
  density: [{filter: lm_head, value: 0.9}, {value: 1.0}]
  epsilon: [{filter: lm_head, value: 0.05}, {value: 0.1}]
  lambda: [1.0, 2.0]
  normalize: false
dtype: float32
seed: 7
"""


def tensors(dtype: Any = ml_dtypes.bfloat16) -> dict[str, Tensors]:
    base = weights(NAMED, 0, dtype) | {"steps": COUNT}
    return dict.fromkeys(("base", *EXPERTS), base)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path, tensors())


def planned(folder: Path, text: str, **options: Any) -> Plan:
    path = folder / "recipe.yml"
    path.write_text(text)
    return della.plan(path, **options)


# ---- JSON -------------------------------------------------------------------------------------------------
NAMES = ("./math", "code/", "./math#2")
CASES = [
    *(("./math", "weight", "mlp", 3), ("./math", "weight", "", 6)),
    *(("", "density", "lm_head", 1), ("", "density", "", 8)),
    *(("", "epsilon", "lm_head", 1), ("", "epsilon", "", 8)),
]
COVERED = {"merged": 9, "of": 9, "left_out": [], "changed": 9}
# (t, weight of the first model where "mlp" is in the name)
AT = {"0": (0.0, 1.0), "1": (0.5, 0.5), "2": (1.0, 2.0)}


def test_the_json_form_holds_every_value_of_every_tensor(folder: Path) -> None:
    with planned(folder, GRADIENTS) as plan:
        found = json.loads(json.dumps(plan_json(plan, 2)))
        order = [job.name for job in plan.jobs]
        departures, notes = list(plan.departures), list(plan.notes)
    wanted: list[dict[str, Any]] = []
    for name in order:
        if name == "steps":
            copied = {"name": name, "shape": [3], "dtype": "int64", "method": "copy"}
            wanted.append({**copied, "parameters": {}, "models": {}})
            continue
        t, mlp = AT[name.split(".")[2]] if ".layers." in name else (0.0, 1.0)
        head = name == "lm_head.weight"
        shared_density, shared_epsilon = (0.9, 0.05) if head else (1.0, 0.1)
        first = {"weight": mlp if "mlp" in name else 0.7, "density": 0.2 + 0.6 * t, "epsilon": shared_epsilon}
        wanted.append(
            {
                "name": name,
                "shape": list(NAMED[name]),
                "dtype": "float32",
                "method": "della",
                "parameters": {
                    "rescale": "per_element",
                    "rank_by": "row",
                    "importance": "magnitude",
                    "ladder": "symmetric",
                    "coupling": "independent",
                    "lambda": 1.0 + t,
                    "normalize": False,
                    "vote": "weighted",
                    "fuse": "sum",
                    "lambda_scaling": "constant",
                },
                "models": {
                    "./math": first,
                    "code/": {"weight": 1.0, "density": 0.6, "epsilon": 0.15},
                    "./math#2": {"weight": 1.0, "density": shared_density, "epsilon": shared_epsilon},
                },
            }
        )
    floats = sum(int(np.prod(shape)) for shape in NAMED.values())
    memory, seconds = found.pop("memory"), found.pop("seconds")
    assert found == {
        "merge_method": "della",
        "base_model": "base",
        "seed": 7,
        "tensors": wanted,
        "bytes_read": floats * 2 * 4 + 24,
        "bytes_written": floats * 4 + 24,
        "disk": floats * 4 + 24 + 2**26,
        "filters": [
            {"model": model, "parameter": parameter, "filter": part, "tensors": count}
            for model, parameter, part, count in CASES
        ],
        "coverage": dict.fromkeys(NAMES, COVERED),
        "departures": departures,
        "notes": notes,
    }
    assert sorted(name for name in order) == sorted([*NAMED, "steps"])
    assert isinstance(memory, int)
    assert 1 << 20 < memory < 1 << 30
    assert isinstance(seconds, float)
    assert seconds > 0


def test_the_order_is_that_of_the_result(folder: Path, tmp_path: Path) -> None:
    with planned(folder, GRADIENTS) as plan:
        names = [tensor["name"] for tensor in plan_json(plan, 1)["tensors"]]
    manifest = della.merge(folder / "recipe.yml", tmp_path / "out", fsync=False, allow_idle=True).manifest
    assert list(manifest["tensors"]) == names
    for name, value in tensors()["base"].items():
        assert value.shape == (3,) or name in names


def test_names_of_models_that_would_be_equal_are_told_apart(folder: Path) -> None:
    put(folder, {"math#2/model.safetensors": tensors()["math"]})
    text = "merge_method: linear\nmodels: [{model: math}, {model: 'math#2'}, {model: math}, {model: math}]\n"
    with planned(folder, text) as plan:
        models = next(t for t in plan_json(plan, 1)["tensors"] if t["method"] == "linear")["models"]
    assert list(models) == ["math", "math#2", "math#3", "math#4"]


def test_a_single_layer_has_the_last_value_of_a_gradient_and_each_stack_is_its_own(tmp_path: Path) -> None:
    """As mergekit does: t is 0 outside of layers, 1 in a stack of one."""
    names = ["embed", "encoder.layers.0.w", "decoder.layers.0.w", "decoder.layers.4.w", "decoder.layers.3.w"]
    file = {name: np.ones(2, np.float32) for name in names}
    put(tmp_path, {"a.safetensors": file, "b.safetensors": file})
    text = (
        "{merge_method: task_arithmetic, base_model: a.safetensors, models: [{model: b.safetensors}],\n"
        "parameters: {weight: [0, 1], lambda: [1, 2, 4]}}\n"
    )
    with planned(tmp_path, text) as plan:
        found = {
            tensor["name"]: (tensor["models"]["b.safetensors"]["weight"], tensor["parameters"]["lambda"])
            for tensor in plan_json(plan, 1)["tensors"]
        }
    assert found == {
        "embed": (0, 1), "encoder.layers.0.w": (1, 4), "decoder.layers.0.w": (0, 1),
        "decoder.layers.4.w": (1, 4), "decoder.layers.3.w": (0.75, 3),
    }  # fmt: skip


# ---- text -------------------------------------------------------------------------------------------------


def test_the_text_form(folder: Path) -> None:
    with planned(folder, GRADIENTS) as plan:
        text = plan_text(plan, 1, everything=True)
        memory, seconds = plan.memory(1), plan.seconds(1)
        read, written = plan.bytes_read, plan.bytes_written
        said = [*plan.departures, *plan.notes]
    shared = (
        "rescale per_element, rank_by row, importance magnitude, ladder symmetric, coupling independent, "
        "lambda 1 ... 1.5 ... 2, "
        "normalize false, vote weighted, fuse sum, lambda_scaling constant"
    )
    varying = (
        "./math: weight {}, ./math: density {}, ./math: epsilon {}, "
        "./math#2: density {}, ./math#2: epsilon {}"
    )
    lines = [
        "della, seed 7: 10 tensors",
        "  base    base",
        "  expert  ./math  weight by cases, density 0.2 ... 0.5 ... 0.8, epsilon by cases",
        "  expert  code/  weight 1, density 0.6, epsilon 0.15",
        "  expert  ./math#2  weight 1, density by cases, epsilon by cases",
        f"  shared  {shared}",
        "",
        *(f"  {name}: 9 of 9 tensors take part, 9 of the result change" for name in NAMES),
        "",
        f"  read    {read / 1e3:.2f} kB",
        f"  write   {written} bytes (int64, float32)",
        f"  disk    {(written + 2**26) / 1e6:.1f} MB free beside OUT (an old OUT stays until all is done)",
        f"  memory  {memory / 1e6:.0f} MB with 1 thread",
        f"  time    about {seconds:.0f} s",
        "",
        "Values along gradients and filters:",
    ]
    assert text.split("\n")[: len(lines)] == lines
    groups = {
        "lambda 1, " + varying.format(0.7, 0.2, 0.05, 0.9, 0.05): ["lm_head.weight"],
        "lambda 1, " + varying.format(0.7, 0.2, 0.1, 1, 0.1): [
            "model.embed_tokens.weight", "model.layers.0.self_attn.q.weight", "model.norm.weight",
        ],
        "lambda 1, " + varying.format(1, 0.2, 0.1, 1, 0.1): ["model.layers.0.mlp.up.weight"],
        "lambda 1.5, " + varying.format(0.5, 0.5, 0.1, 1, 0.1): ["model.layers.1.mlp.up.weight"],
        "lambda 1.5, " + varying.format(0.7, 0.5, 0.1, 1, 0.1): ["model.layers.1.self_attn.q.weight"],
        "lambda 2, " + varying.format(2, 0.8, 0.1, 1, 0.1): ["model.layers.2.mlp.up.weight"],
        "lambda 2, " + varying.format(0.7, 0.8, 0.1, 1, 0.1): ["model.layers.2.self_attn.q.weight"],
    }  # fmt: skip
    rest = text.split("\n")[len(lines) :]
    found: dict[str, list[str]] = {}
    while rest[0].startswith("  "):
        line = rest.pop(0)
        if line.startswith("      "):
            found[list(found)[-1]].append(line[6:])
        else:
            found[line[2:]] = []
    assert {key: sorted(names) for key, names in found.items()} == groups
    assert rest[:3] == ["", "Filters:", "  ./math: weight, mlp: 3 tensors: 1 ... 0.5 ... 2"]
    assert rest[8:10] == ["", "Other than mergekit:"]
    assert [line for line in rest if line.startswith("  - ")] == [f"  - {line}" for line in said]


def test_the_text_form_shows_what_was_set(folder: Path) -> None:
    with planned(folder, GRADIENTS) as plan:
        lines = plan_text(plan, 1).split("\n")
    assert lines[2:6] == [
        "  expert  ./math  weight by cases, density 0.2 ... 0.5 ... 0.8, epsilon by cases",
        "  expert  code/  density 0.6, epsilon 0.15",
        "  expert  ./math#2  density by cases, epsilon by cases",
        "  shared  lambda 1 ... 1.5 ... 2, normalize false, fuse sum",
    ], "fuse follows from normalize"
    assert "--all" in lines[6]
    assert "Values along gradients and filters:" not in lines
    assert "  density, lm_head: 1 tensors: 0.9" in lines


@pytest.mark.parametrize(
    ("own", "shared", "wanted"),
    [
        ("", "", ["  expert  math"]),
        ("weight: 1", "", ["  expert  math  weight 1"]),
        ("window_size: 0.2", "", ["  expert  math  epsilon 0.1"]),
        ("window_size: [0.2, 0.1]", "", ["  expert  math  epsilon varies"]),
        (
            "density: [0.3, 0.9, 0.5, 0.7]", "epsilon: 0",
            ["  expert  math  density 0.3 ... 0.7 ... 0.7, epsilon 0"],
        ),
        (
            "", "rank_by: [row, tensor], lambda: 1",
            ["  expert  math", "  shared  rank_by row ... row ... tensor, lambda 1"],
        ),
    ],
)  # fmt: skip
def test_only_what_was_set_is_shown(folder: Path, own: str, shared: str, wanted: list[str]) -> None:
    text = f"merge_method: della\nbase_model: base\nmodels:\n  - {{model: math, parameters: {{{own}}}}}\n"
    with planned(folder, f"{text}parameters: {{{shared}}}\n") as plan:
        lines = plan_text(plan, 2).split("\n")
        more = plan_text(plan, 2, everything=True).split("\n")
    assert [line for line in lines if line.startswith(("  expert", "  shared"))] == wanted
    assert "--all" in lines[lines.index(wanted[-1]) + 1]
    assert not [line for line in more if "--all" in line]
    assert more[3].startswith("  shared  rescale per_element, rank_by row")
    assert all(name in more[2] for name in ("weight", "density", "epsilon"))


def test_layers_with_the_same_values_are_drawn_together(folder: Path) -> None:
    text = (
        "{merge_method: task_arithmetic, base_model: base, models: [{model: math}],\n"
        "parameters: {weight: [{filter: layers.1, value: 2}, {filter: up, value: 3}, {value: 1}]}}\n"
    )
    with planned(folder, text) as plan:
        lines = plan_text(plan, 2, everything=True).split("\n")
    begin = lines.index("Values along gradients and filters:")
    shown = [line.strip() for line in lines[begin + 1 : lines.index("", begin)]]
    values = [line for line in shown if line.startswith("math: ")]
    assert sorted(values) == ["math: weight 1", "math: weight 2", "math: weight 3"]
    assert shown[shown.index("math: weight 2") + 1] == "model.layers.1.*"
    assert shown[shown.index("math: weight 3") + 1] == "model.layers.0,2.mlp.up.weight"


# ---- departures and notes ---------------------------------------------------------------------------------

RESCALE = "rescale: each survivor is divided by its keep probability (mergekit: one l1 factor, biased)"
RANKS = "ranks are exact integers with ties averaged (mergekit: ranks in the dtype of the tensor)"
ROWS = "a row of a tensor with three or more axes is what feeds one output (mergekit: the second axis)"
FEW = "a density that leaves a tensor less than one delta leaves it none (mergekit: one)"
TIE = "a tied sign vote elects nothing (mergekit: the positive sign)"
ARITHMETIC = "arithmetic is float32 (or float64, as an input) and rounds once (mergekit: in the merge dtype)"
DRAWS = "draws come from seed 42, the same on every machine (mergekit: unseeded)"
COMPAT = "compat mergekit: mergekit's own rules, but with seeded draws instead of an unseeded generator"
DENSITY: dict[str, Any] = {"density": 0.5}


@pytest.mark.parametrize(
    ("method", "shared", "wanted"),
    [
        ("della", DENSITY, [RESCALE, RANKS, TIE, ARITHMETIC, DRAWS]),
        ("della", {}, [TIE, ARITHMETIC]),
        ("della", DENSITY | {"rescale": "l1", "rank_by": "optimal"}, [TIE, ARITHMETIC, DRAWS]),
        ("della", DENSITY | {"epsilon": 0}, [RESCALE, TIE, ARITHMETIC, DRAWS]),
        ("della_linear", DENSITY, [RESCALE, RANKS, ARITHMETIC, DRAWS]),
        ("dare_ties", DENSITY, [RESCALE, TIE, ARITHMETIC, DRAWS]),
        ("dare_linear", DENSITY, [RESCALE, ARITHMETIC, DRAWS]),
        ("dare_linear", {"density": 0}, [ARITHMETIC]),
        ("ties", DENSITY, [TIE, ARITHMETIC]),
        ("ties", {"density": 0.2}, [FEW, TIE, ARITHMETIC]),
        ("task_arithmetic", {}, [ARITHMETIC]),
        ("task_arithmetic", {"vote": "count"}, [TIE, ARITHMETIC]),
        ("breadcrumbs", DENSITY, [ARITHMETIC]),
        ("breadcrumbs_ties", DENSITY, [TIE, ARITHMETIC]),
        ("linear", {}, []),
        ("paper_ta", {}, [TIE, ARITHMETIC]),
        ("paper_dare", DENSITY, [RESCALE, TIE, ARITHMETIC, DRAWS]),
        ("paper_ties", DENSITY, [TIE, ARITHMETIC]),
        ("paper_della", DENSITY, [RESCALE, RANKS, TIE, ARITHMETIC, DRAWS]),
    ],
)
def test_departures_from_mergekit_are_told_once_where_they_are_met(
    folder: Path, method: str, shared: dict[str, Any], wanted: list[str]
) -> None:
    made: dict[str, Any] = {"merge_method": method, "base_model": str(folder / "base"), "parameters": shared}
    made["models"] = [{"model": str(folder / name)} for name in ("math", "code")]
    if method == "linear":
        del made["base_model"]
    with della.plan(made, allow_idle=True) as plan:
        assert list(plan.departures) == wanted
    if "rank_by" not in shared and not method.startswith("paper_"):
        with della.plan(made, compat=True, allow_idle=True) as plan:
            assert list(plan.departures) == ([COMPAT] if DRAWS in wanted else [])


def test_departures_depend_on_the_models_too(tmp_path: Path) -> None:
    wide = save(tmp_path / "f32", tensors(np.float32))
    made: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(wide / "base")}
    made["models"] = [{"model": str(wide / "math")}]

    def departures(**more: Any) -> list[str]:
        with della.plan(made | more) as plan:
            return list(plan.departures)

    assert departures() == departures(dtype="float32") == departures(out_dtype="bfloat16") == []
    assert departures(dtype="bfloat16") == departures(dtype="float64") == [ARITHMETIC]
    assert departures(merge_method="ties") == [], "the vote of one expert is never tied"
    linear = {"merge_method": "linear", "base_model": None}
    assert departures(**linear) == departures(**linear, dtype="float32") == []
    assert departures(**linear, dtype="float16") == departures(**linear, dtype="float64") == [ARITHMETIC]
    double = save(tmp_path / "f64", tensors(np.float64))
    made["base_model"] = str(double / "base")
    assert departures() == []
    assert departures(dtype="float32") == [ARITHMETIC]
    conv = {"conv.weight": np.ones((4, 3, 2), np.float32)}
    put(tmp_path, {"a.safetensors": conv, "b.safetensors": conv})
    made |= {
        "base_model": str(tmp_path / "a.safetensors"),
        "models": [{"model": str(tmp_path / "b.safetensors")}],
    }
    della_ = {"merge_method": "della_linear", "parameters": DENSITY}
    assert departures(**della_) == [RESCALE, RANKS, ROWS, DRAWS]


def test_notes_of_the_recipe_come_first(folder: Path) -> None:
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: math\n  - model: base\n"
        "    parameters: {weight: 1}\nparameters: {gamma: 0.1}\n"
    )
    save(folder, {"math": tensors(np.float32)["math"]})
    with planned(folder, text) as plan:
        path = folder / "recipe.yml"
        assert list(plan.notes) == [
            f"{path}:6:5: model 2 is the base model itself, so its parameters have no effect",
            f"{path}:7:14: 'gamma' has no effect with merge_method ties",
            "math: stored in float32, the base in bfloat16; the result is stored in bfloat16",
        ]


# ---- headers alone ----------------------------------------------------------------------------------------


def huge(path: Path, rows: int) -> int:
    """A file of one tensor whose data is a hole; its size."""
    header, _ = build_header([("model.layers.0.w", DTYPES["F32"], (rows, 5000))])
    size = len(header) + rows * 5000 * 4
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)
    return size


def test_planning_reads_no_weights_however_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 10_000_000  # 200 GB a model, where the file system allows
    try:
        huge(tmp_path / "base.safetensors", rows)
    except OSError:
        rows = 10
        huge(tmp_path / "base.safetensors", rows)
    for name in ("a", "b"):
        huge(tmp_path / f"{name}.safetensors", rows)

    def fail(*_: object) -> int:
        raise AssertionError("weights were read")

    monkeypatch.setattr(os, "preadv", fail)
    text = (
        "{merge_method: della, base_model: base.safetensors, dtype: bfloat16,\n"
        "models: [{model: a.safetensors}, {model: b.safetensors}], parameters: {density: 0.5}}\n"
    )
    with planned(tmp_path, text) as plan:
        assert plan.bytes_read == 3 * rows * 5000 * 4
        assert plan.bytes_written == rows * 5000 * 2
        assert plan.memory(2) < 1 << 30, "memory does not grow with the model"
        assert plan.seconds(1) > plan.seconds(4) > 0
        assert plan_json(plan, 1)["tensors"][0]["shape"] == [rows, 5000]
        assert "bfloat16" in plan_text(plan, 1)
    for path in tmp_path.glob("*.safetensors"):  # some tools would copy the holes
        path.unlink()


def test_a_plan_is_a_pure_function_of_recipe_and_headers(folder: Path) -> None:
    (folder / "recipe.yml").write_text(GRADIENTS)
    read = read_recipe(folder / "recipe.yml")
    with make_plan(read) as one, make_plan(read, weights=False) as two:
        assert plan_json(one, 3) == plan_json(two, 3)
        assert one.memory(4) > one.memory(1)
