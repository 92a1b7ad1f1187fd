"""The campaign of flipped bits passes at a small size, and fails when della.verify does not find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from della.errors import Problem
from della.running.hashing import Check, Hashing
from fuzz import flips
from fuzz.job import Job


def job(folder: Path, only: int | None = None) -> Job:
    (folder / "scratch").mkdir()
    return Job("flips", 0, True, folder / "scratch", folder / "failures", only=only)


def test_it_passes_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    done = job(tmp_path)
    flips.run(done, 60)
    assert done.passed, done.told()
    assert (done.cases, sum(done.counts.values())) == (60, 60)
    assert min(done.counts.values()) > 5
    assert not (tmp_path / "failures").exists()


def test_a_verify_that_hashes_nothing_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(self: Hashing, checks: Sequence[Check]) -> list[str]:
        return []

    monkeypatch.setattr(Hashing, "faults", blind)
    done = job(tmp_path)
    flips.run(done, 40)
    hashed = done.counts["in tensors"] + done.counts["in other files"]
    assert hashed // 2 < len(done.failures) < hashed, "headers and the manifest are looked at elsewhere"
    assert all(": not found; bytes " in failure for failure in done.failures)


def test_a_verify_that_names_another_tensor_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Hashing.faults

    def mixed_up(self: Hashing, checks: Sequence[Check]) -> list[Problem]:
        return [replace(p, said=p.said.replace("layers.1", "layers.2")) for p in plain(self, checks)]

    monkeypatch.setattr(Hashing, "faults", mixed_up)
    done = job(tmp_path)
    flips.run(done, 100)
    assert done.failures
    assert all("expected tensor 'layers.1." in failure for failure in done.failures)
    number = int(done.failures[0].partition("case ")[2].partition(":")[0])
    (tmp_path / "again").mkdir()
    again = job(tmp_path / "again", number)
    flips.run(again, 100)
    assert [again.cases, len(again.failures)] == [1, 1], "a case can be repeated alone"
