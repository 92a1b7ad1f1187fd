"""della verify on manifests that are damaged or hostile: a seal is no signature, anything may be sealed."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from merged import FILE, FOLDER, FORMS, find, flip, refused, reseal, shards

from della.api import verify
from della.errors import CheckpointError, DellaError, OutputError, RecipeError
from della.output.manifest import MOST_BYTES, sealed


@pytest.fixture(params=FORMS)
def merged(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """A merged model to spoil: a folder, or a single file."""
    copy = shutil.copytree if request.param == FOLDER else shutil.copy
    return Path(copy(made / request.param, tmp_path / request.param))


def where(merged: Path) -> Path:
    """The file that holds the manifest."""
    return merged / "della.json" if merged.is_dir() else merged


# ---- damage -----------------------------------------------------------------------------------------------


def test_a_changed_manifest(merged: Path) -> None:
    path = where(merged)
    raw = path.read_bytes()
    said = [f"{path}: changed since it was written, so nothing can be held against it"]
    quote = b'"' if merged.is_dir() else b'\\"'
    changes = [(b"mergekit", b"mergekid"), (b"format" + quote + b": 2", b"format" + quote + b": 3")]
    changes += [(b'"seal', b'"sea1')] if merged.is_dir() else [(b'"della"', b'"dell4"')]
    for old, new in changes:
        assert old in raw
        path.write_bytes(raw.replace(old, new, 1))
        assert verify(merged, sources=1, inputs=True).bad == said, old


def test_a_manifest_that_cannot_be_read(out: Path) -> None:
    path = out / "della.json"
    raw = path.read_bytes()
    path.write_bytes(b"\xff" + raw)
    assert verify(out).bad == [f"{path}: changed since it was written, so nothing can be held against it"]
    path.write_bytes(b"{")
    (bad,) = verify(out).bad
    assert bad.startswith(f"{path}: invalid JSON: ")
    os.truncate(path, MOST_BYTES + 1)
    assert verify(out).bad == [
        f"{path}: 100,000,001 bytes, and 100,000,000 is the most; download the file again"
    ]
    path.unlink()
    path.mkdir()
    assert verify(out).bad == [f"{path}: not a regular file; put the file itself there"]
    path.rmdir()
    path.symlink_to("absent")
    assert verify(out).bad == [f"{path}: a broken link; download the file again"]
    path.unlink()
    path.symlink_to("della.json")
    assert verify(out).bad[0].startswith(f"{path}: ")


def test_a_single_file_without_a_readable_header(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made / FILE, tmp_path / FILE))
    flip(path, 0)
    (bad,) = verify(path).bad
    assert bad.startswith(f"{path}: ")
    path.write_bytes(b"")
    assert verify(path).bad == [
        f"{path}: truncated: expected at least 8 bytes, found 0; download the file again"
    ]


FORMATS: list[tuple[object, str]] = [(1, "1"), (3, "3"), ("2", "2"), (10**90, "1" + "0" * 19)]
FORMATS += [(None, "unknown"), (2.0, "unknown"), ([[]], "unknown")]


@pytest.mark.parametrize(("found", "shown"), FORMATS)
def test_another_format(merged: Path, found: object, shown: str) -> None:
    reseal(merged, lambda manifest: manifest.update(format=found))
    assert refused(OutputError, merged) == (
        f"{where(merged)}: a manifest of format {shown}, and this version of della knows format 2; "
        "verify with the version that merged it"
    )


def test_a_della_json_of_something_else(out: Path) -> None:
    (out / "della.json").write_text("{}")
    assert "a manifest of format unknown" in refused(OutputError, out)


# ---- hostile, and sealed ----------------------------------------------------------------------------------

FORM = "not a manifest as della writes it"
Path_ = tuple[object, ...]
WRONG: list[tuple[Path_, object, str]] = [
    (("tensors",), [], "tensors"),
    (("tensors",), None, "tensors"),
    (("tensors", "gate"), 3, "tensors"),
    (("recipe",), None, "recipe"),
    (("recipe",), {}, "recipe"),
    (("tool",), "della", "tool"),
    (("tool", "version"), 1, "version"),
    (("versions",), [], "versions"),
    (("versions", "numpy"), [1], "versions"),
    (("files",), ["README.md"], "files"),
    (("files", "README.md"), 3, "size"),
    (("files", "README.md"), [], "size"),
    (("files", "README.md", "size"), "9", "size"),
    (("files", "README.md", "size"), True, "size"),
    (("files", "README.md", "size"), 9.0, "size"),
    (("files", "README.md"), {"size": 1, "hash": None}, "hash"),
    (("files", "README.md"), {"size": 1, "header_hash": None}, "header_hash"),
    (("inputs",), [], "inputs"),
    (("inputs", "base"), None, "base"),
    (("inputs", "models"), {}, "models"),
    (("inputs", "models"), [3], "files"),
    (("inputs", "models", 0), None, "files"),
    (("inputs", "base", "tensors"), ["gate"], "tensors"),
    (("inputs", "base", "files"), {}, "files"),
    (("inputs", "base", "files", 0), "x", "name"),
    (("inputs", "base", "files", 0, "name"), [], "name"),
    (("inputs", "models", 1, "files", 0, "header_fingerprint"), 0, "header_fingerprint"),
    (("inputs", "models", 2, "revision"), 3, "revision"),
    (("inputs", "models", 2, "reference"), None, "reference"),
]


def put_at(keys: Path_, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for step in keys[:-1]:
            manifest = manifest.setdefault(step, {}) if isinstance(manifest, dict) else manifest[step]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(("keys", "value", "named"), WRONG)
def test_wrong_types(merged: Path, keys: Path_, value: object, named: str) -> None:
    reseal(merged, put_at(keys, value))
    problem = f"'{named}' must hold texts only" if len(keys) > 1 and named in ("tensors", "versions") else ""
    problem = problem or f"'{named}' is missing or of a wrong type"
    if keys == ("inputs", "base", "tensors"):
        problem = "'tensors' is missing or of a wrong type"
    said = [f"{where(merged)}: {FORM} ({problem}); merge again to have one"]
    assert verify(merged, sources=1, inputs=True).bad == said


@pytest.mark.parametrize(
    "name", ["../della.json", "/etc/passwd", "a\\b", "c:x", "", ".", "..", "a\0b", "a/../b", "a//b"]
)
def test_names_that_leave_the_folder(merged: Path, name: str) -> None:
    reseal(merged, put_at(("files", name), {"size": 1, "hash": "0" * 32}))
    said = f"{name!r} is no name of a file in a model's folder"
    assert verify(merged).bad == [f"{where(merged)}: {FORM} ({said}); merge again to have one"]


def test_a_name_too_long_and_sizes_that_cannot_be(out: Path) -> None:
    long = "x" * 5000
    reseal(out, put_at(("files", long), {"size": -1, "hash": ""}))
    reseal(out, put_at(("files", "config.json", "size"), 10**99))
    readme, size = out / "config.json", (out / "config.json").stat().st_size
    found = verify(out).bad
    assert found[0] == f"{readme}: has {size:,} bytes, expected {10**99:,}"
    assert found[1:] in ([f"{out}/{long}: cannot be read (File name too long)"], [f"{out}/{long}: missing"])


def test_links_that_leave_the_folder(out: Path, made: Path) -> None:
    for name in ("README.md", shards(out)[0].name):
        (out / name).unlink()
        (out / name).symlink_to(made / FOLDER / name)
    bad = verify(out).bad
    end = "; put the file itself there"
    assert f"{out}/README.md: a link that leaves the folder, to {made}/out/README.md{end}" in bad[:2]
    assert any(text.startswith(f"{shards(out)[0]}: a link that leaves the folder") for text in bad[:2])
    assert all(text.startswith(f"{shards(out)[0]}: tensor '") for text in bad[2:])
    manifest = out / "della.json"
    manifest.unlink()
    manifest.symlink_to(made / FOLDER / "della.json")
    assert verify(out).bad == [f"{manifest}: a link that leaves the folder, to {made}/out/della.json{end}"]


def test_nothing_outside_is_opened(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int):
                opened.append(os.fspath(path))
            return call(path, *arguments, **options)

        return wrapper

    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    assert verify(merged).is_well
    monkeypatch.undo()
    assert opened
    assert {path for path in opened if not path.startswith(str(merged))} == set()


def test_tensors_that_are_not_in_the_files_and_the_other_way_round(merged: Path) -> None:
    path, _, _ = find(merged, "gate")

    def change(manifest: dict[str, Any]) -> None:
        del manifest["tensors"]["gate"]
        manifest["tensors"]["new\n"] = "0"
        manifest["tensors"]["one"] = ""

    reseal(merged, change)
    one, _, _ = find(merged, "one")
    assert sorted(verify(merged).bad) == sorted([
        f"{path}: tensor 'gate' is not in the manifest",
        f"{merged}: tensor 'new\\n' is lost",
        f"{one}: tensor 'one' has changed",
    ])  # fmt: skip


RECIPES = {
    "": "a recipe is a mapping that begins with a key such as 'models:', but this is empty",
    "/etc/passwd": "a recipe is a mapping",
    "a: [" * 100: "",
    "a: &a [x]\nb: [*a, *a": "",
    "models: 3": "",
    "x" * (1 << 20): "larger than 1 MiB",
}


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text[:12])
def test_a_recipe_that_is_none(merged: Path, text: str) -> None:
    reseal(merged, put_at(("recipe",), text))
    assert verify(merged).is_well, "it is not asked for"
    said = refused(RecipeError, merged, sources=1)
    assert f"{merged}: in its manifest: recipe" in said
    assert RECIPES[text] in said


def linear(reference: str) -> str:
    models = [{"model": reference, "parameters": {"weight": 1}}]
    return json.dumps({"merge_method": "linear", "models": models})


def test_a_recipe_of_other_models(merged: Path, made: Path) -> None:
    def change(old: str, new: str) -> None:
        reseal(merged, lambda m: m.update(recipe=m["recipe"].replace(old, new)))

    change('"./math"', '"./code"')
    bad = verify(merged, inputs=True, base_dir=made).bad
    code = f"{made}/code/model.safetensors"
    assert f"{code}: tensor 'lm_head.weight' is not what was merged" in bad
    assert verify(merged, sources=1, base_dir=made).bad
    reseal(merged, put_at(("recipe",), linear("./base")))
    bad = verify(merged, inputs=True, base_dir=made).bad
    assert bad[0] == f"{merged}: models in its recipe: 1, in its manifest: 3"
    for reference in ("/dev/null", "/etc/passwd", "\0", "x" * 5000, "~nobody-is-called-this/x"):
        reseal(merged, put_at(("recipe",), linear(reference)))
        with pytest.raises((CheckpointError, RecipeError)):
            verify(merged, inputs=True, base_dir=made)


def test_nested_deeply(out: Path) -> None:
    raw = sealed(b'{"seal": "' + b"0" * 32 + b'", "format": ' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    (out / "della.json").write_bytes(raw)
    assert verify(out).bad == [f"{out}/della.json: JSON is nested too deeply; download the file again"]


def nodes(value: object, keys: Path_ = ()) -> list[Path_]:
    items: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [keys, *(inner for key, each in items for inner in nodes(each, (*keys, key)))]


ODD: list[object] = [None, True, -1, 0.5, 1e308, 10**50, "", "x", "../..", "\n", [], {}, [[]], {"a": 1}, "é"]


def test_any_manifest_is_survived(merged: Path, made: Path) -> None:
    """Values of every type anywhere in it, sealed: an entry in the verdict or a refusal, and no crash."""
    rng = Random(11)
    raw = where(merged).read_bytes()
    endings: Counter[str] = Counter()

    def change(manifest: dict[str, Any]) -> None:
        top = rng.choice([key for key in manifest if key not in ("seal", "format")])
        keys = rng.choice(nodes(manifest[top], (top,)))
        put_at(keys, rng.choice(ODD))(manifest)

    for _ in range(60):
        where(merged).write_bytes(raw)
        reseal(merged, change)
        try:
            found = verify(merged, sources=0.02, inputs=True, base_dir=made, threads=1)
            endings["well" if found.is_well else "bad"] += 1
        except DellaError as error:
            endings[type(error).__name__] += 1
    assert endings["bad"] > 10
    assert endings.total() == 60


def test_the_older_name_of_a_fingerprint_is_read(made: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(made / FOLDER, tmp_path / "out"))
    told = json.loads((merged / "della.json").read_text())["inputs"]
    files = [file for each in (told["base"], *told["models"]) for file in each["files"]]
    assert [key for file in files for key in file] == ["name", "size", "header_fingerprint"] * 4
    earlier = json.dumps(told).replace("header_fingerprint", "fingerprint")
    reseal(merged, put_at(("inputs",), json.loads(earlier)))
    found = verify(merged, inputs=True, base_dir=made)
    assert (found.bad, found.inputs) == ([], 151)
