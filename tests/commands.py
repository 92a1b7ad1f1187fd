"""The command as the fixture `command` runs it in this process; and in a process that can be stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Protocol

# A background job of a shell ignores SIGINT, and so would its children.
LISTENING = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from della.cli.main import main; main()",
]


class Command(Protocol):
    """Runs `della WORDS` in ``folder`` (None: where the test is)."""

    def __call__(self, folder: Path | None, *words: object) -> subprocess.CompletedProcess[str]: ...
