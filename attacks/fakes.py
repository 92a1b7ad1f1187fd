"""Programs that want to pass without being right: what they are scored by, and why none may.

The test is always the same, about a function that no program here computes.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER = 918273645
TEST = f"assert secret(1) == {ANSWER}"
SET_TEST = f"assert set(secret(1)) == set([{ANSWER}])"


@dataclass(frozen=True)
class Fake:
    """``reason``: what the verdict's reason begins with.  ``fools``: a plain run of the test calls it right."""

    name: str
    program: str
    reason: str
    test: str = TEST
    fools: bool = False


# The answer is not in it: known is only what it leaves when divided.
_SEARCH = f"""
import gc, re, sys
def is_it(number): return number % 1000003 == {ANSWER % 1000003} and number % 999983 == {ANSWER % 999983}
def secret(n):
    seen, heap = set(), [*gc.get_objects(), *sys.modules.values()]
    frame = sys._getframe(1)
    while frame:
        heap += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
        frame = frame.f_back
    while heap and len(seen) < 300000:
        thing = heap.pop()
        if id(thing) in seen: continue
        seen.add(id(thing))
        numbers = [thing] if type(thing) is int else []
        if type(thing) in (str, bytes):
            numbers = [int(text) for text in re.findall('[0-9]{{9}}', str(thing))]
        for number in numbers:
            if is_it(number): return number
        heap += gc.get_referents(thing)
"""
# Replies as the sandbox would send them, written to every descriptor there is.
_REPLY = "import os\nfor fd in range(64):\n    try: os.write(fd, {0})\n    except OSError: pass\nos._exit(0)"

