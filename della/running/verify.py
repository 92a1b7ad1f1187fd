"""`della verify`: is a merged model, byte for byte, what was merged; and would its sources give it again?

A manifest is believed no more than any other file: what it says is checked before it is used.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import xxhash

from della.checkpoint.header import Header, read_header
from della.checkpoint.layout import MOST_INDEX_BYTES, confined, read_small, why_no_file
from della.checkpoint.pickles import PICKLES
from della.checkpoint.sides import SIDE_FILES, TEMPLATES
from della.checkpoint.source import HUB_ID, Source, plain
from della.checkpoint.strict import json_object
from della.errors import CheckpointError, DellaError, OutputError, Problem, RecipeError, printable
from della.options import Checks, Execution, Permissions, spelt
from della.output.between import Between, kept
from della.output.manifest import MANIFEST, Entry, Manifest, Recorded, read_manifest, versions
from della.output.shards import INDEX
from della.output.staging import unfinished
from della.planning.job import Job, Plan
from della.planning.planner import make_plan
from della.planning.published import is_absolute
from della.recipe.documents import read_documents
from della.recipe.reader import Recipe
from della.running.compute import Compute
from della.running.hashing import Check, Hashing, of_file
from della.running.run import Progress
from della.version import __version__

# What programs load from a model's folder unasked: a stranger of such a name changes the model.
_LOADED = (".safetensors", INDEX, ".bin.index.json", ".tiktoken", *PICKLES)
CARD = "README.md"
_LOADED_NAMES = {*SIDE_FILES, "config.json", "adapter_config.json"}


@dataclass
class Verdict:
    """What was found.

    Args:
        out: The model that was verified.
        problems: What is wrong; nothing if all is well.  ``bad`` has each as a line of text.
        notes: What is no fault, a line each.
        tensors: Tensors of the model that were checked.
        files: Files of it that were checked.
        nbytes: Bytes of these tensors.
        recomputed: Tensors that were merged again.
        inputs: Tensors of the inputs that were compared.

    >>> import della
    >>> out = della.merge("recipe.yml", "out").out
    >>> (out / "README.md").unlink()
    >>> della.verify(out).bad
    ['out/README.md: missing']
    """

    out: Path
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    files: int = 0
    nbytes: int = 0
    recomputed: int = 0
    inputs: int = 0

    @property
    def is_well(self) -> bool:
        return not self.problems

    @property
    def bad(self) -> list[str]:
        return [_line(str(problem)) for problem in self.problems]

    def tell(self, said: str, subject: object, tensor: str | None = None, fix: str | None = None) -> None:
        """Take up one more problem."""
        self.problems.append(Problem(said, fix, str(subject), tensor))


def verify(
    out: Path, wanted: Checks, permissions: Permissions, execution: Execution,
    progress: Callable[[Progress], None] | None = None,
) -> Verdict:  # fmt: skip
    """Compare every byte of ``out`` with its manifest, and what else is ``wanted``: as `della.verify`."""
    if not os.path.lexists(out):
        found = "; ".join(unfinished(Path(os.path.abspath(out))))
        raise OutputError(Problem("nothing is there", found or None, str(out)))
    try:
        manifest, single = read_manifest(out)
    except (OSError, CheckpointError) as error:
        return Verdict(out, list(_problems(error, out)))
    verdict, hashing = Verdict(out), Hashing(execution.workers, progress)
    with ExitStack() as stack:
        plan = None
        if wanted.sources is not None or wanted.inputs:
            plan = stack.enter_context(_plan(out, manifest, wanted.base_dir, permissions, stack))
        checks = _Model(out, manifest, single, verdict).checks()
        if plan and wanted.inputs:
            checks += _input_checks(plan, manifest, verdict)
        verdict.problems += hashing.faults(checks)
        if not wanted.strict:
            _pass_over_card(verdict)
        if plan and wanted.sources is not None:
            _recompute(plan, manifest, wanted.sources, verdict, hashing)
    verdict.problems = list(dict.fromkeys(verdict.problems))
    if (between := Between(out).folder).is_dir():
        verdict.notes.append(f"{between}: results of the recipe's other documents, which OUT does not need")
    verdict.notes = [_line(text) for text in verdict.notes]
    return verdict


def _line(text: str) -> str:
    """``text`` as one line: names of files and tensors may hold anything."""
    return printable(text).replace("\n", "\\n")


def _problems(error: OSError | CheckpointError, named: Path) -> Sequence[Problem]:
    if isinstance(error, CheckpointError):
        return error.problems
    return [Problem(f"cannot be read ({error.strerror})", subject=str(named))]


def _pass_over_card(verdict: Verdict) -> None:
    """A model card is there to be edited: that its content or size "has" changed is no fault."""
    card = verdict.out / CARD
    edited = [p for p in verdict.problems if p.subject == str(card) and p.said.startswith("has ")]
    if edited:
        verdict.problems = [problem for problem in verdict.problems if problem not in edited]
        verdict.notes.append(f"{card}: edited since the merge, as a model card may be")


# ---- the model itself -------------------------------------------------------------------------------------


class _Model:
    """The files of ``out``, held against its manifest.

    Files that are missing, strange, or have another size or header are told to ``verdict`` at once.
    """

    def __init__(self, out: Path, manifest: Manifest, single: Header | None, verdict: Verdict) -> None:
        self.out, self.manifest, self.verdict = out, manifest, verdict
        self.headers: dict[Path, tuple[Path, Header]] = {}  # by the path to name: where links lead to
        self.damaged: list[Path] = []  # files whose tensors cannot be found
        if single is not None:
            self.headers[out] = out, single

    def checks(self) -> list[Check]:
        """One for every tensor and every other file."""
        found: list[Check] = []
        if self.headers:
            self.verdict.files = 1
        else:
            self.verdict.files = len(self.manifest.files) + 1
            for name, entry in self.manifest.files.items():
                named = self.out / name
                try:
                    found += self._file(named, entry)
                except (OSError, CheckpointError) as error:
                    self.verdict.problems += _problems(error, named)
                    self.damaged += [named] if entry.holds_tensors else []
            self._strangers()
        return [*self._tensors(), *found]

    def _file(self, named: Path, entry: Entry) -> list[Check]:
        """The check of a side file; of a file of tensors the header is read, and checked at once."""
        path = confined(self.out, named.relative_to(self.out).as_posix())
        if not os.path.lexists(named):
            raise CheckpointError(Problem("missing", subject=str(named)))
        if not path.is_file():
            raise CheckpointError(Problem(*why_no_file(path), str(named)))
        size = path.stat().st_size
        if size != entry.size:
            raise CheckpointError(Problem(f"has {size:,} bytes, expected {entry.size:,}", subject=str(named)))
        if not entry.holds_tensors:
            pieces = partial(of_file, path, 0, size)
            return [Check(str(named), None, "has changed", size, entry.hash, pieces)]
        header, raw, _ = read_header(path, str(named))
        if xxhash.xxh3_128_hexdigest(raw) != entry.hash:
            raise CheckpointError(Problem("its header has changed", subject=str(named)))
        self.headers[named] = path, header
        return []

    def _tensors(self) -> Iterator[Check]:
        found: set[str] = set()
        for named, (path, header) in self.headers.items():
            for name, info in header.tensors.items():
                expected = self.manifest.tensors.get(name)
                if expected is None or name in found:
                    self.verdict.tell(f"tensor {name!r} is not in the manifest", named, name)
                    continue
                found.add(name)
                self.verdict.tensors += 1
                self.verdict.nbytes += info.nbytes
                pieces = partial(of_file, path, header.data_start + info.begin, info.nbytes)
                yield Check(str(named), name, "has changed", info.nbytes, expected, pieces)
        self._lost([name for name in self.manifest.tensors if name not in found])

    def _lost(self, names: Sequence[str]) -> None:
        """Tensors that cannot be found, each with the file that held it as far as that can be known."""
        homes = self._index() if names and len(self.damaged) > 1 else {}
        for name in names:
            home = self.out / homes.get(name, "")
            paths = [home] if home in self.damaged else self.damaged or [self.out]
            self.verdict.tell(f"tensor {name!r} is lost", " or ".join(map(str, paths)), name)

    def _index(self) -> dict[str, str]:
        """tensor -> file, as the model's index says; {} where it says nothing that can be used."""
        for name in self.manifest.files:
            if name.endswith(INDEX):
                try:
                    raw = read_small(confined(self.out, name), MOST_INDEX_BYTES)
                    homes = json_object(raw, name).get("weight_map")
                except (OSError, CheckpointError):
                    continue
                if isinstance(homes, dict):
                    return {tensor: home for tensor, home in homes.items() if isinstance(home, str)}
        return {}

    def _strangers(self) -> None:
        """Files that were not merged."""
        ours = {*self.manifest.files, MANIFEST}
        folders = {home for name in ours for home in _homes(name)}
        for home in sorted(folders):
            try:
                names = sorted(home + entry.name for entry in (self.out / home).iterdir())
            except OSError as error:
                if not home:
                    self.verdict.tell(f"cannot be listed ({error.strerror})", self.out)
                continue  # what is missing is told of each file
            for name in names:
                if name not in ours and f"{name}/" not in folders:
                    self._stranger(name)

    def _stranger(self, name: str) -> None:
        last = name.rpartition("/")[2]
        is_template = name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")
        if is_template or name.endswith(_LOADED) or last in _LOADED_NAMES:
            said = "not part of this model, but programs may load it"
            self.verdict.tell(said, self.out / name, fix="move it away")
        else:
            self.verdict.notes.append(f"{self.out / name}: not part of what was merged, and not verified")


