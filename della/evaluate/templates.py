"""How a problem is put to a model, and how its answer is cut: the prompts of the paper's benchmarks.

The wording is that of the authors' release (github.com/declare-lab/della: generate.py,
utils/evaluate_llms_utils.py and lm_eval_task_config/), since models were tuned on it and scores depend on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from della.errors import EvaluationError, unknown
from della.evaluate.problems import Item

TEMPLATES = ("alpaca", "vicuna", "chat")
PROMPTS = ("fixed", "published")
DEFAULTS = {"gsm8k": "alpaca", "mbpp": "alpaca", "alpaca_eval": "vicuna"}

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:"
)
STEPS = "Let's think step by step"
VICUNA_STOPS = ("</s>", "USER:", "ASSISTANT:")
GSM8K_STOPS = ("Q:", "</s>", "<|im_end|>")
# The asserts of this one are longer than everything else: the release shows the call instead.
LONG_TESTS = {"493": ("calculate_polygons(startx, starty, endx, endy, radius)",)}

_FENCE = re.compile(r"```[A-Za-z0-9+]*[ ]*\n")
_AFTER_PROGRAM = ("\n```", 'if __name__ == "__main__":', "# Example usage", "# Test examples")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked: a text to continue, or (``is_chat``) what a user says in its own chat format.
    The answer ends before the first of ``stops``.
    """

    id: str
    text: str
    is_chat: bool = False
    stops: tuple[str, ...] = ()


def check_template(template: str, variant: str) -> None:
    """EvaluationError unless both are known."""
    for name, known in ((template, TEMPLATES), (variant, PROMPTS)):
        if name not in known:
            kind = "template" if known is TEMPLATES else "prompt"
            raise EvaluationError(unknown(kind, name, known))


def prompt_of(problem: Item, template: str, variant: str = "fixed") -> Prompt:
    """The prompt for a problem.  variant: `published` has the literal backslash-n of the authors' task file
    where newlines were meant, `fixed` has the newlines (gsm8k in the Alpaca template only).
    """
    if template == "chat":
        return Prompt(problem.id, _instruction(problem), is_chat=True)
    if template == "vicuna":
        return Prompt(problem.id, VICUNA.format(_instruction(problem)), stops=VICUNA_STOPS)
    if problem.task == "gsm8k":
        return Prompt(problem.id, _gsm8k(problem.instruction, variant), stops=GSM8K_STOPS)
    if problem.task == "mbpp":
        # The release has a newline more than Alpaca here, and tabs instead of four spaces.
        text = f"{ALPACA}\n\n\n### Instruction:\n{_mbpp(problem)}\n\n### Response:"
        return Prompt(problem.id, text)
    text = f"{ALPACA}\n\n### Instruction:\n{problem.instruction}\n\n### Response:"
    return Prompt(problem.id, text)


def cut(answer: str, stops: Sequence[str]) -> str:
    """An answer up to the first of its stops."""
    return answer[: min((at for stop in stops if (at := answer.find(stop)) >= 0), default=len(answer))]


def program_in(answer: str) -> str:
    """The program in an answer to a programming problem: what stands in its first code fence, if it has one,
    up to where the release ends it (a main block, examples, tests); tabs are four spaces.
    """
    text = answer.replace("\t", "    ")
    for opening in ("The solution is:", "The answer is:"):  # words of code-alpaca's models
        if opening in text:
            text = text.partition(opening)[2].partition("\n\nThe answer is:")[0]
    fence = _FENCE.search(text)
    if fence:
        text = text[fence.end() :]
    return cut(text, _AFTER_PROGRAM).strip("\n").rstrip()


def _gsm8k(question: str, variant: str) -> str:
    if variant == "published":
        # As lm-eval reads the file's quoted YAML: a backslash and an n where a line should end.
        return f"{ALPACA}\\n\\n### Instruction:\\n {question} \\n\\n### Response: {STEPS}"
    return f"{ALPACA}\n\n### Instruction:\n{question}\n\n### Response: {STEPS}."


def _instruction(problem: Item) -> str:
    if problem.task == "gsm8k":
        return f"{problem.instruction}\n\n{STEPS}."
    return _mbpp(problem) if problem.task == "mbpp" else problem.instruction


def _mbpp(problem: Item) -> str:
    tests = "\n".join(LONG_TESTS.get(problem.id, problem.tests))
    asked = f"\n{problem.instruction}\nTest examples:\n{tests}".replace("    ", "\t")
    return f"Create a Python script for this problem:\n{asked}"
