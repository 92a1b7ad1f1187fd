"""`della verify`: is a merged model, byte for byte, what was merged; and would its sources give it again?

A manifest is believed no more than any other file: what it says is checked before it is used.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from della.checkpoint.header import Header, read_header
from della.checkpoint.layout import confined
from della.checkpoint.manifest import FORMAT, MANIFEST, MOST_BYTES, embedded, is_sealed
from della.checkpoint.pickles import PICKLES
from della.checkpoint.source import Source
from della.checkpoint.staging import unfinished
from della.checkpoint.strict import json_object
from della.compute import Compute, digests_of, needs_bands
from della.errors import CheckpointError, OutputError, RecipeError
from della.jobs import Job, Plan, default_threads
from della.planning import Permissions, make_plan
from della.recipe import read_recipe
from della.run import Progress

_PIECE = 1 << 22


@dataclass
class Verdict:
    """What was found: ``bad`` is empty if all is well; ``notes`` are no faults.

    ``tensors`` and ``files`` of the model were checked, ``recomputed`` tensors came out of the sources again,
    ``inputs`` tensors of the inputs were compared.
    """

    out: Path
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    files: int = 0
    nbytes: int = 0
    recomputed: int = 0
    inputs: int = 0

    @property
    def is_well(self) -> bool:
        return not self.bad


def verify(
    out: str | Path,
    *,
    sources: float | None = None,
    inputs: bool = False,
    base_dir: str | Path | None = None,
    allow_pickle: bool = False,
    threads: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Verdict:
    """Compare every byte of ``out`` (a folder or file that `della.merge` wrote) with its manifest.

    sources: also compute this share (0 to 1, at least one tensor) of the tensors again, chosen at random.
    inputs: also compare the inputs with what was read when they were merged.  Both open the models that the
    recipe in the manifest names; its relative paths start from ``base_dir``, by default the working
    directory.  progress: called with a Progress, from worker threads, one at a time.

    Raises OutputError where there is nothing to verify, RecipeError for a ``sources`` that is no share,
    CheckpointError where inputs cannot be opened.
    """
    if sources is not None and not 0 < sources <= 1:
        raise RecipeError(f"sources {sources}: expected a share above 0 and at most 1 (100%)")
    out = Path(out)
    verdict = Verdict(out)
    work = _Work(verdict, threads or default_threads(), progress)
    manifest, single = _read_manifest(out, verdict)
    if manifest is None:
        return verdict
    spans = _spans(out, manifest, single, verdict)
    work.hash_all(spans)
    if sources is not None or inputs:
        with _plan(manifest, base_dir, allow_pickle) as plan:
            if inputs:
                work.hash_all(_input_spans(plan, manifest, verdict))
            if sources is not None:
                _recompute(plan, manifest, sources, verdict, work)
    return verdict


# ---- the manifest -----------------------------------------------------------------------------------------


def _read_manifest(out: Path, verdict: Verdict) -> tuple[dict[str, Any] | None, Header | None]:
    """The manifest, None where it is damaged; and the header of a single file."""
    if not os.path.lexists(out):
        raise OutputError("; ".join([f"{out}: nothing is there", *unfinished(Path(os.path.abspath(out)))]))
    header = None
    try:
        if out.is_dir():
            path = confined(out, MANIFEST)
            if not path.is_file():
                raise OutputError(f"{out}: holds no {MANIFEST}; only what della has merged can be verified")
            raw = text = _read_bounded(path)
        else:
            header, raw, _ = read_header(out)
            text = embedded(header)
            if not text:
                raise OutputError(f"{out}: no manifest in its header; only what della has merged has one")
        if not is_sealed(raw):
            raise CheckpointError(f"{out if header else out / MANIFEST}: changed since it was written")
        manifest = json_object(text, str(out / MANIFEST))
        if manifest.get("format") != FORMAT:
            raise OutputError(
                f"{out}: its manifest has format {str(manifest.get('format'))[:20]}, and this version of "
                f"della knows {FORMAT}; merge again, or use the version that made it"
            )
        _check_manifest(manifest, str(out))
    except CheckpointError as error:
        verdict.bad += error.problems
        return None, None
    return manifest, header


def _read_bounded(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MOST_BYTES:
        raise CheckpointError(f"{path}: larger than {MOST_BYTES:,} bytes, which no manifest is")
    return raw


def _check_manifest(manifest: Mapping[str, Any], where: str) -> None:
    """A sealed manifest may still be hostile: it must have the form that `della.merge` gives it."""
    inputs = manifest.get("inputs")
    listed = inputs.get("models") if isinstance(inputs, dict) else None
    sources = [inputs.get("base"), *listed] if isinstance(inputs, dict) and isinstance(listed, list) else [0]
    right = (
        _is_table(manifest.get("tensors"))
        and isinstance(manifest.get("recipe"), str)
        and isinstance(files := manifest.get("files"), dict)
        and all(
            isinstance(entry, dict)
            and type(entry.get("size")) is int
            and isinstance(entry.get("hash", entry.get("header_hash")), str)
            and not set(name) & set("/\\:\0")
            and name not in ("", ".", "..")
            for name, entry in files.items()
        )
        and all(isinstance(s, dict) and _is_table(s.get("tensors")) and _has_files(s) for s in sources)
    )
    if not right:
        raise CheckpointError(f"{where}: its manifest is not of the form that della writes")


def _has_files(source: Mapping[str, Any]) -> bool:
    files = source.get("files")
    return isinstance(files, list) and all(isinstance(file, dict) for file in files)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# ---- the files of the model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """Bytes that have a hash; ``said`` is what to say where it is another one."""

    path: Path
    offset: int
    nbytes: int
    hash: str
    said: str
    read: Callable[[int, memoryview], None] | None = None


def _spans(out: Path, manifest: Mapping[str, Any], single: Header | None, verdict: Verdict) -> list[_Span]:
    """Where every byte lies; files that are missing, strange, or have another size or header are told."""
    headers: dict[Path, Header] = {}
    spans: list[_Span] = []
    if single is not None:
        headers[out] = single
        verdict.files = 1
    else:
        verdict.files = len(manifest["files"]) + 1
        for name, entry in manifest["files"].items():
            try:
                path = confined(out, name)
                if "header_hash" in entry:
                    headers[path] = _header(path, entry)
                else:
                    spans.append(_side_file(path, name, entry))
            except CheckpointError as error:
                verdict.bad += error.problems
        _strangers(out, manifest, verdict)
    spans += _tensors(out, manifest, headers, verdict)
    return spans


def _header(path: Path, entry: Mapping[str, Any]) -> Header:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    header, raw, _ = read_header(path)
    if xxhash.xxh3_128_hexdigest(raw) != entry["header_hash"]:
        raise CheckpointError(f"{path}: its header has changed")
    return header


def _side_file(path: Path, name: str, entry: Mapping[str, Any]) -> _Span:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    size = path.stat().st_size
    if size != entry["size"]:
        raise CheckpointError(f"{path}: has {size:,} bytes, expected {entry['size']:,}")
    return _Span(path, 0, size, entry["hash"], f"{path}: changed")


def _tensors(
    out: Path, manifest: Mapping[str, Any], headers: Mapping[Path, Header], verdict: Verdict
) -> Iterator[_Span]:
    found: set[str] = set()
    for path, header in headers.items():
        for name, info in header.tensors.items():
            expected = manifest["tensors"].get(name)
            if expected is None or name in found:
                verdict.bad.append(f"{path}: tensor {name!r} is not in the manifest")
                continue
            found.add(name)
            verdict.tensors += 1
            verdict.nbytes += info.nbytes
            said = f"{path}: tensor {name!r} has changed"
            yield _Span(path, header.data_start + info.begin, info.nbytes, expected, said)
    lost = [name for name in manifest["tensors"] if name not in found]
    verdict.bad += [f"{out}: tensor {name!r} is lost, with the header of its file" for name in lost]


def _strangers(out: Path, manifest: Mapping[str, Any], verdict: Verdict) -> None:
    """Files that were not merged: weights among them could be loaded instead."""
    for entry in sorted(out.iterdir()):
        if entry.name in manifest["files"] or entry.name == MANIFEST:
            continue
        if entry.name.endswith((".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLES)):
            verdict.bad.append(f"{entry}: not part of this model, but may be loaded instead; move it away")
        else:
            verdict.notes.append(f"{entry}: not part of what was merged, and not verified")


# ---- hashing ----------------------------------------------------------------------------------------------


class _Work:
    """Hashes spans and computes tensors in several threads, with progress."""

    def __init__(self, verdict: Verdict, threads: int, progress: Callable[[Progress], None] | None) -> None:
        self.verdict, self.threads, self.progress = verdict, threads, progress
        self.lock = threading.Lock()
        self.done = self.total = self.finished = self.count = 0

    def hash_all(self, spans: Iterable[_Span]) -> None:
        """Compare every span with its hash; largest first."""
        self.each(self._hash, sorted(spans, key=lambda span: -span.nbytes), lambda span: span.nbytes)

    def each(
        self, work: Callable[[Any], str | None], items: Sequence[Any], size: Callable[[Any], int]
    ) -> None:
        """``work`` on every item; what it returns is bad."""
        self.total += sum(map(size, items))
        self.count += len(items)
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for item, said in zip(items, pool.map(work, items), strict=True):
                    if said:
                        self.verdict.bad.append(said)
                    self.advance(0, str(getattr(item, "name", "")), finished=1)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _hash(self, span: _Span) -> str | None:
        digest = xxhash.xxh3_128()
        buffer = memoryview(bytearray(min(_PIECE, span.nbytes)))
        try:
            read = span.read or _reader(span.path)
            for start in range(0, span.nbytes, _PIECE):
                piece = buffer[: span.nbytes - start]
                read(span.offset + start, piece)
                digest.update(piece)
                self.advance(len(piece), span.path.name)
        except (OSError, CheckpointError) as error:
            return f"{span.said} or cannot be read ({error})"
        return None if digest.hexdigest() == span.hash else span.said

    def advance(self, count: int, name: str, finished: int = 0) -> None:
        """Tell of bytes read and items finished."""
        with self.lock:
            self.done += count
            self.finished += finished
            if self.progress is not None:
                self.progress(Progress(self.done, self.total, self.finished, self.count, name))


def _reader(path: Path) -> Callable[[int, memoryview], None]:
    def read(at: int, piece: memoryview) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            while piece:
                count = file.readinto(piece)
                if not count:
                    raise OSError("it ends too early")
                piece = piece[count:]

    return read


# ---- the sources ------------------------------------------------------------------------------------------


def _plan(manifest: Mapping[str, Any], base_dir: str | Path | None, allow_pickle: bool) -> Plan:
    recipe = read_recipe(manifest["recipe"] + "\n")
    if base_dir is not None:
        recipe = replace(recipe, path=Path(base_dir) / "recipe.yml")
    return make_plan(recipe, permissions=Permissions(pickle=allow_pickle))


def _input_spans(plan: Plan, manifest: Mapping[str, Any], verdict: Verdict) -> list[_Span]:
    """Every tensor of the inputs that was read; other files than those that were merged are told."""
    spans = []
    told = manifest["inputs"]
    pairs = [(plan.base, told["base"]), *zip(plan.models, told["models"], strict=False)]
    for source, entry in {id(source): (source, entry) for source, entry in pairs}.values():
        merged = {file.get("name"): file.get("fingerprint") for file in entry["files"]}
        now = {file.name: file.fingerprint for file in source.files}
        for name in sorted(merged.keys() | now.keys(), key=str):
            if merged.get(name) != now.get(name):
                verdict.bad.append(
                    f"{source.folder / str(name)}: not the file that was merged (size or header)"
                )
        for name, expected in entry["tensors"].items():
            tensor = source.tensors.get(name)
            if tensor is None:
                verdict.bad.append(f"{source.reference}: lacks tensor {name!r}, which was merged")
                continue
            said = f"{tensor.file}: tensor {name!r} is not what was merged"
            spans.append(_Span(tensor.file, 0, tensor.nbytes, expected, said, _from(source, name)))
            verdict.inputs += 1
    return spans


def _from(source: Source, name: str) -> Callable[[int, memoryview], None]:
    return lambda at, piece: source.read_into(source.tensors[name], at, piece)


def _recompute(plan: Plan, manifest: Mapping[str, Any], share: float, verdict: Verdict, work: _Work) -> None:
    """A sample of tensors, merged again."""
    known = manifest["tensors"]
    if (names := {job.name for job in plan.jobs}) != set(known):
        odd = sorted(names ^ set(known))
        verdict.bad.append(f"{verdict.out}: its sources give other tensors than it has ({odd[0]}, ...)")
    jobs = [job for job in plan.jobs if job.name in known]
    jobs = random.sample(jobs, min(len(jobs), max(1, round(share * len(jobs)))))
    compute = Compute(plan)
    bands = compute.model_bands() if any(map(needs_bands, jobs)) else {}

    def again(job: Job) -> str | None:
        digest = xxhash.xxh3_128()
        for stored in compute.pieces(job, bands.get(job.name), digests_of(job)):
            digest.update(stored.reshape(-1).view("u1").data)
            work.advance(stored.nbytes, job.name)
        return None if digest.hexdigest() == known[job.name] else f"{job.name}: its sources give other bytes"

    work.each(again, jobs, lambda job: job.nbytes)
    verdict.recomputed = len(jobs)
