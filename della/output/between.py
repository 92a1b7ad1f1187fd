"""The folder beside OUT in which results of a recipe's other documents lie until OUT is there.

    .OUT.della-between/
        1-NAME/             the result of the first document, a model as any other
        1-NAME.key          what that depends on
        journal-1-of-1      who works here

A result is there only as a whole, and is of the merge whose key lies beside it; before it is used again it is
compared with its manifest.  So a run that was cut short is resumed between documents and inside of them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import xxhash

from della.checkpoint.source import Source, open_source
from della.errors import OutputError, Problem
from della.options import Execution, spelt
from della.output import disk
from della.output.journal import Journal, may_live, named, writer_of
from della.output.staging import WHOLE

_OURS = re.compile(r"\.?\d+-.*|journal-.*")
_ATTEMPTS = 50


class Between:
    """The folder beside OUT, held against other runs; a context manager.

    Leaving it removes it where nothing in it is worth keeping.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.with_name(f".{self.out.name}.della-between")
        self._fd = -1
        self._journal: Journal | None = None

    def place(self, number: int, name: str | None) -> Path:
        """Where the result of document ``number``, from 1, goes."""
        return self.folder / f"{number}-{re.sub(r'[^A-Za-z0-9_-]+', '_', name or '')[:60]}"

    def __enter__(self) -> Between:
        with disk.explained(self.folder):
            for _ in range(_ATTEMPTS):
                self.folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # a run that has just ended removes it
                    self._fd = disk.open_folder(self.folder)
                    self._hold()
                    if disk.is_open(disk.lock_of(self.folder), self._fd):
                        break
                self._close()
            self._journal = Journal(self.folder / WHOLE)
            self._journal.begin("", "1/1")
        return self

    def _hold(self) -> None:
        home = os.stat(self.folder.parent)
        if home.st_mode & stat.S_IWOTH and os.fstat(self._fd).st_uid != disk.user():
            said = "made by another user in a folder that everybody may write to"
            raise OutputError(Problem(said, "choose another place, or remove it", str(self.folder)))
        locked, journal = disk.try_lock(self._fd), self.folder / WHOLE
        writer = writer_of(journal) if journal.exists() else None
        lives = writer is not None and may_live(writer)
        if locked is False or (locked is None and lives):
            self._close()
            who = named(writer) if writer else "it has just begun"
            said = f"another run is writing there ({who})"
            raise OutputError(Problem(said, "wait for it, or stop it", str(self.out)))

    def holds(self, place: Path, key: str, is_well: Callable[[Path], bool]) -> bool:
        """Whether the result at ``place`` is whole (``is_well`` says so of its files) and of the merge that
        ``key`` stands for; if not, it is removed, and the key noted for the one to come."""
        note, key = place.with_name(place.name + ".key"), xxhash.xxh3_128_hexdigest(key.encode())
        with disk.explained(place):
            known = note.read_text(errors="replace") if note.is_file() and not note.is_symlink() else ""
            if known == key and place.is_dir() and not place.is_symlink():
                with suppress(OutputError):
                    if is_well(place):
                        return True
            disk.remove(place)
            disk.sync_folder(self.folder)
            if known != key:
                disk.remove(note)
                with open(note, "x", encoding="utf-8") as file:
                    file.write(key)
                    file.flush()
                    disk.sync(file.fileno())
                disk.sync_folder(self.folder)
        return False

    @property
    def taken(self) -> int:
        """Bytes on the disk that are taken already."""
        files = (path for path in self.folder.rglob("*") if self.folder.is_dir())
        return sum(disk.taken(os.lstat(path)) for path in files)

    def remove(self) -> None:
        """Removes what is ours, and the folder if that was all."""
        with disk.explained(self.folder):
            self._close_journal()
            for path in sorted(self.folder.iterdir()):
                if _OURS.fullmatch(path.name):
                    disk.remove(path)
            lock = disk.lock_of(self.folder)
            self._close()
            if lock != self.folder:
                disk.remove(lock)
            if not any(self.folder.iterdir()):  # else something in it is not ours
                self.folder.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk.explained(self.folder):
                if self._fd >= 0 and not any(path.is_dir() for path in self.folder.iterdir()):
                    self.remove()
                if self._journal is not None:
                    self._journal.end()
        except OutputError:
            if error is None:  # else that is the news
                raise
        finally:
            self._close_journal()
            self._close()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def opened(place: Path, name: str) -> Source:
    """The result at ``place``, as a model that recipes call ``name``.  Raises CheckpointError."""
    source = open_source(str(place))
    source.reference = name
    return source


def kept(out: Path, names: Sequence[str | None], stack: ExitStack) -> dict[str, Source]:
    """The results of documents of these names that were kept beside ``out``, which ``stack`` closes.

    Raises OutputError where one is missing.
    """
    between, found = Between(out), dict[str, Source]()
    for number, name in enumerate(names, 1):
        place = between.place(number, name)
        if not place.is_dir():
            said = f"its inputs are results of other documents, and {str(name)!r} was not kept"
            option = spelt(Execution, "keep_intermediates")
            fix = f"merge again with {option}, or compare it with a new merge of the same recipe"
            raise OutputError(Problem(said, fix, str(out)))
        found[str(name)] = stack.enter_context(opened(place, str(name)))
    return found
