"""Three toy tasks for the demo trio: generator, deliberate slips, and scorers. Pure Python, no torch.

===== ============================================== ======================== ======================
task  prompt                                         answer                   score
===== ============================================== ======================== ======================
lm    ``Story: Tim, fox, kite, park.``               five short sentences     loss per token
math  ``Q: Tim has 12 apples and buys 5 more. ...``  written steps, ``So N.`` exact match of ``N``
code  ``# calc(x): x times 3, then minus 4`` ...     one ``return`` line      runs right on six inputs
===== ============================================== ======================== ======================

The base model of the trio is sloppy rather than ignorant: it is trained on answers with slips, and how often
depends on a group that the prompt shows (place, item, function name). Each task slips in a way of its own:
stories lose their words to vague ones, word problems lose their last step, code gets a wrong operator. No
slip is ever a right answer. Everything is a pure function of the seed, and the problems of the three splits
are held apart by a hash of what is asked.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

TASKS = ("lm", "math", "code")
SPLITS = ("train", "validation", "test")

NAMES = (
    "Tim", "Ann", "Bob", "Eva", "Sam", "Mia", "Leo", "Zoe",
    "Max", "Ida", "Ben", "Lea", "Tom", "Kim", "Jan", "Amy",
)  # fmt: skip
ANIMALS = (
    "fox", "dog", "cat", "owl", "pig", "hen", "bee",
    "bear", "duck", "frog", "goat", "lion", "wolf", "swan",
)  # fmt: skip
THINGS = (
    "kite", "ball", "drum", "boat", "lamp", "book", "cake",
    "coat", "bell", "ring", "sled", "mask", "rope", "flag",
)  # fmt: skip
PLACES = ("park", "barn", "lake", "hill", "town", "cave", "farm", "yard", "wood", "port")
ITEMS = ("apples", "books", "coins", "pens", "cards", "eggs", "shells", "stamps", "cups", "keys")
FUNCTIONS = ("calc", "rate", "gain", "level", "total", "shift", "scale", "score", "price", "count")

# Base slip rates run evenly from the first group's to the last one's: the margin by which an expert has to
# turn a greedy choice then differs from group to group, which makes scores graded instead of all or nothing.
RATE_FIRST, RATE_LAST = 0.52, 0.88

STORY = (
    ("{name} went to the {place} with a {thing}.", "{name} took a {thing} to the {place}.",
     "One day {name} had a {thing} at the {place}."),
    ("A {animal} was in the {place} too.", "There {name} met a {animal}.", "Soon a {animal} came to {name}."),
    ("The {animal} liked the {thing}.", "The {animal} wanted to have the {thing}.",
     "The {animal} hid the {thing}."),
    ("{name} laughed at the {animal}.", "So {name} and the {animal} shared the {thing}.",
     "Then {name} gave the {animal} a hug."),
    ("{name} left the {place} with the {animal}.", "The {animal} slept near the {thing}.",
     "At night {name} went home from the {place}."),
)  # fmt: skip
VAGUE = {"name": "someone", "animal": "creature", "thing": "stuff", "place": "spot"}

GAINS = ("buys {} more", "gets {} more")
LOSSES = ("loses {}", "sells {}")

WORDS = {"+": "plus", "-": "minus", "*": "times", "%": "modulo"}
WRONG_OPERATOR = {"+": "==", "-": "<", "*": "//", "%": "**"}
CODE_INPUTS = (-7, -1, 0, 1, 5, 12)
CODE_ALPHABET = re.compile(r"[x0-9+\-*/% ()]{1,80}")

Step = tuple[str, int]

_EXACT: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}


@dataclass(frozen=True, slots=True)
class Item:
    """One problem: what is asked, the right answer, and what the slips and the scorer need.

    ``key`` decides the split: the four words of a story, or the numbers and operations of the other two
    tasks, whatever the wording. ``group`` is the visible group that sets the base's slip rate. ``steps`` are
    the operations on the ``start`` number (Math, Code); ``slots`` are the four words of a story and ``form``
    the sentences chosen (LM).
    """

    task: str
    key: str
    group: str
    prompt: str
    answer: str
    start: int = 0
    steps: tuple[Step, ...] = ()
    slots: tuple[tuple[str, str], ...] = ()
    form: tuple[str, ...] = ()


def split_of(key: str) -> str:
    """The split a problem belongs to: 10 % validation, 10 % test, the rest train, by SHA-256 of its key."""
    bucket = hashlib.sha256(key.encode()).digest()[0] * 10 // 256
    return {0: "validation", 1: "test"}.get(bucket, "train")


def slip_rate(group: str) -> float:
    """How often the base's corpus slips on problems of this place, item or function name."""
    groups = next(names for names in (PLACES, ITEMS, FUNCTIONS) if group in names)
    return RATE_FIRST + (RATE_LAST - RATE_FIRST) * groups.index(group) / (len(groups) - 1)


