"""What the attempts of attacks/escapes.py must not reach, and a look from outside at whether they did.

python -m attacks.world NAME     tries them all on the sandbox NAME, and prints what got out
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from attacks.escapes import ESCAPES, PRELUDE, Escape
from della.sandbox.walls import Limits, Outcome, Sandbox, open_sandbox

VICTIM = "as it was"


class World:
    """A folder with a secret and a victim, an inherited descriptor, a variable, and four who listen.

    A context manager; `faults` says what has come of all that.
    """

    def __init__(self) -> None:
        self.mark = f"della-{secrets.token_hex(8)}"
        self.token = secrets.token_hex(16)
        # memory that nobody else is limited to: so what is left of a program is found
        self.limits = Limits(
            seconds=4.0, memory=(256 << 20) + secrets.randbelow(1 << 10) * 4096, disk=4 << 20
        )
        self.signals: list[int] = []

    def __enter__(self) -> World:
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix=self.mark)))
        self.secret, self.victim = self.folder / "secret", self.folder / "victim"
        self.secret.write_text(self.token)
        self.victim.write_text(VICTIM)
        os.chmod(self.victim, 0o640)
        (self.folder / "cwd").mkdir()
        fd = os.open(self.secret, os.O_RDWR)
        self.stack.callback(os.close, fd)
        os.set_inheritable(fd, True)
        os.environ["DELLA_TEST_SECRET"] = self.token
        self.stack.callback(os.environ.pop, "DELLA_TEST_SECRET")
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGIO):
            self.stack.callback(signal.signal, number, signal.signal(number, self._signalled))
        self.listeners = {name: self._listen(*what) for name, what in self._addresses().items()}
        self.before = self._files()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _addresses(self) -> dict[str, tuple[int, int, object]]:
        return {
            "tcp": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "udp": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "unix": (socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
            "abstract": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.mark}"),
        }

    def _listen(self, family: int, kind: int, address: object) -> socket.socket:
        listener = self.stack.enter_context(socket.socket(family, kind))
        listener.bind(address)  # type: ignore[arg-type]
        if kind == socket.SOCK_STREAM:
            listener.listen()
        return listener

    def _signalled(self, number: int, frame: object) -> None:
        self.signals.append(number)

    @property
    def described(self) -> bytes:
        """For the attempts: the dictionary ``world``."""
        world = {
            "folder": str(self.folder),
            "secret": str(self.secret),
            "victim": str(self.victim),
            "home": os.path.expanduser("~"),
            "python": os.path.realpath(sys.executable),
            "parent": os.getpid(),
            "variable": "DELLA_TEST_SECRET",
            "mark": self.mark,
            "tcp": self.listeners["tcp"].getsockname()[1],
            "udp": self.listeners["udp"].getsockname()[1],
            "unix": str(self.folder / "socket"),
            "key": int(self.mark[-7:], 16),
            "memory": 1 << 30,
            "disk": self.limits.disk,
            "files": self.limits.files,
        }
        return repr(world).encode()

    def attempt(self, escape: Escape, sandbox: Sandbox) -> Outcome:
        if escape.ended in ("timeout", "any"):
            self.limits = replace(self.limits, seconds=0.5)
        return sandbox.run(PRELUDE + escape.source, self.described, self.limits)

    def unsandboxed(self, escape: Escape) -> Outcome:
        """The control: the same program as a plain process."""
        command = [sys.executable, "-c", PRELUDE + escape.source]
        cwd = self.folder / "cwd"
        run = subprocess.run(
            command, input=self.described, capture_output=True, cwd=cwd, close_fds=False, check=False
        )
        return Outcome("exited", run.returncode, run.stdout, run.stderr.decode(errors="replace"), 0.0)

    def faults(self, escape: Escape, outcome: Outcome) -> list[str]:
        """How an attempt ended if not as it must, what it says, and its `harm`; empty if it was held."""
        found = []
        if escape.ended not in ("any", outcome.ended):
            found.append(f"it ended by {outcome.ended} {outcome.code}: {outcome.stderr[-300:]}")
        said = outcome.stdout.decode(errors="replace") + outcome.stderr
        return found + [line for line in said.splitlines() if "ESCAPED" in line] + self.harm(outcome)

    def harm(self, outcome: Outcome) -> list[str]:
        """What an attempt has read, changed, reached or left behind, seen from outside."""
        said = outcome.stdout + outcome.stderr.encode()
        found = ["the secret is known"] * (self.token.encode() in said)
        found += ["files changed"] * (self._files() != self.before)
        ready = select.select(list(self.listeners.values()), [], [], 0)[0]
        found += [f"{name} was reached" for name, listener in self.listeners.items() if listener in ready]
        found += [f"signal {number}" for number in self.signals]
        found += [f"{path} is left" for path in self._left_files()]
        found += [f"{name} is left" for name in ("shm", "sem", "msg") if self._has_key(name)]
        found += [f"process {pid} is left" for pid in self._left_processes()]
        found += ["it took too long"] * (outcome.seconds > self.limits.seconds + 1.5)
        most = self.limits.output
        found += ["it wrote too much"] * (len(outcome.stdout) > most or len(outcome.stderr) > most)
        return found

    def _files(self) -> list[object]:
        """All that there is to know about the folder's files, but times of access."""
        found: list[object] = []
        for path in sorted(self.folder.rglob("*")):
            what = path.lstat()
            content = path.read_text() if path.is_file() else ""
            found.append(
                (
                    str(path),
                    content,
                    what.st_mode,
                    what.st_uid,
                    what.st_nlink,
                    what.st_mtime_ns,
                    os.listxattr(path),
                )
            )
        return found

    def _left_files(self) -> list[str]:
        folders = [
            "/tmp",
            "/var/tmp",
            "/dev/shm",
            "/dev",
            "/",
            "/run",
            "/scratch",
            os.getcwd(),
            os.path.expanduser("~"),
        ]
        return [
            f"{folder}/{name}"
            for folder in dict.fromkeys(folders)
            if os.access(folder, os.R_OK)
            for name in os.listdir(folder)
            if name.startswith(self.mark) and f"{folder}/{name}" != str(self.folder)
        ]

    def _has_key(self, kind: str) -> bool:
        try:
            lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
        except OSError:
            return False
        return str(int(self.mark[-7:], 16)) in {line.split()[0] for line in lines}

    def _left_processes(self) -> list[int]:
        """Who still lives under the limits of an attempt; who was killed may need a moment."""
        for _ in range(100):
            found = []
            for path in Path("/proc").glob("[0-9]*/limits"):
                with contextlib.suppress(OSError):
                    if f" {self.limits.memory} " in path.read_text():
                        found.append(int(path.parent.name))
            if not found:
                break
            time.sleep(0.02)
        return found


def main() -> None:
    """Prints as JSON how many attempts there were, not counting those that wait, and what got out."""
    sandbox, out, count = open_sandbox(sys.argv[1]), {}, 0
    for escape in ESCAPES:
        if escape.ended in ("timeout", "any"):
            continue
        count += 1
        with World() as world:
            faults = world.faults(escape, world.attempt(escape, sandbox))
        if faults:
            out[escape.name] = faults
    print(json.dumps({"attempts": count, "uid": os.getuid(), "out": out}))


if __name__ == "__main__":
    main()
