"""What a model's folder holds: its files of weights, the tensors in them, its configuration.

Only headers and JSON are read.  What a folder says about itself is checked before it is believed: names in an
index stay in the folder, links stay in the folder or in its hub cache, each tensor has one home.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from della.checkpoint.adapters import CONFIG, cure, factors, said_kind
from della.checkpoint.files import is_file, is_there, readable
from della.checkpoint.header import Header, parse_header, read_header
from della.checkpoint.names import why_hostile
from della.checkpoint.pickles import PICKLES, pickle_refusal, read_pickle
from della.checkpoint.quantised import codes, refuse_quantised_config
from della.checkpoint.strict import AGAIN, json_object
from della.dtypes import Array, DType
from della.errors import CheckpointError, Collector, Problem, some

MOST_CONFIG_BYTES = 10_000_000
MOST_INDEX_BYTES = 100_000_000
STEMS = ("model", "diffusion_pytorch_model")
PICKLE_STEMS = ("pytorch_model", "diffusion_pytorch_model")
INDEX = ".safetensors.index.json"
WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".onnx", ".npz", ".msgpack", ".h5")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``nbytes`` bytes from the absolute ``offset`` of ``file``, row-major.

    A tensor that `Layout.held` holds is read from there, and its offset says nothing.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class File:
    """A file of weights; ``fingerprint`` is xxh3_128 (hex) of its size (8 bytes, little-endian), header.

    A pickle has no header: the table of `pickles.read_pickle` counts as one.
    """

    name: str
    path: Path
    size: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class RawHeader:
    """The first 8 + length bytes of a file of ``size`` bytes that is not here, but on the Hub."""

    raw: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A folder, understood.  ``tensors`` run file by file, in the order of their data.

    ``held`` has the bits of those tensors of pickles that cannot be read by offset (`pickles.copy_bytes`);
    ``notes`` say what of the folder was not read.
    """

    tensors: dict[str, Tensor]
    files: list[File]
    config: dict[str, Any]
    held: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Kind:
    """How files of weights are called: ``stems`` by preference; others begin with one of ``prefixes``."""

    suffix: str
    stems: tuple[str, ...]
    prefixes: tuple[str, ...]

    @property
    def index(self) -> str:
        return self.suffix + ".index.json"

    def found(self, names: Collection[str]) -> list[str]:
        """Those of ``names`` that may hold a model's weights."""
        found = [name for name in names if name.endswith(self.suffix) and name.startswith(self.prefixes)]
        return [name for name in found if not name.startswith("adapter_model")]


SAFETENSORS = Kind(".safetensors", STEMS, ("",))
# Beside the weights, folders of pickles have optimizer.bin, training_args.bin and more of the kind.
PICKLE = Kind(".bin", PICKLE_STEMS, PICKLE_STEMS)


def read_folder(
    folder: Path, remote: Mapping[str, RawHeader] | None = None, *, allow_pickle: bool = False
) -> Layout:
    """The model in ``folder``; ``remote`` holds the headers of weight files that were not downloaded.

    With ``allow_pickle`` pickles are read where there are no safetensors.  Raises CheckpointError.
    """
    remote = remote or {}
    names = sorted({path.name for path in folder.iterdir()} | remote.keys())
    plain = SAFETENSORS.found(names) or any(name.endswith(INDEX) for name in names)
    kind = PICKLE if allow_pickle and not plain else SAFETENSORS
    files, index = weight_files(folder, names, kind)
    config = read_config(folder)
    found = _assemble(folder, files, index, config, remote, kind)
    if left := [name for name in names if name not in files and name.endswith(WEIGHTS)]:
        found.notes.append(f"{some(left, what='files')} beside {some(files, what='files')}: not read")
    return found