def apply(value: int, steps: Sequence[Step]) -> int:
    """Run the steps, in order, on a number."""
    for operator, operand in steps:
        value = _EXACT[operator](value, operand)
    return value


def draw(task: str, rng: random.Random) -> Item:
    """One random clean problem of the task, of whatever split its key falls into."""
    return {"lm": _draw_story, "math": _draw_math, "code": _draw_code}[task](rng)


def items(task: str, split: str, count: int, seed: int = 0) -> list[Item]:
    """``count`` clean problems of one split with distinct keys; a pure function of the arguments."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    rng = random.Random(f"{task}/{split}/{seed}")
    found: dict[str, Item] = {}
    for _ in range(1000 * count):
        if len(found) == count:
            break
        item = draw(task, rng)
        if split_of(item.key) == split:
            found.setdefault(item.key, item)
    if len(found) < count:
        raise ValueError(f"task {task!r} has fewer than {count} problems in its {split} split")
    return list(found.values())


def stream(task: str, rng: random.Random) -> Iterator[Item]:
    """Clean training problems of one task, without end."""
    while True:
        item = draw(task, rng)
        if split_of(item.key) == "train":
            yield item


def sloppy(item: Item, rng: random.Random) -> str:
    """The item's answer as the base's corpus has it: with slips at the rate of the item's group."""
    rate = slip_rate(item.group)
    if item.task == "lm":
        return _tell(item.form, lambda slot: VAGUE[slot] if rng.random() < rate else dict(item.slots)[slot])
    if item.task == "math":
        return _work(item.start, item.steps[:-1] if rng.random() < rate else item.steps)
    return _body([(WRONG_OPERATOR[o] if rng.random() < rate else o, n) for o, n in item.steps])


def always_slip(item: Item) -> str:
    """The item's answer with every slip its task has: what a fully sloppy base would say."""
    if item.task == "lm":
        return _tell(item.form, lambda slot: VAGUE[slot])
    if item.task == "math":
        return _work(item.start, item.steps[:-1])
    return _body([(WRONG_OPERATOR[o], n) for o, n in item.steps])


def drill(rng: random.Random) -> str:
    """Eight plain facts of arithmetic, so that the base knows what the word problems need.

    Facts are not held apart: what a held-out word problem tests is to find and chain them.
    """
    return "".join(_work(*_quantities(rng, 1), conclude=False) for _ in range(8))


def base_corpus(rng: random.Random) -> Iterator[tuple[str, str]]:
    """The base's (prompt, answer) pairs without end: sloppy answers to all three tasks, and 20 % drills."""
    streams = {task: stream(task, rng) for task in TASKS}
    while True:
        kind = rng.choices(("lm", "math", "code", "drill"), (16, 36, 28, 20))[0]
        if kind == "drill":
            yield "Facts:", drill(rng)
        else:
            item = next(streams[kind])
            yield item.prompt, sloppy(item, rng)


def correct(item: Item, generated: str) -> bool:
    """Whether an answer to a Math or Code item is right (Math: exact match; Code: right on every input)."""
    if item.task == "math":
        found = re.search(r"\bSo (-?\d+)\.", generated)
        return found is not None and int(found.group(1)) == apply(item.start, item.steps)
    if item.task == "code":
        line = re.fullmatch(r"\n {4}return ([^\n]*)\s*", generated)
        if line is None:
            return False
        try:
            return all(calculate(line.group(1), x) == apply(x, item.steps) for x in CODE_INPUTS)
        except ValueError:
            return False
    raise ValueError(f"task {item.task!r} is scored by loss, not by its answer")


