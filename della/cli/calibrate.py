"""The command `della calibrate`: input norms of a model, for merges with importance: wanda."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from della.cli.console import print_json, tell

PACE = 5.0  # seconds between two lines of progress

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, or a model of the Hub.", show_default=False)
]
Data = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Texts, one a line; or JSON lines (.jsonl) with text, or with prompt and answer.",
    ),
]
Out = Annotated[
    Path, typer.Option(metavar="NORMS", help="The .safetensors file to write.", show_default=False)
]
Backend = Annotated[
    str, typer.Option(metavar="NAME", help="Who runs the model: hf (torch), or numpy for a small Llama.")
]
Limit = Annotated[
    Optional[int],  # noqa: UP045  (typer evaluates annotations on Python 3.10)
    typer.Option(min=1, metavar="N", help="Only the first N texts.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Progress and result as JSON lines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def calibrate(
    model: Model, data: Data, out: Out, backend: Backend = "hf", limit: Limit = None, quiet: Quiet = False,
    as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Collect the norms of the inputs of MODEL's linear layers over texts, for `input_norms` of a recipe."""
    from della.evaluate import calibration

    found = calibration.calibrate(
        model, data, out, backend=backend, limit=limit, progress=_progress(quiet, as_json)
    )
    if as_json:
        print_json(
            event="calibrated", out=str(found.out), layers=found.layers, texts=found.texts,
            tokens=found.tokens,
        )  # fmt: skip
    elif not quiet:
        tell(f"{out}: norms of {found.layers} layers over {found.texts:,} texts, {found.tokens:,} tokens")


def _progress(quiet: bool, as_json: bool) -> Callable[[int, int], None] | None:
    """A line every few seconds."""
    if quiet and not as_json:
        return None
    last = time.monotonic()

    def update(done: int, of: int) -> None:
        nonlocal last
        if time.monotonic() - last < PACE:
            return
        last = time.monotonic()
        if as_json:
            print_json(event="progress", done=done, of=of)
        else:
            tell(f"{done:,} of {of:,} texts")

    return update