def _homes(name: str) -> Iterator[str]:
    """The folders that lead to a file, from "" on, each with its "/"."""
    parts = name.split("/")
    return ("".join(f"{part}/" for part in parts[:count]) for count in range(len(parts)))


# ---- its inputs -------------------------------------------------------------------------------------------


def _plan(
    out: Path, manifest: Manifest, base_dir: Path | None, permissions: Permissions, stack: ExitStack
) -> Plan:
    """The plan of the merge that made ``out``; its inputs are opened."""
    text = manifest.recipe
    try:
        recipe = read_documents(text if "\n" in text else text + "\n")
        recipe.check_at_once()
        paths = list(_relative(recipe))
        tried = [Path()] if base_dir else [Path(), *out.absolute().parents]
        holds_all = (each for each in tried if all(os.path.lexists(each / path) for path in paths))
        folder = base_dir or next(holds_all, None)
        if folder is not None:
            recipe = replace(recipe, path=folder / "recipe.yml")
        permissions = replace(permissions, allow_idle=True)  # it was merged so
        try:
            given = kept(out, [other.name for other in recipe.others], stack)
            return make_plan(recipe, permissions=permissions, given=given)
        except CheckpointError as error:
            raise CheckpointError(*error.problems, *_hint(paths, base_dir)) from error
    except RecipeError as error:
        raise RecipeError(*(p.within(f"{out}: in its manifest") for p in error.problems)) from error
    except OSError as error:
        raise CheckpointError(Problem(f"an input cannot be opened ({error})", subject=str(out))) from error


