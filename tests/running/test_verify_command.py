"""The command della verify: exit codes, sentences, options, JSON, Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command
from merged import FILE, FOLDER, flip, shards, spans

from della.api import verify

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def della_verify(command: Command) -> Run:
    """Runs the command: its exit code, and what it says on stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        done = command(None, "verify", *words)
        return done.returncode, done.stdout, done.stderr

    return run


def test_the_command_when_all_is_well(made: Path, della_verify: Run) -> None:
    code, stdout, stderr = della_verify(made / FOLDER)
    assert (code, stderr.count("100 %"), stderr.count("\n")) == (0, 1, 1)
    assert stderr.endswith("  46 of 46 checks\n")
    assert stdout == f"{made}/out: all is well: 40 tensors (37.8 kB) in 11 files, as they were merged\n"
    code, stdout, stderr = della_verify(made / FILE, "--sources", "100%", "--inputs", "--from", made)
    assert (code, stderr.count("100 %"), stderr.count("\n")) == (0, 2, 2)
    assert stdout == (
        f"{made}/one.safetensors: all is well: 40 tensors (37.8 kB) in 1 file, as they were merged; "
        "40 tensors computed again: the same; 151 tensors of the inputs: as they were\n"
    )
    assert della_verify(made / FOLDER, "--quiet") == (0, "", "")


@pytest.mark.parametrize("words", ["OUT --sources", "--sources OUT", "--sources 5% OUT", "OUT --sources=5%"])
def test_sources_with_and_without_a_value(made: Path, della_verify: Run, words: str) -> None:
    code, stdout, _ = della_verify(*words.replace("OUT", str(made / FOLDER)).split(), "--from", made)
    assert code == 0
    assert stdout.endswith("; 2 tensors computed again: the same\n"), "5 % of 40"


@pytest.mark.parametrize("value", ["0%", "abc", "101%", "10", "1.2.3%", ""])
def test_a_value_that_is_no_percentage(made: Path, della_verify: Run, value: str) -> None:
    said = f"della: --sources {value}: expected a percentage above 0 and up to 100%, such as 5%\n"
    assert della_verify(made / FOLDER, f"--sources={value}") == (2, "", said)
    if value[:1].isdigit():
        assert della_verify("--sources", value, made / FOLDER) == (2, "", said)


def test_a_word_behind_sources_is_no_value(made: Path, della_verify: Run) -> None:
    code, _, stderr = della_verify(made / FOLDER, "--sources", "abc")
    assert code == 2
    assert "unexpected extra argument(s) (abc)" in stderr
    assert della_verify(made / FOLDER, "--nothing")[0] == 2


def test_damage_is_told_line_by_line(out: Path, della_verify: Run) -> None:
    path = shards(out)[0]
    name, (begin, _) = next(iter(spans(path).items()))
    flip(path, begin)
    (out / "README.md").unlink()
    (out / "mine.txt").write_text("")
    bad = [f"{out}/README.md: missing", f"{path}: tensor {name!r} has changed"]
    lines = [
        *(f"della: {text}" for text in bad),
        f"della: {out}: 2 faults; merge again, or get the files again",
    ]
    note = f"{out}/mine.txt: not part of what was merged, and not verified"
    code, stdout, stderr = della_verify(out)
    assert (code, stdout, stderr.splitlines()[1:]) == (5, "", [f"note: {note}", *lines])
    code, stdout, stderr = della_verify(out, "-q")
    assert (code, stdout, stderr.splitlines()) == (5, "", lines)
    code, stdout, stderr = della_verify(out, "--json")
    *progress, event = map(json.loads, stdout.splitlines())
    assert (code, stderr) == (5, "")
    assert {each["event"] for each in progress} == {"progress"}
    nbytes = event.pop("bytes")
    assert nbytes == verify(out).nbytes
    assert len(event.pop("problems")) == len(bad)
    assert event == {
        "event": "verified", "out": str(out), "well": False, "bad": bad, "notes": [note], "tensors": 40,
        "files": 11, "recomputed": 0, "inputs": 0,
    }  # fmt: skip


def test_exit_codes(made: Path, tmp_path: Path, della_verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    assert della_verify("no") == (4, "", "della: no: nothing is there\n")
    said = "holds no della.json; only what della has merged can be verified\n"
    assert della_verify(made / "base") == (4, "", f"della: {made}/base: {said}")
    assert della_verify(made / FOLDER, "--from", made, "--inputs", "-q") == (0, "", "")
    assert della_verify("--inputs", "--sources", "--from", made, made / FILE, "-q") == (0, "", "")
    alone = shutil.copytree(made / FOLDER, tmp_path / "alone")
    code, stdout, stderr = della_verify(alone, "--inputs")
    assert (code, stdout) == (3, "")
    assert "name that folder: --from FOLDER\n" in stderr
    assert della_verify(alone, "--inputs", "--from", made, "-q") == (0, "", "")
    code, stdout, _ = della_verify(alone, "--sources", "--json")
    assert (code, json.loads(stdout)["exit_code"]) == (3, 3)
    monkeypatch.chdir(made)
    assert della_verify(FOLDER, "--inputs", "-q") == (0, "", "")


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from della.cli import main as cli
from della.running import verify as verifying
def slow(path, offset, nbytes):
    os.write(1, b"ready\\n")  # in one piece, from two threads
    while True:
        time.sleep(0.02)
        yield memoryview(b"x")
verifying.of_file = slow
sys.argv[1:] = ["verify", sys.argv[1], "--quiet", "--threads", "2"]
cli.main()
"""


def test_an_interrupt_ends_it_soon(made: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, made / FOLDER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        if process.stdout.readline() == "ready\n":  # nothing comes of a program that fails
            process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=20)  # left alone it would never end
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "della: stopped; the output is as it was\n")
