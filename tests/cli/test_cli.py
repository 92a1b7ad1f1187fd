"""The command, as a user meets it: exit codes, sentences, progress, Ctrl-C, and how little it loads."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import typer
from checkpoints import put, tree
from commands import LISTENING, Command
from llamas import EXPERTS, load, recipe

import della
from della.cli import main as cli
from della.options import size_of

OWN: list[dict[str, Any]] = [{"weight": 0.5, "density": 0.5}] * 3
COMMAND = [sys.executable, "-m", "della.cli.main"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS")}


def run(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, text=True, check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )  # fmt: skip


@pytest.fixture
def site(models: Path, tmp_path: Path) -> Path:
    """A folder with r.yml, a recipe that works."""
    (tmp_path / "r.yml").write_text(json.dumps(recipe(models, "della", OWN, {}), indent=1))
    return tmp_path


# ---- what is said -----------------------------------------------------------------------------------------

NOTES = (
    "rescale: each survivor is divided by its keep probability (mergekit: one l1 factor, biased)",
    "ranks are exact integers with ties averaged (mergekit: ranks in the dtype of the tensor)",
    "a row of a tensor with three or more axes is what feeds one output (mergekit: the second axis)",
    "a tied sign vote elects nothing (mergekit: the positive sign)",
    "arithmetic is float32 (or float64, as an input) and rounds once (mergekit: in the merge dtype)",
    "draws come from seed 42, the same on every machine (mergekit: unseeded)",
)
COMPILING = "compiling kernels for this processor; later runs find them on disk"


def told(lines: list[str]) -> list[str]:
    """Without the word about compiling, which comes on a first run alone, and those on buffers."""
    return [line for line in lines if line != f"note: {COMPILING}" and "buffer.ids" not in line]


def test_a_merge_tells_departures_progress_and_the_end_in_plain_lines(site: Path) -> None:
    done = run(site, "merge", "r.yml", "out")
    assert (done.returncode, done.stdout) == (0, "")
    lines = told(done.stderr.splitlines())
    assert [line.rpartition("/")[2] for line in lines[:3]] == [
        f"{name}: 37 of 37 tensors take part, 36 of the result change" for name in EXPERTS
    ]
    lines = lines[3:]
    assert lines[0] == "note: 6 departures from mergekit's rules: `della plan` lists them"
    assert lines[1] == "100 %  189 kB of 189 kB  40 of 40 tensors"
    assert re.fullmatch(r"out: 37.8 kB in \d+\.\d s", lines[2])
    assert len(lines) == 3
    assert "\x1b" not in done.stderr
    assert "\r" not in done.stderr


def test_quiet_says_nothing_but_errors(command: Command, site: Path) -> None:
    done = command(site, "merge", "r.yml", "out", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    again = command(site, "merge", "r.yml", "out", "-q")
    assert (again.returncode, again.stderr.count("\n")) == (4, 1)


def test_json_lines(command: Command, site: Path) -> None:
    done = command(site, "merge", "r.yml", "out", "--json", "--threads", "2")
    assert (done.returncode, done.stderr) == (0, "")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    notes = [event["message"] for event in events if event["event"] == "note"]
    assert [note for note in notes if note != COMPILING and "buffer.ids" not in note] == []
    assert [event["departures"] for event in events if event["event"] == "plan"] == [list(NOTES)]
    *_, progress, end = events
    first = next(event for event in events if event["event"] == "progress")
    assert 0 < first["bytes"] < first["total"] == 188988
    assert progress.pop("tensor")
    assert progress == {"event": "progress", "bytes": 188988, "total": 188988, "tensors": 40, "of": 40}
    assert 0 <= end.pop("merging_seconds") <= end.pop("seconds")
    (coverage,) = [event["coverage"] for event in events if event["event"] == "plan"]
    for found in (coverage, measured := end.pop("coverage")):
        assert [
            (Path(name).name, own["merged"], own["of"], own["changed"], own["left_out"])
            for name, own in found.items()
        ] == [(name, 37, 37, 36, []) for name in EXPERTS]
    assert all(0 < own["relative_delta"] < 1 and own["unlike"] == 0 for own in measured.values())
    assert end == {
        "event": "done", "out": "out", "bytes_read": 151155, "bytes_written": 37833, "resumed": 0,
    }  # fmt: skip


def test_a_plan_on_stdout(command: Command, site: Path, models: Path) -> None:
    text = command(site, "plan", "r.yml", "--threads", "2")
    machine = command(site, "plan", "r.yml", "--json")
    assert (text.returncode, text.stderr, machine.returncode, machine.stderr) == (0, "", 0, "")
    assert text.stdout.startswith("della, seed 42: 40 tensors\n")
    assert "with 2 threads\n" in text.stdout
    found = json.loads(machine.stdout)
    assert (found["bytes_read"], found["bytes_written"]) == (151155, 37833)
    assert found["departures"] == list(NOTES)
    assert [line[4:] for line in text.stdout.splitlines() if line.startswith("  - ")][:6] == list(NOTES)
    changed = json.loads(command(site, "plan", "r.yml", "--json", "--seed", "3", "--set", "weight=2").stdout)
    assert changed["seed"] == 3
    tensor = next(tensor for tensor in changed["tensors"] if tensor["name"] == "lm_head.weight")
    own = {"weight": 2.0, "density": 0.5, "epsilon": 0.15}
    assert tensor["models"] == {str(models / name): own for name in EXPERTS}


def test_a_closed_pipe_is_no_error_of_ours(site: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(site, "plan", "r.yml", "--json", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_what_is_printed_is_told(site: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run(site, "plan", "r.yml", "--json", stdout=full.fileno())
    assert done.returncode == 1
    assert done.stderr == "della: what is printed: No space left on device\n"


# ---- options ----------------------------------------------------------------------------------------------


def test_options_reach_the_merge(command: Command, site: Path, models: Path) -> None:
    options = ["--seed", "7", "--set", "lambda=0.5", "--set", "models.0.parameters.weight=2", "--no-fsync"]
    done = command(site, "merge", "r.yml", "out", *options, "--shard-size", "0.01MB", "--threads", "1")
    assert done.returncode == 0, done.stderr
    own = [{**OWN[0], "weight": 2}, *OWN[1:]]
    wanted = della.merge(
        recipe(models, "della", own, {"lambda": 0.5}), site / "same", seed=7, shard_bytes=10_000, fsync=False
    )
    assert load(site / "out") == load(site / "same")
    assert {path.name for path in (site / "out").iterdir()} == {p.name for p in (site / "same").iterdir()}
    manifest = json.loads((site / "out/della.json").read_text())
    assert (manifest["seed"], manifest["tensors"]) == (7, wanted.manifest["tensors"])


def test_compat_and_overwrite(command: Command, site: Path) -> None:
    assert command(site, "merge", "r.yml", "out", "-q").returncode == 0
    ours = load(site / "out")
    done = command(site, "merge", "r.yml", "out", "--overwrite", "--compat", "mergekit")
    note = "compat mergekit: mergekit's own rules, but with seeded draws instead of an unseeded generator"
    assert told(done.stderr.splitlines())[3] == f"note: {note}"
    assert done.returncode == 0
    assert load(site / "out") != ours
    assert sorted(os.listdir(site)) == ["out", "r.yml"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("0.5 MB", 500_000),
        ("2GiB", 2 << 30),
        ("10k", 10_000),
        ("7", 7),
        ("1mib", 1 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


def test_the_version(tmp_path: Path) -> None:
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"della {della.__version__}\n", "")


# ---- exit codes -------------------------------------------------------------------------------------------

CURE = "write 'nonfinite: zero' to leave out such values, 'nonfinite: keep' to let them pass"
SENTENCES: list[tuple[str, int, str]] = [
    ("merge absent.yml out", 2, "absent.yml: no such file"),
    ("plan absent.yml", 2, "absent.yml: no such file"),
    ("merge . out", 2, ".: this is a folder; name the recipe file in it"),
    ("merge bad.yml out", 2, "bad.yml:2:1: unknown key 'densty' at the top level; did you mean 'density'?"),
    ("plan r.yml --set densty=1", 2, "--set densty=1: unknown key 'densty'; did you mean 'density'?"),
    ("plan r.yml --set density=2", 2, "--set density=2: 'density' must lie between 0 and 1, found 2"),
    ("plan r.yml --seed -1", 2, f"--set seed=-1: 'seed' must lie between 0 and {2**64 - 1}, found -1"),
    (
        "merge r.yml out --compat kit",
        2,
        "--compat kit: the only other rules known are mergekit's; give --compat mergekit",
    ),
    ("merge r.yml out --shard-size big", 2, "--shard-size big: expected a size such as 5GB or 500MB"),
    ("merge r.yml out --shard-size 0", 2, "--shard-size 0: expected a size such as 5GB or 500MB"),
    ("plan lost.yml", 3, "./zzz: not found; tried {site}/zzz"),
    ("merge torn.yml out", 3, "{site}/torn.safetensors: truncated: expected at least 8 bytes, found 3; "
     "download the file again"),
    ("merge nan.yml out", 3, "{site}/nan.safetensors: tensor w of nan.safetensors holds 1 value that is NaN "
     f"or infinite (the first is element 1: nan); such a model is damaged: get it again, or {CURE}"),
    ("merge r.yml r.yml", 4, "{site}/r.yml: exists already; choose another place, or allow it to be "
     "replaced: --overwrite"),
    ("merge r.yml r.yml --overwrite", 4, "{site}/r.yml: a file, which is not replaced; "
     "choose another place"),
    ("merge one.yml one.safetensors --overwrite=any", 4, "{site}/one.safetensors: touches the input "
     "{site}/one.safetensors; choose another place for the result"),
    ("merge large.yml out", 4, "w: element 0 becomes inf when it is rounded to float16; "
     f"choose a wider out_dtype, or a smaller lambda; or {CURE}"),
]  # fmt: skip


def prepare(site: Path) -> None:
    """One recipe for each sentence above."""
    one = np.array([70000.0, 2.0], np.float32)
    put(site, {
        "one.safetensors": {"w": one}, "torn.safetensors": b"abc",
        "nan.safetensors": {"w": one * np.array([1, np.nan], np.float32)},
        "bad.yml": b"merge_method: linear\ndensty: 1\nmodels: [{model: one.safetensors}]\n",
        "large.yml": {"merge_method": "linear", "models": [{"model": "one.safetensors"}], "dtype": "float16"},
        "lost.yml": {"merge_method": "linear", "models": [{"model": "./zzz"}]},
        **{f"{name}.yml": {"merge_method": "linear", "models": [{"model": f"{name}.safetensors"}]}
           for name in ("one", "nan", "torn")},
    })  # fmt: skip


@pytest.mark.parametrize(("line", "code", "sentence"), SENTENCES, ids=[line for line, _, _ in SENTENCES])
def test_bad_input_gets_one_sentence_and_its_exit_code(
    command: Command, site: Path, line: str, code: int, sentence: str
) -> None:
    prepare(site)
    before = tree(site)
    done = command(site, *line.split(), "--json" if line.startswith("plan") else "--quiet")
    wanted = sentence.format(site=site)
    assert (done.returncode, done.stderr) == (code, f"della: {wanted}\n")
    if line.startswith("plan"):
        event = json.loads(done.stdout)
        assert event.pop("problems")[0]["said"] in wanted
        assert event == {"event": "error", "exit_code": code, "message": wanted}
    assert tree(site) == before


def test_debug_shows_the_traceback_and_keeps_the_exit_code(command: Command, site: Path) -> None:
    prepare(site)
    for line, code in (("merge bad.yml out", 2), ("merge nan.yml out", 3), ("merge r.yml r.yml", 4)):
        plain, debug = command(site, *line.split()), command(site, *line.split(), "--debug")
        assert (plain.returncode, debug.returncode) == (code, code)
        assert "Traceback" not in plain.stderr
        assert "Traceback (most recent call last):\n" in debug.stderr
        assert debug.stderr.endswith(plain.stderr.splitlines()[-1] + "\n")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("merge", "Missing argument 'RECIPE'."),
        ("merge r.yml", "Missing argument 'OUT'."),
        ("merge r.yml out --nonsense", "No such option: --nonsense"),
        ("merge r.yml out --threads 0", "Invalid value for '--threads'"),
        ("plan r.yml --seed x", "Invalid value for '--seed'"),
        ("merg r.yml out", "No such command 'merg'."),
    ],
)
def test_a_wrong_command_line_exits_with_2(command: Command, site: Path, line: str, sentence: str) -> None:
    done = command(site, *line.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Error: {sentence}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_defect_is_called_one(capfd: pytest.CaptureFixture[str]) -> None:
    for debug, wanted in ((False, " (details: --debug)\n"), (True, "\n")):
        with pytest.raises(typer.Exit) as caught, cli._errors(debug, False):
            raise ValueError("oh")
        assert caught.value.exit_code == 1
        said = capfd.readouterr().err
        assert said.endswith(f"della: a defect of della, please report it: ValueError: oh{wanted}")
        assert ("Traceback" in said) == debug


# ---- terminals and Ctrl-C ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of many seconds: the calibration looks at every subset of eight experts."""
    folder = tmp_path_factory.mktemp("slow")
    rng = np.random.default_rng(0)
    base = rng.standard_normal((2000, 2000)).astype(ml_dtypes.bfloat16)
    expert = (base.astype(np.float32) * np.float32(1.1)).astype(ml_dtypes.bfloat16)
    put(folder, {
        "base.safetensors": {"w": base, "v": base[:9]}, "expert.safetensors": {"w": expert, "v": expert[:9]},
        "r.yml": {
            "merge_method": "della", "base_model": "base.safetensors",
            "models": [{"model": "expert.safetensors"}] * 8,
            "parameters": {"density": 0.5, "fuse": "calibrated"},
        },
    })  # fmt: skip
    return folder


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*LISTENING, *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "120"},
        **options,
    )