def _relative(recipe: Recipe) -> Iterator[str]:
    """The relative paths of a recipe."""
    norms = (model.input_norms for model in recipe.models)
    for reference in filter(None, (recipe.base_model, *(m.reference for m in recipe.models), *norms)):
        may_be_of_hub = HUB_ID.fullmatch(plain(reference)) and not reference.startswith(".")
        is_document = reference in {other.name for other in recipe.others}
        if not may_be_of_hub and not is_absolute(reference) and not is_document:
            yield reference


def _hint(paths: Sequence[str], base_dir: Path | None) -> Iterator[Problem]:
    """What to do where a relative path leads nowhere."""
    for path in paths:
        if not any(os.path.lexists(root / path) for root in (base_dir or Path(), Path())):
            said = "it starts where the recipe was, or in a folder that holds all inputs"
            yield Problem(said, f"name that folder: {spelt(Checks, 'base_dir', 'FOLDER')}", path)
            return


def _input_checks(plan: Plan, manifest: Manifest, verdict: Verdict) -> list[Check]:
    """One for every tensor of the inputs that was read; other files than those that were merged are told."""
    if (now := len(plan.models)) != (told := len(manifest.models)):
        verdict.tell(f"models in its recipe: {now}, in its manifest: {told}", verdict.out)
    found: dict[tuple[Source, str, str], Check] = {}
    pairs = [(plan.base, manifest.base), *zip(plan.others, manifest.others)]
    for model, was in zip(plan.models, manifest.models):
        pairs.append((model.source, was))
        if model.norms and was.norms:
            pairs.append((model.norms, was.norms))
        elif model.norms or was.norms:
            said = "input norms are in its recipe or in its manifest, and not in both"
            verdict.tell(f"{was.reference}: {said}", verdict.out)
    for source, was in pairs:
        _compare_files(source, was, verdict)
        parts = source.parts
        for name, expected in was.tensors.items():
            part = parts.get(name)
            if part is None:
                verdict.tell(f"tensor {name!r}, which was merged, is missing", source.reference, name)
                continue
            check = Check(str(part.file), name, "is not what was merged", part.nbytes, expected, part.pieces)
            found[source, name, expected] = check
    verdict.inputs = len(found)
    return list(found.values())


