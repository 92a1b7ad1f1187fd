"""Runs inside the sandbox, behind the guard: runs generated functions and sends back what they return.

Whatever it sends may come from the generated code itself, which shares its process.  So it is given nothing
that would help to lie: no expected value, and no verdict to say.
"""

from __future__ import annotations

import gc
import os
import sys

from della.sandbox.guard import NULL, lock_child
from della.sandbox.values import CannotCrossError, decode, encode

TYPE_CHECKING = False  # typing takes longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

MOST_ANSWER = 1 << 14  # bytes of one function's values in a batch


def answers() -> None:
    """The values of the calls of one program.

    Reads [program, setup, [call, ...], most bytes of a value]; writes b"+" and for each value its length in 4
    bytes and its bytes, or b"-" and why there are none.
    """
    program, setup, calls, most = decode(_read_all())
    out = _leave_streams()
    try:
        names = _run(program)
        exec(compile(setup, "<setup>", "exec"), names)
        reply = b"+"
        for call in calls:
            value = encode(eval(compile(call, "<test>", "eval"), names), most)
            reply += len(value).to_bytes(4, "big") + value
    except BaseException as error:
        reply = b"-" + _reason(error)
    _end(out, reply)


def verdict() -> None:
    """Do the tests hold with these values?  No generated code is here.

    Reads [[setup statement, ...], [(test, {name: value as bytes}), ...]]; writes b"+", or b"-" and why not.
    """
    setup, tests = decode(_read_all())
    out = _leave_streams()
    names: dict[str, Any] = {}
    for statement in setup:
        try:
            exec(compile(statement, "<setup>", "exec"), names)
        except Exception:  # it needs the generated program; the program's own sandbox ran it
            continue
    reply = b"+"
    for number, (test, values) in enumerate(tests, 1):
        try:
            exec(
                compile(test, "<test>", "exec"),
                names | {name: decode(value) for name, value in values.items()},
            )
        except AssertionError:
            reply = b"-wrong answer in test %d" % number
        except BaseException as error:
            reply = b"-wrong answer in test %d: " % number + _reason(error)
        if reply != b"+":
            break
    _end(out, reply)


def batch() -> None:
    """The values of many functions of one argument, each run in a process of its own.

    Reads [[(source, name), ...], [input, ...], seconds for each function]; writes for each the length of its
    answer in 4 bytes and its answer: a list of encoded values, None where there is none.
    """
    functions, inputs, seconds = decode(_read_all())
    out = _leave_streams()
    import signal  # noqa: F401  -- here, once, and not in every child

    gc.freeze()
    for source, name in functions:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.closerange(3, writing)
            os.closerange(writing + 1, 256)
            lock_child(seconds)
            _end(writing, _values(source, name, inputs))
        os.close(writing)
        answer = b""
        while len(answer) <= MOST_ANSWER and (part := os.read(reading, MOST_ANSWER)):
            answer += part
        os.close(reading)
        os.waitpid(child, 0)
        answer = answer if len(answer) <= MOST_ANSWER else b""
        _write(out, len(answer).to_bytes(4, "big") + answer)
    os._exit(0)


def _values(source: str, name: str, inputs: list[Any]) -> bytes:
    values: list[bytes | None] = []
    try:
        function = _run(source)[name]
    except BaseException:
        return encode([None] * len(inputs))
    for value in inputs:
        try:
            values.append(encode(function(value), MOST_ANSWER))
        except BaseException:
            values.append(None)
    return encode(values)


def _run(program: str) -> dict[str, Any]:
    """Run ``program`` as a module, not as __main__, whose part may ask for input; its names."""
    module = sys.modules["program"] = type(sys)("program")
    exec(compile(program, "<program>", "exec"), module.__dict__)
    return module.__dict__


def _reason(error: BaseException) -> bytes:
    """An error as a short line; generated code may have made its class."""
    try:
        if isinstance(error, CannotCrossError):
            return f"the value cannot leave the sandbox: {error}".encode()
        text = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        return text.rstrip(": ").encode(errors="replace")
    except BaseException:
        return b"an error that cannot be shown"


def _read_all() -> bytes:
    parts = []
    while part := os.read(0, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _leave_streams() -> int:
    """A new number for standard output; what generated code reads and prints is nothing."""
    out = os.dup(1)
    for stream in (0, 1, 2):
        os.dup2(NULL, stream)
    return out


def _write(out: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def _end(out: int, data: bytes) -> None:
    """Write and leave at once: nothing registered for the end of the process runs."""
    try:
        _write(out, data)
    finally:
        os._exit(0)
