"""strace as witness and as saboteur."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crash.scene import run

# Whatever changes the disk, and openat.
CALLS = (
    *(
        "openat",
        "write",
        "pwrite64",
        "ftruncate",
        "fallocate",
        "fsync",
        "mkdir",
        "rmdir",
        "unlink",
        "unlinkat",
    ),
    *("rename", "renameat", "renameat2"),
)
_LINE = re.compile(r"(?P<thread>\d+) +(?P<call>\w+)\((?P<rest>.*)")


@dataclass(frozen=True)
class Call:
    """The ``number``-th (from 1) call of its name in its thread; ``text`` is what strace shows of it."""

    name: str
    number: int
    text: str


def strace() -> str:
    """Where strace is; it ends the program where there is none."""
    path = shutil.which("strace")
    if path is None:
        raise SystemExit("strace is needed: apt-get install strace, dnf install strace ...")
    return path


def record(command: Sequence[str], log: Path) -> list[Call]:
    """Every call of the main thread of an undisturbed run, in order."""
    options = ["-f", "-y", "-qq", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}", "-o", str(log)]
    done = run([strace(), *options, *command])
    assert done.returncode == 0, done.stderr
    counts: Counter[str] = Counter()
    calls: list[Call] = []
    main = ""
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match and match["call"] in CALLS:
            main = main or match["thread"]
            if match["thread"] == main:
                counts[match["call"]] += 1
                calls.append(Call(match["call"], counts[match["call"]], match["rest"]))
    return calls


def sabotaged(command: Sequence[str], call: Call, effect: str) -> list[str]:
    """``command`` with ``effect`` ("signal=SIGKILL", "error=EIO") at one call."""
    inject = f"inject={call.name}:{effect}:when={call.number}"  # with --seccomp-bpf no signal is sent
    options = ["-f", "-qq", "-e", f"trace={call.name}", "-e", inject, "-o", "/dev/null"]
    return [strace(), *options, *command]


def not_synced(calls: Sequence[Call], place: Path) -> list[str]:
    """What was renamed into place before it was safe on the disk: files and their folder, then its parent."""
    renamed = next(i for i, call in enumerate(calls) if call.name.startswith("rename"))
    written = {
        match[1]
        for call in calls[:renamed]
        if call.name in ("write", "pwrite64") and (match := re.match(r"\d+<([^>]*)>", call.text))
        if "/model/" in match[1] and match[1].startswith(str(place))
    }
    synced = [
        (i, match[1])
        for i, call in enumerate(calls)
        if call.name == "fsync" and (match := re.match(r"\d+<([^>]*)>", call.text))
    ]
    before = {path for i, path in synced if i < renamed}
    after = {path for i, path in synced if i > renamed}
    folder = {str(Path(path).parent) for path in written}
    wanted = written | folder
    return sorted(wanted - before) + ([] if str(place) in after else [f"{place} (after the rename)"])