def read_single(path: Path, *, allow_pickle: bool = False) -> Layout:
    """The model in one file, with the config.json beside it.  Raises CheckpointError."""
    kind = PICKLE if path.suffix in PICKLES else SAFETENSORS
    if kind is PICKLE and not allow_pickle:
        raise CheckpointError(pickle_refusal(path))
    return _assemble(path.parent, [path.name], None, read_config(path.parent), {}, kind, named=path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``, or {}; a quantised model is refused.  Raises CheckpointError."""
    named = folder / "config.json"
    path = confined(folder, named.name)
    if not is_there(named):
        return {}
    if not is_file(path):
        raise CheckpointError(Problem(*why_no_file(path), str(named)))
    config = json_object(read_small(path, MOST_CONFIG_BYTES), str(named))
    refuse_quantised_config(folder, config)
    return config


def weight_files(
    folder: Path, names: Collection[str], kind: Kind = SAFETENSORS, *, on_hub: bool = False
) -> tuple[list[str], dict[str, str] | None]:
    """Which of the ``names`` in ``folder`` hold its weights, and its index (tensor -> file) if it has one.

    Raises CheckpointError where there are none, or more than one reading.
    """
    for stem in kind.stems:
        index, single = stem + kind.index, stem + kind.suffix
        if index in names:
            weight_map = _read_index(folder, index, kind)
            files = sorted(set(weight_map.values()))
            if single in names and single not in files:
                raise CheckpointError(
                    Problem(
                        f"{single} stands beside {index}, which does not name it",
                        "some programs load one and some the other: move the stale one away",
                        str(folder),
                    )
                )
            return files, weight_map
        if single in names:
            return [single], None
    found = kind.found(names)
    shards = [SHARD.fullmatch(name) for name in found]
    if len(found) == 1 and not shards[0]:
        return found, None
    if not found:
        raise CheckpointError(_why_no_weights(folder, names, kind, on_hub))
    families = {(match["stem"], match["count"]) for match in shards if match}
    if not all(shards) or len(families) != 1:
        raise CheckpointError(
            Problem(
                f"several {kind.suffix} files and no {kind.stems[0]}{kind.index}: {', '.join(found[:6])}",
                "name the one file that is meant",
                str(folder),
            )
        )
    count = int(families.pop()[1])
    if sorted(int(match["number"]) for match in shards if match) != list(range(1, count + 1)):
        raise CheckpointError(
            Problem(
                f"expected {count} shards, found {len(found)}: {', '.join(found[:6])}",
                "download the missing ones",
                str(folder),
            )
        )
    return found, None


def confined(folder: Path, name: str) -> Path:
    """The file that ``name`` in ``folder`` leads to through links, which may not leave the folder or its hub
    cache (``models--*/snapshots/*`` may link to ``models--*``).  Raises CheckpointError."""
    try:
        home = folder.resolve()
        path = (home / name).resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            Problem(f"the link cannot be followed ({error})", "put the file itself there", str(folder / name))
        ) from None
    roots = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent)
    if not any(path.is_relative_to(root) for root in roots):
        raise CheckpointError(
            Problem(
                f"a link that leaves the folder, to {path}", "put the file itself there", str(folder / name)
            )
        )
    return path


def why_no_file(path: Path) -> tuple[str, str]:
    """(what is wrong, what to do) about a name of a folder that leads to ``path``, which is not a file."""
    if path.exists():
        return "not a regular file", "put the file itself there"
    return "a broken link", "download the file again"


def _why_no_weights(folder: Path, names: Collection[str], kind: Kind, on_hub: bool) -> Problem:
    where = str(folder)
    if CONFIG in names:
        of_what = said_kind(folder)
        said = f"an adapter{f' ({of_what})' if of_what else ''}, not a whole model"
        return Problem(said, f"adapters come in a later version: {cure(folder, of_what)}", where)
    if "model_index.json" in names:
        said = "a pipeline of diffusers, of several models"
        return Problem(said, "name one of them, such as its transformer/ or unet/", where)
    pickles = [name for name in names if name.endswith((*PICKLES, ".bin.index.json"))]
    if pickles and kind is PICKLE:
        wanted = f"expected {kind.stems[0]}{kind.suffix} or {kind.stems[0]}{kind.index}"
        return Problem(f"{wanted}, found {', '.join(pickles[:6])}", "name the one file that is meant", where)
    if pickles:
        pickles.sort(key=lambda name: (name.endswith(".json"), name))
        return pickle_refusal(folder / pickles[0], on_hub=on_hub)
    if any(name.endswith(".gguf") for name in names):
        fix = "give the safetensors model that they were made from"
        return Problem("holds only GGUF files", fix, where)
    found = f"found {', '.join(sorted(names)[:6])}" if names else "the folder is empty"
    return Problem(f"no model here: expected model.safetensors or model{INDEX}, {found}", subject=where)


def _read_index(folder: Path, name: str, kind: Kind) -> dict[str, str]:
    where = str(folder / name)
    path = confined(folder, name)
    if not is_file(path):
        raise CheckpointError(Problem(*why_no_file(path), where))
    weight_map = json_object(read_small(path, MOST_INDEX_BYTES), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            Problem("expected an object weight_map (tensor -> file), found none", AGAIN, where)
        )
    if any(not isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(Problem("weight_map must name a file for each tensor", AGAIN, where))
    bad = [
        f"{where}: names {file[:200]!r}, which {why}"
        for file in sorted(set(weight_map.values()))
        if (why := why_hostile(file, kind.suffix))
    ]
    if bad:
        raise CheckpointError(*bad)
    return weight_map


def check_small(path: Path, most: int) -> None:
    """Refuses a file of more than ``most`` bytes (CheckpointError)."""
    size = path.stat().st_size
    if size > most:
        raise CheckpointError(Problem(f"{size:,} bytes, and {most:,} is the most", AGAIN, str(path)))


def read_small(path: Path, most: int) -> bytes:
    """What a file of at most ``most`` bytes holds.  Raises CheckpointError."""
    check_small(path, most)
    with readable(path):
        return path.read_bytes()


def _assemble(
    folder: Path,
    names: list[str],
    index: Mapping[str, str] | None,
    config: dict[str, Any],
    remote: Mapping[str, RawHeader],
    kind: Kind,
    named: Path | None = None,
) -> Layout:
    """Headers of all files ``names``, held against the index; every problem is told at once."""
    headers: dict[str, Header] = {}
    held: dict[str, dict[str, Array]] = {}
    files: list[File] = []
    problems = Collector(CheckpointError)
    for name in names:
        where = folder / name
        with problems, readable(where):
            # A file that the user named is followed wherever it leads; one that the folder names is not.
            path = named.resolve() if named else confined(folder, name)
            if name in remote:
                raw, size = remote[name].raw, remote[name].size
                header = parse_header(raw, size, str(where))
            elif is_file(path) and kind is PICKLE:
                header, raw, size, held[name] = read_pickle(path, str(where))
            elif is_file(path):
                header, raw, size = read_header(path, str(where))
            elif index is not None and not is_there(where):
                said = "the index names this file, but it is not there"
                raise CheckpointError(Problem(said, AGAIN, str(where)))
            else:
                raise CheckpointError(Problem(*why_no_file(path), str(where)))
            headers[name] = header
            digest = xxhash.xxh3_128(size.to_bytes(8, "little") + raw).hexdigest()
            files.append(File(name, where, size, digest))
    homes = _homes(folder, headers, problems) if index is None else _against(folder, headers, index, problems)
    infos = [info for header in headers.values() for info in header.tensors.values()]
    problems.extend(list(factors(folder, infos, names)) or codes(folder, infos))
    problems.raise_any()
    tensors = {
        info.name: Tensor(
            info.name, info.dtype, info.shape, path, header.data_start + info.begin, info.nbytes
        )
        for name, header in headers.items()
        for path in [folder / name]
        for info in header.tensors.values()
        if homes[info.name] == name
    }
    twice = [
        f"{info.name} stands in {homes[info.name]} and in {name}; the index says {homes[info.name]}"
        for name, header in headers.items()
        for info in header.tensors.values()
        if homes[info.name] != name
    ]
    bits = {t: array for name, arrays in held.items() for t, array in arrays.items() if homes[t] == name}
    return Layout(tensors, files, config, bits, twice)


def _homes(folder: Path, headers: Mapping[str, Header], problems: Collector) -> dict[str, str]:
    """tensor -> file, for files without an index."""
    homes: dict[str, str] = {}
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor in homes:
                problems.add(
                    f"tensor {tensor!r} stands in {homes[tensor]} and in {name}, and there is no index "
                    "to say which one is meant",
                    "download the index again",
                    str(folder),
                    tensor,
                )
            homes[tensor] = name
    return homes


def _against(
    folder: Path, headers: Mapping[str, Header], index: Mapping[str, str], problems: Collector
) -> dict[str, str]:
    """tensor -> file as the index says; adds what the files say against it to ``problems``."""
    for tensor, name in index.items():
        if name in headers and tensor not in headers[name].tensors:
            problems.add(
                f"tensor {tensor!r} is missing, which the index expects here",
                "download both again",
                str(folder / name),
                tensor,
            )
    for name, header in headers.items():
        for tensor, info in header.tensors.items():
            if tensor not in index:
                problems.add(
                    f"tensor {tensor!r} is not in the index",
                    "download both again",
                    str(folder / name),
                    tensor,
                )
                continue
            home = headers.get(index[tensor])
            named = home.tensors.get(tensor) if home else None
            if named and (named.dtype, named.shape) != (info.dtype, info.shape):
                problems.add(
                    f"tensor {tensor!r} is {named.dtype.name} {list(named.shape)} in {index[tensor]} "
                    f"but {info.dtype.name} {list(info.shape)} in {name}",
                    "download both again",
                    str(folder),
                    tensor,
                )
    return dict(index)
