"""The folder beside OUT in which a merge is staged: who may work in it, and what is finished there.

    .OUT.della-staging/
        model/              what becomes OUT in one rename
        journal-1-of-1      one for each writer: parts i of n work side by side
    .OUT.della-old/         the old OUT, for an instant, where the system cannot exchange two folders

A lock on the folder (shared by parts) keeps others away, and one on its journal each part.  Locks save work;
correctness does not hang on them: whoever computes a tensor of the same merge writes the same bytes, and a
writer whose files were replaced finds out before it commits.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from della.errors import OutputError, Problem, either
from della.options import Execution, spelt
from della.output import disk
from della.output.journal import FORMAT, Done, Facts, Journal, may_live, named, told, writer_of

PATIENCE = 2.0  # seconds that a writer waits for another one that has just begun
WHOLE = "journal-1-of-1"
OWN = ("model", "refused", disk.LOCK)  # what may stand in the folder beside journals


class Staging:
    """The staging folder of ``out``; ``key`` tells whether what is found there is of the same merge.

    ``finish`` is for who puts parts together, and will not remove what does not fit.
    """

    def __init__(self, out: Path, key: str, part: int = 1, parts: int = 1, finish: bool = False) -> None:
        self.out, self.key, self.part, self.parts, self.finish = out, key, part, parts, finish
        self.folder = out.with_name(f".{out.name}.della-staging")
        self.model = self.folder / "model"
        self.aside = out.with_name(f".{out.name}.della-old")
        self.done: dict[str, Done] = {}
        self.facts: Facts = {}
        self.replaced = False
        self._fd = -1
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "not claimed"
        return self._journal

    @property
    def is_held(self) -> bool:
        """Whether the folder is claimed, and still the one that was."""
        return self._fd >= 0 and disk.is_open(disk.lock_of(self.folder), self._fd)

    # ---- claiming ----

    def claim(self) -> None:
        """Makes the folder, or takes it over with what is finished there.

        Raises OutputError while another writer holds it, or where another merge would be spoilt.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            is_last = time.monotonic() > deadline
            try:
                if self._take(is_last):
                    return
                self.release()
                if is_last:
                    raise self._busy(*self._rivals())
            except BaseException:
                self.release()
                raise
            time.sleep(0.02)

    def _take(self, is_last: bool) -> bool:
        """One attempt to lock the folder, to make it ready, and to begin a journal."""
        with suppress(FileExistsError):
            self.folder.mkdir()
        try:
            self._fd = disk.open_folder(self.folder)
        except FileNotFoundError:
            return False  # the run that made it has just ended
        except NotADirectoryError:
            raise OutputError(
                Problem("not a staging folder of della", "remove it", str(self.folder))
            ) from None
        self._refuse_strangers()
        locked = disk.try_lock(self._fd)
        if locked is None and self._living(self._rivals()):
            raise self._busy(*self._rivals())
        shared = locked is False and self.parts > 1 and disk.try_lock(self._fd, shared=True) is True
        if locked is False and not shared:
            if is_last or self._living(self._rivals()):
                raise self._busy(*self._rivals())
            return False
        alone = locked is True or (locked is None and not self._living(self._journals()))
        if not self.is_held or not self._make_ready(alone):
            return False
        self._begin()
        # A part lets others in only now that its journal names the merge; the change of a lock is not
        # atomic, so it may fail.
        return self.parts == 1 or shared or disk.try_lock(self._fd, shared=True) is not False

    def _make_ready(self, alone: bool) -> bool:
        """Removes what is of no use; never what another merge has finished in parts, and nothing at all
        unless ``alone``.  False: not yet.
        """
        strange = [n for n in os.listdir(self.folder) if n not in OWN and not n.startswith("journal-")]
        if strange:
            raise OutputError(
                Problem(f"holds {strange[0]!r}, which is not della's", "move it away", str(self.folder))
            )
        if alone:
            self._recover()
        found = told(self._journals())
        if found.formats - {FORMAT}:
            raise OutputError(
                Problem(
                    "an unfinished merge of another version of della",
                    "end it with that version, or remove the folder to begin anew",
                    str(self.folder),
                )
            )
        if found.swapped and self.finish:
            raise OutputError(
                Problem(
                    "an earlier run was cut short while it put the new model there",
                    f"see what {either('`della verify`', 'della.verify')} says, and leave out "
                    f"{spelt(Execution, 'finish')} if it is not there",
                    str(self.out),
                )
            )
        if found.keys != {self.key} or found.swapped:
            if not alone and not found.keys:
                return False
            is_to_stay = not alone or self.finish or self._is_of_parts(found.authors)
            if found.keys and not found.swapped and is_to_stay:
                raise OutputError(
                    Problem(
                        "holds another merge (another recipe, seed, version or shard size, or inputs "
                        "that have changed since)",
                        "do this one alike, or remove that folder",
                        str(self.folder),
                    )
                )
            if found.keys or any(self.model.glob("*")) or self.model.is_symlink():
                self.replaced = bool(found.done) and not found.swapped
                self.clear()
                found = told([])
        with suppress(FileExistsError):  # nothing else: mkdir(exist_ok=True) would pass over a broken disk
            self.model.mkdir()
        self.done, self.facts = found.done, found.facts
        return True

    def _is_of_parts(self, authors: set[str]) -> bool:
        """Whether parts have finished something: work of several, which one alone should not remove."""
        return bool(authors - {WHOLE}) or (self.parts > 1 and bool(authors))

    def _begin(self) -> None:
        self._journal = Journal(self.folder / f"journal-{self.part}-of-{self.parts}")
        taken = disk.try_lock(self._journal.fd)
        if taken is False or (taken is None and self._living([self._journal.path])):
            raise self._busy(self._journal.path)
        self._journal.begin(self.key, f"{self.part}/{self.parts}")

    def _recover(self) -> None:
        """Undoes, or ends, a replacement that was cut short between two renames."""
        if not self.aside.is_dir() or self.aside.is_symlink():
            return
        if not os.path.lexists(self.out):
            os.rename(self.aside, self.out)
        elif told(self._journals()).swapped and not self.model.exists():
            disk.remove(self.aside)
        else:
            raise OutputError(
                Problem(
                    "the old model, from a replacement that was cut short, while something else "
                    f"stands at {self.out}",
                    "move one of them away",
                    str(self.aside),
                )
            )

    def _refuse_strangers(self) -> None:
        """Where everybody may write, a folder of this name may be a trap: somebody else's "finished"."""
        is_open_to_all = os.stat(self.folder.parent).st_mode & stat.S_IWOTH
        if is_open_to_all and os.fstat(self._fd).st_uid != disk.user():
            raise OutputError(
                Problem(
                    "made by another user in a folder that everybody may write to",
                    "choose another place, or remove it",
                    str(self.folder),
                )
            )

    # ---- other writers ----

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*-of-*"))

    def _rivals(self) -> list[Path]:
        """The journals whose writers keep this one away: a part's, those that do not do a part as well."""
        rivals = self._journals()
        return rivals if self.parts == 1 else [p for p in rivals if p.name == WHOLE]

    def _living(self, journals: Sequence[Path]) -> list[str]:
        """The writers who may be at work, told without locks."""
        writers = []
        for path in journals:
            with suppress(FileNotFoundError):  # it has just ended
                writers.append(writer_of(path))
        return [named(writer) for writer in writers if writer and may_live(writer)]

    def _busy(self, *journals: Path) -> OutputError:
        names = self._living(journals)
        here = disk.host()
        elsewhere = any(f" on {here}" not in name for name in names)
        return OutputError(
            Problem(
                f"another run is writing there ({'; '.join(names) or 'it has just begun'})",
                f"wait for it, or stop it{f'; if it is dead, remove {self.folder}' * elsewhere}",
                str(self.out),
            )
        )

    # ---- ending ----

    def clear(self) -> None:
        """Removes all that is in the folder but its lock; the journals, by which it would be understood,
        last.
        """
        held = disk.lock_of(self.folder)
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name.startswith("journal-")):
            if entry != held:
                disk.remove(entry)

    def remove(self) -> None:
        """Removes the folder, which must be held alone."""
        self._close_journal()  # Windows removes nothing that is open
        self.clear()
        if disk.lock_of(self.folder) != self.folder:
            self._close_lock()
            disk.remove(disk.lock_of(self.folder))
        self.folder.rmdir()

    def abandon(self, *, keep: bool) -> bool:
        """Leaves the folder to a later writer if something is finished in it and it is worth keeping, or if
        others work in it; removes it else.  Whether it is left.
        """
        if not self.is_held:
            return False
        alone = self.parts == 1 or disk.try_lock(self._fd) is True
        found = told(self._journals())
        if not alone or self._is_of_parts(found.authors) or (found.done and keep):
            self.journal.end()
            return bool(found.done)
        self.remove()
        return False

    def release(self) -> None:
        """Lets others in."""
        self._close_journal()
        self._close_lock()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _close_lock(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def unfinished(out: Path) -> Iterator[str]:
    """What lies beside ``out`` of a merge that was not finished, in words."""
    staging = Staging(out, "")
    if staging.folder.is_dir():
        count = len(told(staging._journals()).done)
        again = f"the same {either('command', 'call')} resumes it"
        yield f"{staging.folder}: an unfinished merge ({count} tensors done); {again}"
    if staging.aside.is_dir():
        yield f"{staging.aside}: the old model; the next merge puts it back"


def staged_bytes(out: Path) -> int:
    """Bytes on the disk that a merge into ``out`` which was not finished has taken already."""
    model = Staging(out, "").model
    with disk.explained(model):
        try:
            return sum(disk.taken(entry.stat(follow_symlinks=False)) for entry in os.scandir(model))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                return 0
            raise
