"""Scores of generated programs; their code runs in a sandbox, and the verdict is reached outside of it.

A test such as ``assert f(1, 2) == [3]`` is taken apart: the sandbox that holds the program is given the call
``f(1, 2)`` and sends back its value as plain data; another, which holds no generated code, then evaluates the
test with that value instead of the call.  So a program cannot say that it passed: it can only answer.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from della.errors import EvaluationError
from della.sandbox.values import decode, encode
from della.sandbox.walls import Limits, Outcome, Sandbox

_ANSWERS, _VERDICT, _BATCH = (
    f"from della.sandbox.harness import {name}; {name}()" for name in ("answers", "verdict", "batch")
)
_MOST_OF_A_VALUE = 2  # a value may take half of what a program may write


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether all tests hold, and why: "passed", "timeout", "wrong answer in test 2", "NameError: ..."."""

    passed: bool
    reason: str


def check(
    sandbox: Sandbox,
    program: str,
    tests: Sequence[str],
    setup: str = "",
    limits: Limits = Limits(),  # noqa: B008
) -> Verdict:
    """Does ``program`` pass all ``tests``, each an assert (or several) about what its function returns?

    ``setup`` is run after the program, for what the tests need.  Raises EvaluationError for a test that has
    no call to take out, and where the sandbox cannot be started.
    """
    parts = _taken_apart(tests, setup)
    called = [call for _, calls in parts for call in calls.values()]
    most = limits.output // _MOST_OF_A_VALUE
    outcome = sandbox.run(_ANSWERS, encode([program, setup, called, most], sys.maxsize), limits)
    values = _values(outcome, len(called))
    if isinstance(values, str):
        return Verdict(False, values)
    answers = iter(values)
    judged = [(test, {name: next(answers) for name in calls}) for test, calls in parts]
    question = encode([_statements(setup), judged], sys.maxsize)
    outcome = sandbox.run(_VERDICT, question, replace(limits, processes=0))
    if outcome.ended != "exited" or not outcome.stdout:
        return Verdict(False, f"wrong answer: the comparison ended with {_ending(outcome)}")
    said = outcome.stdout.decode(errors="replace")
    return Verdict(said == "+", "passed" if said == "+" else said[1:])


def calls(
    sandbox: Sandbox,
    functions: Sequence[tuple[str, str]],
    inputs: Sequence[int],
    limits: Limits = Limits(seconds=1.0, processes=64),  # noqa: B008
) -> list[list[object]]:
    """What each function returns for each input, None where it fails; ``functions`` are (source, name).

    One sandbox for all; each function runs in a process of its own there, ``limits.seconds`` long at most.
    What ends too early or takes too long gives None for all inputs.
    """
    question = encode([list(functions), list(inputs), float(limits.seconds)], sys.maxsize)
    whole = replace(
        limits,
        seconds=10.0 + len(functions) * (limits.seconds + 0.1),
        output=(1 << 15) * len(functions) + 1,
        processes=max(limits.processes, 1),
    )
    outcome = sandbox.run(_BATCH, question, whole)
    answers = _split(outcome.stdout)
    if outcome.ended != "exited" or outcome.code or answers is None or len(answers) != len(functions):
        lines = outcome.stderr.strip().splitlines() or [_ending(outcome)]
        raise EvaluationError(f"the sandbox {sandbox.name} did not run a batch to its end: {lines[-1]}")
    return [_decoded(answer, len(inputs)) for answer in answers]


def _decoded(answer: bytes, count: int) -> list[object]:
    """The values of one function: nothing in ``answer`` is trusted."""
    try:
        values = decode(answer)
        if not isinstance(values, list) or len(values) != count:
            return [None] * count
        return [decode(value) if isinstance(value, bytes) else None for value in values]
    except ValueError:
        return [None] * count


def _values(outcome: Outcome, count: int) -> list[bytes] | str:
    """The values that a program sent, or why there are none."""
    if outcome.ended == "timeout":
        return "timeout"
    if outcome.stdout[:1] == b"-":
        reason = outcome.stdout[1:300].decode(errors="replace").partition("\n")[0]
        return "".join(c for c in reason if c.isprintable())
    values = _split(outcome.stdout[1:]) if outcome.stdout[:1] == b"+" else None
    if values is None or len(values) != count:
        return f"no answer: the program ended with {_ending(outcome)}"
    return values


def _split(data: bytes) -> list[bytes] | None:
    """Parts, each after its length in 4 bytes; None if that is not what the data are."""
    parts, position = [], 0
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "big")
        parts.append(data[start:position])
    return parts if position == len(data) else None


def _ending(outcome: Outcome) -> str:
    if outcome.ended == "timeout":
        return "a timeout"
    return f"signal {outcome.code}" if outcome.ended == "signal" else f"exit code {outcome.code}"


# ---- tests taken apart -----------------------------------------------------------------------------------


def _taken_apart(tests: Sequence[str], setup: str) -> list[tuple[str, dict[str, str]]]:
    """Each test with names instead of its calls, and the calls by these names."""
    own = {
        node.id
        for node in ast.walk(_parsed(setup))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    own |= {
        node.name for node in ast.walk(_parsed(setup)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    trees = [_parsed(test) for test in tests]
    tested = {name for tree in trees if (name := _tested(tree, own)) is not None}
    parts = []
    for test, tree in zip(tests, trees):
        taking = _Taking(tested)
        taken = ast.fix_missing_locations(taking.visit(tree))
        if not taking.calls:
            raise EvaluationError(f"the test {test!r} calls no function whose value could be compared")
        libraries = {
            node.id for node in ast.walk(taken) if isinstance(node, ast.Name)
        } & sys.stdlib_module_names
        imports = "".join(f"import {library}\n" for library in sorted(libraries))
        parts.append((imports + ast.unparse(taken), taking.calls))
    return parts


def _tested(tree: ast.Module, own: set[str]) -> str | None:
    """The function under test: the first that is called and is neither Python's nor the test's own.

    Only if there is none, Python's: a task may ask for a function called ``sum``.  Whatever else a test
    calls is not left to the program, which could otherwise bring a ``set`` that equals all.
    """
    called = list(_called(tree))
    foreign = [name for name in called if name not in own and not hasattr(builtins, name)]
    return next(iter(foreign or called), None)


def _called(node: ast.AST) -> Iterator[str]:
    """The names that are called, in the order of the text, outer ones first."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        yield node.func.id
    for child in ast.iter_child_nodes(node):
        yield from _called(child)


class _Taking(ast.NodeTransformer):
    """Takes the outermost calls of the functions under test out of a test."""

    def __init__(self, tested: set[str]) -> None:
        self.tested = tested
        self.calls: dict[str, str] = {}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not (isinstance(node.func, ast.Name) and node.func.id in self.tested):
            return self.generic_visit(node)
        name = f"value_{len(self.calls)}_of_the_call"
        self.calls[name] = ast.unparse(node)
        return ast.Name(name, ast.Load())


def _statements(setup: str) -> list[str]:
    return [ast.unparse(statement) for statement in _parsed(setup).body]


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise EvaluationError(f"the test {text!r} is no Python: {error}") from error
