"""What models (and judges) have answered, on disk: one JSON line an answer, and none is asked for twice.

The first line says what all others depend on.  An answer is on the disk before its writer continues, so that
whatever ends an evaluation, the next one finds every answer that had come back.  A line that the end cut
short is dropped: its answer is asked for again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from della.errors import EvaluationError, Problem
from della.evaluate.options import opt
from della.evaluate.problems import parsed
from della.output import disk

FORMAT = 1
Record = dict[str, Any]


class Store:
    """The answers in one file, by id; several threads may add to it.

    settings: everything that the answers depend on, as JSON; None takes a file as it is.  Answers of
    other settings are refused, unless they are to be forgotten (``fresh``).  ``records`` are the
    finished ones, each with its "id"; ``settings`` is what they were made with.  of: what they are.
    Raises EvaluationError, and OutputError where the disk refuses.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any] | None, *, fresh: bool = False,
        of: str = "answers",
    ) -> None:  # fmt: skip
        self.path, self._of = path, of
        self.records: dict[str, Record] = {}
        self.settings: Record | None = json.loads(json.dumps(settings))
        self._adding = threading.Lock()
        self._end = 0
        with disk.explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = disk.open_plain(path, os.O_RDWR | os.O_CREAT)
        if fd is None:
            raise EvaluationError(Problem("not a plain file", f"choose another {opt('out')}", str(path)))
        self._fd = fd
        try:
            self._open(fresh)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; another evaluation may then write to it."""
        os.close(self._fd)

    def add(self, *records: Mapping[str, Any]) -> None:
        """Append finished records, each with an "id" of its own, and return once they are on the disk."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        content = "".join(lines).encode("utf-8", "replace")
        with self._adding, disk.explained(self.path):
            try:
                disk.write_at(self._fd, memoryview(content), self._end)
                disk.sync(self._fd)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._fd, self._end)  # no torn line in the middle, should another follow
                raise
            self._end += len(content)
            self.records.update({str(record["id"]): dict(record) for record in records})

    def _open(self, fresh: bool) -> None:
        if disk.try_lock(self._fd) is False:
            raise EvaluationError(
                Problem(
                    "another evaluation is writing it",
                    f"wait for its end, or choose another {opt('out')}",
                    str(self.path),
                )
            )
        with disk.explained(self.path):
            if not fresh:
                self._end = self._read(_all(self._fd))
            os.ftruncate(self._fd, self._end)
        if not self._end:
            self._begin()

    def _begin(self) -> None:
        header = {"della": "generations", "format": FORMAT, "settings": self.settings}
        content = (json.dumps(header, ensure_ascii=False) + "\n").encode()
        with disk.explained(self.path):
            disk.write_at(self._fd, memoryview(content), 0)
            disk.sync(self._fd)
            disk.sync_folder(self.path.parent)
        self._end = len(content)

    def _read(self, raw: bytes) -> int:
        """Fill ``records``; the bytes that are whole, without what was cut short at the end."""
        *lines, rest = raw.split(b"\n")
        if not lines and (not rest or b'{"della": "generations"'.startswith(rest[:23])):
            return 0  # cut short while it was begun
        others = self._other_settings(lines[0] if lines else rest)
        end = len(lines[0]) + 1
        damage: EvaluationError | None = None
        for number, line in enumerate(lines[1:], 2):
            where = f"{self.path}:{number}"
            try:
                record = self._record(line, where)
            except EvaluationError as error:
                damage = damage or error
                continue
            if damage:  # a line cut short has none behind it
                raise damage
            self.records[record["id"]] = record
            end += len(line) + 1
        if others and self.records:
            fix = f"choose another {opt('out')}"
            fix += f", or begin anew with {opt('fresh', True)}" if self._of == "answers" else ""
            said = f"its {self._of} are of other settings: {others}"
            raise EvaluationError(Problem(said, fix, str(self.path)))
        return 0 if others else end

    def _record(self, line: bytes, where: str) -> Record:
        fix = "delete this line, and its answer is asked for again"
        value = parsed(line, where, fix)
        if not isinstance(value, dict) or not isinstance(value.get("id"), str):
            raise EvaluationError(Problem("expected a JSON object with a text as 'id'", fix, where))
        if value["id"] in self.records:
            raise EvaluationError(Problem(f"the answer {value['id']} stands twice", fix, where))
        return value

    def _other_settings(self, line: bytes) -> str:
        """Which settings of the file differ from ours, in words; "" if none does."""
        foreign = EvaluationError(
            Problem(
                "not a file of answers that della has written",
                f"choose another {opt('out')}",
                str(self.path),
            )
        )
        try:
            header = parsed(line, str(self.path))
        except EvaluationError:
            raise foreign from None
        if not isinstance(header, dict) or (header.get("della"), header.get("format")) != (
            "generations", FORMAT,
        ):  # fmt: skip
            raise foreign
        stored, now = header.get("settings"), self.settings
        stored = stored if isinstance(stored, dict) else {}
        if now is None:
            self.settings = stored
        if now is None or stored == now:
            return ""
        keys = [k for k in {**stored, **now} if stored.get(k) != now.get(k)]
        return "; ".join(f"{k} {_shown(stored.get(k))}, now {_shown(now.get(k))}" for k in keys)


def _all(fd: int) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        return file.read()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
