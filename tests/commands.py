"""The command in the process of the tests, as the fixture `command` runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol


class Command(Protocol):
    """Runs `della WORDS` in ``folder`` (None: where the test is)."""

    def __call__(self, folder: Path | None, *words: object) -> subprocess.CompletedProcess[str]: ...
