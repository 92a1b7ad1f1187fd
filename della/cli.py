"""The command: arguments, exit codes, progress; nothing else.  Everything heavy is imported inside the
commands.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from della.errors import DellaError

if TYPE_CHECKING:
    from della.run import Progress, Result

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
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait until OUT is safe on the disk.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Progress and result as JSON lines.")] = False,
    debug: Debug = False,
) -> None:
    """Merge models as RECIPE says and write the result to OUT."""
    with _errors(debug, as_json):
        from della.api import open_plan, read
        from della.planning import default_threads

        shard_bytes = _size(shard_size)
        with open_plan(read(recipe, seed, overrides or (), _is_compat(compat)), out, overwrite) as plan:
            say = _Speaker(quiet, as_json)
            for text in (*plan.notes, *plan.departures):
                say.note(text)
            from della.merging.kernel import on_compile
            from della.run import run

            on_compile(say.compiling)
            with say.progress() as progress:
                result = run(
                    plan, out, threads=threads or default_threads(), overwrite=overwrite,
                    fsync=not no_fsync, shard_bytes=shard_bytes, progress=progress,
                )  # fmt: skip
            say.done(result, plan.bytes_read, plan.bytes_written)


@app.command()
def plan(
    recipe: Recipe,
    seed: Seed = None,
    threads: Threads = None,
    overrides: Set = None,
    compat: Compat = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a merge would do, from the headers of the models alone."""
    with _errors(debug, as_json):
        from della import api
        from della.planning import default_threads
        from della.show import plan_json, plan_text

        threads = threads or default_threads()
        with api.plan(recipe, seed=seed, overrides=overrides or (), compat=_is_compat(compat)) as made:
            text = json.dumps(plan_json(made, threads), indent=1) if as_json else plan_text(made, threads)
            print(text, flush=True)


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
    except KeyboardInterrupt:
        code, message = 130, "stopped; the output is as it was"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(1) from None
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
        _print_json(event="error", exit_code=code, message=message)
    _tell(f"della: {message}")
    raise typer.Exit(code)


def _size_text(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


def _print_json(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def _tell(line: str) -> None:
    """A line on stderr, in one piece whatever other threads write."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class _Speaker:
    """Tells a run's story: a live bar on a terminal, plain lines in a pipe, JSON lines with --json."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.has_compiled = False

    def note(self, text: str) -> None:
        if self.as_json:
            _print_json(event="note", message=text)
        elif not self.quiet:
            _tell(f"note: {text}")

    def compiling(self) -> None:
        """Tell, once, that kernels are compiled on the first run."""
        if not self.has_compiled:
            self.has_compiled = True
            self.note("compiling kernels for this processor; later runs find them on disk")

    @contextmanager
    def progress(self) -> Iterator[Callable[[Progress], None] | None]:
        """What to call with each Progress."""
        if self.as_json:
            yield _paced(1.0, lambda p: _print_json(
                event="progress", bytes=p.done, total=p.total, tensors=p.tensors, of=p.of_tensors,
                tensor=p.name,
            ))  # fmt: skip
        elif self.quiet:
            yield None
        elif sys.stderr.isatty():
            with _bar() as update:
                yield update
        else:
            yield _paced(5.0, lambda p: _tell(
                f"{100 * p.done / max(p.total, 1):3.0f} %  {_size_text(p.done)} of {_size_text(p.total)}  "
                f"{p.tensors} of {p.of_tensors} tensors"
            ), at_once=False)  # fmt: skip

    def done(self, result: Result, read: int, written: int) -> None:
        if self.as_json:
            _print_json(
                event="done",
                out=str(result.out),
                seconds=round(result.seconds, 3),
                merging_seconds=round(result.merging_seconds, 3),
                bytes_read=read,
                bytes_written=written,
            )
        elif not self.quiet:
            _tell(f"{result.out}: {_size_text(written)} in {result.seconds:.1f} s")


def _paced(
    seconds: float, tell: Callable[[Progress], None], *, at_once: bool = True
) -> Callable[[Progress], None]:
    """``tell`` at most every so many seconds, at the beginning (``at_once``) and at the end."""
    last = time.monotonic() - (seconds if at_once else 0)

    def update(progress: Progress) -> None:
        nonlocal last
        if progress.tensors == progress.of_tensors or time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(progress)

    return update


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield _paced(0.1, lambda p: bar.update(task, completed=p.done, total=p.total))


def main() -> None:
    """Entry point of the ``della`` command."""
    app()


if __name__ == "__main__":
    main()