def everything(terminal: int, until: str | None = None) -> bytes:
    """What a program writes to a terminal, to its end or until something is seen (colours apart)."""
    shown = b""
    while until is None or not re.search(until.encode(), re.sub(rb"\x1b\[[\d;]*m", b"", shown)):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux: the program has ended
            part = b""
        if not part:
            assert until is None, shown
            break
        shown += part
    return shown


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_a_terminal_shows_a_bar(site: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    process = start(site, "merge", "r.yml", "out", stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = everything(ours).decode()
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    assert "\x1b[" in shown
    assert "merging" in shown
    assert "189.0/189.0 kB" in shown
    assert shown.count("note: 6 departures from mergekit's rules") == 1
    assert re.search(r"out: 37.8 kB in \d+\.\d s\r\n$", shown)


@pytest.mark.slow
def test_the_bar_tells_rate_and_time_left_and_ctrl_c_takes_it_away(
    slow: Path, tmp_path: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal
    out = tmp_path / "out"
    process = start(slow, "merge", "r.yml", str(out), "--threads", "1", stderr=theirs)
    os.close(theirs)
    shown = everything(ours, r"merging \S+ \d+\.\d/80\.4 MB \d+\.\d [kM]B/s 0:00:\d\d")
    process.send_signal(signal.SIGINT)
    shown += everything(ours)
    assert process.wait() == 130
    assert shown.endswith(b"della: stopped; the output is as it was\r\n")
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor is back"
    assert b"Traceback" not in shown
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c_leaves_the_disk_as_it_was(slow: Path, tmp_path: Path, existing: bool) -> None:
    if existing:
        put(tmp_path, {"out/model.safetensors": b"old", "out/config.json": {}})
    before = tree(tmp_path)
    arguments = ["merge", "r.yml", str(tmp_path / "out"), "--threads", "1", "--json"]
    process = start(
        slow, *arguments, *["--overwrite=any"] * existing, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    events = []
    for line in process.stdout:  # progress comes while it is at work
        events.append(json.loads(line))
        if events[-1]["event"] == "progress":
            break
    assert events, process.communicate()
    assert 0 < events[-1]["bytes"] < events[-1]["total"]
    assert len(os.listdir(tmp_path)) == 1 + existing, "staged beside OUT"
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate()
    message = "stopped; the output is as it was"
    assert (process.returncode, said.decode()) == (130, f"della: {message}\n")
    event = json.loads(rest.splitlines()[-1])
    assert event == {"event": "error", "exit_code": 130, "message": message, "problems": []}
    assert tree(tmp_path) == before


# ---- what is loaded ---------------------------------------------------------------------------------------

HEAVY = {"numba", "numpy", "ml_dtypes", "torch", "transformers", "huggingface_hub", "yaml", "xxhash"}


def loaded(folder: Path, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "della.cli.main", *arguments], cwd=folder, env=ENVIRONMENT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in names
    return names


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["plan", "-h"], ["--version"]])
def test_help_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    names = loaded(tmp_path, *arguments)
    assert not {name.partition(".")[0] for name in names} & HEAVY
    assert not {name for name in names if name.startswith(("rich.progress", "matplotlib", "plotly"))}


def test_a_plan_needs_no_kernels(site: Path) -> None:
    names = {name.partition(".")[0] for name in loaded(site, "plan", "r.yml")}
    assert not names & {"numba", "torch", "transformers", "huggingface_hub"}
    assert {"numpy", "yaml"} <= names


def test_help_names_every_option(tmp_path: Path) -> None:
    text = run(tmp_path, "merge", "--help").stdout
    for option in (
        *("--seed", "--threads", "--overwrite", "--set", "--compat", "--shard-size", "--no-fsync"),
        *("--quiet", "--json", "--debug"),
    ):
        assert option in text
    assert run(tmp_path).returncode == 2
    assert [line.split()[0] for line in run(tmp_path, "-h").stdout.split("Commands:\n")[1].splitlines()] == [
        "merge", "plan", "verify", "methods", "eval", "calibrate", "paper",
    ]  # fmt: skip
