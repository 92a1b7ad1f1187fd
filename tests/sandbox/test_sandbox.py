"""What the sandbox for generated code promises to those who run programs in it."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sandboxes import OPENED, any_sandbox, each_sandbox, sandbox_named

from della.errors import EvaluationError
from della.sandbox import process, seccomp
from della.sandbox import walls as module
from della.sandbox.walls import INSTALL, Limits, Sandbox, open_sandbox

LIBRARY = (
    "abc, array, ast, base64, bisect, calendar, cmath, collections, copy, csv, dataclasses, datetime, "
    "decimal, enum, fractions, functools, hashlib, heapq, io, itertools, json, math, operator, queue, "
    "random, re, statistics, string, struct, sys, textwrap, threading, time, typing, unicodedata, zlib, "
    "zoneinfo"
)


@each_sandbox
def test_a_program_reads_stdin_and_writes(sandbox: Sandbox) -> None:
    source = (
        "import sys\ntext = sys.stdin.read()\nprint(text.upper())\nprint('so', file=sys.stderr)\nsys.exit(3)"
    )
    outcome = sandbox.run(source, "à la carte".encode())
    assert (outcome.ended, outcome.code) == ("exited", 3)
    assert (outcome.stdout, outcome.stderr) == ("À LA CARTE\n".encode(), "so\n")
    assert 0 < outcome.seconds < 10


@each_sandbox
def test_time_counts_from_the_first_line(sandbox: Sandbox) -> None:
    """Not from the start of the interpreter, which takes long on a busy machine."""
    assert sandbox.run("pass", limits=Limits(seconds=0.02)).ended == "exited"


def test_a_sandbox_that_breaks_later_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no wrong answer of a program that was never run."""
    sandbox = any_sandbox()
    monkeypatch.setattr(module, "_interpreter", lambda: shutil.which("false"))
    with pytest.raises(EvaluationError, match=f"^the sandbox {sandbox.name} did not begin: it ended with 1$"):
        sandbox.run("pass")
    monkeypatch.setattr(module, "_interpreter", lambda: shutil.which("sleep"))
    monkeypatch.setattr(module, "_START", "60")
    monkeypatch.setattr(process, "MOST_SECONDS_TO_BEGIN", 0.3)
    with pytest.raises(EvaluationError, match=f"^the sandbox {sandbox.name} did not begin: "):
        sandbox.run("pass")


@each_sandbox
def test_large_input_and_output_pass(sandbox: Sandbox) -> None:
    data = os.urandom(3 << 20)
    source = f"pad = '{'x' * 300_000}'\nimport sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert sandbox.run(source, data, Limits(output=4 << 20)).stdout == data


@each_sandbox
def test_input_that_nobody_reads_is_no_error(sandbox: Sandbox) -> None:
    outcome = sandbox.run("print('done')", bytes(8 << 20))
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exited", 0, b"done\n")


@each_sandbox
def test_the_standard_library_is_at_hand(sandbox: Sandbox) -> None:
    outcome = sandbox.run(f"import {LIBRARY}\nprint(math.isqrt(17), hashlib.sha256(b'').hexdigest()[:4])")
    assert outcome.stderr == ""
    assert outcome.stdout == b"4 e3b0\n"


@each_sandbox
def test_nothing_else_is_at_hand(sandbox: Sandbox) -> None:
    source = "import os, sys\nprint(dict(os.environ), 'della' in sys.modules, os.getcwd())\nimport numpy"
    outcome = sandbox.run(source)
    cwd = {"bubblewrap": "/scratch", "landlock": "/"}[sandbox.name]
    assert outcome.stdout.decode() == f"{{}} False {cwd}\n"
    assert outcome.stderr.endswith("ModuleNotFoundError: No module named 'numpy'\n")