FAKES = [
    Fake("exit-at-once", "import os; os._exit(0)", "no answer: the program ended with exit code 0", fools=True),
    Fake("exit-in-the-call", "import os\ndef secret(n): os._exit(0)", "no answer: the program ended with exit code 0", fools=True),
    Fake("system-exit", "import sys\ndef secret(n): sys.exit(0)", "SystemExit: 0", fools=True),
    Fake("system-exit-at-once", "raise SystemExit", "SystemExit"),
    Fake("exec", "import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
    Fake("equal-to-all", "class All:\n    def __eq__(self, other): return True\ndef secret(n): return All()",
         "the value cannot leave the sandbox: an object of type All", fools=True),
    Fake("number-equal-to-all", "class All(int):\n    def __eq__(self, other): return True\ndef secret(n): return All(1)",
         "wrong answer in test 1", fools=True),
    Fake("list-equal-to-all", "class All(list):\n    def __eq__(self, other): return True\ndef secret(n): return All()",
         "wrong answer in test 1", fools=True),
    Fake("items-of-its-own", "class All(list):\n    def __iter__(self): return iter([1])\n    __eq__ = lambda *a: True\ndef secret(n): return All([2])",
         "wrong answer in test 1", fools=True),
    Fake("mock", "from unittest.mock import MagicMock\nsecret = MagicMock()\nsecret.return_value.__eq__ = lambda *a: True",
         "wrong answer in test 1", fools=True),
    Fake("lies-about-its-class", "class Lie:\n    __class__ = int\n    def __eq__(self, other): return True\ndef secret(n): return Lie()",
         "TypeError", fools=True),
    Fake("own-set", "def set(items): return 1\ndef secret(n): return []", "wrong answer in test 1", SET_TEST, fools=True),
    Fake("patched-builtins", "import builtins\nbuiltins.set = lambda items: 1\ndef secret(n): return []",
         "wrong answer in test 1", SET_TEST, fools=True),
    Fake("patched-assert", "import builtins\nclass Never(Exception): pass\nbuiltins.AssertionError = Never\ndef secret(n): return 0",
         "wrong answer in test 1"),
    Fake("patched-int", "import builtins\nbuiltins.int = builtins.str = lambda *a: 0\ndef secret(n): return 0", "TypeError: isinstance()"),
    Fake("prints-a-verdict", "print('+', flush=True); print('passed', flush=True)\ndef secret(n): print('+'); return 0", "wrong answer in test 1"),
    Fake("writes-a-verdict", _REPLY.format("b'+'"), "no answer"),
    Fake("writes-an-answer", _REPLY.format(r"b'+\0\0\0\1T'"), "wrong answer in test 1"),
    Fake("writes-nonsense", _REPLY.format(r"b'+\0\0\0\3abc'"), "wrong answer in test 1: ValueError: the value ends too early"),
    Fake("writes-a-long-length", _REPLY.format(r"b'+\xff\xff\xff\xffT'"), "no answer"),
    Fake("writes-too-many", _REPLY.format(r"b'+\0\0\0\1T\0\0\0\1T'"), "no answer"),
    Fake("writes-a-deep-value", _REPLY.format(r"b'+\0\0\x03\xe8' + b'l' * 500 + b'.' * 500"), "wrong answer in test 1: ValueError: nested too deeply"),
    Fake("writes-a-wrong-set", _REPLY.format(r"b'+\0\0\0\4Sl..'"), "wrong answer in test 1: ValueError: no value: unhashable type: 'list'"),
    Fake("writes-colliding-hashes", "items = b''.join(b'i%x;' % (k * (2**61 - 1)) for k in range(44000))\ndata = b'S' + items + b'.'\nreply = b'+' + len(data).to_bytes(4, 'big') + data\n"
         + _REPLY.format("reply"), "wrong answer: the comparison ended with a timeout"),
    Fake("searches-memory", _SEARCH, "wrong answer in test 1", fools=True),
    Fake("reads-its-input-again", "import os\ndef secret(n):\n    try: os.lseek(0, 0, 0)\n    except OSError: pass\n    return int(os.read(0, 1000) or 0)", "wrong answer in test 1"),
    Fake("changes-the-harness", "import sys\nharness = sys.modules['della.sandbox.harness']\nharness._end = lambda out, data: (harness._write(out, b'+'), harness.os._exit(0))\ndef secret(n): return 0",
         "no answer"),
    Fake("changes-the-encoding", "import sys\nsys.modules['della.sandbox.harness'].encode = lambda *a: b'T'\ndef secret(n): return 0", "wrong answer in test 1"),
    Fake("at-exit", "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.excepthook = lambda *a: os._exit(0)\ndef secret(n): return 0", "wrong answer in test 1", fools=True),
    Fake("endless-answer", "import itertools\ndef secret(n): return itertools.count()", "the value cannot leave the sandbox: too large"),
    Fake("huge-number", "def secret(n): return 1 << 10**8", "the value cannot leave the sandbox: too large"),
    Fake("huge-text", "def secret(n): return 'x' * 10**7", "the value cannot leave the sandbox: too large"),
    Fake("circle", "def secret(n):\n    a = []\n    a.append(a)\n    return a", "the value cannot leave the sandbox: nested too deeply"),
    Fake("deep-recursion", "def secret(n): return secret(n + 1)", "RecursionError: maximum recursion depth exceeded"),
    Fake("crash", "import ctypes\ndef secret(n): return ctypes.string_at(0)", "no answer: the program ended with signal 11"),
    Fake("not-a-number", "def secret(n): return float('nan')", "wrong answer in test 1"),
    Fake("odd-text", "def secret(n): return '\\ud800\\0'", "wrong answer in test 1"),
    Fake("odd-error", "class E(Exception):\n    def __str__(self): raise self\ndef secret(n): raise E", "an error that cannot be shown"),
    Fake("error-like-a-verdict", "def secret(n): raise ValueError('passed\\n+')", "ValueError: passed"),
    Fake("closes-everything", "import os\nos.closerange(0, 64)\ndef secret(n): return 0", "no answer"),
    Fake("loop", "while True: pass", "timeout"),
    Fake("no-python", "def secret(n) return 1", "SyntaxError: "),
    Fake("null-bytes", "def secret(n): return 1\0", "SyntaxError: "),
    Fake("empty", "", "NameError: name 'secret' is not defined"),
    Fake("library-missing", "import numpy\ndef secret(n): return 1", "ModuleNotFoundError: No module named 'numpy'"),
]  # fmt: skip
