"""What a model's folder holds: its files of weights, the tensors in them, its configuration.

Only headers and JSON are read.  What a folder says about itself is checked before it is believed: names in an
index stay in the folder, links stay in the folder or in its hub cache, each tensor has one home.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from della.checkpoint.header import Header, parse_header, read_header
from della.checkpoint.strict import json_object
from della.dtypes import DType
from della.errors import CheckpointError, listing

MOST_CONFIG_BYTES = 10_000_000
MOST_INDEX_BYTES = 100_000_000
STEMS = ("model", "diffusion_pytorch_model")
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")

# What is no letter of a shard's name: signs of a drive, stream, pattern, variable or URL, and signs that are
# taken for a slash.
SIGNS = set('\\:*?"<>|$%\u2044\u2215\u2216\u29f5\u29f8\u29f9')
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
DEVICE = re.compile(
    r"(con|prn|aux|nul|conin|conout|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 1000

# Suffixes that only quantised models give to their tensors; nested ones (quant_state) carry more behind.
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "GPTQ, AWQ or MLX",
    ".absmax": "bitsandbytes 4-bit",
    ".quant_map": "bitsandbytes 4-bit",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    ".weight_scale": "FP8",
    ".weight_scale_inv": "FP8",
}
QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}
UNQUANTISED = "give the unquantised model that it was made from, and quantise the merge instead"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``nbytes`` bytes from the absolute ``offset`` of ``file``, row-major."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class File:
    """A file of weights; ``fingerprint`` is xxh3_128 (hex) of its size (8 bytes, little-endian), header."""

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
    """A folder, understood.  ``tensors`` run file by file, in the order of their data."""

    tensors: dict[str, Tensor]
    files: list[File]
    config: dict[str, Any]


def read_folder(folder: Path, remote: Mapping[str, RawHeader] | None = None) -> Layout:
    """The model in ``folder``; ``remote`` holds the headers of weight files that were not downloaded.

    Raises CheckpointError.
    """
    remote = remote or {}
    names = sorted({path.name for path in folder.iterdir()} | remote.keys())
    files, index = weight_files(folder, names)
    config = read_config(folder)
    return _assemble(folder, files, index, config, remote)


def read_single(path: Path) -> Layout:
    """The model in one .safetensors file, with the config.json beside it.  Raises CheckpointError."""
    return _assemble(path.parent, [path.name], None, read_config(path.parent), {}, named=path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of ``folder``, or {}; a quantised model is refused.  Raises CheckpointError."""
    path = confined(folder, "config.json")
    if not path.is_file():
        return {}
    config = json_object(_read_small(path, MOST_CONFIG_BYTES), str(folder / "config.json"))
    quantisation = config.get("quantization_config") or config.get("quantization")
    if quantisation:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
        raise CheckpointError(
            f"{folder}: a model quantised by {QUANTISERS.get(str(method), str(method)[:60])} "
            f"(quantization_config in config.json) cannot be merged; {UNQUANTISED}. "
            "If its tensors are in fact plain, remove quantization_config from config.json"
        )
    return config


def weight_files(folder: Path, names: Collection[str]) -> tuple[list[str], dict[str, str] | None]:
    """Which of the ``names`` in ``folder`` hold its weights, and its index (tensor -> file) if it has one.

    Raises CheckpointError where there are none, or more than one reading.
    """
    for stem in STEMS:
        index, single = stem + INDEX, stem + ".safetensors"
        if index in names:
            weight_map = _read_index(folder, index)
            files = sorted(set(weight_map.values()))
            if single in names and single not in files:
                raise CheckpointError(
                    f"{folder}: {single} stands beside {index}, which does not name it; "
                    "some programs load one and some the other: move the stale one away"
                )
            return files, weight_map
        if single in names:
            return [single], None
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_model")]
    shards = [SHARD.fullmatch(name) for name in found]
    if len(found) == 1 and not shards[0]:
        return found, None
    if not found:
        raise CheckpointError(_why_no_weights(folder, names))
    families = {(match["stem"], match["count"]) for match in shards if match}
    if not all(shards) or len(families) != 1:
        raise CheckpointError(
            f"{folder}: several .safetensors files and no model{INDEX}: "
            f"{', '.join(found[:6])}; name the one file that is meant"
        )
    count = int(families.pop()[1])
    if sorted(int(match["number"]) for match in shards if match) != list(range(1, count + 1)):
        raise CheckpointError(
            f"{folder}: expected {count} shards, found {len(found)}: {', '.join(found[:6])}; "
            "download the missing ones"
        )
    return found, None


