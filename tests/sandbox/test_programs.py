"""Scores of programs: right ones pass, wrong ones fail, and none can say that it passed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import any_sandbox, each_sandbox

from attacks.fakes import FAKES, Fake
from della.errors import EvaluationError
from della.sandbox.programs import Verdict, calls, check
from della.sandbox.values import CannotCrossError, decode, encode
from della.sandbox.walls import Limits, Sandbox

PASSED = Verdict(True, "passed")
QUICK = Limits(seconds=2.0)


# ---- values ----------------------------------------------------------------------------------------------

PLAIN = [
    None, True, False, 0, -1, 10**30, -(16**5000), 0.0, -0.0, 1.5, 1e-320, float("inf"), 1 + 2j, "", "aé\n\0\ud800",
    b"", b"\0;", bytearray(b"x"), [], [1, [2]], (), (1,), set(), {1, "a"}, frozenset({2}), {}, {"a": {1: None}},
    range(1, 9, 2), deque([1, 2]),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=range(len(PLAIN)))
def test_plain_values_cross_as_they_are(value: object) -> None:
    crossed = decode(encode(value))
    assert crossed == value
    assert type(crossed) is type(value)
    if not isinstance(value, int):
        assert repr(crossed) == repr(value)


def test_nan_crosses() -> None:
    assert repr(decode(encode([float("nan"), -0.0]))) == "[nan, -0.0]"


def test_subclasses_cross_as_what_they_hold() -> None:
    Pair = namedtuple("Pair", "a b")
    odd: dict[str, list[int]] = defaultdict(list, {"a": [1]})
    values = [Counter("aab"), OrderedDict(x=1), odd, Pair(1, 2)]
    crossed = decode(encode(values))
    assert crossed == [{"a": 2, "b": 1}, {"x": 1}, {"a": [1]}, (1, 2)]
    assert [type(value) for value in crossed] == [dict, dict, dict, tuple]


def test_iterators_and_views_stay_what_they_are() -> None:
    crossed = decode(
        encode([map(abs, [-1, 2]), {1: 2}.keys(), {1: 2}.values(), {1: 2}.items(), (x for x in "a")])
    )
    assert crossed[0] != [1, 2]
    assert list(crossed[0]) == [1, 2]
    assert crossed[1] == {1}
    assert list(crossed[2]) == [2]
    assert crossed[3] == {(1, 2)}
    assert list(crossed[4]) == ["a"]


@pytest.mark.parametrize("value", [object(), len, int, Any, [object()], ValueError("x")])
def test_other_objects_do_not_cross(value: object) -> None:
    with pytest.raises(CannotCrossError, match=r"^an object of type "):
        encode(value)


@given(st.binary(max_size=60) | st.text("NTFifcsbaltSzdkvmIqr.;:0123-", max_size=40).map(str.encode))
def test_bytes_that_are_no_value_are_an_error_and_nothing_worse(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode(data)


# ---- programs --------------------------------------------------------------------------------------------


@each_sandbox
def test_a_right_program_passes(sandbox: Sandbox) -> None:
    program = "import math\r\ndef area(a, b):\r\n\treturn a * b"
    assert check(sandbox, program, ["assert area(2, 3) == 6", "assert area(1.5, 2) == 3.0"]) == PASSED
    assert check(sandbox, program, ["assert area(2, 3) == 6", "assert area(1, 1) == 2"]) == Verdict(
        False, "wrong answer in test 2"
    )


@pytest.mark.parametrize(
    ("program", "test", "setup"),
    [
        ("def f(x): return x / 3", "assert math.isclose(f(1), 0.3333, rel_tol=0.001)", ""),
        ("def f(x): return x + x", "assert set(f([1, 2])) == set([2, 1])", ""),
        ("def f(x): return None", "assert f(1) is None", ""),
        ("def f(x): return x % 2 == 0", "assert not f(1)\nassert f(2) == True", ""),
        ("def f(x): return map(str, x)", "assert list(f([1, 2])) == ['1', '2']", ""),
        ("def sum(a, b): return a - b", "assert sum(3, 1) == 2", ""),
        ("def f(x): return (x, 'é')", "assert f(1)[1] == 'é', 'a message'", ""),
        ("def f(x): return x\ndef g(x): return -x", "assert f(g(2)) == -2", ""),
        ("class Pair:\n def __init__(self, a): self.a = a\ndef f(p): return p.a", "assert f(Pair(7)) == 7", ""),
        ("class Node:\n def __init__(self, a): self.a = a\ndef f(n): return n.a + 1", "assert f(root) == 2", "root = Node(1)\nroot.a = 1"),
        ("def f(x): return x * 2", "assert close(f(2), 4)", "def close(a, b): return abs(a - b) < 1"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}", ""),
        ("kept = []\ndef f(x):\n    kept.append(x)\n    return kept", "assert f(1) == [1]\nassert f(2) == [1, 2]", ""),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\ndef f(x): return A(x).n", "assert f(1) == 1", ""),
        ("print('noise' * 999999)\ndef f(x): print(x); return input and x", "assert f(1) == 1", ""),
        ("def f(x): return x\nif __name__ == '__main__': f(int(input()))", "assert f(1) == 1", ""),
        ("def f(x): return 1 << 99999", "assert f(1) == 2 ** 99999", ""),
    ],
)  # fmt: skip
def test_every_form_of_test(sandbox: Sandbox, program: str, test: str, setup: str) -> None:
    assert check(sandbox, program, [test], setup) == PASSED


def test_a_map_is_no_list(sandbox: Sandbox) -> None:
    """As in a plain run of the test."""
    verdict = check(sandbox, "def f(x): return map(str, x)", ["assert f([1]) == ['1']"])
    assert verdict == Verdict(False, "wrong answer in test 1")


def test_the_program_is_never_given_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox, sent = any_sandbox(), []

    class Spy:
        name = sandbox.name

        def run(self, source: str, stdin: bytes = b"", limits: Limits = QUICK) -> Any:
            sent.append(stdin)
            return sandbox.run(source, stdin, limits)

    program = "def f(x): return x\ndef set(x): return 1"
    tests = [
        "assert f(1) == 424242",
        "assert set(f(2)) == set([535353])",
        "assert isinstance(f(3), (int, 646464))",
    ]
    assert not check(Spy(), program, tests, "limit = 757575").passed
    assert decode(sent[0]) == [program, "limit = 757575", ["f(1)", "f(2)", "f(3)"], 1 << 19]
    assert b"def f" in sent[0]
    assert b"def f" not in sent[1]
    assert b"424242" in sent[1]


@pytest.mark.parametrize("fake", FAKES, ids=lambda fake: fake.name)
@each_sandbox
def test_no_fake_passes(sandbox: Sandbox, fake: Fake) -> None:
    verdict = check(sandbox, fake.program, [fake.test], limits=QUICK)
    assert not verdict.passed
    assert verdict.reason.startswith(fake.reason)


@pytest.mark.parametrize("fake", [fake for fake in FAKES if fake.fools], ids=lambda fake: fake.name)
def test_a_plain_run_of_the_test_is_fooled(fake: Fake) -> None:
    """The control: the process that runs program and test together ends as if all were well."""
    program = f"import sys\nfrom math import *\n{fake.program}\n{fake.test}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_only_the_function_under_test_is_left_to_the_program(sandbox: Sandbox) -> None:
    program = "def f(x): return 0\ndef Right(x): return 0"
    verdict = check(sandbox, program, ["assert f(1) == Right(1)"])
    assert verdict == Verdict(False, "wrong answer in test 1: NameError: name 'Right' is not defined")


def test_a_test_without_a_call_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(
        EvaluationError, match=r"^the test 'assert 1 == 1' calls no function whose value could be"
    ):
        check(sandbox, "", ["assert 1 == 1"])
    with pytest.raises(EvaluationError, match=r"^the test 'assert f\(' is no Python: "):
        check(sandbox, "", ["assert f("])


def test_a_broken_sandbox_is_no_wrong_answer() -> None:
    class Broken:
        name = "broken"

        def run(self, source: str, stdin: bytes = b"", limits: Limits = QUICK) -> Any:
            raise EvaluationError("the sandbox broken cannot be started: no")

    with pytest.raises(EvaluationError, match="cannot be started"):
        check(Broken(), "def f(x): return 1", ["assert f(1) == 1"])


# ---- batches ---------------------------------------------------------------------------------------------


@each_sandbox
def test_a_batch_of_functions(sandbox: Sandbox) -> None:
    functions = [(f"def calc(x):\n    return x * {n} - 4\n", "calc") for n in range(40)]
    assert calls(sandbox, functions, [1, 2, 30]) == [[n - 4, 2 * n - 4, 30 * n - 4] for n in range(40)]
    assert calls(sandbox, [], [1]) == []
    assert calls(sandbox, functions[:1], []) == [[]]


@each_sandbox
def test_what_fails_in_a_batch_fails_alone(sandbox: Sandbox) -> None:
    bad = {
        "no python": "def f(x) return x",
        "no such name": "def g(x): return x",
        "ends": "import os\nos._exit(0)",
        "crashes": "import ctypes\nctypes.string_at(0)",
        "loops": "while True: pass",
        "sleeps": "import time\ntime.sleep(99)",
        "forks": "import os\nos.fork()\ndef f(x): return x",
        "kills": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return x",
        "stops its alarm": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ndef f(x): return x",
        "floods": "import os\nwhile True:\n  for number in range(64):\n    try: os.write(number, b'x' * 4096)\n    except OSError: pass",
        "too large": "def f(x): return [x] * 10**6",
        "an object": "def f(x): return f",
        "garbage": "import os\nfor number in range(64):\n    try: os.write(number, b'garbage')\n    except OSError: pass\nos._exit(0)",
        "closes all": "import os\nos.closerange(0, 64)\ndef f(x): return x",
    }
    functions = [
        pair for source in bad.values() for pair in ((source, "f"), ("def f(x): return 1 / (x - 1)", "f"))
    ]
    answers = calls(sandbox, functions, [1, 2], Limits(seconds=0.4, processes=64))
    assert dict(zip(bad, answers[::2])) == {name: [None, None] for name in bad}
    assert answers[1::2] == [[None, 1.0]] * len(bad)


@each_sandbox
def test_functions_of_a_batch_do_not_meet(sandbox: Sandbox) -> None:
    """Each runs as if it were the first: nothing that one changes is seen by the next."""
    source = "import builtins, math\nold = getattr(builtins, 'mark', 0)\nbuiltins.mark = 1\nbuiltins.abs = math.pi\ndef f(x): return old"
    assert calls(sandbox, [(source, "f")] * 3, [1]) == [[0]] * 3


def test_a_batch_that_cannot_run_is_told(sandbox: Sandbox) -> None:
    class Ending:
        name = "ending"

        def run(self, source: str, stdin: bytes = b"", limits: Limits = QUICK) -> Any:
            return sandbox.run("import sys; sys.exit('out of processes')", stdin, limits)

    message = "^the sandbox ending did not run a batch to its end: out of processes$"
    with pytest.raises(EvaluationError, match=message):
        calls(Ending(), [("def f(x): return x", "f")], [1])
