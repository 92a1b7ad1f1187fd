"""A merged model on its way to the disk: staged beside OUT, written by offset, renamed in at the end.

Until `StagedOutput.commit` has renamed the staging folder, OUT is what it was before.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from della.checkpoint import disk
from della.checkpoint.disk import explained
from della.checkpoint.header import build_header
from della.dtypes import DType
from della.errors import OutputError, listing

TensorPlan = Sequence[tuple[str, DType, Sequence[int]]]
Bytes = bytes | bytearray | memoryview

MARGIN_BYTES = 1 << 26  # for tokenizers and other side files, whose sizes are not known beforehand
# What a folder without della.json may hold and still be taken for a model that --overwrite may replace.
MODEL_FILES = (
    ".safetensors",
    ".json",
    ".jinja",
    ".md",
    ".model",
    ".txt",
    ".tiktoken",
    ".gitattributes",
    "LICENSE",
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to be written: its header, its size in bytes, where each tensor lies in it (begin, end)."""

    name: str
    header: bytes
    size: int
    spans: dict[str, tuple[int, int]]


def plan_shards(tensors: TensorPlan, max_bytes: int) -> list[list[int]]:
    """Indices of ``tensors`` by shard: in order, each shard at most ``max_bytes`` of data.

    A tensor that is larger has a shard to itself.  No tensors make one empty shard.
    """
    shards: list[list[int]] = [[]]
    used = 0
    for index, (_, dtype, shape) in enumerate(tensors):
        size = math.prod(shape) * dtype.bytes
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(index)
        used += size
    return shards


def lay_out(
    tensors: TensorPlan,
    shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    single: str | None = None,
    stem: str = "model",
) -> list[Shard]:
    """The files that hold ``tensors``, named after ``stem``; with ``single``, one file of that name.

    Within a file wider dtypes come first, so that every tensor is aligned to its own width.
    Raises OutputError for a name that stands twice.
    """
    twice = [name for name, count in Counter(name for name, _, _ in tensors).items() if count > 1]
    if twice:
        raise OutputError(listing([f"tensor {name!r} would be written twice" for name in twice]))
    groups = [list(range(len(tensors)))] if single else plan_shards(tensors, shard_bytes)
    shards = []
    for number, group in enumerate(groups, 1):
        part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        group.sort(key=lambda index: -tensors[index][1].bits)
        header, relative = build_header([tensors[index] for index in group], metadata)
        start = len(header)
        spans = {tensor: (start + begin, start + end) for tensor, (begin, end) in relative.items()}
        size = max((end for _, end in spans.values()), default=start)
        shards.append(Shard(single or f"{stem}{part}.safetensors", header, size, spans))
    return shards


