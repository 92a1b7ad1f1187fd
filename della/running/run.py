"""Execute a Plan: compute its tensors, a job each, several at a time, and write them.

What an earlier run of the same merge has finished is used again; a part of n does its share of the files.
"""

from __future__ import annotations

import html
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from della.checkpoint.files import readable
from della.checkpoint.layout import STEMS
from della.checkpoint.source import Source
from della.checkpoint.view import Hashes, Stored
from della.errors import CheckpointError, DellaError, OutputError, Problem, distinct, either
from della.merging.kernels import cast
from della.options import Execution, Permissions, Target, spelt
from della.output.journal import Done
from della.output.manifest import MANIFEST, UNKNOWN, build_manifest, dump, embed, recorded, sealed, versions
from della.output.writer import StagedOutput
from della.planning.card import config_json, model_card, published, side_file
from della.planning.job import Job, Plan, html_table
from della.planning.published import portable_references, portable_text
from della.running import measure
from della.running.compute import Compute
from della.running.workers import each
from della.version import __version__

_MEASURED = 200  # bytes of a header for what is measured of a model


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: Bytes read and written.
        total: Of how many.
        tensors: Tensors that are finished.
        of_tensors: Of how many.
        name: The last tensor that was worked on.

    >>> import della
    >>> seen = []
    >>> _ = della.merge("recipe.yml", "out", progress=seen.append)
    >>> seen[-1]
    Progress(done=24, total=24, tensors=1, of_tensors=1, name='w')
    """

    done: int
    total: int
    tensors: int
    of_tensors: int
    name: str


@dataclass(frozen=True)
class Result:
    """A finished merge.

    Args:
        out: Where it is.
        manifest: What its della.json holds but the seal; {} for a part.
        seconds: Wall time.
        merging_seconds: Those of them in which tensors were merged.
        resumed: The number of tensors that an earlier run had finished.
        bytes_read: Bytes that were read for the others.
        bytes_written: Bytes that were written for them.

    >>> import della
    >>> result = della.merge("recipe.yml", "out")
    >>> result.bytes_read, result.bytes_written, result.manifest["seed"]
    (16, 8, 42)
    """

    out: Path
    manifest: dict[str, Any]
    seconds: float
    merging_seconds: float
    resumed: int
    bytes_read: int
    bytes_written: int

    def __repr__(self) -> str:
        tensors = f"{len(self.manifest.get('tensors', ()))} tensors"
        return f"<Result: {self.out}, {tensors}, {self.seconds:.1f} s>"

    def _repr_html_(self) -> str:
        """For notebooks: a row for each model."""
        coverage = self.manifest.get("coverage", {})
        rows = [(name, f"{own['merged']} of {own['of']}", own["changed"]) for name, own in coverage.items()]
        heads = ("model", "tensors that take part", "of the result changed")
        return f"<p>{html.escape(repr(self))}</p>{html_table(heads, rows)}"


def run(
    plan: Plan, target: Target, execution: Execution, permissions: Permissions = Permissions(), *,
    progress: Callable[[Progress], None] | None = None, tell: Callable[[str], None] | None = None,
) -> Result:  # fmt: skip
    """Merge into ``target``, which is what it was until the last step.

    With a part of several only that share is computed, and ``finish`` puts the parts together.  Raises
    CheckpointError and OutputError.
    """
    started = time.monotonic()
    out, single, part = target.out, target.is_single, execution.part
    stamps = stamps_of(plan)
    names = None if target.record_paths else portable_references(plan.recipe)
    metadata, room = _embedded(plan, names) if single else (None, 0)
    staged = StagedOutput(
        out, _tensors(plan), execution.shard_bytes, target.overwrite, single, execution.fsync,
        metadata=metadata,
        inputs=[path for source in plan.sources for path in source.paths],
        stem=next((s for s in STEMS if plan.base.files[0].name.startswith(s)), STEMS[0]),
        key=key_of(plan, stamps, room),
        part=(part.number, part.count),
        finish=execution.finish,
    )  # fmt: skip
    try:
        with staged:
            cast.widen_bf16(np.zeros(0, np.uint16), np.zeros(0, np.uint32))  # Numba's own start takes 0.1 s
            staged_at = time.monotonic()
            work = _Run(plan, staged, execution, progress, tell)
            resumed = work.all()
            merging = time.monotonic() - staged_at
            _check_unchanged(plan, stamps)
            manifest: dict[str, Any] = {}
            if not part.is_whole:
                staged.end_part()
            else:
                plan = _measured(plan, staged, permissions, tell)
                manifest = _complete(plan, staged, room, permissions.keep_auto_map, names)
                staged.commit()
    except (DellaError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and staged.committed:
            raise KeyboardInterrupt(f"{out} is complete") from error
        if staged.kept and not execution.finish:
            again = f"the same {either('command', 'call')} resumes it"
            if staged.keeps:  # it would be refused again
                again = "they are not computed again"
            kept = f"{len(staged.done)} finished tensors are kept in {staged.kept}; {again}"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"the output is as it was; {kept}") from error
            first, *others = error.problems  # what it knows of file and tensor stays with it
            fix = f"{first.fix}; {kept}" if first.fix else kept
            raise type(error)(replace(first, fix=fix), *others) from error
        raise
    seconds = time.monotonic() - started
    return Result(out, manifest, seconds, merging, resumed, work.bytes_read, work.bytes_written)


def _measured(
    plan: Plan, staged: StagedOutput, permissions: Permissions, tell: Callable[[str], None] | None
) -> Plan:
    """The plan with what was learnt of its models.  Raises CheckpointError where it was no merge."""
    found = measure.told(plan, {name: done.measured for name, done in staged.done.items()}, plan.coverage)
    for text in measure.warnings(plan, found):
        if tell is not None:
            tell(text)
    if not permissions.allow_idle:
        staged.keeps = True  # the same merge may be wanted all the same
        measure.check_changes(plan, found, staged.done)
        staged.keeps = False
    return replace(plan, coverage=found)


def _tensors(plan: Plan) -> list[tuple[str, Any, tuple[int, ...]]]:
    return [(job.name, job.dtype, job.shape) for job in plan.jobs]


def stamps_of(plan: Plan) -> dict[str, str]:
    """By which a changed input is noticed: of a model of the Hub its commit, else size and time of change."""
    stamps = {}
    for source in plan.sources:
        for file in source.files:
            with readable(file.path):
                found = os.stat(file.path)
            stamp = source.revision or f"{found.st_size} {found.st_mtime_ns}"
            stamps[str(file.path)] = f"{file.fingerprint} {stamp}"
    return stamps


def _check_unchanged(plan: Plan, stamps: Mapping[str, str]) -> None:
    now = stamps_of(plan)
    names = ", ".join(path for path, stamp in stamps.items() if now.get(path) != stamp)
    if names:
        fix = "is something writing to it? Start again"
        raise CheckpointError(Problem("changed while it was merged", fix, names))


def key_of(plan: Plan, stamps: Mapping[str, str], room: int) -> str:
    """What the bytes of the weights depend on, and where they stand in a single file."""
    identities = [model.identity for model in plan.recipe.models]
    keys = sorted({view.key for job in plan.jobs for view in job.views})
    parts = [__version__, versions(), plan.recipe.text, identities, list(stamps.values()), keys, room]
    return json.dumps(parts, sort_keys=True)


def _manifest(
    plan: Plan,
    done: Mapping[str, Done],
    files: Mapping[str, Mapping[str, Any]],
    names: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The manifest, in which models are called as ``names`` has them, or else as in the recipe, which without
    ``names`` is recorded to the letter."""
    called_here = names or {}

    def record(source: Source) -> dict[str, Any]:
        found = recorded(source, hashes)
        return found | {"reference": called_here.get(source.reference, source.reference)}

    hashes: dict[Stored, str] = {}
    for job in plan.jobs:
        hashes.update(zip(job.parts, done[job.name].inputs, strict=True))
    models = []
    for model in plan.models:
        models.append(record(model.source) | {"identity": model.entry.identity})
        models[-1] |= {"input_norms": record(model.norms)} if model.norms else {}
    called = distinct(called_here.get(model.entry.reference, model.entry.reference) for model in plan.models)
    return build_manifest(
        recipe=plan.recipe.text if names is None else portable_text(plan.recipe, names),
        method=plan.recipe.merge_method,
        seed=plan.recipe.seed,
        base=record(plan.base),
        models=models,
        others=[record(source) for source in plan.others],
        coverage={name: each.as_dict for name, each in zip(called, plan.coverage, strict=True)},
        hashes={job.name: done[job.name].hash for job in plan.jobs},
        departures=plan.departures,
        files=files,
    )


