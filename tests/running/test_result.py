"""What stands beside the weights: shards and index, configuration, tokenizer, model card, della.json."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import xxhash
import yaml
from checkpoints import COMMIT, put
from llamas import CONFIG, EXPERTS, Tensors, as_stored, expected, load, recipe, save, shapes, weights
from markdown_it import MarkdownIt

import della
from della.checkpoint import source
from della.checkpoint.source import open_source
from della.dtypes import DTYPES
from della.output.manifest import is_sealed

OWN: list[dict[str, Any]] = [{"density": 0.5}] * 3
SIDE = {
    "generation_config.json": {"eos_token_id": 2},
    "tokenizer.json": {"version": "1.0"},
    "tokenizer_config.json": {"chat_template": "{{ 'é' }}", "model_max_length": 4096},
    "special_tokens_map.json": {},
    "chat_template.jinja": b"{{ messages }}",
    "tokenizer.model": b"\x00\x01",
}


def plain_trio(dtype: Any = ml_dtypes.bfloat16, tied: bool = False) -> dict[str, Tensors]:
    base = weights(shapes(tied=tied), 0, dtype)
    others = {name: weights(shapes(tied=tied), seed, dtype, base) for seed, name in enumerate(EXPERTS, 1)}
    return {"base": base, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "models", plain_trio())


def merge(made: dict[str, Any], out: Path, **options: Any) -> dict[str, Any]:
    return della.merge(made, out, fsync=False, **options).manifest


# ---- weights ----------------------------------------------------------------------------------------------


def test_shards_of_a_given_size_with_their_index(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe(folder, "della", OWN, {}), out, shard_bytes=6_000)
    wanted = expected(plain_trio(), "della", OWN, {})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in wanted.values())}
    assert sorted(index["weight_map"]) == sorted(wanted)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(names)
    assert names == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert count > 5
    sizes = []
    for name in names:
        with safetensors.safe_open(out / name, "np") as file:
            assert file.metadata() == {"format": "pt"}, "some versions of transformers ask for it"
            assert set(file.keys()) == {key for key, home in index["weight_map"].items() if home == name}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                assert file.get_tensor(key).tobytes() == wanted[key].tobytes()
            sizes.append(sum(wanted[key].nbytes for key in file.keys()))  # noqa: SIM118
    assert max(sizes) <= 6_000
    assert all(a + b > 6_000 for a, b in itertools.pairwise(sizes)), "no more shards than needed"
    with open_source(str(out)) as read:
        assert {name: read.tensors[name].read().tobytes() for name in read.tensors} == {
            name: value.tobytes() for name, value in wanted.items()
        }


def test_one_shard_needs_no_index(folder: Path, tmp_path: Path) -> None:
    merge(recipe(folder, "ties", OWN, {}), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "della.json", "model.safetensors",
    ]  # fmt: skip


def test_transformers_loads_the_result(folder: Path, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    torch: Any = pytest.importorskip("torch")
    merge(recipe(folder, "ties", OWN, {}, dtype="float16"), tmp_path / "out", shard_bytes=10_000)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(told.values())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    wanted = expected(plain_trio(), "ties", OWN, {}, "F16")
    assert {name: value.numpy().tobytes() for name, value in model.state_dict().items()} == {
        name: value.tobytes() for name, value in wanted.items()
    }


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    tensors = plain_trio(tied=True)
    folder = save(tmp_path / "models", tensors, tie_word_embeddings=True)
    merge(recipe(folder, "della", OWN, {}), tmp_path / "out")
    assert load(tmp_path / "out") == as_stored(expected(tensors, "della", OWN, {}))
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_a_diffusion_model_keeps_the_name_that_diffusers_loads(tmp_path: Path) -> None:
    for number, name in enumerate(("base", *EXPERTS)):
        tensors = {"w": np.full((2, 3), number, np.float32)}
        files = {"diffusion_pytorch_model.safetensors": tensors, "config.json": {"_class_name": "UNet"}}
        put(tmp_path / "models" / name, files)
    made = recipe(tmp_path / "models", "task_arithmetic", [{}] * 3, {})
    merge(made, tmp_path / "out")
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").exists()
    assert front_matter(tmp_path / "out")["library_name"] == "diffusers"
    merge(made, tmp_path / "two", shard_bytes=1, overwrite=True)
    with open_source(str(tmp_path / "two")) as read:
        assert read.tensors["w"].read().tolist() == [[6.0] * 3] * 2


# ---- configuration and tokenizer --------------------------------------------------------------------------


def test_side_files_are_the_bases_and_never_code(folder: Path, tmp_path: Path) -> None:
    code = {"modeling_x.py": b"raise SystemExit", "tokenization_x.py": b"", "pytorch_model.bin": b"\x80"}
    put(folder / "base", {**SIDE, **code, "notes.md": b"x", "README.md": b"the base's own"})
    put(folder / "math", {"tokenizer.json": {"another": 1}, "added_tokens.json": {}})
    out = tmp_path / "out"
    merge(recipe(folder, "della", OWN, {}), out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*SIDE, "README.md", "config.json", "della.json", "model.safetensors"]
    )
    for name in SIDE:
        assert (out / name).read_bytes() == (folder / "base" / name).read_bytes()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask()}


def test_code_of_its_own_is_named_only_if_asked_for(folder: Path, tmp_path: Path) -> None:
    named = {"auto_map": {"AutoModel": "modeling_x.X"}}
    put(folder / "base", {"config.json": {**CONFIG, **named}, "tokenizer_config.json": {"a": 1, **named}})
    put(folder / "base", {"modeling_x.py": b"raise SystemExit"})
    made = recipe(folder, "ties", OWN, {})
    for keep in (False, True):
        out = tmp_path / str(keep)
        merge(made, out, keep_auto_map=keep)
        for name in ("config.json", "tokenizer_config.json"):
            assert ("auto_map" in json.loads((out / name).read_text())) == keep
        assert not list(out.glob("*.py"))
    with della.plan(made) as plan:
        assert [note for note in plan.notes if "code of its own" in note] == [
            f"{folder}/base: config.json names code of its own (auto_map); it is never run, and left out of "
            "the result"
        ]


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


@pytest.mark.parametrize(
    ("config", "keys", "written"),
    [
        ({"torch_dtype": "float32"}, {}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "float16"}, {"dtype": "float16"}),
        ({"n": 1}, {"dtype": "float16", "out_dtype": "float32"}, {"n": 1, "torch_dtype": "float32"}),
        ({"torch_dtype": None, "x": [1, "é"]}, {}, {"torch_dtype": "bfloat16", "x": [1, "é"]}),
        ({"dtype": "a", "torch_dtype": "b"}, {}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "other": {"dtype": "x"}},
            {"out_dtype": "float16"},
            {"dtype": "float16", "text_config": {"dtype": "float16", "n": 1}, "other": {"dtype": "x"}},
        ),
        (
            {"auto_map": {"AutoModel": "x.y"}, "vision_config": {"auto_map": {}}, "custom_pipelines": {}},
            {},
            {"vision_config": {}, "torch_dtype": "bfloat16"},
        ),
        ({"n": 1e9, "limit": math.inf}, {}, {"n": 1e9, "limit": math.inf, "torch_dtype": "bfloat16"}),
    ],
)
def test_the_configuration_tells_the_dtype_and_names_no_code(
    tmp_path: Path, config: dict[str, Any], keys: dict[str, Any], written: dict[str, Any]
) -> None:
    folder = save(tmp_path / "models", plain_trio())
    (folder / "base/config.json").write_text(json.dumps(config))
    made = recipe(folder, "della", OWN, {}, **keys)
    merge(made, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == written
    with della.plan(made) as plan:
        named = [key for key in ("auto_map", "custom_pipelines") if key in config]
        said = f"{folder}/base: config.json names code of its own ({', '.join(named)})"
        told = [note for note in plan.notes if "code of its own" in note]
        assert told == ([f"{said}; it is never run, and left out of the result"] if named else [])


def test_a_tokenizer_that_names_code_loses_the_name(folder: Path, tmp_path: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["x--y.Z", None]}, "model_max_length": 7, "name": "é"}
    put(folder / "base", {"tokenizer_config.json": config})
    merge(recipe(folder, "della", OWN, {}), tmp_path / "out")
    found = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert found == {"model_max_length": 7, "name": "é"}


def test_linear_takes_side_files_from_its_base_model_if_that_is_merged_too(
    folder: Path, tmp_path: Path
) -> None:
    for name in ("math", "code"):
        put(folder / name, {"tokenizer.json": {"of": name}})
    made = recipe(folder, "linear", [{}] * 3, {})
    for number, (base, wanted) in enumerate(((None, "math"), ("code", "code"), ("base", "math"))):
        keys = {"base_model": str(folder / base)} if base else {}
        merge({**made, **keys}, tmp_path / str(number))
        assert json.loads((tmp_path / str(number) / "tokenizer.json").read_text()) == {"of": wanted}


# ---- della.json -------------------------------------------------------------------------------------------


def test_the_manifest(folder: Path, tmp_path: Path) -> None:
    path = put(tmp_path, {"r.yml": recipe(folder, "della", OWN, {}, dtype="float32")}) / "r.yml"
    told = merge(str(path), tmp_path / "out", seed=7)  # type: ignore[arg-type]
    stored = json.loads((tmp_path / "out/della.json").read_text())
    assert is_sealed((tmp_path / "out/della.json").read_bytes())
    assert told == {key: value for key, value in stored.items() if key != "seal"}
    with della.plan(path, seed=7) as plan:
        assert told["departures_from_mergekit"] == list(plan.departures)
    identities = {}
    for name in ("base", *EXPERTS):
        raw = (folder / name / "model.safetensors").read_bytes()
        head = raw[: 8 + int.from_bytes(raw[:8], "little")]
        fingerprint = xxhash.xxh3_128(len(raw).to_bytes(8, "little") + head).hexdigest()
        file = {"name": "model.safetensors", "size": len(raw), "header_fingerprint": fingerprint}
        tensors = {
            key: xxhash.xxh3_128_hexdigest(raw)
            for key, (dtype, _, raw) in load(folder / name).items()
            if name == "base" or DTYPES[dtype].is_float  # what is copied is read from the base alone
        }
        identities[name] = {
            "reference": f"./{name}", "revision": None, "files": [file], "tensors": tensors,
        }  # fmt: skip
    assert told["inputs"] == {
        "base": identities["base"],
        "models": [{**identities[name], "identity": name} for name in EXPERTS],
    }
    written = json.loads(path.read_text().replace(f"{folder}/", "./"))
    assert yaml.safe_load(told["recipe"]) == {**written, "seed": 7}
    assert (told["merge_method"], told["seed"], told["tensor_hash"]) == ("della", 7, "xxh3_128")
    assert told["tool"] == {"name": "della", "version": della.__version__}
    assert told["versions"] == {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "numba", "ml_dtypes")},
    }
    stored = {name: raw for name, (_, _, raw) in load(tmp_path / "out").items()}
    assert told["tensors"] == {name: xxhash.xxh3_128(raw).hexdigest() for name, raw in stored.items()}


# ---- the model card ---------------------------------------------------------------------------------------


def front_matter(out: Path) -> dict[str, Any]:
    """Between the first line, which is ---, and the next that is."""
    lines = (out / "README.md").read_text().split("\n")
    assert lines[0] == "---"
    found: dict[str, Any] = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    return found


def test_the_card(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(json.dumps(recipe(folder, "della", OWN, {}), indent=1))
    merge(str(path), tmp_path / "out", seed=None)  # type: ignore[arg-type]
    assert front_matter(tmp_path / "out") == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "della"],
    }
    text = (tmp_path / "out/README.md").read_text()
    assert f"```yaml\n{path.read_text().replace(f'{folder}/', '')}\n```\n" in text
    assert "mergekit" not in text
    assert "\n# math + code + story\n" in text
    versions = f"della {della.__version__}, python {platform.python_version()}, numpy {np.__version__}"
    assert f"A merge: method `della`, seed 42, made with {versions}" in text


def test_models_of_the_hub_stand_in_the_front_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders do not, even where their reference has the form owner/name: paths mean nothing to others."""
    tensors = plain_trio()
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "some", {name: tensors[name] for name in ("code",)})
    for name in ("base", "math"):
        save(tmp_path / f"hub/models--owner--{name}/snapshots", {COMMIT: tensors[name]})
    monkeypatch.setattr(
        source, "fetch",
        lambda repo, revision, weights: (
            tmp_path / f"hub/models--{repo.replace('/', '--')}/snapshots" / COMMIT, {}
        ),
    )  # fmt: skip
    made = {
        "merge_method": "della",
        "base_model": "owner/base",
        "models": [{"model": reference} for reference in ("owner/math@main", "some/code", "./some/code")],
    }
    told = merge(made, tmp_path / "out")
    assert front_matter(tmp_path / "out") == {
        "base_model": ["owner/base", "owner/math"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "della"],
    }
    assert [entry["revision"] for entry in told["inputs"]["models"]] == [COMMIT, None, None]


