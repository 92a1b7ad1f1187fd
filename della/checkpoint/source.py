"""A checkpoint as a read-only map from names to views of tensors, whatever it came from.

A reference is a folder, a .safetensors file, or ``owner/name[@revision]`` on the Hub; a pickle where the user
allows it.  Opening reads headers and configuration only.  `fetch` alone uses the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from della.checkpoint.files import is_file, is_there
from della.checkpoint.header import LENGTH_BYTES, header_length
from della.checkpoint.layout import (
    INDEX,
    Layout,
    RawHeader,
    read_folder,
    read_single,
    weight_files,
)
from della.checkpoint.pickles import PICKLES
from della.checkpoint.sides import HUB_FILES, below, checked_side_files
from della.checkpoint.view import Renamed, Stored, TensorView
from della.checkpoint.weights import Weights
from della.errors import CheckpointError, Problem, suggest

HUB_PAGE = re.compile(
    r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+?)(/(tree|blob)/(?P<revision>[\w.-]+))?/?",
    re.ASCII,
)
HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
WINDOWS_PATH = re.compile(r"[A-Za-z]:/|.*\\")
COMMIT = re.compile(r"[0-9a-f]{40}")
FIRST_READ = 1 << 17  # holds the whole header of most files, so most need one request


class _Absent(CheckpointError):
    """The Hub has no such model, or cannot say; a folder may have been meant."""


class Source:
    """An opened checkpoint; safe to read from several threads.  Close it, or use it in a with-block.

    It has ``tensors``, views by name, file by file in the order of their data; ``folder``, where it lies;
    ``config``, {} where there is no config.json; ``revision``, the commit of a Hub snapshot, else None;
    ``notes`` on what of the folder was not read; and ``instead``, what a result has in place of
    its side files: by name another file, bytes, or None.

    Args:
        reference: the model as its user names it.
        path: the folder or file that was opened.
        layout: what was found there.

    Example:
        >>> with open_source("one") as model:
        ...     [(name, view.shape, view.dtype.name) for name, view in model.tensors.items()]
        [('w', (2,), 'F32')]
    """

    def __init__(self, reference: str, path: Path, layout: Layout) -> None:
        self.reference = reference
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.files = layout.files
        self.config = layout.config
        self.notes = [f"{reference}: {note}" for note in layout.notes]
        self.revision = _commit_of(self.folder)
        self.instead: Mapping[str, Path | bytes | None] = {}
        self.piece: object = None  # of a source of some of its tensors, which: a part of its identity
        self._weights = Weights(reference, layout.files)
        self.tensors: dict[str, TensorView] = {
            name: Stored(entry, self._weights, layout.held.get(name))
            for name, entry in layout.tensors.items()
        }

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same source, whose tensors that ``names`` has are called otherwise; it shares the files."""
        return self.changed(
            {
                names.get(name, name): Renamed(names[name], view) if name in names else view
                for name, view in self.tensors.items()
            }
        )

    def changed(self, tensors: Mapping[str, TensorView]) -> Source:
        """The same source with other tensors; it shares the files."""
        made = copy(self)
        made.tensors = dict(tensors)
        return made

    @property
    def paths(self) -> list[Path]:
        """The folder or file that was opened, and every file of weights: what no result may touch."""
        return [self.path, *(file.path for file in self.files)]

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two sources of the same files, however they are named: by links, other spellings of a
        path, or another name of the same commit, of which not all need be here."""
        try:
            stats = [os.stat(file.path) for file in self.files]
        except OSError:
            stats = []
        if not all(found.st_ino for found in stats) or not stats:  # some systems have no such numbers
            return (self.path.resolve(), self.piece)
        return (*sorted((found.st_dev, found.st_ino, found.st_size) for found in stats), self.piece)

    @property
    def parts(self) -> dict[str, Stored]:
        """The stored tensors by name: all that reading its views can read."""
        parts = (part for view in self.tensors.values() for part in view.parts)
        return {part.name: part for part in parts if part.weights is self._weights}  # rows may be another's

    def side_files(self) -> dict[str, Path]:
        """Files of the tokenizer, the chat template and the generation settings, by name, also in subfolders:
        as `sides.checked_side_files`, but for ``instead``.  Raises CheckpointError."""
        own = checked_side_files(self.folder).items()
        files = {name: path for name, path in own if name not in self.instead}
        files |= {name: path for name, path in self.instead.items() if isinstance(path, Path)}
        return dict(sorted(files.items()))

    def close(self) -> None:
        """Close the files of weights."""
        self._weights.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(
    reference: str, *, base_dir: Path | None = None, weights: bool = True, allow_pickle: bool = False
) -> Source:
    """Open a model; headers and configuration are read, no tensor.

    Args:
        reference: a folder, a .safetensors file, or ``owner/name[@revision]`` on the Hub.
        base_dir: where a relative path is looked for before the working directory.
        weights: False opens a model of the Hub by its headers alone: only small files are downloaded.
        allow_pickle: read local files of torch.save too, by torch, and only for their tensors.

    Returns:
        A Source; close it, or use it in a with-block.

    Raises:
        CheckpointError: there is no such model, or it is damaged, hostile, or of no kind that can be merged.

    Example:
        >>> with open_source("one") as model:
        ...     model.tensors["w"].read()
        array([1., 2.], dtype=float32)
    """
    tried = _candidates(plain(reference), base_dir)
    for path in tried:
        try:
            if path.is_dir():
                path = _snapshot(path)
                return Source(reference, path, read_folder(path, allow_pickle=allow_pickle))
            if path.exists():
                return Source(reference, path, _read_file(path, allow_pickle))
        except OSError as error:  # a name too long to be one, a folder that may not be listed
            raise CheckpointError(
                Problem(f"cannot be opened ({error.strerror})", subject=str(path)[:1000])
            ) from error
    match = HUB_ID.fullmatch(plain(reference))
    if not match:
        raise CheckpointError(_not_found(reference, tried))
    try:
        folder, headers = fetch(match["repo"], match["revision"], weights=weights)
    except _Absent as error:
        said = f"{error}. No such folder either: tried {_shown(tried)}"
        raise CheckpointError(Problem(said, _near(tried))) from error
    return Source(reference, folder, read_folder(folder, headers))


def plain(reference: str) -> str:
    """A reference without the words of a browser: a page of the Hub is owner/name, file:// a path."""
    if page := HUB_PAGE.fullmatch(reference):
        return page["repo"] + (f"@{page['revision']}" if page["revision"] else "")
    return url2pathname(urlsplit(reference).path) if reference.startswith("file://") else reference