@each_sandbox
def test_the_environment_is_not_handed_over(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to what runs before the program, whose memory it could read."""
    monkeypatch.setenv("API_KEY", "secret")
    memory = (304 << 20) + 4096
    limits = Limits(seconds=20, memory=memory, output=8)
    thread = threading.Thread(target=sandbox.run, args=("import time; time.sleep(0.5)", b"", limits))
    thread.start()
    while not (found := limited_to(memory)):
        assert thread.is_alive()
        time.sleep(0.01)
    environment = Path(found[0]).with_name("environ").read_bytes().split(b"\0")
    thread.join()
    assert {*environment} - {b"PWD=/scratch", b""} == {b"PYTHONHASHSEED=0"}, "PWD is bubblewrap's own"


@each_sandbox
def test_sets_of_texts_have_one_order(sandbox: Sandbox) -> None:
    source = "print(*{str(n) for n in range(99)})"
    assert sandbox.run(source).stdout == sandbox.run(source).stdout


@each_sandbox
def test_scratch(sandbox: Sandbox) -> None:
    source = "import os\nprint(os.listdir('.'))\nopen('x', 'w').write('kept')\nprint(open('x').read())"
    if sandbox.name == "bubblewrap":
        assert [sandbox.run(source).stdout for _ in range(2)] == [b"[]\nkept\n"] * 2
        over = sandbox.run(
            "for n in range(9): open(str(n), 'wb').write(bytes(1 << 19))", limits=Limits(disk=1 << 20)
        )
        assert "OSError: [Errno 28] No space left on device" in over.stderr
    else:
        outcome = sandbox.run("open('x', 'w')")
        assert outcome.stderr.endswith("OSError: [Errno 30] Read-only file system: 'x'\n")


@each_sandbox
def test_memory_ends(sandbox: Sandbox) -> None:
    source = "try: bytearray(200 << 20)\nexcept MemoryError: print('no')"
    assert sandbox.run(source, limits=Limits(memory=150 << 20)).stdout == b"no\n"
    assert sandbox.run(source, limits=Limits(memory=400 << 20)).stdout == b""


@each_sandbox
def test_time_ends(sandbox: Sandbox) -> None:
    begun = time.monotonic()
    outcome = sandbox.run("print('begun', flush=True)\nwhile True: pass", limits=Limits(seconds=1.5))
    assert outcome.ended == "timeout"
    assert outcome.stdout == b"begun\n"
    assert 1.5 <= outcome.seconds <= time.monotonic() - begun < 3


@each_sandbox
def test_cpu_time_ends_by_itself(sandbox: Sandbox) -> None:
    """Should the parent fail to: the kernel's own limit, a second later."""
    source = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))"
    assert sandbox.run(source, limits=Limits(seconds=2.5)).stdout == b"(3, 3)\n"


@each_sandbox
@pytest.mark.parametrize("stream", [1, 2])
def test_output_ends(sandbox: Sandbox, stream: int) -> None:
    source = f"import os\nwhile True: os.write({stream}, b'y' * 1000)"
    outcome = sandbox.run(source, limits=Limits(output=12_345))
    assert (outcome.ended, outcome.code) == ("signal", 9)
    assert (len(outcome.stdout), len(outcome.stderr)) == ((12_345, 0) if stream == 1 else (0, 12_345))


