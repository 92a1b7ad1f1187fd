"""Problems of the benchmarks in their published formats, and the command that evaluates models on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stub_server import Request

COMMAND = [sys.executable, "-m", "della.cli.main", "eval"]
PEAS: dict[str, Any] = {"question": "2 peas and 3 peas?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
ADD: dict[str, Any] = {
    "task_id": 11, "text": "Write a function to add.", "code": "def add(a, b): return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "import math",
    "challenge_test_list": [],
}  # fmt: skip
HELLO: dict[str, Any] = {"dataset": "own", "instruction": "Say hello.", "output": "Hello.", "generator": "me"}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    return [{"question": f"What is {n} + 1?", "answer": f"{n} + 1\n#### {n + 1}"} for n in range(count)]


def number_in(request: Request) -> int:
    return int(request.prompt.partition("What is ")[2].partition(" ")[0])


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