def _snapshot(folder: Path) -> Path:
    """Of a model's folder in a hub cache (models--owner--name) the snapshot that its main branch names, or
    the only one; any other folder itself.  Raises CheckpointError."""
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs/main"
    commit = main.read_text().strip() if is_file(main) else ""
    chosen = [path for path in found if path.name == commit] or (found if len(found) == 1 else [])
    if not chosen:
        said = f"a folder of a hub cache with {len(found)} snapshots, of which none is the main branch's"
        raise CheckpointError(Problem(said, "name one of its snapshots", str(folder)))
    return chosen[0]


def open_file(reference: str, *, base_dir: Path | None = None) -> Source:
    """Opens a single .safetensors file that is no model: neither a folder nor the Hub is looked at.

    Raises CheckpointError.
    """
    tried = _candidates(reference, base_dir)
    for path in tried:
        if is_there(path):
            if path.suffix != ".safetensors" or not is_file(path):
                raise CheckpointError(Problem("expected a .safetensors file", subject=str(path)))
            return Source(reference, path, read_single(path))
    raise CheckpointError(Problem(f"no such file; tried {_shown(tried)}", _near(tried), reference))


def _candidates(reference: str, base_dir: Path | None) -> list[Path]:
    if not reference or "\0" in reference:
        raise CheckpointError(
            f"{reference!r} is not a model: expected a folder, a .safetensors file or owner/name"
        )
    try:
        path = Path(reference).expanduser()
    except RuntimeError as error:
        raise CheckpointError(Problem(str(error), subject=reference)) from None
    roots = [Path.cwd()] if base_dir is None else [base_dir, Path.cwd()]
    return list(dict.fromkeys(root.absolute() / path for root in roots))


def _read_file(path: Path, allow_pickle: bool) -> Layout:
    if path.suffix in (".safetensors", *PICKLES):
        return read_single(path, allow_pickle=allow_pickle)
    raise CheckpointError(Problem("not a model: expected a folder or a .safetensors file", subject=str(path)))


def _commit_of(folder: Path) -> str | None:
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" and COMMIT.fullmatch(real.name) else None


