"""What is published with a merge: a model card without paths, that the Hub takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import put
from safetensors.numpy import load_file

import della
from della.errors import CheckpointError
from della.planning.published import portable_references, portable_text
from della.recipe.reader import read_recipe

BASE: dict[str, Any] = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}


def card(folder: Path, models: list[str], base: str, written: str = "yaml") -> str:
    made = {"merge_method": "della", "base_model": base, "models": [{"model": name} for name in models]}
    text = json.dumps(made) if written == "json" else yaml.safe_dump(made)
    (folder / "recipe.yml").write_text(text)
    della.merge(folder / "recipe.yml", folder / "out", fsync=False, overwrite=True)
    return (folder / "out/README.md").read_text()


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize("written", ["yaml", "json"])
def test_no_path_of_this_machine(tmp_path: Path, written: str) -> None:
    secret = tmp_path / "home of somebody"
    put(secret, {"a/base/model.safetensors": BASE, "it's/one/model.safetensors": {"w": BASE["w"] + 1}})
    put(secret, {"b/one/model.safetensors": {"w": BASE["w"] + 2}})
    text = card(tmp_path, [f"{secret}/it's/one", f"{secret}/b/one"], f"{secret}/a/base", written)
    assert "somebody" not in text
    assert str(tmp_path) not in text
    assert "base_model" not in front(text), "a folder is no model of the Hub"
    assert front(text)["tags"] == ["merge", "della"]
    assert "expert: one: 1 of 1 tensors" in text
    assert "expert: b/one: 1 of 1 tensors" in text, "equal names are told apart by more of the path"


LAYOUTS = {
    "beside": ("a/base", "it's/one", "b/one"),
    "nested": ("base", "base/one", "base/tuned models/one"),
    "with dots": ("a/base", "a/../b/one", 'b/"two'),
}


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written", ["yaml", "json", "mapping"])
def test_a_manifest_without_paths_repeats_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, layout: str, written: str
) -> None:
    secret = tmp_path / "home of somebody"
    names = LAYOUTS[layout]
    for value, name in enumerate(names):
        put(secret, {f"{name}/model.safetensors": {"w": BASE["w"] * (1 + value / 100)}})
    base, *models = (f"{secret}/{name}" for name in names)
    entries: list[Any] = [{"model": {"path": name} if written == "mapping" else name} for name in models]
    made = {"merge_method": "della", "base_model": base, "models": entries, "seed": 3}
    recipe = tmp_path / "recipe.yml"
    text = json.dumps(made) if written == "json" else f"# of {base}\n" + yaml.safe_dump(made)
    recipe.write_text(text)
    before: list[bytes] = []
    for start in (tmp_path, secret):  # where it was started does not matter
        monkeypatch.chdir(start)
        della.merge(recipe, tmp_path / out, fsync=False, overwrite=True)
        files = [tmp_path / out] if "." in out else [tmp_path / out / n for n in ("della.json", "README.md")]
        raw = [path.read_bytes() for path in files]
        assert not [one for one in raw if b"somebody" in one or str(tmp_path).encode() in one]
        assert raw == (before or raw)
        before = raw
    monkeypatch.chdir(tmp_path)
    moved = secret.rename(tmp_path / "elsewhere")
    found = della.verify(out, sources=1.0, inputs=True, base_dir=moved)
    assert found.is_well, found.bad
    assert (found.recomputed, found.inputs) == (1, 3)
    with pytest.raises(CheckpointError, match="name that folder: base_dir=FOLDER"):
        della.verify(out, inputs=True)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("written", ["{folder}/{name}", "file://{folder}/{name}", "~/{name}"])
def test_one_merge_in_two_folders_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, written: str
) -> None:
    found = []
    for folder in (tmp_path / "of-one", tmp_path / "of/another person's"):
        monkeypatch.setenv("HOME", str(folder))
        for value, name in enumerate(("base", "tuned/a", "tuned/b")):
            put(folder, {f"{name}/model.safetensors": {"w": BASE["w"] * (1 + value / 100)}})
            put(folder, {f"{name}/config.json": {"model_type": "llama"}})
        put(folder, {"norms.safetensors": {"w": np.arange(1, 5, dtype=np.float32)}})
        base, a, b = (written.format(folder=folder, name=name) for name in ("base", "tuned/a", "tuned/b"))
        norms = {"input_norms": f"{folder}/norms.safetensors"}
        models = [{"model": a, **norms}, {"model": b, "parameters": {"weight": 0.5}, **norms}]
        made = {"merge_method": "della", "base_model": base, "models": models, "seed": 3}
        made["parameters"] = {"importance": "wanda", "density": 0.5}
        target = della.merge(made, folder / "merged" / out, fsync=False).out
        assert della.verify(target, sources=1.0, inputs=True).is_well
        paths = sorted(target.iterdir()) if target.is_dir() else [target]
        found.append({path.name: path.read_bytes() for path in paths})
    assert found[0] == found[1]
    assert ("della.json" in found[0]) == (out == "out")
    assert not [raw for raw in found[0].values() if b"of-one" in raw or b"file:" in raw or b"~" in raw]


def test_a_path_with_a_revision_or_a_dot_at_its_end(tmp_path: Path) -> None:
    """Neither is told, nor does an expert get another name, by which what is dropped is drawn."""
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": {"w": BASE["w"] + 1}})
    put(tmp_path, {"one@v2/model.safetensors": {"w": BASE["w"] + 2}})
    one: dict[str, Any] = {"model": {"model": {"path": f"{tmp_path}/one"}, "revision": "v2"}}
    made = {"merge_method": "della", "base_model": f"{tmp_path}/base", "models": [one], "seed": 3}
    manifest = della.merge(made, tmp_path / "out", fsync=False).manifest
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["inputs"]["models"][0]["reference"] == "./one@v2"
    assert della.verify(tmp_path / "out", sources=1.0, inputs=True).is_well
    dotted = {**made, "models": [{"model": f"{tmp_path}/one/."}]}
    recipe = read_recipe(dotted)
    again = read_recipe(portable_text(recipe, portable_references(recipe)))
    assert str(tmp_path) not in again.text
    assert [each.identity for each in again.models] == [each.identity for each in recipe.models]


def test_a_tokenizer_of_a_model_is_recorded_as_that_model() -> None:
    models = [{"model": "/home/me/one"}, {"model": "/home/me/two/"}]
    rows = {"<a>": {"source": "/home/me/two"}, "model": {"source": {"kind": "zero"}}}
    rows["<b>"] = {"source": {"kind": "model_token", "model": "/home/me/one/", "token": "x"}}
    for tokenizer in (
        {"tokenizer_source": "/home/me/one/"},
        {"tokenizer": {"source": "/home/me/two", "tokens": rows}},
        {"tokenizer_source": "base"},
        {"tokenizer": {"source": "union"}},
    ):
        made = {"merge_method": "linear", "models": models, **tokenizer}
        recipe = read_recipe(made)
        text = portable_text(recipe, portable_references(recipe))
        expected = json.dumps(made).replace("/home/me", ".").replace('/"', '"')
        assert yaml.safe_load(text) == json.loads(expected)
        read_recipe(text)


def test_paths_are_recorded_where_that_is_asked_for(tmp_path: Path) -> None:
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": {"w": BASE["w"] + 1}})
    made: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    made |= {"models": [{"model": f"{tmp_path}/one"}]}
    for out in ("out", "out.safetensors"):
        result = della.merge(made, tmp_path / out, fsync=False, record_paths=True)
        assert result.manifest["inputs"]["base"]["reference"] == f"{tmp_path}/base"
        assert della.verify(tmp_path / out, sources=1.0, inputs=True).is_well
    assert f"{tmp_path}/one" in (tmp_path / "out/README.md").read_text()
    plain = della.merge(made, tmp_path / "plain", fsync=False).manifest
    assert plain["inputs"]["base"]["reference"] == "./base"
    assert plain["tensors"] == result.manifest["tensors"]


def test_an_unfinished_file_has_room_for_either(tmp_path: Path) -> None:
    """What is recorded moves the weights of a single file, so another one is begun."""
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": {"w": BASE["w"] + 1}})
    made: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    made |= {"models": [{"model": f"{tmp_path}/one"}]}
    out = tmp_path / "out.safetensors"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    for record in (False, True):
        with pytest.raises(KeyboardInterrupt):
            della.merge(made, out, fsync=False, record_paths=record, progress=stop)
        della.merge(made, out, fsync=False, record_paths=not record, overwrite=True)
        assert della.verify(out, sources=1.0, inputs=True, base_dir=tmp_path).is_well
        assert np.array_equal(load_file(out)["w"], BASE["w"] + 1)
        out.unlink()


def test_relative_and_absolute_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"base/model.safetensors": BASE, "r/none/model.safetensors": {"w": BASE["w"] + 1}})
    text = f"merge_method: task_arithmetic\nname: none\nbase_model: {tmp_path}/base\n"
    text += "models:\n- model: none\n  parameters: {weight: [{filter: none, value: 2}, {value: 1}]}\n"
    (tmp_path / "r/recipe.yml").write_text(text.replace("filter: none", "filter: w"))
    monkeypatch.chdir("/")
    manifest = della.merge(tmp_path / "r/recipe.yml", tmp_path / "out", fsync=False, allow_idle=True).manifest
    read = yaml.safe_load(manifest["recipe"])
    assert (read["base_model"], read["models"][0]["model"], read["name"]) == ("./base", "./r/none", "none")
    assert list(manifest["coverage"]) == ["./r/none"]
    assert della.verify(tmp_path / "out", sources=1.0, inputs=True, base_dir=tmp_path).is_well


def test_where_only_the_root_holds_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe({"merge_method": "linear", "models": [{"model": "/a/me/x"}, {"model": "/b/me/x"}]})
    assert portable_references(recipe) == {"/a/me/x": "./x", "/b/me/x": "./me/x"}
    text = portable_text(recipe, portable_references(recipe))
    assert [entry.identity for entry in read_recipe(text).models] == ["x", "x#2"]
    monkeypatch.setenv("HOME", "/root/of/me")
    home = {"merge_method": "linear", "models": [{"model": "~/x"}, {"model": "/root/of/me/y/z"}]}
    assert portable_references(read_recipe(home)) == {"~/x": "./x", "/root/of/me/y/z": "./y/z"}


def test_names_on_the_hub_where_they_are_known(tmp_path: Path) -> None:
    commit = "a" * 40
    put(tmp_path, {f"models--own--base/snapshots/{commit}/model.safetensors": BASE})
    put(
        tmp_path,
        {"one/model.safetensors": {"w": BASE["w"] + 1}, "one/config.json": {"_name_or_path": "own/one"}},
    )
    put(
        tmp_path,
        {"two/model.safetensors": {"w": BASE["w"] + 2}, "two/config.json": {"_name_or_path": "/x/y"}},
    )
    base = str(tmp_path / f"models--own--base/snapshots/{commit}")
    text = card(tmp_path, [str(tmp_path / "one"), str(tmp_path / "two")], base)
    assert front(text)["base_model"] == ["own/base", "own/one"]
    assert front(text)["base_model_relation"] == "merge"


def test_in_a_notebook(tmp_path: Path) -> None:
    put(tmp_path, {"base/model.safetensors": BASE, "<b>one/model.safetensors": {"w": BASE["w"] + 1}})
    made = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    recipe = made | {"models": [{"model": str(tmp_path / "<b>one")}]}
    plan = della.plan(recipe)
    result = della.merge(recipe, tmp_path / "out", fsync=False)
    for shown in (plan, result):
        assert len(repr(shown)) < 200
        page = shown._repr_html_()
        assert "<td>1 of 1</td>" in page
        assert "&lt;b&gt;one" in page
        assert "<b>" not in page
    assert repr(plan) == "<Plan: task_arithmetic, 1 models, 1 tensors, 48 bytes>"
    plan.close()
    plan.close()


def test_a_plan_shows_layers_in_their_order(tmp_path: Path) -> None:
    from della.planning.describe import plan_text

    base = {f"layers.{k}.w": np.full((2, 2), k, np.float32) for k in range(12)}
    put(
        tmp_path,
        {"base/model.safetensors": base, "one/model.safetensors": {k: v + 1 for k, v in base.items()}},
    )
    own = {"weight": [0.1, 1.2]}
    made = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    with della.plan(made | {"models": [{"model": str(tmp_path / "one"), "parameters": own}]}) as plan:
        lines = [line.strip() for line in plan_text(plan, 1, everything=True).split("\n")]
    assert [line for line in lines if line.startswith("layers.")] == [f"layers.{k}.*" for k in range(12)]


@pytest.mark.parametrize("auto_map", [False, True])
def test_configurations_do_not_say_where_a_model_lay(tmp_path: Path, auto_map: bool) -> None:
    inner = {"_name_or_path": "owner/inner", "name_or_path": "~/inner", "model_type": "x"}
    config = {"_name_or_path": "/home/me/base", "model_type": "llama", "text_config": inner, "list": [inner]}
    tokenizer = {
        "tokenizer_file": "/me/t.json",
        "special_tokens_map_file": "/me/s.json",
        "chat_template": "/home",
        "model_max_length": 9,
    }
    plain = {"base_model_name_or_path": "owner/name", "_name_or_path": "C:/me/base", "eos_token_id": 2}
    files = {"config": config, "tokenizer_config": tokenizer, "generation_config": plain}
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": {"w": BASE["w"] + 1}})
    for name, value in files.items():
        (tmp_path / f"base/{name}.json").write_text(json.dumps(value))
    made: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base"}
    made |= {"models": [{"model": f"{tmp_path}/one"}]}
    out = della.merge(made, tmp_path / "out", fsync=False, keep_auto_map=auto_map).out
    kept = {"_name_or_path": "owner/inner", "model_type": "x"}
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in files}
    assert "_name_or_path" not in read["config"]
    assert (read["config"]["text_config"], read["config"]["list"]) == (kept, [kept])
    assert read["tokenizer_config"] == {"chat_template": "/home", "model_max_length": 9}
    assert read["generation_config"] == {"base_model_name_or_path": "owner/name", "eos_token_id": 2}
    assert della.verify(out).is_well


@pytest.mark.parametrize(
    ("comment", "told"),
    [("# from /home/me/secret, of May", True), ("# ~/secret", True), ("# May: 1/2 of it", False)],
)
def test_a_comment_does_not_say_where_a_model_lay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comment: str, told: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"base/model.safetensors": BASE, "one/model.safetensors": {"w": BASE["w"] + 1}})
    put(tmp_path, {"base/config.json": {"model_type": "llama"}})
    Path("r.yml").write_text(
        f"merge_method: task_arithmetic {comment}\nbase_model: base\nmodels: [model: one]\n"
    )
    for record_paths in (False, True):
        out = della.merge("r.yml", "out", fsync=False, record_paths=record_paths, overwrite=True).out
        for text in ((out / "README.md").read_text(), json.loads((out / "della.json").read_text())["recipe"]):
            assert (comment in text) == (record_paths or not told)
            assert "merge_method: task_arithmetic" in text
        assert della.verify(out, sources=1.0).is_well