@each_sandbox
def test_what_was_written_last_is_read(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import os\nos.write(1, b'z' * 60_000)\nos.write(2, b'e' * 60_000)\nos._exit(7)")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (7, b"z" * 60_000, "e" * 60_000)


@each_sandbox
def test_a_signal_is_told(sandbox: Sandbox) -> None:
    outcome = sandbox.run("import ctypes; ctypes.string_at(0)")
    assert (outcome.ended, outcome.code) == ("signal", 11)


@each_sandbox
def test_processes_of_a_trusted_program_end_with_it(sandbox: Sandbox) -> None:
    """One that continues in the background, holding the output open, keeps nobody waiting."""
    source = "import os, time\nif os.fork() == 0:\n    while True: time.sleep(1)\nprint('over', flush=True)"
    outcome = sandbox.run(source, limits=Limits(processes=1, memory=(301 << 20) + 4096))
    assert (outcome.ended, outcome.code, outcome.stdout) == ("exited", 0, b"over\n")
    assert outcome.seconds < 5
    assert gone((301 << 20) + 4096)


@each_sandbox
def test_processes_are_counted(sandbox: Sandbox) -> None:
    if sandbox.name == "bubblewrap" and os.geteuid() == 0:
        pytest.skip("the kernel does not count the processes of root")
    source = """
import os, time
made = 0
try:
    while made < 50:
        if os.fork() == 0: time.sleep(9)
        made += 1
except OSError: print(made)
"""
    made = int(sandbox.run(source, limits=Limits(processes=5)).stdout)
    assert made == 5 if os.geteuid() == 0 else 1 <= made <= 9  # others of the same user come and go


@each_sandbox
def test_a_locked_child_starts_nothing_and_ends_on_time(sandbox: Sandbox) -> None:
    source = """
import os, signal, time
from della.sandbox.guard import lock_child
child = os.fork()
if child == 0:
    lock_child(0.3)
    for act in (os.fork, lambda: signal.signal(14, signal.SIG_IGN), lambda: signal.setitimer(0, 0),
                lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [14]), lambda: os.kill(os.getppid(), 9)):
        try: act()
        except OSError as error: print(error.errno, flush=True)
    while True: pass
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert sandbox.run(source, limits=Limits(processes=1)).stdout.split() == [b"1"] * 5 + [b"-14"]


@each_sandbox
def test_nothing_is_left_of_many_runs(sandbox: Sandbox) -> None:
    def state() -> tuple[int, list[str], int]:
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        return (
            len(os.listdir("/proc/self/fd")),
            children.read_text().split() if children.exists() else [],
            threading.active_count(),
        )

    before = state()
    for source in ("pass", "while True: pass", "while True: print('x' * 1000)", "import os; os.abort()"):
        sandbox.run(source, limits=Limits(seconds=0.4, output=1000))
    assert state() == before


@each_sandbox
def test_runs_in_threads_do_not_disturb_each_other(sandbox: Sandbox) -> None:
    said: dict[int, bytes] = {}

    def one(number: int) -> None:
        said[number] = sandbox.run(f"import time; time.sleep(0.05); print({number})").stdout

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: f"{number}\n".encode() for number in range(8)}


@each_sandbox
def test_an_interrupt_ends_the_program(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sandbox.run("print('begun', flush=True)\nwhile True: pass", limits=Limits(memory=(302 << 20) + 4096))
    assert gone((302 << 20) + 4096)


@each_sandbox
def test_a_program_ends_with_its_parent(sandbox: Sandbox) -> None:
    memory = (303 << 20) + 4096
    program = f"""
from della.sandbox.walls import Limits, open_sandbox
open_sandbox({sandbox.name!r}).run("while True: pass", limits=Limits(seconds=60, memory={memory}))
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 20
    while not limited_to(memory):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert gone(memory)


def limited_to(memory: int) -> list[str]:
    """The processes with this limit."""
    found = []
    for path in Path("/proc").glob("[0-9]*/limits"):
        try:
            found += [str(path)] * (f" {memory} " in path.read_text())
        except OSError:
            continue
    return found


def gone(memory: int) -> bool:
    """Is nobody left with this limit, within two seconds?"""
    for _ in range(100):
        if not limited_to(memory):
            return True
        time.sleep(0.02)
    return False


# ---- which sandbox ---------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused() -> None:
    message = "^sandbox 'docker': expected one of bubblewrap, landlock$"
    with pytest.raises(EvaluationError, match=message):
        open_sandbox("docker")


def test_bubblewrap_is_preferred() -> None:
    assert open_sandbox().name == any_sandbox().name


def fake_bwrap(folder: Path, script: str) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        (
            "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
            "the sandbox bubblewrap did not begin: bwrap: No permissions to create new namespace",
        ),
        (
            'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
            "the sandbox bubblewrap does not hold: it is not in a namespace of its own",
        ),
    ],
    ids=["refused", "no wall at all"],
)
def test_a_bubblewrap_that_does_not_work_is_not_taken(
    script: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_bwrap(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(EvaluationError) as caught:
        open_sandbox("bubblewrap")
    assert f"no sandbox for generated code works here ({fault})" in str(caught.value)
    if not isinstance(OPENED["landlock"], str):
        assert open_sandbox().name == "landlock"


def test_without_any_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "_PROBE", "import sys; sys.exit('the kernel has no Landlock')")
    with pytest.raises(EvaluationError) as caught:
        open_sandbox()
    assert str(caught.value) == (
        "no sandbox for generated code works here (the program bwrap is not installed; the sandbox landlock "
        f"does not hold: the kernel has no Landlock), and without one it is not run; {INSTALL}"
    )
    assert caught.value.exit_code == 6


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(EvaluationError, match=r"bubblewrap needs Linux on x86_64 or aarch64; landlock needs"):
        open_sandbox()


def test_where_namespaces_are_forbidden_landlock_stands_in() -> None:
    """Really forbidden, by the kernel: in a user namespace that may have none below it."""
    sandbox_named("landlock")
    if not shutil.which("unshare"):
        pytest.skip("needs unshare of util-linux")
    program = "from della.sandbox.walls import open_sandbox as o; print(o().name, o().run('print(1)').code)"
    script = 'echo 0 > /proc/sys/user/max_user_namespaces || exit 9; exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0 and run.stderr.startswith("unshare:"):
        pytest.skip(run.stderr)
    assert run.stdout == "landlock 0\n", run.stderr


def test_the_filters_name_every_call_once() -> None:
    for column in (0, 1):
        tables = [seccomp._ALWAYS, seccomp._WRITING, seccomp._FORKING]
        numbers = [
            numbers[column] for table in tables for numbers in table.values() if numbers[column] is not None
        ]
        assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_is_whole(machine: str) -> None:
    for program in (seccomp.filter_of(machine, writing=True, forking=True), seccomp.child_filter(machine)):
        assert len(program) % 8 == 0
        assert len(program) // 8 <= 4096
        assert program[-8] == 0x06, "it ends in a return"


def test_a_kernel_without_a_descriptor_for_processes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert any_sandbox().run("print(1)").stdout == b"1\n", "by the system call"

    class Library:
        def syscall(self, *_: int) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library())
    with pytest.raises(EvaluationError, match=r"needs Linux 5\.3 or newer"):
        process._descriptor_of(os.getpid())
