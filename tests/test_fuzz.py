"""The fuzz campaigns pass at a small size, and each of them fails when della does not do what it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import della.checkpoint.layout
import della.recipe.reader
import della.recipe.settings
from della.checkpoint import header
from della.checkpoint.header import Header, TensorInfo
from della.dtypes import DTYPES
from della.errors import CheckpointError, RecipeError
from della.merging.registry import METHODS
from fuzz import __main__ as command
from fuzz import keys, recipes
from fuzz.campaigns import CAMPAIGNS, run
from fuzz.headers import mutated, ours, theirs
from fuzz.job import Job
from fuzz.names import HOSTILE
from fuzz.seeds import files

SIZES = {"headers": 300, "truncations": 60, "names": 40, "keys": 150, "yaml": 150}


def small(name: str, folder: Path, **options: Any) -> Job:
    return run(name, folder / "failures", sample=True, most=SIZES.get(name, 20), hold_times=False, **options)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_every_campaign_passes(name: str, tmp_path: Path) -> None:
    job = small(name, tmp_path)
    assert job.passed, job.told()
    assert job.cases > 0
    assert not (tmp_path / "failures").exists()


def test_a_case_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    jobs = [Job("headers", seed, False, tmp_path, tmp_path) for seed in (0, 0, 1)]
    first, again, other = ([mutated(job.rng(case), files()) for case in range(20)] for job in jobs)
    assert first == again != other


def test_the_seeds_are_files_that_both_read_alike() -> None:
    for raw in files():
        mine = ours(raw)
        assert isinstance(mine, dict)
        assert mine == theirs(raw)
    assert len(files()) == len(set(files())) == 12


def test_some_mutations_stay_valid(tmp_path: Path) -> None:
    counts = small("headers", tmp_path).counts
    assert 10 < counts["accepted"] < 100
    assert counts["refused by della alone"] > 0


def lax(raw: bytes, size: int, where: str) -> Header:
    """Believes what a header says and checks nothing."""
    stop = 8 + int.from_bytes(raw[:8], "little")
    try:
        table = json.loads(raw[8:stop])
        table.pop("__metadata__", None)
        infos = [
            TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in table.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{where}: no") from None
    return Header({info.name: info for info in infos}, {}, stop)


def broken(raw: bytes, size: int, where: str) -> Header:
    raise KeyError("data_offsets")


@pytest.mark.parametrize(
    ("parse", "said"), [(lax, "accepted, but refused by safetensors"), (broken, "raised KeyError")]
)
def test_a_lax_or_broken_header_is_found(
    parse: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "parse_header", parse)
    job = small("headers", tmp_path)
    assert not job.passed
    assert any(said in failure for failure in job.failures)
    number = int(job.failures[0].partition("case ")[2].partition(":")[0])
    again = small("headers", tmp_path, only=number)
    assert again.failures == job.failures[: len(again.failures)] != []


def test_a_slow_case_is_found(tmp_path: Path) -> None:
    job = Job("headers", 0, True, tmp_path, tmp_path / "failures", bar=0.002)
    assert job.timed(3, b"x" * 200, lambda: sum(range(10**6))) == sum(range(10**6))
    assert "seed 0, case 3: took " in job.failures[0]
    assert (tmp_path / "failures" / "headers-0-3").read_bytes() == b"x" * 200
    job.timed(4, b"short", lambda: None)
    assert (len(job.failures), job.cases) == (1, 2)


def test_a_message_without_sizes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(first: bytes, size: int, where: str) -> int:
        raise CheckpointError(f"{where}: damaged")

    monkeypatch.setattr(header, "header_length", silent)
    job = small("truncations", tmp_path)
    assert any("no word of the bytes expected" in failure for failure in job.failures)
    assert any("no word of the bytes found" in failure for failure in job.failures)
    assert not any("no word of the file" in failure for failure in job.failures)


def test_names_that_are_followed_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(HOSTILE) == len(set(HOSTILE)) == 40
    monkeypatch.setattr(della.checkpoint.layout, "why_hostile", lambda name, suffix: "")
    monkeypatch.setattr(della.checkpoint.layout, "confined", lambda folder, name: (folder / name).resolve())
    followed = [failure for failure in small("names", tmp_path).failures if "was followed" in failure]
    assert len(followed) > 30, "the decoys are where the names lead"


def test_a_key_that_is_not_suggested_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (della.recipe.reader, della.recipe.settings):
        monkeypatch.setattr(module, "suggest", lambda key, known: "")
    job = small("keys", tmp_path)
    assert len(job.failures) == job.cases
    monkeypatch.setattr(della.recipe.reader, "suggest", lambda key, known: f"; did you mean '{known[0]}'?")
    job = small("keys", tmp_path)
    assert 0 < len(job.failures) < job.cases


def test_every_key_has_its_spots() -> None:
    found = {spot.key for spot in keys.spots()}
    known = {*della.recipe.reader._TOP_KEYS, *della.recipe.reader._MODEL_KEYS}
    assert found >= known
    used = {name for method in METHODS.values() for name in method.parameters}
    assert found >= used
    assert [
        keys.distance(*pair) for pair in (("seed", "sede"), ("vote", "votes"), ("a", "b"), ("", "abc"))
    ] == [*(1, 1, 1, 3)]


def test_what_reading_a_recipe_may_not_raise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fragile(source: Any, *, overrides: Any = ()) -> Any:
        if overrides:
            raise IndexError("list index out of range")
        raise RecipeError("no")

    monkeypatch.setattr(recipes, "read_recipe", fragile)
    job = small("yaml", tmp_path)
    assert 0 < len(job.failures) < job.cases
    assert "raised IndexError" in job.failures[0]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report, kept = tmp_path / "report.md", ["--failures", str(tmp_path / "failures")]
    assert command.main(["names", "truncations", "--sample", "--report", str(report), *kept]) == 0
    said = capsys.readouterr().out
    assert said.startswith("names: 40 cases, ")
    assert report.read_text().startswith("`scripts/fuzz names truncations --sample --report ")
    assert said.endswith(report.read_text().partition("\n\n")[2])
    monkeypatch.setattr(della.checkpoint.layout, "why_hostile", lambda name, suffix: "")
    assert command.main(["names", *kept]) == 1
    assert "FAILED\n  seed 0, case " in capsys.readouterr().out
    for wrong in (["nothing"], ["--case", "1"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(wrong)
