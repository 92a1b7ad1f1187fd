"""GSM8K: the number that an answer gives, and whether it is the right one.

The regular expressions are those of the paper's release, a task file of lm-eval; scripts/agree holds the
scores against lm-eval's own.
"""

from __future__ import annotations

import re

_STRICT = re.compile(r"The answer is: (-?[0-9.,]+)")
_PUBLISHED = re.compile(r"The answer is: (-?[0-9.,]+).")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_STEPS = re.compile(r".*#### ", re.DOTALL)


def strict(text: str) -> str | None:
    """The number after the first "The answer is: ", as it stands there; None without one."""
    return _first(_STRICT, text)


def published(text: str) -> str | None:
    """`strict` as the release has it: a further character must follow the number, so that of an answer that
    ends in "The answer is: 42" it takes 4, and of one that ends in "The answer is: 7" nothing.
    """
    return _first(_PUBLISHED, text)


def flexible(text: str) -> str | None:
    """The last number of the text, whatever it says, as it stands there; None without one."""
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else None


def right(answer: str | None, reference: str) -> bool:
    """Whether an extracted number is that of the reference: the number alone, or the solution with "#### N".

    Compared are the digits, not the values: commas, $ and one full stop at the end do not count, but 18.00 is
    not 18.
    """
    return answer is not None and _bare(answer) == _bare(_STEPS.sub("", reference).strip())


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found[1] if found else None


def _bare(number: str) -> str:
    return number.replace(",", "").replace("$", "").removesuffix(".")
