"""What stands in subfolders beside the base's weights and is read with them: modules of
sentence-transformers, further chat templates, tokenizers of a processor's parts.  It is in the result, in the
manifest, and verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from safetensors.numpy import save

import della
from della.errors import CheckpointError, DellaError, OutputError

Files = dict[str, Any]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
DENSE = save({"linear.weight": np.eye(4, dtype=np.float32)})


def weights(seed: int) -> bytes:
    return save({"w": np.random.default_rng(seed).normal(size=(4, 4)).astype(np.float32)})


def embedder(name: str, seed: int = 0, dense: bytes = DENSE, more: Files | None = None) -> Files:
    files = {
        "model.safetensors": weights(seed),
        "config.json": {"hidden_size": 4}, "modules.json": json.dumps(MODULES).encode(),
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 4},
        "2_Dense/model.safetensors": dense, "additional_chat_templates/tool.jinja": b"{{ x }}",
        "qformer_tokenizer/tokenizer.json": {}, "qformer_tokenizer/vocab.txt": b"a",
    } | (more or {})  # fmt: skip
    return {f"{name}/{file}": content for file, content in files.items()}


CARRIED = {
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json",
    "additional_chat_templates/tool.jinja", "qformer_tokenizer/tokenizer.json", "qformer_tokenizer/vocab.txt",
}  # fmt: skip


def recipe(folder: Path, *models: str) -> Path:
    made = {"merge_method": "task_arithmetic", "base_model": "BASE"}
    made |= {"models": [{"model": name} for name in models or ("FT",)]}  # type: ignore[dict-item]
    (folder / "recipe.yml").write_text(json.dumps(made))
    return folder / "recipe.yml"


def pair(folder: Path, base: Files | None = None, expert: Files | None = None) -> Path:
    put(folder, (base or embedder("BASE")) | (expert or embedder("FT", 1)))
    return recipe(folder)


def notes(path: Path) -> list[str]:
    with della.plan(path) as plan:
        return list(plan.notes)


def listed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_they_are_in_the_result_and_in_its_manifest(tmp_path: Path) -> None:
    path = pair(tmp_path)
    della.merge(path, tmp_path / "out", fsync=False)
    manifest = json.loads((tmp_path / "out/della.json").read_bytes())
    assert listed(tmp_path / "out") == {
        *CARRIED,
        "config.json",
        "README.md",
        "della.json",
        "model.safetensors",
    }
    for name in CARRIED:
        ours, theirs = ((tmp_path / home / name).read_bytes() for home in ("out", "BASE"))
        assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest()
        assert manifest["files"][name]["size"] == len(theirs)
    assert della.verify(tmp_path / "out").bad == []
    assert any("2_Dense/model.safetensors" in note and "not merged" in note for note in notes(path))


CHANGES: list[tuple[str, bytes | None, str]] = [
    ("1_Pooling/config.json", b"{}", "1_Pooling/config.json"),
    ("2_Dense/model.safetensors", DENSE[:-4] + b"abcd", "2_Dense/model.safetensors: has changed"),
    ("additional_chat_templates/tool.jinja", None, "missing"),
    ("additional_chat_templates/more.jinja", b"x", "programs may load it"),
    ("2_Dense/pytorch_model.bin", b"x", "programs may load it"),
    ("1_Pooling/adapter_config.json", b"{}", "programs may load it"),
]


@pytest.mark.parametrize(("name", "content", "said"), CHANGES)
def test_what_changes_in_them_is_found(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    della.merge(pair(tmp_path), tmp_path / "out", fsync=False)
    file = tmp_path / "out" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    (bad,) = della.verify(tmp_path / "out").bad
    assert name in bad
    assert said in bad


def test_a_whole_folder_that_is_missing_is_found(tmp_path: Path) -> None:
    della.merge(pair(tmp_path), tmp_path / "out", fsync=False)
    (tmp_path / "out/1_Pooling/config.json").unlink()
    (tmp_path / "out/1_Pooling").rmdir()
    assert della.verify(tmp_path / "out").bad == [f"{tmp_path}/out/1_Pooling/config.json: missing"]


def test_a_stranger_in_them_is_told_and_not_replaced(tmp_path: Path) -> None:
    path = pair(tmp_path)
    della.merge(path, tmp_path / "out", fsync=False)
    della.merge(path, tmp_path / "out", fsync=False, overwrite=True)
    (tmp_path / "out/1_Pooling/notes.odt").write_bytes(b"mine")
    verdict = della.verify(tmp_path / "out")
    assert verdict.is_well
    assert any("1_Pooling/notes.odt: not part of what was merged" in note for note in verdict.notes)
    with pytest.raises(OutputError, match=r"it holds 1_Pooling/notes\.odt"):
        della.merge(path, tmp_path / "out", fsync=False, overwrite=True)
    assert (tmp_path / "out/1_Pooling/notes.odt").read_bytes() == b"mine"


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("1_Pooling", "1_Pooling/config.json", "additional_chat_templates")):
        home = tmp_path / str(number)
        path = pair(home)
        there = home / "BASE" / name
        moved = home / "secret"
        there.rename(moved)
        there.symlink_to(moved)
        with pytest.raises(CheckpointError, match="a link that leaves the folder"):
            della.plan(path)


def test_links_within_a_hub_cache_are_followed(tmp_path: Path) -> None:
    path = pair(tmp_path)
    snapshot = tmp_path / "models--o--n/snapshots" / ("a" * 40)
    blobs = tmp_path / "models--o--n/blobs"
    blobs.mkdir(parents=True)
    for name in listed(tmp_path / "BASE"):
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes((tmp_path / "BASE" / name).read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    made = json.loads(path.read_text()) | {"base_model": str(snapshot)}
    path.write_text(json.dumps(made))
    della.merge(path, tmp_path / "out", fsync=False)
    assert listed(tmp_path / "out") >= CARRIED
    assert not any(found.is_symlink() for found in (tmp_path / "out").rglob("*"))


HOSTILE = ["../BASE/x", "/etc", "a/../../b", "a\\b", "C:x", "a\u2215b", "nul"]


@pytest.mark.parametrize("home", HOSTILE)
def test_a_list_of_modules_that_leads_elsewhere_is_refused(tmp_path: Path, home: str) -> None:
    listed = [{"path": home, "type": "x"}]
    path = pair(tmp_path, embedder("BASE", more={"modules.json": json.dumps(listed).encode()}))
    with pytest.raises(CheckpointError, match=r"modules\.json: names"):
        della.plan(path)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[1, {}]", b'[{"path": 3}]'])
def test_a_list_of_modules_that_is_none_names_nothing(tmp_path: Path, content: bytes) -> None:
    della.merge(
        pair(tmp_path, embedder("BASE", more={"modules.json": content})), tmp_path / "out", fsync=False
    )
    assert (tmp_path / "out/modules.json").read_bytes() == content
    assert not (tmp_path / "out/1_Pooling").exists()


@pytest.mark.parametrize("name", ["../x", "a/../x", "/x", "a//x", "a/./x"])
def test_a_manifest_that_leads_elsewhere_is_not_followed(tmp_path: Path, name: str) -> None:
    from della.output.manifest import dump

    della.merge(pair(tmp_path), tmp_path / "out", fsync=False)
    where = tmp_path / "out/della.json"
    manifest = json.loads(where.read_bytes())
    manifest.pop("seal")
    manifest["files"][name] = {"size": 1, "hash": "0" * 32}
    where.write_bytes(dump(manifest))
    assert any("no name of a file" in bad for bad in della.verify(tmp_path / "out").bad)


def test_code_and_pickles_stay_behind_and_are_named(tmp_path: Path) -> None:
    more: Files = {
        "2_Dense/pytorch_model.bin": b"x", "2_Dense/modeling.py": b"x", "assets/a.png": b"x", ".git/x": b"x",
        "additional_chat_templates/run.py": b"x",
    }  # fmt: skip
    base = embedder("BASE", more=more)
    del base["BASE/2_Dense/model.safetensors"]
    path = pair(tmp_path, base)
    della.merge(path, tmp_path / "out", fsync=False)
    told = notes(path)
    (left,) = [note for note in told if "left behind" in note and "assets/" in note]
    assert left.startswith("BASE: 4 files (")
    assert any("pickles that are left behind" in note and "save_pretrained" in note for note in told)
    assert not listed(tmp_path / "out") & more.keys()


def test_those_of_an_expert_that_differ_are_told(tmp_path: Path) -> None:
    other = save({"linear.weight": 2 * np.eye(4, dtype=np.float32)})
    path = pair(tmp_path, None, embedder("FT", 1, other, {"1_Pooling/config.json": {"cls": True}}))
    (note,) = [note for note in notes(path) if "differ from" in note]
    assert note.startswith("FT: 1_Pooling/config.json, 2_Dense/model.safetensors")
    base = {f"BASE/{name}": content for name, content in
            {"model.safetensors": weights(0), "config.json": {}}.items()}  # fmt: skip
    path = pair(tmp_path / "plain", base)
    assert any("modules.json" in note and "has none" in note for note in notes(path))
    della.merge(path, tmp_path / "plain/out", fsync=False)
    assert not (tmp_path / "plain/out/modules.json").exists()


def test_a_single_file_has_none(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    della.merge(pair(tmp_path), out, fsync=False)
    assert out.is_file()
    assert della.verify(out).is_well


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("della.checkpoint.sides.MOST_BYTES", 50)
    with pytest.raises(DellaError, match=r"2_Dense/model\.safetensors"):
        della.plan(pair(tmp_path))


def test_a_pipeline_of_diffusers_is_merged_part_by_part(tmp_path: Path) -> None:
    for seed, name in enumerate(("BASE", "FT")):
        put(tmp_path, {
            f"{name}/model_index.json": {}, f"{name}/scheduler/scheduler_config.json": {},
            f"{name}/unet/diffusion_pytorch_model.safetensors": weights(seed),
            f"{name}/unet/config.json": {"_class_name": "UNet2DModel"},
        })  # fmt: skip
    path = recipe(tmp_path)
    with pytest.raises(CheckpointError, match=r"pipeline of diffusers.* unet/"):
        della.plan(path)
    path.write_text(path.read_text().replace('"BASE"', '"BASE/unet"').replace('"FT"', '"FT/unet"'))
    della.merge(path, tmp_path / "out", fsync=False)
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").is_file()


# ---- as the programs read them ----------------------------------------------------------------------------

TEMPLATES = {"default": "{{ messages }}", "tool": "{{ tools }}"}


def bert(folder: Path, seed: int) -> None:
    """A BERT of one layer whose weights are the seed's beside those of seed 0, with a tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c", "d"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=6, max_position_embeddings=64, **sizes))
    torch.manual_seed(seed)
    for values in model.parameters() if seed else ():
        values.data += 0.01 * torch.randn_like(values)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_transformers_reads_all_chat_templates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for seed, name in enumerate(("BASE", "FT")):
        bert(tmp_path / name, seed)
    della.merge(recipe(tmp_path), tmp_path / "out", fsync=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATES


@pytest.mark.slow
def test_sentence_transformers_loads_the_result(tmp_path: Path) -> None:
    sentences = pytest.importorskip("sentence_transformers")
    torch = pytest.importorskip("torch")
    for seed, name in enumerate(("BASE", "FT")):
        bert(tmp_path / f"raw{seed}", seed)
        torch.manual_seed(5)
        parts = pytest.importorskip("sentence_transformers.models")
        chain = [parts.Transformer(str(tmp_path / f"raw{seed}")), parts.Pooling(16), parts.Dense(16, 8)]
        sentences.SentenceTransformer(modules=[*chain, parts.Normalize()]).save_pretrained(
            str(tmp_path / name)
        )
    della.merge(recipe(tmp_path), tmp_path / "out", fsync=False)
    assert della.verify(tmp_path / "out").is_well
    found, wanted = (
        sentences.SentenceTransformer(str(tmp_path / name)).encode(["a b", "c d"]) for name in ("out", "FT")
    )
    assert found.shape == (2, 8)
    assert np.abs(found - wanted).max() < 1e-6  # the whole delta, and the same dense layer
