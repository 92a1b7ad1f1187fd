"""Hash many stretches of bytes in several threads, hold each against what it was, and tell how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from della.checkpoint.view import PIECE_BYTES
from della.errors import CheckpointError, DellaError, Problem
from della.running.run import Progress
from della.running.workers import Stopped, each


@dataclass(frozen=True)
class Check:
    """Bytes and the hash (xxh3_128, hex) that they should have.

    ``subject`` is the file (or model) and ``tensor`` the tensor in it, None for all of a file; ``fault`` says
    what it means if the hash is another.
    """

    subject: str
    tensor: str | None
    fault: str
    nbytes: int
    hash: str
    pieces: Callable[[], Iterator[memoryview]]

    def problem(self, said: str) -> Problem:
        """That the bytes ``said``, such as "has changed"."""
        what = f"tensor {self.tensor!r} " if self.tensor is not None else ""
        return Problem(what + said, subject=self.subject, tensor=self.tensor)


class Hashing:
    """Runs checks in ``threads`` threads; setting ``stop`` ends them after their current piece."""

    def __init__(self, threads: int, progress: Callable[[Progress], None] | None) -> None:
        self.threads, self.progress = threads, progress
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._done = self._total = self._finished = self._count = 0

    def faults(self, checks: Sequence[Check]) -> list[Problem]:
        """What is wrong, in the order of ``checks``; progress begins anew with each call."""
        self._done, self._total = 0, sum(check.nbytes for check in checks)
        self._finished, self._count = 0, len(checks)
        # The largest go first, so that no thread ends much later.
        order = sorted(range(len(checks)), key=lambda number: -checks[number].nbytes)
        said = each(self._fault, [checks[number] for number in order], self.threads, stop=self.stop)
        found = dict(zip(order, said, strict=True))
        return [problem for number in range(len(checks)) if (problem := found[number])]

    def _fault(self, check: Check) -> Problem | None:
        digest, left, found = xxhash.xxh3_128(), check.nbytes, None
        try:
            for piece in check.pieces():
                if self.stop.is_set():
                    raise Stopped
                digest.update(piece)
                left -= piece.nbytes
                self._advance(check, piece.nbytes)
            if digest.hexdigest() != check.hash:
                found = check.problem(check.fault)
        except DellaError as error:
            what = f"tensor {check.tensor!r} of {check.subject}" if check.tensor else check.subject
            found = replace(error.problems[0], said=f"{error.problems[0].said}, so {what} cannot be checked")
        self._advance(check, left, finished=1)
        return found

    def _advance(self, check: Check, count: int, finished: int = 0) -> None:
        with self._lock:
            self._done += count
            self._finished += finished
            if self.progress is not None:
                name = Path(check.subject).name if check.tensor is None else check.tensor
                self.progress(Progress(self._done, self._total, self._finished, self._count, name))


def of_file(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """``nbytes`` bytes of a file, in pieces whose buffer is reused.

    Raises CheckpointError.
    """
    buffer = memoryview(bytearray(min(PIECE_BYTES, nbytes)))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while nbytes:
                count = file.readinto(buffer[:nbytes])
                if not count:
                    raise CheckpointError(Problem("ends too early", "is something writing to it?", str(path)))
                yield buffer[:count]
                nbytes -= count
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be read ({error.strerror})", subject=str(path))) from error
