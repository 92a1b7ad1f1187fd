"""Options are declared once: commands take what the classes say, and texts become values or a refusal."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from della.cli import calibrate, evaluate, main, methods, paper
from della.cli.console import Speech
from della.cli.options import Given, Only, derived, only
from della.errors import DellaError, RecipeError
from della.evaluate.options import CalibrationOptions, EvaluationOptions
from della.experiments.options import ExperimentOptions
from della.options import (
    Changes,
    Checks,
    Execution,
    Permissions,
    Share,
    Spec,
    Target,
    argument,
    build,
    declared,
    option,
    percent_of,
    size_of,
    size_text,
)  # fmt: skip

CLASSES = [
    Changes, Target, Execution, Permissions, Checks, Speech, EvaluationOptions, CalibrationOptions,
    ExperimentOptions, methods.Which, paper.Asked,
]  # fmt: skip
FUNCTIONS: dict[str, Callable[..., None]] = {
    "merge": main.merge, "plan": main.plan, "verify": main.verify, "eval": evaluate.evaluate,
    "calibrate": calibrate.calibrate, "methods": methods.methods, "paper": paper.paper,
}  # fmt: skip


def taken(function: Callable[..., None]) -> Iterator[tuple[Spec, str, str]]:
    """(what is declared, name, help) of everything that a command takes."""
    for name, hint in get_type_hints(function, include_extras=True).items():
        kind, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(kind):
            picked = next((each for each in extra if isinstance(each, Only)), Only((), {}))
            for field, spec in declared(kind).items():  # type: ignore[arg-type]
                if not picked.names or field in picked.names:
                    yield spec, field, picked.helps.get(field, spec.help)
        else:
            yield from ((each, name, each.help) for each in extra if isinstance(each, Spec))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_command_takes_what_its_classes_declare_and_says_so(name: str) -> None:
    command = get_command(main.app).commands[name]  # type: ignore[attr-defined]
    known = {parameter.name: parameter for parameter in command.params if parameter.name != "help"}
    wanted = list(taken(FUNCTIONS[name]))
    assert [field for _, field, _ in wanted] == list(known), "each once, and no others"
    shown = CliRunner().invoke(main.app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    words = " ".join(shown.split())
    for spec, field, said in wanted:
        assert " ".join(said.split()) in words
        if spec.is_argument:
            assert str(spec.metavar) in words
            continue
        flags = spec.flags or ("--" + field.replace("_", "-"),)
        assert tuple(known[field].opts) == flags
        assert flags[0] in words
        assert spec.metavar is None or f"{flags[0]} {spec.metavar} " in words


def test_every_option_belongs_to_a_command() -> None:
    used = {id(spec) for function in FUNCTIONS.values() for spec, _, _ in taken(function)}
    assert [spec for cls in CLASSES for spec in declared(cls).values() if id(spec) not in used] == []


@pytest.mark.parametrize("cls", CLASSES)
def test_the_default_as_text_is_the_default(cls: type[Any]) -> None:
    for field in dataclasses.fields(cls):
        spec = field.metadata.get("option")
        if spec is not None and spec.text is not None:
            assert spec.read(spec.text) == field.default


def test_nothing_given_is_every_default() -> None:
    for cls in (Changes, Execution, Permissions, Checks, Speech):
        assert build(cls, {}) == cls()
    assert build(Changes, {"seed": None, "overrides": [], "unknown": 1}) == Changes()


# ---- a command of one's own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """All kinds of options."""

    place: Path = argument("Where.", metavar="PLACE")
    names: tuple[str, ...] = option("Whom.", (), "--name", "-n", many=True)
    width: int = option("Columns.", 80, least=20, metavar="N")
    colour: bool = option("Plain.", True, "--no-colour")
    share: Share | None = option("A part.", None, read=Share.parse)
    files: dict[str, str] = option(
        "By name.", dict, many=True, read=lambda texts, names: dict(zip(names, texts)), after="names"
    )
    inner: int = 7


def shown(arguments: str) -> tuple[Any, ...]:
    """What a command is called with; its error output when it is not."""
    found: list[tuple[Any, ...]] = []

    def show(shown: Shown, speech: Annotated[Speech, only("quiet")], given: Given) -> None:
        found.append((shown, speech, given))

    app = typer.Typer()
    app.command()(derived(show))
    ended = CliRunner().invoke(app, arguments.split())
    return found[0] if found else (ended.exit_code, ended.stderr)


def test_values_arrive_as_classes() -> None:
    value, speech, written = shown("here")
    assert (value, speech, written) == (Shown(Path("here")), Speech(), {"place": "place"})
    value, speech, written = shown(
        "here -n a --name b --files x --files y --width 30 --no-colour --share 2/7 --quiet"
    )
    assert value == Shown(Path("here"), ("a", "b"), 30, False, Share(2, 7), {"a": "x", "b": "y"})
    assert speech == Speech(quiet=True)
    assert written == {
        "place": "place", "names": "--name", "files": "--files", "width": "--width",
        "colour": "--no-colour", "share": "--share", "quiet": "--quiet",
    }  # fmt: skip


def test_what_cannot_be_is_refused_by_the_parser() -> None:
    for arguments, word in (("", "Missing argument"), ("x --width 3", "--width"), ("x --json", "--json")):
        code, said = shown(arguments)
        assert (code, word in said) == (2, True)


def test_an_option_stands_in_one_class_alone() -> None:
    def twice(one: Speech, other: Annotated[Speech, only("quiet")]) -> None:
        """Takes --quiet twice."""

    with pytest.raises(AssertionError, match="two classes"):
        derived(twice)
    with pytest.raises(AssertionError, match="lacks"):
        derived(lacking)


def lacking(speech: Annotated[Speech, only("loud")]) -> None:
    """Takes what there is not."""


def test_the_module_runs_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "della", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("della ")


# ---- texts ------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6 - 1), st.integers(1, 10**6 - 1))
def test_a_share_is_what_its_text_says(number: int, count: int) -> None:
    text = f"{number}/{count}"
    if number > count:
        with pytest.raises(RecipeError, match="1 <= i <= n"):
            Share.parse(text)
        return
    share = Share.parse(text)
    assert (share.number, share.count, str(share), share.is_whole) == (number, count, text, count == 1)


@given(st.text(max_size=12))
def test_no_text_breaks_the_readers(text: str) -> None:
    for read in (Share.parse, size_of, percent_of):
        try:
            value: Any = read(text)
        except RecipeError:
            continue
        assert isinstance(value, (Share, int, float))


@given(
    st.integers(1, 10**9), st.sampled_from(["", "B", "kB", "MB", "GB", "KiB", "mib", "gib", "k", "M", "g"])
)
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    letters = unit.lower().removesuffix("b")
    base, power = (1024, letters[:-1]) if letters.endswith("i") else (1000, letters)
    assert size_of(f"{number}{unit}") == number * base ** ["", "k", "m", "g"].index(power)
    assert size_of(f" {number} {unit} ") == size_of(f"{number}{unit}")


@settings(deadline=None)
@given(st.integers(0, 10**16))
def test_a_size_in_words_is_near_what_it_says(count: int) -> None:
    number, unit = size_text(count).replace(",", "").split()
    size = {"byte": 1, "bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert abs(float(number) * size - count) <= 0.005 * count
    assert float(number) < 1000 or unit == "TB"


@given(st.integers(1, 1000))
def test_a_percentage_is_a_share(tenths: int) -> None:
    assert percent_of(f"{tenths / 10}%") == pytest.approx(tenths / 1000)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Execution(threads=0), "threads 0"),
        (lambda: Execution(tile=0), "tile 0"),
        (lambda: Execution(shard_bytes=-1), "shard_bytes -1"),
        (lambda: Execution(part=Share(1, 2), finish=True), "leave out part"),
        (lambda: Share(0, 3), "1 <= i <= n"),
        (lambda: Checks(sources=0.0), "sources 0.0"),
        (lambda: Checks(sources=1.5), "sources 1.5"),
    ],
)
def test_values_that_cannot_be_are_refused_however_they_come(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(DellaError) as caught:
        make()
    assert word in str(caught.value)
