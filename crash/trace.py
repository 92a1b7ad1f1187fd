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

    def puts(self, site: Path) -> bool:
        """Whether it renames something to OUT, or OUT away; results of other documents are no OUT."""
        return self.name.startswith("rename") and f"{site}/out" in self.text


def strace() -> str:
    """Where strace is; it ends the program where there is none."""
    path = shutil.which("strace")
    if path is None:
        raise SystemExit("strace is needed: apt-get install strace, dnf install strace ...")
    return path


def record(command: Sequence[str], log: Path, swaps: bool) -> list[Call]:
    """Every call of the main thread of an undisturbed run, in order."""
    options = ["-f", "-y", "-qq", "-e", "signal=none", "-e", f"trace={','.join(CALLS)}", "-o", str(log)]
    done = run([strace(), *options, *_without_exchange(swaps), *command])
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


def sabotaged(command: Sequence[str], call: Call, effect: str, swaps: bool = True) -> list[str]:
    """``command`` with ``effect`` ("signal=SIGKILL", "error=EIO") at one call."""
    inject = f"inject={call.name}:{effect}:when={call.number}"  # with --seccomp-bpf no signal is sent
    more = [] if call.name == "renameat2" else _without_exchange(swaps)
    traced = f"trace={call.name},renameat2" if more else f"trace={call.name}"
    return [strace(), "-f", "-qq", "-e", traced, "-e", inject, *more, "-o", "/dev/null", *command]


def _without_exchange(swaps: bool) -> list[str]:
    return [] if swaps else ["-e", "inject=renameat2:error=EINVAL"]


def not_synced(calls: Sequence[Call], site: Path) -> tuple[int, list[str]]:
    """How many files were written; and what was renamed to OUT (or, by a part, left) before it was safe
    on the disk: files and their folder, then the folder above.
    """
    renamed = next((i for i, call in enumerate(calls) if call.puts(site)), None)
    written: set[str] = set()
    synced: list[tuple[int, str]] = []
    for i, call in enumerate(calls):
        match = re.match(r"\d+<([^>]*)>", call.text)
        if match and call.name == "fsync":
            synced.append((i, match[1]))
        elif match and call.name in ("write", "pwrite64") and match[1].startswith(f"{site}/"):
            written |= {match[1]} if "/model/" in match[1] else set()
    last = len(calls) if renamed is None else renamed
    before = {path for i, path in synced if i < last}
    missing = sorted((written | {str(Path(path).parent) for path in written}) - before)
    if renamed is not None and str(site) not in {path for i, path in synced if i > renamed}:
        missing.append(f"{site} (after the rename)")
    return len(written), missing