def _compare_files(source: Source, was: Recorded, verdict: Verdict) -> None:
    now = {file.name: file.fingerprint for file in source.files}
    for name in sorted(was.files.keys() | now.keys()):
        if name not in now:
            verdict.tell("was merged, and is no part of the model any more", source.folder / name)
        elif name not in was.files:
            verdict.tell("not among the files that were merged", source.folder / name)
        elif was.files[name] != now[name]:
            verdict.tell("not the file that was merged (its size or header)", source.folder / name)
    if was.revision and source.revision and was.revision != source.revision:
        verdict.notes.append(
            f"{source.reference}: merged at revision {was.revision}, compared with {source.revision}"
        )


# ---- the merge, again -------------------------------------------------------------------------------------


def _recompute(plan: Plan, manifest: Manifest, share: float, verdict: Verdict, hashing: Hashing) -> None:
    """A sample of the tensors, merged again."""
    out, known = verdict.out, manifest.tensors
    made = {job.name for job in plan.jobs}
    for name in (name for name in known if name not in made):
        verdict.tell(f"tensor {name!r} does not come from its sources", out, name)
    for name in sorted(made - known.keys()):
        verdict.tell(f"lacks tensor {name!r}, which its sources give", out, name)
    jobs = [job for job in plan.jobs if job.name in known]
    jobs = random.sample(jobs, min(len(jobs), max(1, round(share * len(jobs)))))
    compute = Compute(plan)
    compute.stop = hashing.stop
    try:
        facts = compute.learn() if any(job.of_whole_model for job in jobs) else {}
    except DellaError as error:
        verdict.problems += [problem.within(f"{out}: cannot be merged again") for problem in error.problems]
        return

    def merged(job: Job) -> Iterator[memoryview]:
        for stored in compute.pieces(job, facts.get(job.name)):
            yield stored.reshape(-1).view("u1").data

    def check(job: Job) -> Check:
        fault = "is not what its sources give"
        return Check(str(out), job.name, fault, job.nbytes, known[job.name], partial(merged, job))

    bad = hashing.faults([check(job) for job in jobs])
    verdict.problems += bad
    verdict.recomputed = len(jobs)
    then, now = manifest.versions, {"della": __version__} | versions()
    if bad and then != now:
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        told = ", ".join(f"{n} {then.get(n, 'unknown')} (here {now.get(n, 'none')})" for n in changed)
        verdict.notes.append(f"{out}: merged with {told}, which may be why its sources give other bytes")
