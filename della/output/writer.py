"""A merged model on its way to the disk: staged beside OUT, written by offset, renamed in at the end.

Until `StagedOutput.commit` has renamed the staged folder, OUT is what it was before.  What was finished when
a run died is found in the journal (journal.py) and used again after a look at its hash.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import xxhash

from della.errors import DellaError, OutputError, Problem
from della.output import disk
from della.output.disk import explained
from della.output.journal import Done, Facts
from della.output.place import Overwrite, check_place, check_space, refusal_to_replace
from della.output.shards import INDEX, Shard, TensorPlan, index_json, lay_out, share
from della.output.staging import Staging

Bytes = bytes | bytearray | memoryview

WRITE_BACK = 1 << 25  # bytes after which the system is asked to begin writing them to the disk
_PIECE = 1 << 20


class StagedOutput:
    """A model being written; a context manager.

    ``tensors`` are (name, dtype, shape) in the order in which they shall lie; ``shard_bytes`` is the most
    data in one file.  ``inputs`` are the folders and files of the models that are read: OUT may not touch
    them.  With ``single_file`` OUT is one .safetensors file.  ``overwrite`` lets OUT be replaced, if della
    made it ("any": if it is a model).  ``stem`` begins the names of the files: "diffusion_pytorch_model" for
    what diffusers shall load.
    ``fsync=False`` is for tests and scratch models: a power cut may then lose what commit has reported.

    ``key`` stands for everything that the bytes depend on, but the layout.  With one, what is finished when
    the writer stops early is kept for the next writer with the same key, if that may do better; ``part``
    (i, n) writes its share of the files, and ``finish`` puts parts together.  Without a key, leaving without
    `commit` removes all that was written.
    """

    def __init__(
        self,
        out: Path,
        tensors: TensorPlan,
        shard_bytes: int = 5_000_000_000,
        overwrite: Overwrite = False,
        single_file: bool = False,
        fsync: bool = True,
        metadata: Mapping[str, str] | None = None,
        inputs: Iterable[Path] = (),
        stem: str = "model",
        key: str | None = None,
        part: tuple[int, int] = (1, 1),
        finish: bool = False,
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self._inputs = list(inputs)
        self._overwrite, self._single_file, self._fsync = overwrite, single_file, fsync
        self._check_place()
        self.shards = lay_out(tensors, shard_bytes, metadata, self.out.name if single_file else None, stem)
        self._index = stem + INDEX
        self._resumable = key is not None
        self._staging = Staging(self.out, _key(key, self.shards), *part, finish)
        self.mine = share(self.shards, *part)
        self._homes = {tensor: shard for shard in self.shards for tensor in shard.spans}
        self._missing = {
            tensor: end - begin for shard in self.mine for tensor, (begin, end) in shard.spans.items()
        }
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        self._made: list[Path] = []
        self.committed = False
        self.keeps = False  # what is finished, whatever error ends this writer
        self.kept: Path | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.size for shard in self.shards)

    @property
    def staging(self) -> Path:
        """The folder beside OUT where all is until `commit`."""
        return self._staging.folder

    @property
    def done(self) -> dict[str, Done]:
        """The tensors that are finished, by this writer or (not checked yet) by one before or beside it."""
        return self._staging.done

    @property
    def facts(self) -> Facts:
        """What a writer before or beside this one has learnt of the whole model."""
        return self._staging.facts

    @property
    def has_replaced(self) -> bool:
        """Whether what another merge had finished for OUT was removed."""
        return self._staging.replaced

    def __enter__(self) -> StagedOutput:
        try:
            with explained(self.out.parent):
                self._make_folders()
            with explained(self._staging.folder):
                self._staging.claim()
                self._remove_strange_files()
            self._check_place()  # another run may have ended, or been recovered, before the claim
            check_space(self.out.parent, sum(self._missing.values()), self._taken())
            for shard in self.mine:
                self._create(shard)
        except BaseException:
            self._abandon(keep=True)
            raise
        return self

    def write(self, name: str, start_byte: int, buffer: Bytes) -> None:
        """Writes ``buffer`` (C-contiguous) to tensor ``name`` from its byte ``start_byte`` on.

        Safe to call from several threads at once; each byte of a tensor is to be written once.
        """
        shard = self._homes[name]
        begin, end = shard.spans[name]
        view = memoryview(buffer)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        at, count = begin + start_byte, len(rest)
        if start_byte < 0 or at + count > end:
            raise ValueError(f"bytes {start_byte} to {start_byte + count} of {name}: it has {end - begin}")
        with explained(self._staging.model / shard.name):
            disk.write_at(self._fds[shard.name], rest, at)
        if self._fsync and ((at + count) // WRITE_BACK > at // WRITE_BACK or at + count == end):
            since = max(begin, at // WRITE_BACK * WRITE_BACK)
            disk.start_writing(self._fds[shard.name], since, at + count - since)
        with self._lock:
            self._missing[name] -= count

    def finish(self, name: str, done: Done) -> None:
        """Notes in the journal that all of a tensor is written, and its hashes."""
        with explained(self._staging.journal.path):
            self._staging.journal.finished(name, done)
        self.done[name] = done

    def note_facts(self, facts: Facts) -> None:
        """Notes what was learnt of the whole model in the journal."""
        with explained(self._staging.journal.path):
            self._staging.journal.facts(facts)

    def holds(self, name: str) -> bool:
        """Whether tensor ``name`` is finished, by its journal and by the hash of its staged bytes."""
        done = self.done.get(name)
        if done is None:
            return False
        digest = xxhash.xxh3_128()
        shard = self._homes[name]
        begin, end = shard.spans[name]
        with explained(self._staging.model / shard.name):
            for at in range(begin, end, _PIECE):
                digest.update(disk.read_back(self._fds[shard.name], min(_PIECE, end - at), at))
        if digest.hexdigest() != done.hash:
            del self.done[name]
            return False
        self._missing[name] = 0
        return True

    def rewrite_header(
        self, tensors: TensorPlan, metadata: Mapping[str, str], last: Callable[[bytes], bytes]
    ) -> None:
        """Gives the single file other metadata of the same length; ``last`` has the last word on it."""
        shard = lay_out(tensors, self.nbytes, metadata, self.out.name)[0]
        assert shard.spans == self.shards[0].spans, "the length has changed"
        with explained(self._staging.model / shard.name):
            disk.write_at(self._fds[shard.name], memoryview(last(shard.header)), 0)

    def add_file(self, name: str, content: bytes) -> None:
        """Adds a side file; a "/" in its name leads into a subfolder.  Raises OutputError."""
        taken = {self._index, *(shard.name for shard in self.shards)}
        if name.partition("/")[0] in taken or not disk.is_name_below(name):
            raise OutputError(
                Problem(
                    f"{name!r} cannot be the name of a side file", "a plain name is needed", str(self.out)
                )
            )
        if self._single_file:
            raise OutputError(
                Problem(f"one file was asked for, so {name} has no place", "write to a folder", str(self.out))
            )
        self._add(name, content)

    def index(self) -> tuple[str, bytes] | None:
        """Name and content of the index; None where one file holds everything."""
        return (self._index, index_json(self.shards)) if len(self.shards) > 1 else None

    def commit(self) -> None:
        """Makes OUT the new model in one rename; when this returns it is on the disk.  Raises OutputError."""
        unfinished = [
            Problem(
                f"not complete: tensor {name!r}: {count} bytes were not written", None, str(self.out), name
            )
            for name, count in self._missing.items()
            if count
        ]
        if unfinished:
            raise OutputError(*unfinished)
        if index := self.index():
            self._add(*index)
        self._sync_files()
        model, replaces = self._staging.model, os.path.lexists(self.out)
        with explained(self.out):
            for folder in (
                (*(path for path in model.rglob("*") if path.is_dir()), model) if self._fsync else ()
            ):
                disk.sync_folder(folder)
            self._check_place()
            self._check_files()
            self._close_files()
            self._move_in(model / self.shards[0].name if self._single_file else model, replaces)
        try:
            with explained(self.out):
                if self._fsync:
                    disk.sync_folder(self.out.parent)
            with explained(self._staging.folder):
                disk.remove(self._staging.aside)
                self._staging.remove()
        except OutputError as error:
            problems = (replace(p, said=f"{p.said} ({self.out} is complete)") for p in error.problems)
            raise OutputError(*problems) from error
        self._close()

    def end_part(self) -> None:
        """Leaves what this part has finished to the parts beside it; on the disk when this returns."""
        self._sync_files()
        with explained(self._staging.folder):
            self._check_files()
            self._staging.journal.end()
            if self._fsync:
                disk.sync(self._staging.journal.fd)
                disk.sync_folder(self._staging.model)
                disk.sync_folder(self._staging.folder)
        self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What no second try can mend (a damaged input, a value out of range) is not worth keeping.
        is_final = isinstance(error, DellaError) and not isinstance(error.__cause__, OSError)
        self._abandon(keep=self.keeps or not is_final)

    def _move_in(self, staged: Path, replace: bool) -> None:
        """The rename; what a user has put into the old model meanwhile is not lost."""
        journal = self._staging.journal
        if replace and not self._single_file:
            journal.swap(True)
            if self._fsync:
                disk.sync(journal.fd)
        try:
            disk.move_in(staged, self.out, replace, self._staging.aside)
            old = next((path for path in (self._staging.aside, staged) if path.is_dir()), None)
            if old and (text := refusal_to_replace(self.out, old)):
                disk.move_in(old, self.out, True, self._staging.folder / "refused")
                raise OutputError(text)
        except BaseException:
            if replace and not self._single_file:
                with suppress(OSError):
                    journal.swap(False)
            raise
        self.committed = True

    def _check_files(self) -> None:
        """Refuses to go on when what was written to is no longer what stands in the staging folder."""
        lost = [name for name, fd in self._fds.items() if not disk.is_open(self._staging.model / name, fd)]
        if lost or not self._staging.is_held:
            path = self._staging.model / lost[0] if lost else self._staging.folder
            raise OutputError(
                Problem("replaced or removed by another run while this one worked", "start again", str(path))
            )

    def _sync_files(self) -> None:
        for name, fd in self._fds.items():
            with explained(self._staging.model / name):
                if self._fsync:
                    disk.sync(fd)

    def _check_place(self) -> None:
        check_place(self.out, self._overwrite, self._single_file, self._inputs)

    def _create(self, shard: Shard) -> None:
        path = self._staging.model / shard.name
        with explained(path):
            fd = disk.open_plain(path, os.O_RDWR | os.O_CREAT)
            if fd is None:
                raise OutputError(Problem("not a plain file", "remove it", str(path)))
            self._fds[shard.name] = fd
            disk.allocate(fd, shard.size)
            disk.write_at(fd, memoryview(shard.header), 0)

    def _add(self, name: str, content: bytes) -> None:
        path = self._staging.model / name
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with explained(path), open(path, "xb") as file:
            file.write(content)
            file.flush()
            if self._fsync:
                disk.sync(file.fileno())

    def _remove_strange_files(self) -> None:
        """Whatever a run that died left beside the weights: side files are written anew."""
        if self._staging.parts == 1:
            ours = {shard.name for shard in self.shards}
            for entry in list(self._staging.model.iterdir()):
                if entry.name not in ours:
                    disk.remove(entry)

    def _taken(self) -> int:
        """Bytes on the disk that the files of this writer have already."""
        total = 0
        for shard in self.mine:
            with suppress(OSError):
                total += min(shard.size, disk.taken(os.lstat(self._staging.model / shard.name)))
        return total

    def _close(self) -> None:
        """Closes everything; the lock last, because it keeps other runs away."""
        self._close_files()
        self._staging.release()

    def _close_files(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _make_folders(self) -> None:
        missing = [step for step in (self.out.parent, *self.out.parent.parents) if not step.exists()]
        for step in reversed(missing):
            step.mkdir(exist_ok=True)
            self._made.append(step)
            if self._fsync:
                disk.sync_folder(step.parent)

    def _abandon(self, *, keep: bool) -> None:
        with suppress(OSError, OutputError):
            if self.committed and self._staging.is_held:
                self._staging.remove()
            elif self._staging.abandon(keep=keep and self._resumable):
                self.kept = self._staging.folder
        self._close()
        for folder in reversed(self._made):
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()


def _key(key: str | None, shards: Sequence[Shard]) -> str:
    """Of the merge and of how its bytes lie in files; one that nobody else has where there is no ``key``."""
    digest = xxhash.xxh3_128(os.urandom(16) if key is None else key.encode())
    for piece in _pieces(shards):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(shards: Sequence[Shard]) -> Iterator[bytes]:
    for shard in shards:
        yield shard.name.encode() + b"\0"
        yield shard.header
