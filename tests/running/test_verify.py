"""della verify: what is well, what is damaged, and how the command tells it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from checkpoints import COMMIT, put
from merged import FILE, FOLDER, FORMS, find, flip, refused, shards, spans

import della
from della.api import verify
from della.checkpoint import view
from della.errors import CheckpointError, OutputError, RecipeError
from della.running import hashing
from della.running.run import Progress
from della.running.verify import Verdict

# ---- all is well ------------------------------------------------------------------------------------------


def test_a_model_that_is_well(made: Path) -> None:
    nbytes = sum(end - begin for begin, end in spans(made / FILE).values())
    found = verify(made / FOLDER)
    assert len(shards(made / FOLDER)) == 4
    assert found == Verdict(made / FOLDER, [], [], tensors=40, files=11, nbytes=nbytes)
    assert found.is_well
    assert verify(str(made / FILE)) == Verdict(made / FILE, tensors=40, files=1, nbytes=nbytes)


@pytest.mark.parametrize("form", FORMS)
def test_everything_at_once(made: Path, form: str) -> None:
    found = verify(made / form, sources=1, inputs=True, base_dir=made, threads=3)
    assert (found.bad, found.notes, found.recomputed) == ([], [], 40)
    assert found.inputs == 4 * 40 - 3 * 3, "three buffers are copied from the base, and not read elsewhere"


@pytest.mark.parametrize("form", FORMS)
def test_progress_is_right_from_the_start_and_begins_anew_for_the_merge(made: Path, form: str) -> None:
    seen: list[Progress] = []
    found = verify(made / form, sources=0.25, inputs=True, base_dir=made, threads=2, progress=seen.append)
    ends = [n for n, p in enumerate(seen) if p.tensors == p.of_tensors]
    assert len(ends) == 2
    first, second = seen[: ends[0] + 1], seen[ends[0] + 1 :]
    for part in (first, second):
        assert len({(p.total, p.of_tensors) for p in part}) == 1
        assert (part[-1].done, part[-1].tensors) == (part[-1].total, part[-1].of_tensors)
        assert [p.done for p in part] == sorted(p.done for p in part)
    assert second[0].of_tensors == found.recomputed == 10
    assert first[0].of_tensors == 40 + 151 + (6 if form == FOLDER else 0)
    assert first[0].total > found.nbytes


def test_files_in_pieces(made: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hashing, view):
        monkeypatch.setattr(module, "PIECE_BYTES", 7)
    opened: list[Path] = []

    def counted(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
        opened.append(path)
        return hashing.of_file(path, offset, nbytes)

    monkeypatch.setattr("della.running.verify.of_file", counted)
    assert verify(out, inputs=True, base_dir=made).is_well
    assert len(opened) == 46, "a file is opened once for each tensor"
    path, begin, end = find(out, "model.layers.1.mlp.up_proj.weight")
    for at in (begin, end - 1):
        flip(path, at)
        assert verify(out).bad == [f"{path}: tensor 'model.layers.1.mlp.up_proj.weight' has changed"]
        flip(path, at)


def test_a_tensor_larger_than_a_piece(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        values = np.random.default_rng(seed).standard_normal(1_300_000).astype(np.float32)
        put(tmp_path / name, {"model.safetensors": {"w": values, "none": values[:0]}})
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in "ab"]
    della.merge({"merge_method": "linear", "models": models}, tmp_path / "o.safetensors", fsync=False)
    found = verify(tmp_path / "o.safetensors", sources=1, inputs=True)
    assert (found.bad, found.recomputed, found.inputs) == ([], 2, 4)
    begin, end = spans(tmp_path / "o.safetensors")["w"]
    assert end - begin > view.PIECE_BYTES
    flip(tmp_path / "o.safetensors", end - 1)
    assert verify(tmp_path / "o.safetensors").bad == [f"{tmp_path}/o.safetensors: tensor 'w' has changed"]


def as_snapshot(out: Path, cache: Path) -> Path:
    """``out`` as the hub cache holds a model: links to blobs."""
    folder = cache / "models--me--merged/snapshots" / COMMIT
    for number, path in enumerate(sorted(out.iterdir())):
        blob = (
            put(cache / "models--me--merged/blobs", {f"{number:040x}": path.read_bytes()}) / f"{number:040x}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).symlink_to(os.path.relpath(blob, folder))
    return folder


def test_a_snapshot_in_the_hub_cache(out: Path, tmp_path: Path) -> None:
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    folder = as_snapshot(out, tmp_path / "hub")
    note = f"{folder}/.gitattributes: not part of what was merged, and not verified"
    assert (verify(folder).bad, verify(folder).notes) == ([], [note])
    shard = shards(folder)[0]
    name, (begin, _) = next(iter(spans(shard).items()))
    flip(shard.resolve(), begin)
    assert verify(folder).bad == [f"{shard}: tensor {name!r} has changed"]


def test_a_link_to_the_model(made: Path, tmp_path: Path) -> None:
    for form in FORMS:
        (tmp_path / form).symlink_to(made / form)
        assert verify(tmp_path / form).is_well


# ---- damage -----------------------------------------------------------------------------------------------


def flips(site: Path, seed: int, count: int) -> Iterator[tuple[Path, int, int]]:
    """(file, byte, bit): every file first, then anywhere; half of them in the data, where most bytes are."""
    rng = Random(seed)
    files = [site] if site.is_file() else sorted(site.iterdir())
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        path = files[number] if number < len(files) else rng.choices(files, sizes)[0]
        yield path, rng.randrange(path.stat().st_size), rng.randrange(8)


@pytest.mark.parametrize("form", FORMS)
def test_every_flipped_bit_is_found_and_the_tensor_named(out: Path, single: Path, form: str) -> None:
    site = out if form == FOLDER else single
    homes = {path: spans(path) for path in (shards(out) if form == FOLDER else [single])}
    named = 0
    for path, at, bit in flips(site, 5, 200):
        hit = [name for name, (begin, end) in homes.get(path, {}).items() if begin <= at < end]
        flip(path, at, bit)
        found = verify(site, threads=1)
        flip(path, at, bit)
        if hit:
            named += 1
            assert found.bad == [f"{path}: tensor {hit[0]!r} has changed"], (path, at, bit)
        elif path.name == "README.md":
            assert found.is_well
            assert found.notes == [f"{path}: edited since the merge, as a model card may be"]
        else:
            assert found.bad[0].startswith(f"{path}: "), (path, at, bit, found)
            assert len(found.bad) == 1 or path in homes
    assert named > 50
    assert verify(site).is_well, "all were mended"


def test_every_bad_tensor_is_named_in_the_order_of_the_files(out: Path) -> None:
    wanted = []
    for path in shards(out):
        for name, (begin, end) in spans(path).items():
            if end > begin:
                flip(path, begin)
                wanted.append(f"{path}: tensor {name!r} has changed")
    assert len(wanted) == 39
    assert verify(out).bad == wanted


def test_side_files_changed_missing_cut_and_no_files_at_all(out: Path) -> None:
    flip(out / "tokenizer.json", 3)
    (out / "README.md").unlink()
    (out / "chat_template.jinja").write_bytes(b"{{ x }} ")
    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    assert verify(out).bad == [
        f"{out}/README.md: missing",
        f"{out}/chat_template.jinja: has 8 bytes, expected 7",
        f"{out}/config.json: not a regular file; put the file itself there",
        f"{out}/tokenizer.json: has changed",
    ]


def test_strangers(out: Path) -> None:
    loaded = ["adapter_config.json", "model.safetensors", "pytorch_model.bin", "vocab.txt", "x.tiktoken"]
    for name in [*loaded, "LICENSE", "notes.md"]:
        (out / name).write_bytes(b"x")
    (out / "logs").mkdir()
    found = verify(out)
    end = "not part of this model, but programs may load it; move it away"
    assert found.bad == [f"{out}/{name}: {end}" for name in loaded]
    assert found.notes == [
        f"{out}/{name}: not part of what was merged, and not verified"
        for name in ("LICENSE", "logs", "notes.md")
    ]


def test_names_cannot_forge_lines(out: Path) -> None:
    (out / "x\nall is well\x1b[2J").write_bytes(b"")
    said = f"{out}/x\\nall is well\\x1b[2J: not part of what was merged, and not verified"
    assert verify(out).notes == [said]


def lost(path: Path, names: dict[str, Any]) -> list[str]:
    return [f"{path}: tensor {name!r} is lost" for name in names]


def test_a_damaged_header_names_its_tensors(out: Path) -> None:
    first, second, third, _ = shards(out)
    held = {path: spans(path) for path in (first, second, third)}
    order = list(json.loads((out / "della.json").read_text())["tensors"])
    flip(first, 9)
    bad = verify(out).bad
    assert bad[0].startswith(f"{first}: ")
    assert sorted(bad[1:]) == sorted(lost(first, held[first]))
    raw = second.read_bytes()
    second.write_bytes(raw.replace(b'"format":"pt"', b'"format":"pu"'))
    third.unlink()
    bad = verify(out).bad
    assert bad[1:3] == [f"{second}: its header has changed", f"{third}: missing"]
    homes = {name: path for path, names in held.items() for name in names}
    assert bad[3:] == [f"{homes[name]}: tensor {name!r} is lost" for name in order if name in homes]
    (out / "model.safetensors.index.json").write_bytes(b"{")
    bad = verify(out).bad
    anywhere = f"{first} or {second} or {third}"
    assert bad[4:] == [f"{anywhere}: tensor {name!r} is lost" for name in order if name in homes]


def test_a_truncated_shard(out: Path) -> None:
    path = shards(out)[2]
    size, names = path.stat().st_size, spans(path)
    os.truncate(path, size - 1)
    bad = verify(out).bad
    assert bad[0] == f"{path}: has {size - 1:,} bytes, expected {size:,}"
    assert sorted(bad[1:]) == sorted(lost(path, names))


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    name, (begin, end) = next((n, s) for n, s in spans(single).items() if s[1] - s[0] > 100)
    pieces = hashing.of_file(single, begin, end - begin)
    os.truncate(single, begin + 10)
    assert len(next(pieces)) == 10
    with pytest.raises(CheckpointError, match=r"ends too early; is something writing to it\?$"):
        next(pieces)
    single.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\)$"):
        next(hashing.of_file(single, begin, 1))
    assert name


# ---- nothing to verify ------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path, made: Path) -> None:
    assert refused(OutputError, tmp_path / "no") == f"{tmp_path}/no: nothing is there"
    assert refused(OutputError, "no\0where") == "no\\x00where: nothing is there"

    def stop(progress: Progress) -> None:
        if progress.tensors == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        della.merge(made / "recipe.yml", tmp_path / "no", threads=1, fsync=False, progress=stop)
    said = "an unfinished merge (5 tensors done); the same call resumes it"
    assert refused(OutputError, tmp_path / "no") == (
        f"{tmp_path}/no: nothing is there; {tmp_path}/.no.della-staging: {said}"
    )


def test_no_manifest(made: Path, tmp_path: Path) -> None:
    only = "only what della has merged can be verified"
    assert refused(OutputError, made / "base") == f"{made}/base: holds no della.json; {only}"
    weights = made / "base/model.safetensors"
    assert refused(OutputError, weights) == f"{weights}: no manifest in its header; {only}"
    neither = "neither a folder nor a .safetensors file; name what della has merged"
    assert refused(OutputError, made / "recipe.yml") == f"{made}/recipe.yml: {neither}"
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert refused(OutputError, tmp_path / "pipe.safetensors") == f"{tmp_path}/pipe.safetensors: {neither}"


@pytest.mark.parametrize("share", [0, -1, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none(made: Path, share: float) -> None:
    said = f"sources {share}: expected a share above 0 and at most 1 (100%)"
    assert refused(RecipeError, made / FOLDER, sources=share) == said
    assert refused(RecipeError, made / FOLDER, threads=0) == "threads 0: expected a whole number from 1 up"
