"""PyTorch's own files (.bin, .pt, .pth, .ckpt): read on request, and for the tensors in them alone.

Such a file is a pickle, which is a program.  It is only ever opened by torch.load with weights_only, which
knows how to build tensors and refuses everything else; what comes out passes the same gate as a safetensors
header.  In the zip format, torch.save's since 2020, a tensor's bytes lie in the file as they are, so they
are found once and then read by offset like any others.  The rest (the older format, transposed tensors) is
held as NumPy arrays.  torch is imported here and nowhere else.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from della.checkpoint.header import METADATA, Header, TensorInfo, tensor_info
from della.dtypes import DTYPES, Array
from della.errors import CheckpointError, Collector, Problem, either

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OLDEST_TORCH = (2, 10)  # before it, files are known that make weights_only run code or write out of bounds
ZIP = b"PK\x03\x04"
LEGACY = re.compile(rb"\x80[\x02\x03]\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\.")
LOCAL_HEADER_BYTES = 30
_IN_QUOTES = '"$`!\\'  # what a shell reads in double quotes
STATE_DICT = "a state dict is needed: a dict of tensors by name, and nothing else"

_NAMES = {dtype.torch_name: dtype.name for dtype in DTYPES.values() if dtype.torch_name}


def _conversion(path: Path) -> str:
    """A command that writes the tensors of a pickle beside it, as safetensors, and loads nothing else."""
    out = path.with_name(re.sub("^pytorch_model", "model", path.stem) + ".safetensors")
    program = (
        "import torch, safetensors.torch as s; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous().clone() for k, v in d.items()}}, {str(out)!r}, {{'format': 'pt'}})"
    )
    return "python -c " + (shlex.quote(program) if set(program) & set(_IN_QUOTES) else f'"{program}"')


def pickle_refusal(path: Path, *, on_hub: bool = False) -> Problem:
    """Why a .bin or .pt file is not read, and what to do; those of the Hub are not downloaded either."""
    allow = f"allow it with {either('--allow-pickle', 'allow_pickle=True')}, which needs torch"
    otherwise = f"download the folder yourself, give that, and {allow}" if on_hub else allow
    each = "each such file" if "-of-" in path.name else "it"
    newest = f"with torch {'.'.join(map(str, OLDEST_TORCH))} or newer"
    fix = otherwise if on_hub else f"convert {each} once, {newest}: {_conversion(path)}; or {otherwise}"
    said = "a pickle, which can run any code when it is loaded, so it is not read"
    return Problem(said, fix, str(path))


def read_pickle(path: Path, where: str) -> tuple[Header, bytes, int, dict[str, Array]]:
    """A file of torch.save: its tensors as a header, its table as bytes, its size, and what is held of it.

    The table is the sorted JSON list of [name, dtype, shape]; fingerprints have it in place of a header.
    A tensor that is held (name -> array of its bits, of any strides, read by `copy_bytes`) has the offset 0,
    the others have theirs in the file.  ``where`` names the file in messages.  Raises CheckpointError.
    """
    torch = _torch(where)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(32)
        if not (first.startswith(ZIP) or LEGACY.match(first)):
            raise CheckpointError(
                Problem(
                    f"not a file of torch.save: it begins with {first[:8]!r}",
                    "download the file again",
                    where,
                )
            )
        records = _records(path, where) if first.startswith(ZIP) else None
    except OSError as error:
        raise CheckpointError(Problem(f"cannot be read ({error.strerror})", subject=where)) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file may raise anything in zipfile and the unpackers under it
        raise CheckpointError(
            Problem(f"truncated or damaged: {str(error)[:200]}", "download it again", where)
        ) from error
    tensors = _state_dict(torch, _load(torch, path, where, mmap=records is not None), where)
    base = _mapped_at(tensors, records, where) if records is not None else None
    infos, held = _table(torch, tensors, base, where)
    table = sorted([info.name, info.dtype.name, info.shape] for info in infos)
    infos.sort(key=lambda info: (info.begin, info.end))
    return Header({info.name: info for info in infos}, {}, 0), json.dumps(table).encode(), size, held


def copy_bytes(bits: Array, start: int, buffer: memoryview) -> None:
    """Fills ``buffer`` (bytes) with what a row-major copy of ``bits`` holds from byte ``start`` on.

    Only the elements that are asked for are copied, whatever the strides of ``bits`` are.
    """
    width = bits.itemsize
    first, end = start // width, -(-(start + len(buffer)) // width)
    part = bits.reshape(-1)[first:end] if bits.flags.c_contiguous else bits.flat[first:end]
    skip = start - first * width
    np.frombuffer(buffer, np.uint8)[:] = part.view(np.uint8)[skip : skip + len(buffer)]


def _torch(where: str) -> Any:
    wanted = ".".join(map(str, OLDEST_TORCH))
    fix = f'pip install "torch>={wanted}", or give the model as safetensors'
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            Problem("reading a pickle needs torch, which is missing", fix, where)
        ) from error
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not match or (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise CheckpointError(
            Problem(
                f"reading a pickle needs torch {wanted} or newer, found {torch.__version__}: a hostile "
                "file gets past older ones",
                fix,
                where,
            )
        )
    return torch


def _load(torch: Any, path: Path, where: str, *, mmap: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged file may raise anything in torch's reader
        program = "TorchScript" if "TorchScript" in str(error) else ""
        if not program and not isinstance(error, pickle.UnpicklingError):
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                Problem(f"truncated or damaged: {why[:200]}", "download it again", where)
            ) from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1][:100]!r})" if found else f" ({program})" * bool(program)
        raise CheckpointError(
            Problem(
                f"holds more than tensors{what}, or is damaged",
                "it was refused, and nothing in it was run. Save its state dict alone, or give the "
                "model as safetensors",
                where,
            )
        ) from None


def _records(path: Path, where: str) -> dict[int, int]:
    """Offset -> size of the storages that lie in a zip file as they are, empty ones left out."""
    found: dict[int, int] = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            kind = info.filename.partition("/")[2]
            if kind == "byteorder" and archive.open(info).read(8) != sys.byteorder.encode():
                raise CheckpointError(
                    Problem(
                        "written on a machine of another byte order", "give the model as safetensors", where
                    )
                )
            if kind.startswith("data/") and info.file_size and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                local = file.read(LOCAL_HEADER_BYTES)
                if len(local) < LOCAL_HEADER_BYTES:
                    raise ValueError(f"record {info.filename[:100]!r} lies beyond the end")
                names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                found[info.header_offset + LOCAL_HEADER_BYTES + names] = info.file_size
    return found


def _state_dict(torch: Any, loaded: object, where: str) -> dict[str, Any]:
    """What was loaded, if it is a dict of plain tensors by name; every problem is told at once."""
    if not isinstance(loaded, dict):
        raise CheckpointError(Problem(f"holds one object of type {type(loaded).__name__}", STATE_DICT, where))
    inner = [name for name in ("state_dict", "model_state_dict", "module", "model") if name in loaded]
    if inner and isinstance(loaded[inner[0]], dict):
        raise CheckpointError(
            Problem(
                f"a training checkpoint: the weights are in its entry {inner[0]!r}",
                f"save that alone: torch.save(torch.load('FILE', weights_only=True)[{inner[0]!r}], "
                "'pytorch_model.bin')",
                where,
            )
        )
    tensors: dict[str, Any] = {}
    problems = Collector(CheckpointError)
    for name, value in loaded.items():
        if not isinstance(name, str):
            problems.add(f"the names must be strings, found one of type {type(name).__name__}", subject=where)
        elif name == METADATA or name.encode(errors="ignore").decode() != name:
            problems.add(
                f"tensor {name[:200]!r}: a name that no safetensors file can hold", subject=where, tensor=name
            )
        elif not isinstance(value, torch.Tensor):
            problems.add(f"entry {name[:200]!r} is of type {type(value).__name__}", STATE_DICT, where)
        else:
            tensors[name] = torch.Tensor.detach(value)  # without the attributes that a file may set
            what = _what_is_not_plain(torch, tensors[name])
            if what:
                problems.add(f"tensor {name[:200]!r} {what}", "give a plain, dense tensor", where, name)
    problems.raise_any()
    return tensors


def _what_is_not_plain(torch: Any, tensor: Any) -> str:
    if tensor.is_quantized:
        return "is quantised, and cannot be merged"
    if tensor.is_nested:
        return "is nested: rows of several lengths"
    if tensor.layout != torch.strided:
        return f"is sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.device.type != "cpu":
        return f"is on the {tensor.device.type} device: it has a shape, but no values"
    if type(tensor) is not torch.Tensor:
        return f"is of a class of its own ({type(tensor).__name__})"
    first = tensor.storage_offset()
    last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() and (first < 0 or last >= room or min(tensor.stride(), default=0) < 0):
        return "reaches beyond its own storage"
    if tensor.numel() > room:
        return f"repeats what is stored once: {tensor.numel():,} elements, of which {room:,} are stored"
    return ""


def _mapped_at(tensors: dict[str, Any], records: dict[int, int], where: str) -> int | None:
    """The address where torch has mapped the file, or None if its storages do not show it.

    The storages, which have addresses, are the records, which have offsets, moved by that address.  Raises
    CheckpointError for a storage of a size that no record has: torch itself would read on into the next one.
    """
    storages = {(s.data_ptr(), s.nbytes()) for t in tensors.values() if (s := t.untyped_storage()).nbytes()}
    lies = Counter(size for _, size in storages) - Counter(records.values())
    if lies:
        raise CheckpointError(
            Problem(
                f"damaged: the pickle expects a storage of {min(lies):,} bytes, and the file has none "
                "of that size, or packs it",
                "download the file again",
                where,
            )
        )
    if not storages:
        return None
    base = min(storages)[0] - min(records)
    return base if {(address - base, size) for address, size in storages} == set(records.items()) else None


def _table(
    torch: Any, tensors: dict[str, Any], base: int | None, where: str
) -> tuple[list[TensorInfo], dict[str, Array]]:
    """A checked entry for each tensor, and the bits of those that do not lie in the file from ``base`` on."""
    infos: list[TensorInfo] = []
    held: dict[str, Array] = {}
    problems = Collector(CheckpointError)
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        lies = base is not None and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        begin = tensor.data_ptr() - base if base is not None and lies and nbytes else 0
        torch_name = str(tensor.dtype).removeprefix("torch.")
        entry = {
            "dtype": _NAMES.get(torch_name, torch_name),
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + nbytes],
        }
        with problems:
            infos.append(tensor_info(name, entry, where))
        if not problems and not lies and nbytes:
            twin = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
            held[name] = tensor.resolve_conj().resolve_neg().view(twin).numpy()
    problems.raise_any()
    return infos, held