class StagedOutput:
    """A model being written; a context manager.  Leaving it without `commit` removes all that was written.

    ``tensors`` are (name, dtype, shape) in the order in which they shall lie; ``shard_bytes`` is the most
    data in one file.  ``inputs`` are the folders and files of the models that are read: OUT may not touch
    them.  With ``single_file`` OUT is one .safetensors file.  ``overwrite`` lets OUT be replaced, if it is a
    model.  ``stem`` begins the names of the files: "diffusion_pytorch_model" for what diffusers shall load.
    ``fsync=False`` is for tests and scratch models: a power cut may then lose what commit has reported.
    """

    def __init__(
        self,
        out: Path,
        tensors: TensorPlan,
        shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
        single_file: bool = False,
        fsync: bool = True,
        metadata: Mapping[str, str] | None = None,
        inputs: Iterable[Path] = (),
        stem: str = "model",
    ) -> None:
        self.out = Path(os.path.abspath(out))
        if not self.out.name or "\0" in self.out.name:
            raise OutputError(f"{str(out)!r} cannot be the name of a model")
        self.shards = lay_out(tensors, shard_bytes, metadata, self.out.name if single_file else None, stem)
        self._index = f"{stem}.safetensors.index.json"
        self.staging = self.out.with_name(f".{self.out.name}.della-staging")
        self._overwrite = overwrite
        self._single_file = single_file
        self._fsync = fsync
        self._inputs = list(inputs)
        self._spans = {
            tensor: (number, begin, end)
            for number, shard in enumerate(self.shards)
            for tensor, (begin, end) in shard.spans.items()
        }
        self._missing = {tensor: end - begin for tensor, (_, begin, end) in self._spans.items()}
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._claim: int | None = None
        self._made: list[Path] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.size for shard in self.shards)

    def __enter__(self) -> StagedOutput:
        self._check_place()
        try:
            with explained(self.out.parent):
                self._make_folders()
                self._claim = disk.claim(self.staging, self.out)
                disk.recover(self.out)
            self._check_place()  # another run may have ended, or been recovered, before the claim
            check_space(self.out.parent, self.nbytes)
            for shard in self.shards:
                self._create(shard)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, start_byte: int, buffer: Bytes) -> None:
        """Writes ``buffer`` (C-contiguous) to tensor ``name`` from its byte ``start_byte`` on.

        Safe to call from several threads at once; each byte of a tensor is to be written once.
        """
        number, begin, end = self._spans[name]
        view = memoryview(buffer)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        at, count = begin + start_byte, len(rest)
        if start_byte < 0 or at + count > end:
            raise ValueError(f"bytes {start_byte} to {start_byte + count} of {name}: it has {end - begin}")
        with explained(self.staging / self.shards[number].name):
            disk.write_at(self._fds[number], rest, at)
        with self._lock:
            self._missing[name] -= count

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Adds a side file: ``content``, or what the file it names holds.  Raises OutputError."""
        if name in ("", ".", "..", self._index, disk.OWNER) or set(name) & set("/\\:\0"):
            raise OutputError(
                f"{self.out}: {name!r} cannot be the name of a side file; a plain name is needed"
            )
        if self._single_file:
            raise OutputError(
                f"{self.out}: one file was asked for, so {name} has no place; write to a folder"
            )
        path = self.staging / name
        raw = _read_side_file(content) if isinstance(content, Path) else content
        with explained(path), open(path, "xb") as file:
            file.write(raw)
            file.flush()
            if self._fsync:
                disk.sync(file.fileno())

    def commit(self) -> None:
        """Makes OUT the new model in one rename; when this returns it is on the disk.  Raises OutputError."""
        unfinished = [
            f"tensor {name!r}: {count} bytes were not written"
            for name, count in self._missing.items()
            if count
        ]
        if unfinished:
            raise OutputError(f"{self.out}: not complete: {listing(unfinished)}")
        self._check_place()
        if len(self.shards) > 1:
            self._write_index()
        for fd, shard in zip(self._fds, self.shards, strict=True):
            with explained(self.staging / shard.name):
                if self._fsync:
                    disk.sync(fd)
        staged = self.staging / self.shards[0].name if self._single_file else self.staging
        with explained(self.out):
            (self.staging / disk.OWNER).unlink()
            if self._fsync:
                disk.sync_folder(self.staging)
            disk.move_in(staged, self.out, self._overwrite and os.path.lexists(self.out))
            if self._fsync:
                disk.sync_folder(self.out.parent)
        self._close()
        if self._single_file:
            self.staging.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._claim is not None:
            self._abandon()

    def _check_place(self) -> None:
        check_place(self.out, self._overwrite, self._single_file, self._inputs)

    def _create(self, shard: Shard) -> None:
        path = self.staging / shard.name
        with explained(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._fds.append(fd)
            disk.allocate(fd, shard.size)
            disk.write_at(fd, memoryview(shard.header), 0)

    def _write_index(self) -> None:
        names = {tensor: self.shards[number].name for tensor, (number, _, _) in self._spans.items()}
        total = sum(end - begin for _, begin, end in self._spans.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        path = self.staging / self._index
        with explained(path), open(path, "x", encoding="utf-8") as file:
            json.dump(index, file, indent=2, sort_keys=True)
            file.write("\n")
            file.flush()
            if self._fsync:
                disk.sync(file.fileno())

    def _close(self) -> None:
        """Closes everything; the claim last, because it keeps other runs away."""
        while self._fds:
            os.close(self._fds.pop())
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def _make_folders(self) -> None:
        missing = [step for step in (self.out.parent, *self.out.parent.parents) if not step.exists()]
        for step in reversed(missing):
            step.mkdir(exist_ok=True)
            self._made.append(step)
            if self._fsync:
                disk.sync_folder(step.parent)

    def _abandon(self) -> None:
        if self._claim is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
        self._close()
        for folder in reversed(self._made):
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()


def _read_side_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path}: cannot be copied to the result ({error.strerror})") from error


def check_place(out: Path, overwrite: bool, single_file: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuses an OUT that is taken, cannot be replaced, or touches an input.  Raises OutputError."""
    if single_file and out.suffix != ".safetensors":
        raise OutputError(f"{out}: one file was asked for; its name must end in .safetensors")
    if not single_file and out.suffix == ".safetensors":
        raise OutputError(f"{out}: a folder was asked for; its name must not end in .safetensors")
    for place in inputs:
        if _inside(out, place) or _inside(place, out):
            raise OutputError(f"{out}: touches the input {place}; choose another place for the result")
    if out.is_symlink():
        raise OutputError(f"{out}: a link; name the place that it leads to")
    if not out.exists():
        return
    if not overwrite:
        raise OutputError(
            f"{out}: exists already; choose another place, or allow it to be replaced: --overwrite"
        )
    if single_file != out.is_file():
        raise OutputError(
            f"{out}: a {'folder' if single_file else 'file'}, which is not replaced; choose another place"
        )
    if not single_file:
        _check_replaceable(out)


def _check_replaceable(out: Path) -> None:
    """A folder that may be replaced is empty, made by della, or a model and nothing else."""
    with explained(out):
        names = [entry.name + "/" * entry.is_dir() for entry in os.scandir(out)]
    if not names or "della.json" in names:
        return
    foreign = [name for name in names if not name.endswith(MODEL_FILES)]
    if not any(name.endswith(".safetensors") for name in names) and "config.json" not in names:
        foreign = names
    if foreign:
        raise OutputError(
            f"{out}: not replaced: it is not a model, or more (it holds {', '.join(sorted(foreign)[:5])}); "
            "choose another place, or remove it yourself"
        )


def _inside(path: Path, place: Path) -> bool:
    """Whether ``path`` is ``place``, or lies in it, by device and inode."""
    try:
        there = place.stat()
    except OSError:
        return False
    real = path.resolve()
    for step in (real, *real.parents):
        with suppress(OSError):
            if os.path.samestat(step.stat(), there):
                return True
    return False


def check_space(folder: Path, needed: int) -> None:
    """Refuses when the disk of ``folder`` has less than ``needed`` bytes and a margin free (OutputError)."""
    with explained(folder):
        found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < needed + MARGIN_BYTES:  # some network file systems report nothing
        raise OutputError(
            f"{folder}: the result needs {needed + MARGIN_BYTES:,} bytes, {free:,} are free; "
            "free some space, or write to another disk"
        )
