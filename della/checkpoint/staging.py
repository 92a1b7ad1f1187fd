"""The folder beside OUT in which a merge is staged: who may work in it, and what is finished there.

    .OUT.della-staging/
        model/              what becomes OUT in one rename
        old/                the old OUT, for an instant, where the system cannot exchange two folders
        journal-1-of-1      one for each writer: parts i of n work side by side

A lock on the folder (shared by parts) keeps others away, and one on its journal each part.  Locks save work;
correctness does not hang on them: whoever computes a tensor of the same merge writes the same bytes.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from della.checkpoint import disk
from della.checkpoint.journal import Bands, Done, Journal, finished, may_live, named, records, writer_of
from della.errors import OutputError

PATIENCE = 2.0  # seconds that a writer waits for another one that has just begun


class Staging:
    """The staging folder of ``out``; ``key`` tells whether what is found there is of the same merge."""

    def __init__(self, out: Path, key: str, part: int = 1, parts: int = 1) -> None:
        self.out, self.key, self.part, self.parts = out, key, part, parts
        self.folder = out.with_name(f".{out.name}.della-staging")
        self.model = self.folder / "model"
        self.aside = self.folder / "old"
        self.done: dict[str, Done] = {}
        self.bands: Bands = {}
        self.replaced = False
        self._fd = -1
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "not claimed"
        return self._journal

    def claim(self) -> None:
        """Makes the folder, or takes it over with what is finished there.

        Raises OutputError while another writer holds it, or where a part would join another merge.
        """
        deadline = time.monotonic() + PATIENCE
        while not self._take(time.monotonic() > deadline):
            time.sleep(0.02)
        try:
            self._journal = Journal(self.folder / f"journal-{self.part}-of-{self.parts}")
            taken = disk.try_lock(self.journal.fd)
            if taken is False or (taken is None and self._living([self.journal.path])):
                raise self._busy(self.journal.path)
            self.done, self.bands = finished(self._journals())
            self.journal.begin(self.key, self.model.stat().st_ino, f"{self.part}/{self.parts}")
        except BaseException:
            self.release()
            raise

    def _take(self, is_last: bool) -> bool:
        """One attempt to lock the folder and make it ready."""
        try:
            self.folder.mkdir()
        except FileExistsError:
            self._refuse_strangers()
        try:
            self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False  # the run that made it has just ended
        try:
            locked = disk.try_lock(self._fd)
            if locked is None and self._living(self._rivals()):
                raise self._busy(*self._rivals())
            shared = locked is False and self.parts > 1 and disk.try_lock(self._fd, fcntl.LOCK_SH)
            if locked is False and not shared:
                if is_last or self._living(self._rivals()):
                    raise self._busy(*self._rivals())
            elif disk.is_open(self.folder, self._fd):
                self._make_ready(shared=bool(shared))
                return True
        except BaseException:
            self.release()
            raise
        self.release()
        return False

    def _make_ready(self, *, shared: bool) -> None:
        """Removes what is of no use; a part never removes what another merge has finished."""
        if not shared:
            disk.recover(self.out, self.aside)
        key, intact = self._found()
        if key != self.key or not intact:
            if key and intact and self.parts > 1:
                raise OutputError(
                    f"{self.folder}: holds another merge (another recipe, seed, version or shard size, or "
                    "inputs that have changed since); give every part the same, or remove that folder"
                )
            if not shared and not self._untouched():
                self.replaced = bool(key) and intact
                self.clear()
        self.model.mkdir(exist_ok=True)
        if self.parts > 1 and not shared:
            disk.try_lock(self._fd, fcntl.LOCK_SH)

    def _found(self) -> tuple[str, bool]:
        """The key that the journals agree on ("" for none), and whether the staged folder is still the one
        they were written for: after a swap it is the old model that stands there.
        """
        begun = [r for path in self._journals() for r in records(path) if "key" in r]
        keys = {record["key"] for record in begun}
        try:
            found = os.lstat(self.model)
        except FileNotFoundError:
            return "", False
        intact = stat.S_ISDIR(found.st_mode) and {record["model"] for record in begun} == {found.st_ino}
        return (keys.pop() if len(keys) == 1 else ""), intact

    def _untouched(self) -> bool:
        """Whether the folder holds no more than what another part may just have made."""
        found = [path.relative_to(self.folder) for path in self.folder.rglob("*")]
        return not found or (found == [Path("model")] and not self.model.is_symlink())

    def _refuse_strangers(self) -> None:
        """Where everybody may write, a folder of this name may be a trap: somebody else's "finished"."""
        try:
            found, home = os.lstat(self.folder), os.stat(self.folder.parent)
        except FileNotFoundError:
            return
        if found.st_uid != os.geteuid() and home.st_mode & stat.S_IWOTH:
            raise OutputError(
                f"{self.folder}: made by another user in a folder that everybody may write to; "
                "choose another place, or remove it"
            )

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*-of-*"))

    def _rivals(self) -> list[Path]:
        """The journals whose writers keep this one away: a part's, those that do not do a part as well."""
        rivals = self._journals()
        return rivals if self.parts == 1 else [p for p in rivals if p.name == "journal-1-of-1"]

    def _living(self, journals: list[Path]) -> list[str]:
        """The writers who may be at work, told without locks."""
        writers = [writer for path in journals if (writer := writer_of(path)) and may_live(writer)]
        return [named(writer) for writer in writers]

    def _busy(self, *journals: Path) -> OutputError:
        names = self._living(list(journals))
        who = "; ".join(names) or "it has just begun"
        return OutputError(
            f"{self.out}: another run is writing there ({who}); wait for it, or stop it"
            + (f"; if it is dead, remove {self.folder}" if self._elsewhere(journals) else "")
        )

    def _elsewhere(self, journals: tuple[Path, ...]) -> bool:
        here = os.uname().nodename
        return any((writer := writer_of(path)) and writer["host"] != here for path in journals)

    def clear(self) -> None:
        """Removes all that is in the folder; the journals, by which it would be understood, last."""
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name.startswith("journal-")):
            disk.remove(entry)

    def remove(self) -> None:
        """Removes the folder; it must be held alone."""
        self.clear()
        self.folder.rmdir()

    def release(self) -> None:
        """Lets others in."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def unfinished(out: Path) -> Iterator[str]:
    """What lies beside ``out`` of a merge that was not finished, in words."""
    staging = Staging(out, "")
    if staging.folder.is_dir():
        count = len(finished(staging._journals())[0])
        yield f"{staging.folder}: an unfinished merge ({count} tensors done); the same command goes on"


def staged_bytes(out: Path) -> int:
    """Bytes on the disk that a merge into ``out`` which was not finished has taken already."""
    model = Staging(out, "").model
    with disk.explained(model), suppress(FileNotFoundError, NotADirectoryError):
        return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(model))
    return 0
