"""The command `della paper`: the experiment of the DELLA paper at three scales."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from della.cli.console import Speech, print_json, tell
from della.cli.options import Given, only
from della.experiments.options import ExperimentOptions, check, read_file
from della.options import argument, build, declared, option


@dataclass(frozen=True)
class Asked:
    """What is asked for beside the options of the experiment."""

    file: Path | None = argument("A YAML file of options: experiment.yml.", None, metavar="EXPERIMENT")
    plan: bool = option("13b: say what it would take, and do nothing.", False)


def paper(
    asked: Asked,
    options: ExperimentOptions,
    speech: Annotated[Speech, only("quiet", "debug", as_json="The plan, or where the result is, as JSON.")],
    given: Given,
) -> None:
    """Run the experiment of the DELLA paper: mini (the demo's models, minutes), 135m (a real small model,
    hours) or 13b (the paper's models, days of a GPU).  The same command resumes where it was cut short.
    """
    own = {name: flag for name, flag in given.items() if name in declared(ExperimentOptions)}
    said = read_file(asked.file) if asked.file else {}
    chosen = replace(build(ExperimentOptions, said), **{name: getattr(options, name) for name in own})
    check(chosen, {**{name: f"{asked.file}: {name}" for name in said}, **own})
    try:
        _run(chosen, asked.plan, speech)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{chosen.place} keeps what is done; the same command resumes") from None


def _run(options: ExperimentOptions, plan: bool, speech: Speech) -> None:
    def say(line: str) -> None:
        if not speech.quiet:
            tell(line)

    command = shlex.join(["della", *sys.argv[1:]])
    if options.scale == "mini":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded: the threads are our own
        from della.experiments.mini import run_mini

        run_mini(options, command, say)
    elif options.scale == "135m":
        from della.experiments.small import run_small

        run_small(options, say)
    elif plan:
        _plan(options, speech.as_json)
        return
    else:
        from della.experiments.full import run_full

        run_full(options, command, say)
    if speech.as_json:
        print_json(event="finished", scale=options.scale, results=str(options.place / "results.json"))
    else:
        say(f"{options.place}: index.html, tables.md, results.json")


def _plan(options: ExperimentOptions, as_json: bool) -> None:
    from della.experiments.full import plan_full
    from della.experiments.full_plan import plan_text

    found = plan_full(options)
    if as_json:
        print_json(event="plan", **found)
    else:
        print(plan_text(found), flush=True)