HOSTILE = "a`b```c---<script>alert(1)<!--*_#|[x](javascript:y)~~~ é"
HOSTILE_RECIPE = """\
---
# ---
# ```` ~~~~ </code></pre><script>alert(2)</script>
# front: matter
name: 'text
  ````
  </code></pre><script>alert(3)</script>'
merge_method: task_arithmetic
base_model: "{0}/base"
models:
  - model: '{0}/{1}'
"""


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    tensors = plain_trio()
    save(tmp_path, {"base": tensors["base"], HOSTILE: tensors["math"]})
    path = tmp_path / "recipe.yml"
    path.write_text(HOSTILE_RECIPE.format(tmp_path, HOSTILE))
    out = tmp_path / f"{HOSTILE} out"
    merge(str(path), out)  # type: ignore[arg-type]
    assert front_matter(out) == {
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "della", "task_arithmetic"],
    }
    text = (out / "README.md").read_text()
    body = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt().parse(body)
    assert [token.content for token in tokens if token.type == "fence"] == [
        path.read_text().replace(f"{tmp_path}/", "")
    ]
    inline = [child for token in tokens for child in token.children or ()]
    assert {token.type for token in (*tokens, *inline)}.isdisjoint(
        {"html_block", "html_inline", "link_open", "image", "hr", "em_open", "strong_open"}
    )
    shown = [
        "".join(child.content for child in token.children or ()) for token in tokens if token.type == "inline"
    ]
    assert shown[0] == "text ```` </code></pre><script>alert(3)</script>"
    assert [line for line in shown if line.startswith(f"expert: {HOSTILE}: ")]
    told = yaml.safe_load(json.loads((out / "della.json").read_text())["recipe"])
    assert told == yaml.safe_load(path.read_text().replace(f"{tmp_path}/", "./"))


