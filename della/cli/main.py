"""The command: arguments, exit codes, progress; nothing else.  Everything heavy is imported inside the
commands.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from della.cli import calibrate as cli_calibrate
from della.cli import evaluate as cli_evaluate
from della.cli import paper as cli_paper
from della.cli.console import Speaker, print_json, tell
from della.errors import DamageError, DellaError

PERCENT = re.compile(r"(\d+(?:\.\d+)?)%", re.ASCII)
NUMBER = re.compile(r"\d[\d.]*%?", re.ASCII)

app = typer.Typer(
    name="della",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: half the time to start, and the same in a pipe
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge fine-tuned models of one base into one model: DELLA, DARE, TIES, task arithmetic and more.",
)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer evaluates annotations on Python 3.10)
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe: lambda=0.8, models.0.parameters.weight=1."
    ),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Seed of the random draws, instead of the recipe's.", show_default=False),
]
Compat = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="mergekit", help="Follow mergekit's rules where they differ.", show_default=False),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, help="Threads; the result does not depend on it. [default: all processors]", show_default=False
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read .bin and .pt models too, by torch, as weights only."),
]
PartOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--part", metavar="I/N", help="Compute only the I-th of N shares of the files.", show_default=False
    ),
]
Finish = Annotated[
    bool, typer.Option("--finish", help="Check what all parts have computed, and make OUT of it.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from della.version import __version__

        print(f"della {__version__}")
        raise typer.Exit


@app.command()
def merge(
    recipe: Recipe,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Where to: a folder, or a .safetensors file.", show_default=False),
    ],
    seed: Seed = None,
    threads: Threads = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, in one step, when all is done.")
    ] = False,
    overrides: Set = None,
    compat: Compat = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of weights in one file.")
    ] = "5GB",
    part: PartOption = None,
    finish: Finish = False,
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait until OUT is safe on the disk.")
    ] = False,
    allow_pickle: AllowPickle = False,
    keep_auto_map: Annotated[
        bool, typer.Option("--keep-auto-map", help="Keep what config.json says of code of its own.")
    ] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """Merge models as RECIPE says and write the result to OUT.  A run that was cut short is gone on with by
    the same command.
    """
    with _errors(debug, as_json):
        from della import api
        from della.planning.job import default_threads
        from della.planning.planner import Permissions, Target, make_plan

        shard_bytes, share = _size(shard_size), _part(part)
        api.check_part(share, finish)
        read = api.read(recipe, seed, overrides or (), _is_compat(compat))
        permissions = Permissions(allow_pickle, keep_auto_map)
        with make_plan(read, target=Target(out, overwrite), permissions=permissions) as plan:
            say = Speaker(quiet, as_json)
            for text in (*plan.notes, *plan.departures):
                say.note(text)
            from della.merging.kernels.compile import on_compile
            from della.running.run import Options, run

            on_compile(say.compiling)
            with say.progress() as progress:
                result = run(plan, out, Options(
                    threads=threads or default_threads(), overwrite=overwrite, fsync=not no_fsync,
                    shard_bytes=shard_bytes, part=share, finish=finish, auto_map=keep_auto_map,
                    progress=progress, tell=say.note,
                ))  # fmt: skip
            say.merged(result, plan.bytes_written, part)


@app.command()
def plan(
    recipe: Recipe,
    seed: Seed = None,
    threads: Threads = None,
    overrides: Set = None,
    compat: Compat = None,
    allow_pickle: AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would do, from the headers of the models alone."""
    with _errors(debug, as_json):
        from della import api
        from della.planning.describe import plan_json, plan_text
        from della.planning.job import default_threads

        threads = threads or default_threads()
        with api.plan(
            recipe, seed=seed, overrides=overrides or (), compat=_is_compat(compat), allow_pickle=allow_pickle
        ) as made:
            text = json.dumps(plan_json(made, threads), indent=1) if as_json else plan_text(made, threads)
            print(text, flush=True)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="What della has merged.", show_default=False)],
    sources: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--sources",
            metavar="[K%]",
            show_default=False,
            help="Compute K% of the tensors from the sources again, chosen at random. [without a value: 5%]",
        ),
    ] = None,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Check that the inputs are still what was merged.")
    ] = False,
    base_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from",
            metavar="FOLDER",
            show_default=False,
            help="Where relative paths of the recipe start. [default: the working directory]",
        ),
    ] = None,
    threads: Threads = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """Compare every byte of OUT with what was merged.  The exit code is 0 only if all is well."""
    with _errors(debug, as_json):
        from della.running.verify import verify as look

        share = _share(sources)
        say = Speaker(quiet, as_json)
        with say.progress("verifying", "checks") as progress:
            verdict = look(
                out, sources=share, inputs=inputs, base_dir=base_dir, allow_pickle=allow_pickle,
                threads=threads, progress=progress,
            )  # fmt: skip
        say.verified(verdict)
        if not verdict.is_well:
            raise typer.Exit(DamageError.exit_code)