def confined(folder: Path, name: str) -> Path:
    """The file that ``name`` in ``folder`` leads to through links, which may not leave the folder or its hub
    cache (``models--*/snapshots/*`` may link to ``models--*``).  Raises CheckpointError."""
    try:
        home = folder.resolve()
        path = (home / name).resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder / name}: the link cannot be followed ({error})") from None
    roots = [home]
    for parent in home.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            roots.append(parent.parent)
    if not any(path.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{folder / name}: a link that leaves the folder, to {path}; put the file itself there"
        )
    return path


def _why_no_weights(folder: Path, names: Collection[str]) -> str:
    if "adapter_config.json" in names:
        return (
            f"{folder}: a LoRA adapter, not a whole model; adapters come in a later version: "
            "merge it into its base model first (peft: merge_and_unload), and give the result"
        )
    pickles = [name for name in names if name.endswith((*PICKLES, ".bin.index.json"))]
    if pickles:
        return pickle_refusal(folder / pickles[0])
    if any(name.endswith(".gguf") for name in names):
        return f"{folder}: holds only GGUF files; give the safetensors model that they were made from"
    found = f"found {', '.join(sorted(names)[:6])}" if names else "the folder is empty"
    return f"{folder}: no model here: expected model.safetensors or model{INDEX}, {found}"


def pickle_refusal(path: Path) -> str:
    """Why a .bin or .pt file is not read, and how to convert its model."""
    return (
        f"{path}: a pickle, which can run any code when it is loaded, so it is not read. "
        'If you trust its author, convert the folder once: python -c "from transformers import '
        "AutoModelForCausalLM as M; M.from_pretrained('FOLDER', dtype='auto').save_pretrained('CONVERTED')\""
    )


