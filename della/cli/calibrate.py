"""The command `della calibrate`: input norms of a model, for merges with importance: wanda."""

from __future__ import annotations

from typing import Annotated

from della.cli.console import Speaker, Speech, print_json, tell
from della.evaluate.options import CalibrationOptions
from della.options import Spec

Model = Annotated[
    str, Spec("A folder, or a model of the Hub.", metavar="MODEL", is_argument=True, shown=False)
]


def calibrate(model: Model, options: CalibrationOptions, speech: Speech) -> None:
    """Collect the norms of the inputs of MODEL's linear layers over texts, for `input_norms` of a recipe."""
    from della.evaluate import calibration

    progress = Speaker(speech).lines(_text, lambda p: {"done": p[0], "of": p[1]}, lambda p: False)
    found = calibration.calibrate(
        model, options.data, options.out, backend=options.backend, limit=options.limit,
        progress=progress and (lambda done, of: progress((done, of))),
    )  # fmt: skip
    if speech.as_json:
        print_json(
            event="calibrated", out=str(found.out), layers=found.layers, texts=found.texts,
            tokens=found.tokens,
        )  # fmt: skip
    elif not speech.quiet:
        counted = f"{found.texts:,} texts, {found.tokens:,} tokens"
        tell(f"{found.out}: norms of {found.layers} layers over {counted}")


def _text(progress: tuple[int, int]) -> str:
    return "{:,} of {:,} texts".format(*progress)
