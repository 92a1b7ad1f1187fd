"""The sandboxes of this machine, for tests that need one."""

from __future__ import annotations

import pytest

from della.errors import EvaluationError
from della.evaluate.sandbox import NAMES, Sandbox, open_sandbox


def _parameter(name: str) -> object:
    try:
        return pytest.param(open_sandbox(name), id=name)
    except EvaluationError as error:
        return pytest.param(None, id=name, marks=pytest.mark.skip(reason=str(error)))


EACH = [_parameter(name) for name in NAMES]
each_sandbox = pytest.mark.parametrize("sandbox", EACH)


def any_sandbox() -> Sandbox:
    """The one that della would take; the test is skipped where there is none."""
    try:
        return open_sandbox()
    except EvaluationError as error:
        pytest.skip(str(error))