def _embedded(plan: Plan, names: Mapping[str, str] | None) -> tuple[dict[str, str], int]:
    """Metadata of a single file before anything is known, and the bytes that it takes in the header: as many
    as what is measured may need."""
    manifest = _manifest(
        plan, {job.name: Done(UNKNOWN, (UNKNOWN,) * len(job.parts)) for job in plan.jobs}, {}, names
    )
    room = max(map(len, map(json.dumps, embed(manifest).values()))) + _MEASURED * len(plan.models)
    return embed(manifest, room), room


def _complete(
    plan: Plan, staged: StagedOutput, room: int, auto_map: bool, names: Mapping[str, str] | None
) -> dict[str, Any]:
    """Everything but the weights: side files and the manifest, which in a single file has ``room`` bytes of
    the header.  Returns the manifest."""
    if room:
        manifest = _manifest(plan, staged.done, {}, names)
        staged.rewrite_header(_tensors(plan), embed(manifest, room), sealed)
        return manifest
    files = {"README.md": model_card(plan, record_paths=names is None)}
    if plan.base.config:
        files["config.json"] = config_json(plan.base.config, plan.jobs, auto_map)
    files |= {name: side_file(path, auto_map) for name, path in plan.base.side_files().items()}
    made = {name: raw for name, raw in plan.base.instead.items() if isinstance(raw, bytes)}
    files |= {name: published(name, raw, auto_map, name) for name, raw in made.items()}
    for name, content in files.items():
        staged.add_file(name, content)
    table = {shard.name: _entry(shard.header, shard.size) for shard in staged.shards}
    index = dict([found]) if (found := staged.index()) else {}
    table |= {name: _entry(content) for name, content in sorted({**files, **index}.items())}
    manifest = _manifest(plan, staged.done, table, names)
    staged.add_file(MANIFEST, dump(manifest))
    return manifest