def _not_found(reference: str, tried: list[Path]) -> Problem:
    if os.name != "nt" and WINDOWS_PATH.match(reference):
        said = "a Windows path, and this is not Windows"
        return Problem(said, "write it with / (under WSL: /mnt/c/...)", reference)
    if "+" in reference:
        said = "names a LoRA adapter (base+adapter), which is not part of this version yet"
        return Problem(said, "merge the adapter into its base first (or rename the folder)", reference)
    hub = None if "/" in reference else "a model of the Hub is written owner/name"
    return Problem(f"not found; tried {_shown(tried)}", _near(tried) or hub, reference)


def _shown(tried: list[Path]) -> str:
    return ", ".join(map(str, tried))


def _near(tried: list[Path]) -> str | None:
    """A hint at a folder or file beside one of the paths whose name is like its own."""
    for path in tried:
        with suppress(OSError):
            hint = suggest(path.name, (entry.name for entry in path.parent.iterdir()))
            if hint:
                return hint
    return None


def fetch(repo_id: str, revision: str | None, *, weights: bool) -> tuple[Path, dict[str, RawHeader]]:
    """Downloads a model of the Hub into the hub cache: its snapshot folder, and headers of what is not in it.

    With ``weights=False`` only configuration, index and side files are downloaded; of weight files that are
    not in the cache yet, the headers are read by range.  Where to, as whom and whether at all is up to
    huggingface_hub (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT).  Raises CheckpointError.
    """
    try:
        from huggingface_hub import HfFileSystem, snapshot_download
    except ImportError:
        raise CheckpointError(
            Problem("models of the Hub need huggingface_hub", "pip install huggingface_hub", repo_id)
        ) from None
    try:
        # Patterns match across "/"; the second one keeps to the top folder.
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]
            )
        )
        here = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        hub, root = HfFileSystem(), f"{repo_id}@{folder.name}"
        there, unreachable = _listing(hub, root)
        if unreachable and not any(name.endswith((".safetensors", INDEX)) for name in here):
            raise unreachable
        beside = [name for name in below(folder, there) if name not in here]
        if beside := [name for name in beside if weights or not name.endswith(".safetensors")]:
            snapshot_download(repo_id, revision=folder.name, allow_patterns=beside)
        wanted = [name for name in weight_files(folder, here | there, on_hub=True)[0] if name not in here]
        if wanted and unreachable:
            raise unreachable
        wanted = [name for name in wanted if name in there]
        if weights and wanted:
            snapshot_download(repo_id, revision=folder.name, allow_patterns=wanted)
        if weights or not wanted:
            return folder, {}
        with ThreadPoolExecutor(8) as pool:
            headers = pool.map(lambda name: _remote_header(hub, f"{root}/{name}"), wanted)
            return folder, dict(zip(wanted, headers, strict=True))
    except CheckpointError:
        raise
    except Exception as error:  # which ones it raises changes with the versions of huggingface_hub
        raise _hub_refusal(repo_id, revision, error) from error


def _listing(hub: Any, root: str) -> tuple[set[str], Exception | None]:
    """The files of a commit on the Hub; none, and why, when it cannot be reached: the cache may suffice."""
    try:
        return {name[len(root) + 1 :] for name in hub.find(root)}, None
    except Exception as error:
        return set(), error


def _remote_header(hub: Any, path: str) -> RawHeader:
    with hub.open(path, "rb", block_size=FIRST_READ, cache_type="readahead") as file:
        first = file.read(LENGTH_BYTES)
        return RawHeader(first + file.read(header_length(first, file.size, path)), file.size)


def _hub_refusal(repo_id: str, revision: str | None, error: BaseException) -> CheckpointError:
    from huggingface_hub import errors

    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            Problem("gated on the Hub", f"accept its terms on its page there, then {login}", repo_id)
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _Absent(f"{repo_id}: no such model on the Hub, or a private one; check the name, or {login}")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            Problem(f"no revision {revision!r} on the Hub", "check the branch, tag or commit", repo_id)
        )
    if isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # an answer, though the wrapper calls it a file that is not in the cache
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return _Absent(
            f"{repo_id}: not, or not wholly, in the hub cache, and the Hub cannot be reached; "
            "go online (HF_HUB_OFFLINE must not be set), or give a folder"
        )
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(Problem(f"cannot be fetched from the Hub: {first_line[:300]}", subject=repo_id))