def test_the_result_does_not_depend_on_its_place(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, "della", OWN, {})
    merge(made, tmp_path / "one")
    merge(made, tmp_path / "deep/two")
    merge({**made, "name": "My  *merge*"}, tmp_path / "named")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "deep/two"))
    assert one == two
    assert "\n# math + code + story\n" in (tmp_path / "one/README.md").read_text()
    assert "\n# My \\*merge\\*\n" in (tmp_path / "named/README.md").read_text()


def test_a_single_file_has_nothing_beside_it(folder: Path, tmp_path: Path) -> None:
    put(folder / "base", SIDE)
    (tmp_path / "site").mkdir()
    manifest = merge(recipe(folder, "della", OWN, {}), tmp_path / "site/out.safetensors")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["out.safetensors"]
    assert load(tmp_path / "site/out.safetensors") == as_stored(expected(plain_trio(), "della", OWN, {}))
    with safetensors.safe_open(tmp_path / "site/out.safetensors", "np") as file:
        metadata = file.metadata()
    raw = (tmp_path / "site/out.safetensors").read_bytes()
    assert is_sealed(raw[: 8 + int.from_bytes(raw[:8], "little")])
    assert metadata.keys() == {"format", "della"}
    told = json.loads(metadata["della"])
    assert {key: value for key, value in told.items() if key != "seal"} == manifest
    assert told["files"] == {}
    assert told["tensors"] == {
        name: xxhash.xxh3_128_hexdigest(raw)
        for name, (_, _, raw) in load(tmp_path / "site/out.safetensors").items()
    }


def test_a_base_in_one_file_lends_the_config_beside_it(tmp_path: Path) -> None:
    tensors = plain_trio()
    for name in ("base", "math"):
        put(tmp_path / name, {f"{name}.safetensors": dict(tensors[name]), "config.json": CONFIG, **SIDE})
    made = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base/base.safetensors"),
        "models": [{"model": str(tmp_path / "math/math.safetensors")}],
    }
    merge(made, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*SIDE, "README.md", "config.json", "della.json", "model.safetensors"]
    )
