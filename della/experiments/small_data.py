"""Data of the 135 M experiment: pairs of prompt and response from JSONL files, as tokens of one chat turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from della.checkpoint.strict import json_object
from della.errors import CheckpointError, EvaluationError, Problem
from della.experiments.demo import EXPERTS as TASKS

SPLITS = ("train", "validation", "test")
# For a tokenizer without a chat template.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Example:
    """The tokens of one pair; the first ``asked`` are the prompt's and carry no loss."""

    ids: tuple[int, ...]
    asked: int

    @property
    def answered(self) -> int:
        """The number of response tokens, the end token included."""
        return len(self.ids) - self.asked


def data_file(folder: Path, task: str, split: str) -> Path:
    """Where the pairs of one task and split lie."""
    return folder / f"{task}.{split}.jsonl"


def check_data(folder: Path, splits: Sequence[str] = SPLITS) -> None:
    """EvaluationError naming every data file that is missing."""
    names = [data_file(folder, task, split) for task in TASKS for split in splits]
    missing = [path.name for path in names if not path.is_file()]
    if missing:
        raise EvaluationError(
            Problem(
                f"{', '.join(missing)} not found",
                'expected JSONL files TASK.SPLIT.jsonl of lines {"prompt": ..., "response": ...}; '
                "training/data_135m.py makes them of GSM8K, MBPP and novels",
                subject=str(folder),
            )
        )


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The (prompt, response) pairs of a JSONL file; EvaluationError naming the line that is none."""
    pairs = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_object(line, f"{path}, line {number}")
        except CheckpointError as error:
            raise EvaluationError(*error.problems) from None
        prompt, response = row.get("prompt"), row.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str):
            said = 'expected "prompt" and "response" with text'
            raise EvaluationError(Problem(said, subject=f"{path}, line {number}"))
        pairs.append((prompt, response))
    return pairs


def example(tokenizer: Any, prompt: str, response: str) -> Example:
    """One pair as tokens: the model's own chat format, else the Alpaca prompt; the end token closes it."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        asked = (tokenizer.bos_token or "") + ALPACA.format(prompt=prompt)
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, response))
    return Example((*before, *after, tokenizer.eos_token_id), len(before))


def examples(tokenizer: Any, path: Path, longest: int, most: int | None = None) -> list[Example]:
    """The first ``most`` pairs of a file that have at most ``longest`` tokens, in the file's order.

    EvaluationError where there are fewer.
    """
    found: list[Example] = []
    for prompt, response in read_pairs(path):
        one = example(tokenizer, prompt, response)
        if len(one.ids) <= longest:
            found.append(one)
        if len(found) == most:
            break
    if len(found) < (most or 1):
        raise EvaluationError(
            Problem(
                f"{len(found)} pairs of at most {longest} tokens, {most or 1} are needed", subject=str(path)
            )
        )
    return found