def _entry(content: bytes, size: int | None = None) -> dict[str, Any]:
    """Size and hash of a file; with ``size``, ``content`` is only the header of a file of tensors."""
    digest = xxhash.xxh3_128_hexdigest(content)
    if size is None:
        return {"size": len(content), "hash": digest}
    return {"size": size, "header_hash": digest}


class _Run:
    """One run over the jobs of a writer."""

    def __init__(
        self, plan: Plan, staged: StagedOutput, execution: Execution,
        progress: Callable[[Progress], None] | None, tell: Callable[[str], None] | None,
    ) -> None:  # fmt: skip
        self.staged, self.execution = staged, execution
        self.progress, self.tell = progress, tell or (lambda text: None)
        mine = {tensor for shard in staged.mine for tensor in shard.spans}
        # The largest go first, so that no thread ends much later.
        self.jobs = sorted((j for j in plan.jobs if j.name in mine), key=lambda job: -job.elements)
        self.compute = Compute(plan, execution.tile)
        self.total = sum(job.bytes_read + job.nbytes for job in self.jobs)
        self.done = self.finished = self.bytes_read = self.bytes_written = 0
        self.lock = threading.Lock()
        self.facts: Mapping[str, Any] = {}

    def all(self) -> int:
        """Finish every job; how many were finished before."""
        if self.staged.has_replaced:
            self.tell("what an unfinished run of another merge had left for this place was removed")
        if not self.jobs and not self.execution.part.is_whole:
            files = len(self.staged.shards)
            end = f"the result has {files} files; a smaller {spelt(Execution, 'shard_bytes')} makes more"
            self.tell(f"nothing to do for this part: {end}")
        threads, stop = self.execution.workers, self.compute.stop
        each(self._look, [job for job in self.jobs if job.name in self.staged.done], threads, stop=stop)
        before = self.finished
        left = [job for job in self.jobs if job.name not in self.staged.done]
        if before and left:
            self.tell(f"{before} of {len(self.jobs)} tensors were finished before; the merge is resumed")
        if self.execution.finish and left:
            said = f"{len(left)} of {len(self.jobs)} tensors are not finished ({left[0].name}, ...)"
            fix = f"run the parts that are missing, or leave out {spelt(Execution, 'finish')}"
            raise OutputError(Problem(said, fix, str(self.staged.out), left[0].name))
        if any(job.of_whole_model for job in left):
            self.facts = self._facts()
        each(self._one, left, threads, stop=stop)
        return before

    def _facts(self) -> Mapping[str, Any]:
        """What the method learns of the whole model; an earlier writer may have done so."""
        if not self.staged.facts:
            facts = self.compute.learn()
            self.staged.note_facts(facts)
            return facts
        return self.staged.facts

    def _look(self, job: Job) -> None:
        """A tensor that the journal calls finished: is it?"""
        if self.staged.holds(job.name):
            self._advance(job, job.bytes_read + job.nbytes, finished=1)

    def _one(self, job: Job) -> None:
        digest, inputs = xxhash.xxh3_128(), Hashes()
        probe = measure.Probe(job) if job.reads_base and job.method else None  # else there is no delta
        start = told = 0
        for stored in self.compute.pieces(job, self.facts.get(job.name), inputs, probe):
            raw = stored.reshape(-1).view(np.uint8).data
            self.staged.write(job.name, start, raw)
            digest.update(raw)
            start += raw.nbytes
            now = (job.bytes_read + job.nbytes) * start // job.nbytes
            self._advance(job, now - told)
            told = now
        done = Done(digest.hexdigest(), tuple(map(inputs.of, job.parts)), probe.measured() if probe else ())
        self.staged.finish(job.name, done)
        self._advance(job, 0, finished=1)
        with self.lock:
            self.bytes_read += job.bytes_read
            self.bytes_written += job.nbytes

    def _advance(self, job: Job, count: int, finished: int = 0) -> None:
        with self.lock:
            self.done += count
            self.finished += finished
            if self.progress is not None:
                self.progress(Progress(self.done, self.total, self.finished, len(self.jobs), job.name))
