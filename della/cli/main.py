"""The command: arguments, exit codes, progress; nothing else.  Everything heavy is imported inside the
commands.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from della.cli import calibrate as cli_calibrate
from della.cli import evaluate as cli_evaluate
from della.cli import methods as cli_methods
from della.cli import paper as cli_paper
from della.cli.console import Speaker, Speech, print_json, tell
from della.cli.options import derived, only
from della.errors import DamageError, DellaError, command_line
from della.options import Changes, Checks, Execution, Permissions, Spec, Target, declared

if TYPE_CHECKING:
    from della.planning.job import Plan

# Plans and kernels are many objects that live to the end, and hardly anything is in a circle.
GC_THRESHOLDS = (50_000, 50, 50)
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


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from della.version import __version__

        print(f"della {__version__}")
        raise typer.Exit


Recipe = Annotated[str, Spec("The recipe, a YAML file.", metavar="RECIPE", is_argument=True, shown=False)]


def merge(
    recipe: Recipe, target: Target, changes: Changes, execution: Execution, permissions: Permissions,
    speech: Speech,
) -> None:  # fmt: skip
    """Merge models as RECIPE says and write the result to OUT.  A run that was cut short is resumed by the
    same command.
    """
    from della import api

    say = Speaker(speech)

    def planned(plan: Plan) -> None:
        from della.merging.kernels.compile import on_compile

        say.planned(plan)
        on_compile(say.compiling)

    with say.progress() as progress:
        result = api.run_merge(
            recipe, target, changes, execution, permissions, progress=progress, tell=say.note, on_plan=planned
        )
    say.merged(result, execution.part)


def plan(
    recipe: Recipe,
    changes: Changes,
    execution: Annotated[Execution, only("threads")],
    permissions: Annotated[Permissions, only("allow_pickle", "allow_idle")],
    speech: Annotated[Speech, only("debug", as_json="One JSON object.")],
    sample: Annotated[bool, Spec("Also read a sample, to see how far each model is from the base.")] = False,
    everything: Annotated[bool, Spec("Show defaults too, and the values of each layer.", ("--all",))] = False,
) -> None:
    """Show what a merge would do, from the headers of the models alone."""
    from della import api
    from della.planning.describe import plans_json, plans_text

    with api.run_plan(recipe, changes, permissions, sample) as made:
        threads = execution.workers
        if speech.as_json:
            print(json.dumps(plans_json(made, threads), indent=1), flush=True)
        else:
            print(plans_text(made, threads, everything=everything), flush=True)


def verify(
    out: Annotated[Path, Spec("What della has merged.", metavar="OUT", is_argument=True, shown=False)],
    checks: Checks,
    execution: Annotated[Execution, only("threads")],
    permissions: Annotated[Permissions, only("allow_pickle")],
    speech: Speech,
) -> None:
    """Compare every byte of OUT with what was merged.  The exit code is 0 only if all is well."""
    from della import api

    say = Speaker(speech)
    with say.progress("verifying", "checks") as progress:
        verdict = api.run_verify(out, checks, permissions, execution, progress=progress)
    say.verified(verdict)
    if not verdict.is_well:
        raise typer.Exit(DamageError.exit_code)


@contextmanager
def _errors(debug: bool, as_json: bool) -> Iterator[None]:
    """Errors as one sentence and an exit code; a traceback only with --debug."""
    try:
        with command_line():
            yield
    except KeyboardInterrupt as stopped:
        code, message, problems = 130, f"stopped; {str(stopped) or 'the output is as it was'}", []
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception as error:
        known = isinstance(error, DellaError)
        code, message = getattr(error, "exit_code", 1), str(error)
        problems = [problem.as_dict() for problem in error.problems] if isinstance(error, DellaError) else []
        if isinstance(error, OSError) and error.errno is not None:  # the system's word, not a defect
            known, message = True, f"{error.filename or 'what is printed'}: {error.strerror}"
        if not known:
            message = f"a defect of della, please report it: {type(error).__name__}: {error}"
        if debug:
            traceback.print_exc()
        elif not known:
            message += " (details: --debug)"
    else:
        return
    if as_json:
        with suppress(OSError):  # it may be what is told
            print_json(event="error", exit_code=code, message=message, problems=problems)
    tell(f"della: {message}")
    raise typer.Exit(code)


def _register(name: str, command: Callable[..., None]) -> None:
    """A command with the errors of all commands."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        with _errors(arguments["debug"], arguments["as_json"]):
            command(**arguments)

    app.command(name)(guarded)


_register("merge", derived(merge))
_register("plan", derived(plan))
_register("verify", derived(verify))
_register("methods", derived(cli_methods.methods))
_register("eval", derived(cli_evaluate.evaluate))
_register("calibrate", derived(cli_calibrate.calibrate))
_register("paper", derived(cli_paper.paper))


def _with_values(arguments: list[str]) -> list[str]:
    """typer knows no option whose value may be left out: `--sources` alone gets the value it stands for.

    That of --overwrite stands behind a "=", as the next word may be OUT."""
    options = declared(Checks) | declared(Target)
    bare = {f"--{name}": spec.bare for name, spec in options.items() if spec.bare}
    following = [*arguments, ""][1:]
    return [
        f"{word}={bare[word]}"
        if word in bare and not ("%" in bare[word] and NUMBER.fullmatch(after))
        else word
        for word, after in zip(arguments, following, strict=True)
    ]


def main() -> None:
    """The command with the arguments of this process; raises SystemExit."""
    app(_with_values(sys.argv[1:]))


def process() -> NoReturn:
    """Entry point of the ``della`` command: `main`, and an end without Python's clearing up, which takes a
    fifth of a second and changes nothing that is left.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, int) or threading.active_count() > 1:
            raise
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            if not ended.code:  # Python tells of it
                raise ended from None
        os._exit(ended.code)
    raise AssertionError("an app ends by SystemExit")


if __name__ == "__main__":
    process()