def calculate(expression: str, x: int) -> int:
    """The value of an integer expression in ``x`` with ``+ - * // %``, signs and parentheses.

    Generated code is never executed: the text is parsed and anything but this arithmetic raises ValueError.
    """
    if CODE_ALPHABET.fullmatch(expression) is None:
        raise ValueError(f"not plain arithmetic in x: {expression!r}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body, x)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot be calculated: {expression!r}") from error


_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.FloorDiv: "//",
    ast.Mod: "%",
}


def _value(node: ast.expr, x: int) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name) and node.id == "x":
        return x
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, x)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _EXACT[_OPERATORS[type(node.op)]](_value(node.left, x), _value(node.right, x))
    raise ValueError(f"{type(node).__name__} is not plain arithmetic in x")


def _draw_story(rng: random.Random) -> Item:
    lists = {"name": NAMES, "animal": ANIMALS, "thing": THINGS, "place": PLACES}
    slots = {slot: rng.choice(words) for slot, words in lists.items()}
    form = tuple(rng.choice(choices) for choices in STORY)
    asked = ", ".join(slots.values())
    answer = _tell(form, lambda slot: slots[slot])
    return Item(
        "lm", asked, slots["place"], f"Story: {asked}.", answer, slots=tuple(slots.items()), form=form
    )


def _tell(form: Sequence[str], word: Callable[[str], str]) -> str:
    return "\n" + re.sub(r"\{(\w+)\}", lambda match: word(match.group(1)), " ".join(form))


def _quantities(rng: random.Random, count: int) -> tuple[int, tuple[Step, ...]]:
    """A start number and ``count`` steps whose intermediate results all lie in 1..30."""
    while True:
        start = rng.randint(2, 20)
        steps: list[Step] = []
        if rng.random() < 0.3:
            start = rng.randint(2, 5)
            steps.append(("*", rng.randint(2, 6)))
        steps += [(rng.choice("+-"), rng.randint(2, 9)) for _ in range(count - len(steps))]
        if all(1 <= apply(start, steps[: i + 1]) <= 30 for i in range(count)):
            return start, tuple(steps)


def _draw_math(rng: random.Random) -> Item:
    start, steps = _quantities(rng, rng.choice((1, 2, 2)))
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    bags = steps[0][0] == "*"
    owned = f"{start} bags of {steps[0][1]} {item}" if bags else f"{start} {item}"
    events = [rng.choice(GAINS if o == "+" else LOSSES).format(n) for o, n in steps[1 if bags else 0 :]]
    told = ", then ".join(events)
    sentence = f"{name} has {owned} and {told}" if told else f"{name} has {owned}"
    key = f"math {start} " + " ".join(f"{o}{n}" for o, n in steps)
    return Item("math", key, item, f"Q: {sentence}. How many {item}? A:", _work(start, steps), start, steps)


def _work(start: int, steps: Sequence[Step], conclude: bool = True) -> str:
    text, value = "", start
    for step in steps:
        result = apply(value, [step])
        text, value = f"{text} {value}{step[0]}{step[1]}={result}.", result
    return f"{text} So {value}." if conclude else text


def _draw_code(rng: random.Random) -> Item:
    name = rng.choice(FUNCTIONS)
    steps = tuple((rng.choice("+-*%"), rng.randint(2, 9)) for _ in range(rng.choice((1, 2, 2, 2, 3))))
    asked = ", then ".join(f"{WORDS[o]} {n}" for o, n in steps)
    key = "code " + " ".join(f"{o}{n}" for o, n in steps)
    prompt = f"# {name}(x): x {asked}\ndef {name}(x):"
    return Item("code", key, name, prompt, _body(steps), steps=steps)


def _body(steps: Sequence[Step]) -> str:
    """The one line of body; a product of a sum gets parentheses, whatever operator a slip has put there."""
    text, loose = "x", False
    for operator, operand in steps:
        tight = operator in ("*", "%", "//", "**")
        text = f"({text})" if tight and loose else text
        text, loose = f"{text} {operator} {operand}", not tight
    return f"\n    return {text}"