def _read_index(folder: Path, name: str) -> dict[str, str]:
    where = str(folder / name)
    path = confined(folder, name)
    if not path.is_file():
        raise CheckpointError(f"{where}: a broken link; download the file again")
    weight_map = json_object(_read_small(path, MOST_INDEX_BYTES), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected an object weight_map (tensor -> file), found none")
    if any(not isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{where}: weight_map must name a file for each tensor")
    bad = [
        f"{where}: names {file[:200]!r}, which {why}"
        for file in sorted(set(weight_map.values()))
        if (why := _why_hostile(file))
    ]
    if bad:
        raise CheckpointError(listing(bad))
    return weight_map


def _why_hostile(file: str) -> str:
    """What is wrong with a shard's name, or "".  Subfolders are fine; all that some system or program could
    read as a way out, as another file or as no file is not."""
    parts = file.split("/")
    outside = any(part in ("", ".", "..") for part in parts) or set(file) & set("\\:\0")
    if outside or not file.endswith(".safetensors"):
        return "is not a .safetensors file of this folder"
    if len(file.encode()) > MOST_PATH_BYTES or any(len(part.encode()) > MOST_NAME_BYTES for part in parts):
        return "is longer than the name of a file can be"
    # Some systems and programs fold letters that look alike into plain ones: a wide slash is a slash.
    folded = unicodedata.normalize("NFKC", file)
    if (
        folded.count("/") != file.count("/")
        or set(folded + file) & SIGNS
        or any(unicodedata.category(letter) in UNSEEN for letter in file)
        or any(_odd(part) for part in (*parts, *folded.split("/")))
    ):
        return "some systems do not read as a plain file of this folder; rename it here and in the folder"
    return ""


def _odd(part: str) -> bool:
    """Whether some system trims the name, expands it, or takes it for a device."""
    return (
        part in ("", ".", "..")
        or part != part.strip(" ").rstrip(".")
        or bool(part.startswith("~") or DEVICE.fullmatch(part))
    )


def _read_small(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError(f"{path}: {size:,} bytes, and {most:,} is the most")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def _assemble(
    folder: Path,
    names: list[str],
    index: Mapping[str, str] | None,
    config: dict[str, Any],
    remote: Mapping[str, RawHeader],
    named: Path | None = None,
) -> Layout:
    """Headers of all files ``names``, held against the index; every problem is told at once."""
    headers: dict[str, Header] = {}
    files: list[File] = []
    problems: list[str] = []
    for name in names:
        try:
            # A file that the user named is followed wherever it leads; one that the folder names is not.
            path = named.resolve() if named else confined(folder, name)
            if name in remote:
                raw, size = remote[name].raw, remote[name].size
                header = parse_header(raw, size, str(folder / name))
            elif path.is_file():
                header, raw, size = read_header(path, str(folder / name))
            else:
                why = "a broken link" if index is None else "the index names this file, but it is not there"
                problems.append(f"{folder / name}: {why}; download it again")
                continue
        except CheckpointError as error:
            problems.append(str(error))
            continue
        except OSError as error:
            problems.append(f"{folder / name}: cannot be read ({error.strerror})")
            continue
        headers[name] = header
        digest = xxhash.xxh3_128(size.to_bytes(8, "little") + raw).hexdigest()
        files.append(File(name, folder / name, size, digest))
    homes = _homes(folder, headers, problems) if index is None else _against(folder, headers, index, problems)
    _refuse_quantised(folder, homes, problems)
    if problems:
        raise CheckpointError(listing(problems))
    tensors = {
        info.name: Tensor(
            info.name, info.dtype, info.shape, folder / name, header.data_start + info.begin, info.nbytes
        )
        for name, header in headers.items()
        for info in header.tensors.values()
        if homes[info.name] == name
    }
    return Layout(tensors, files, config)


def _homes(folder: Path, headers: Mapping[str, Header], problems: list[str]) -> dict[str, str]:
    """tensor -> file, for files without an index."""
    homes: dict[str, str] = {}
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor in homes:
                problems.append(
                    f"{folder}: tensor {tensor!r} stands in {homes[tensor]} and in {name}, "
                    "and there is no index to say which one is meant"
                )
            homes[tensor] = name
    return homes


def _against(
    folder: Path, headers: Mapping[str, Header], index: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """tensor -> file as the index says; adds what the files say against it to ``problems``."""
    for tensor, name in index.items():
        if name in headers and tensor not in headers[name].tensors:
            problems.append(f"{folder / name}: tensor {tensor!r} is missing, which the index expects here")
    for name, header in headers.items():
        for tensor, info in header.tensors.items():
            if tensor not in index:
                problems.append(f"{folder / name}: tensor {tensor!r} is not in the index")
                continue
            home = headers.get(index[tensor])
            named = home.tensors.get(tensor) if home else None
            if named and (named.dtype, named.shape) != (info.dtype, info.shape):
                problems.append(
                    f"{folder}: tensor {tensor!r} is {named.dtype.name} {list(named.shape)} "
                    f"in {index[tensor]} but {info.dtype.name} {list(info.shape)} in {name}"
                )
    return dict(index)


def _refuse_quantised(folder: Path, tensors: Collection[str], problems: list[str]) -> None:
    for tensor in tensors:
        for suffix, method in QUANTISED.items():
            if tensor.endswith(suffix):
                problems.append(
                    f"{folder}: a model quantised by {method} (tensor {tensor!r}) cannot be merged; "
                    f"{UNQUANTISED}"
                )
                return
