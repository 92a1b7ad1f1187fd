"""The prompts, to the letter, and how answers are cut."""

from __future__ import annotations

import pytest

from della.errors import EvaluationError
from della.evaluate.problems import Item
from della.evaluate.templates import Prompt, check_template, cut, program_in, prompt_of

MATH = Item("3", "gsm8k", "Two and three?", "#### 5")
CODE = Item("11", "mbpp", "Write a function.", "", ("assert f(1) == 1", "assert f(2) ==    2"))
CHAT = Item("0", "alpaca_eval", "Say {hello}.", "")
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: "
)


def test_gsm8k_in_the_alpaca_prompt() -> None:
    assert prompt_of(MATH, "alpaca") == Prompt(
        "3", f"{ALPACA}\n\n### Instruction:\nTwo and three?\n\n### Response: Let's think step by step.",
        stops=("Q:", "</s>", "<|im_end|>"),
    )  # fmt: skip


def test_gsm8k_as_published_has_backslashes_in_the_place_of_newlines() -> None:
    assert prompt_of(MATH, "alpaca", "published").text == (
        ALPACA + r"\n\n### Instruction:\n Two and three? \n\n### Response: Let's think step by step"
    )


def test_mbpp_as_the_release_asks_it() -> None:
    asked = (
        f"{ALPACA}\n\n\n### Instruction:\nCreate a Python script for this problem:\n\nWrite a function.\n"
        "Test examples:\nassert f(1) == 1\nassert f(2) ==\t2\n\n### Response:"
    )
    assert prompt_of(CODE, "alpaca") == Prompt("11", asked)
    long = Item("493", "mbpp", "Polygons.", "", ("assert calculate_polygons(1) == [...]",) * 3)
    assert "\nPolygons.\nTest examples:\ncalculate_polygons(startx, starty, endx, endy, radius)\n\n###" in (
        prompt_of(long, "alpaca").text
    )


def test_alpaca_eval_in_the_releases_vicuna_prompt() -> None:
    assert prompt_of(CHAT, "vicuna") == Prompt(
        "0", f"{VICUNA}Say {{hello}}. ASSISTANT:", stops=("</s>", "USER:", "ASSISTANT:")
    )
    assert prompt_of(CHAT, "alpaca").text == f"{ALPACA}\n\n### Instruction:\nSay {{hello}}.\n\n### Response:"


def test_a_chat_template_is_given_what_a_user_would_say() -> None:
    assert prompt_of(CHAT, "chat") == Prompt("0", "Say {hello}.", is_chat=True)
    assert prompt_of(MATH, "chat").text == "Two and three?\n\nLet's think step by step."
    assert prompt_of(CODE, "chat").text.startswith("Create a Python script for this problem:\n\nWrite a f")


def test_unknown_templates_are_told() -> None:
    check_template("chat", "published")
    with pytest.raises(EvaluationError) as error:
        check_template("vicunia", "fixed")
    assert str(error.value) == (
        "template 'vicunia': expected one of alpaca, vicuna, chat; did you mean 'vicuna'?"
    )
    with pytest.raises(EvaluationError, match=r"^prompt 'broken': expected one of fixed, published$"):
        check_template("chat", "broken")


def test_an_answer_ends_before_its_first_stop() -> None:
    assert cut("5. USER: and</s>", ("</s>", "USER:")) == "5. "
    assert cut("5.", ("</s>",)) == cut("5.", ()) == "5."


PROGRAMS = {
    "bare": ("\ndef f(x):\n\treturn x\n", "def f(x):\n    return x"),
    "indented first line": ("  x = 1", "  x = 1"),
    "python fence": ("Here:\n```python\ndef f(): pass\n```\nIt passes.", "def f(): pass"),
    "plain fence": ("```\ndef f(): pass\n```", "def f(): pass"),
    "only the first fence": ("```py\na = 1\n```\n```python\nb = 1\n```", "a = 1"),
    "a fence that is not closed": ("```python\nimport re\nx", "import re\nx"),
    "a main block": ('def f(): pass\nif __name__ == "__main__":\n    f()', "def f(): pass"),
    "examples": ("def f(): pass\n# Example usage\nf()", "def f(): pass"),
    "tests": ("def f(): pass\n\n# Test examples:\nassert f()", "def f(): pass"),
    "words of code-alpaca": ("So. The solution is:\ndef f(): pass\n\nThe answer is: f", "def f(): pass"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("answer", "program"), PROGRAMS.values(), ids=PROGRAMS)
def test_the_program_in_an_answer(answer: str, program: str) -> None:
    assert program_in(answer) == program
