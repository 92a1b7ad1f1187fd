"""The sandboxes of this machine, for tests that need one."""

from __future__ import annotations

import pytest

from della.errors import EvaluationError
from della.sandbox.walls import NAMES, Sandbox, open_sandbox


def _opened(name: str) -> Sandbox | str:
    try:
        return open_sandbox(name)
    except EvaluationError as error:
        return str(error)


OPENED = {name: _opened(name) for name in NAMES}  # by name, or why not
each_sandbox = pytest.mark.parametrize(
    "sandbox",
    [
        pytest.param(found, id=name, marks=[pytest.mark.skip(reason=found)] if isinstance(found, str) else [])
        for name, found in OPENED.items()
    ],
)


def sandbox_named(name: str) -> Sandbox:
    """One of them; the test is skipped where it does not work."""
    found = OPENED[name]
    if isinstance(found, str):
        pytest.skip(found)
    return found


def any_sandbox() -> Sandbox:
    """The one that della takes; the test is skipped where there is none."""
    for found in OPENED.values():
        if not isinstance(found, str):
            return found
    pytest.skip(" ".join(map(str, OPENED.values())))
