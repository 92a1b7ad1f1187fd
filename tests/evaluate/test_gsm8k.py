"""GSM8K's numbers: what is read out of an answer, and what counts as right."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from della.evaluate.gsm8k import flexible, published, right, strict

SOLUTION = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"


@pytest.mark.parametrize(
    ("text", "by_strict", "by_published", "by_flexible"),
    [
        ("So 9 * 2 = 18. The answer is: 18.", "18.", "18", "18."),
        ("The answer is: 18", "18", "1", "18"),
        ("The answer is: 7", "7", None, "7"),
        ("The answer is: 18\n", "18", "1", "18"),
        ("The answer is: 18 dollars, of 20", "18", "18", "20"),
        ("The answer is: 1,234.50. Thanks", "1,234.50.", "1,234.50.", "1,234.50."),
        ("The answer is: -5 degrees", "-5", "-5", "-5"),
        ("The answer is: 3. No! The answer is: 4.", "3.", "3.", "4."),
        ("The answer is: $18.", None, None, "$18."),
        ("The answer is 18.", None, None, "18."),
        ("the answer is: 18.", None, None, "18."),
        ("It is 18 ... I think", None, None, "..."),
        ("I cannot help with that", None, None, None),
        ("", None, None, None),
        ("eighteen", None, None, None),
    ],
)
def test_what_is_read(
    text: str, by_strict: str | None, by_published: str | None, by_flexible: str | None
) -> None:
    assert (strict(text), published(text), flexible(text)) == (by_strict, by_published, by_flexible)


@pytest.mark.parametrize("answer", ["18", "18.", "$18", "$18.", "1,8", "18,"])
@pytest.mark.parametrize("reference", [SOLUTION, "18", " 18\n", "#### 18", SOLUTION + "\n", "#### $18."])
def test_what_is_right(answer: str, reference: str) -> None:
    assert right(answer, reference)


@pytest.mark.parametrize("answer", [None, "", "9", "16", "1", "118", "-18", "18.0", "18.00", "18..", "..."])
def test_what_is_wrong(answer: str | None) -> None:
    assert not right(answer, SOLUTION)


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "{:,}"]),
    st.sampled_from(["", ".", ".\n", " apples"]),
)
def test_a_number_is_found_however_it_is_written(number: int, form: str, after: str) -> None:
    text = f"Of 12 and 5 we get {number + 1}.\nThe answer is: {form.format(number)}{after}"
    reference = f"12 + 5 makes it\n#### {number}"
    assert right(strict(text), reference)
    assert right(flexible(text), reference)
    assert not right(strict(text), f"#### {number + 1}")


PIECES = st.sampled_from(["The answer is: ", "The answer is ", "#### ", *"0123456789$.,- \na"])


def as_lm_eval(pattern: str, select: int, text: str) -> str:
    """Its regex filter: of all matches the selected one, of that the first group that holds anything."""
    found = re.findall(pattern, text)
    if not found:
        return "[invalid]"
    chosen = found[select]
    return (chosen if isinstance(chosen, str) else next(group for group in chosen if group)).strip()


def exact_match(answer: str, reference: str) -> bool:
    """Its exact_match with the settings of the GSM8K tasks."""
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer, reference = re.sub(ignored, "", answer), re.sub(ignored, "", reference)
    return answer.lower() == reference.lower()


@given(st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["7", "42", "-1", "1,000", "0.5"]))
def test_scores_are_those_of_the_task_file(text: str, number: str) -> None:
    reference = f"Step by step.\n#### {number}"
    for ours, pattern, select in (
        (strict, r"The answer is: (\-?[0-9\.\,]+)", 0),
        (published, r"The answer is: (\-?[0-9\.\,]+).", 0),
        (flexible, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):
        theirs = as_lm_eval(pattern, select, text)
        assert (ours(text) or "[invalid]") == theirs
        assert right(ours(text), reference) == exact_match(theirs, reference)
