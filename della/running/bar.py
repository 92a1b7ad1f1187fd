"""A bar for ``progress=True``, in notebooks and terminals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from della.running.run import Progress


@contextmanager
def shown(
    progress: Callable[[Progress], None] | bool | None, doing: str
) -> Iterator[Callable[[Progress], None] | None]:
    """What to call with each Progress: ``progress`` itself, nothing, or for True what draws a bar on stderr.

    In a notebook it is a widget, or text where ipywidgets is missing.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # text is no fault
        from tqdm.auto import tqdm

        bar = tqdm(desc=doing, unit="B", unit_scale=True)

    def show(now: Progress) -> None:
        if now.total != bar.total or now.done < bar.n:  # it begins, or begins anew
            bar.reset(now.total)
        bar.update(now.done - bar.n)

    try:
        yield show
    finally:
        bar.leave = bar.n > 0  # of a merge that was refused nothing stays
        bar.close()
