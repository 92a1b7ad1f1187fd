"""Beside lm-eval itself: the same generations have the same GSM8K scores, item by item.

Needs lm-eval 0.4.13 in an environment of its own, named by DELLA_LM_EVAL_PYTHON, and is skipped without;
scripts/agree --test makes one.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    "DELLA_LM_EVAL_PYTHON" not in os.environ, reason="DELLA_LM_EVAL_PYTHON names no environment with lm-eval"
)


def agree(path: Path, rows: list[dict[str, str]]) -> subprocess.CompletedProcess[str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        os.environ["DELLA_LM_EVAL_PYTHON"],
        "-m",
        "benchmarks.lm_eval_agreement",
        "--generations",
        str(path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_scores_agree_item_by_item(tmp_path: Path) -> None:
    rows = []
    for n in range(2, 42):
        m = n * (n + 1)
        row = {"question": f"What is {n} * {n + 1}?", "answer": f"Multiply.\n#### {m}"}
        for output in (f"It is {m}. The answer is: {m}.", f"The answer is: {n} of {m}"):
            rows.append({**row, "output": output})
    run = agree(tmp_path / "rows.jsonl", rows)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert lines[0][-3:-1] == ["of", "121"]
    found = {line[0]: [int(number) for number in line[1:]] for line in lines[1:]}
    # (lm-eval, della, without a number, that differ), 41 hard ones included
    assert found == {
        "strict": [50, 50, 25, 0], "published": [49, 49, 27, 0], "flexible-extract": [102, 102, 5, 0],
    }  # fmt: skip


def test_a_difference_is_found(tmp_path: Path) -> None:
    """The only known one: a blank after the reference's number, which lm-eval does not forgive."""
    row = {"question": "What is 1 + 1?", "answer": "Add.\n#### 2 ", "output": "The answer is: 2."}
    run = agree(tmp_path / "rows.jsonl", [row])
    assert run.returncode == 1
    assert run.stdout.count("  item 0: ") == 3