def _part(text: str | None) -> tuple[int, int]:
    from della.errors import RecipeError

    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text or "1/1")
    if not match:
        raise RecipeError(f"--part {text}: expected I/N, such as 2/7")
    return int(match[1]), int(match[2])


def _share(text: str | None) -> float | None:
    from della.errors import RecipeError

    if text is None:
        return None
    match = PERCENT.fullmatch(text)
    if not match or not 0 < float(match[1]) <= 100:
        raise RecipeError(f"--sources {text}: expected a percentage above 0 and up to 100%, such as 5%")
    return float(match[1]) / 100


def _is_compat(value: str | None) -> bool:
    if value not in (None, "mergekit"):
        from della.errors import RecipeError

        raise RecipeError(f"--compat {value}: the only other rules known are mergekit's: --compat mergekit")
    return value is not None


def _size(text: str) -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number."""
    from della.errors import RecipeError

    units = {
        "": 1,
        "B": 1,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "KIB": 1 << 10,
        "MIB": 1 << 20,
        "GIB": 1 << 30,
    }
    digits = text.rstrip("BGIKMbgikm ")
    unit = text[len(digits) :].strip().upper()
    try:
        size = int(float(digits) * units[unit if unit in units else unit + "B"])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise RecipeError(f"--shard-size {text}: expected a size such as 5GB or 500MB")
    return size


@contextmanager
def _errors(debug: bool, as_json: bool) -> Iterator[None]:
    """Errors as one sentence and an exit code; a traceback only with --debug."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        code, message = 130, f"stopped; {str(stopped) or 'the output is as it was'}"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception as error:
        known = isinstance(error, DellaError)
        code, message = getattr(error, "exit_code", 1), str(error)
        if not known:
            message = f"a defect of della, please report it: {type(error).__name__}: {error}"
        if debug:
            traceback.print_exc()
        elif not known:
            message += " (details: --debug)"
    else:
        return
    if as_json:
        print_json(event="error", exit_code=code, message=message)
    tell(f"della: {message}")
    raise typer.Exit(code)


def _register(name: str, command: Callable[..., None]) -> None:
    """A command of another module, with the errors of all commands."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        with _errors(arguments["debug"], arguments["as_json"]):
            command(**arguments)

    app.command(name)(guarded)


_register("eval", cli_evaluate.evaluate)
_register("calibrate", cli_calibrate.calibrate)
_register("paper", cli_paper.paper)


def _with_values(arguments: list[str]) -> list[str]:
    """typer knows no option whose value may be left out: `--sources` alone means 5 %."""
    following = [*arguments, ""][1:]
    return [
        "--sources=5%" if word == "--sources" and not NUMBER.fullmatch(after) else word
        for word, after in zip(arguments, following, strict=True)
    ]


def main() -> None:
    """Entry point of the ``della`` command."""
    app(_with_values(sys.argv[1:]))


if __name__ == "__main__":
    main()
