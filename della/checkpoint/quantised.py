"""Models whose tensors are codes (quantised): no mean of these has a meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from della.checkpoint.header import TensorInfo
from della.errors import CheckpointError, Problem

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
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or INT8",
    ".weight_scale_inv": "FP8",
    "_proj_blocks": "MXFP4",
    ".W_q": "HQQ",
}
# Tensors beside codes that turn them into values, in the names of any scheme.
SCALE = re.compile(
    r"scale|zero|absmax|amax|quant|codebook|centroid|lut\b|step_size|\bSCB\b|qparams|norm_factor|dequant",
    re.IGNORECASE,
)
# Integers of these are indices and masks, unless they are called a weight or have a scale of their shape.
BUFFERS = ("BOOL", "I64", "U64")
# What is called so is computed from the configuration, and is no weight.
BUFFER = re.compile(
    r"mask|index|position|causal|freq|rope|(^|[._])(ids|idxs?|cis|bias|tril|table)([._]|$)", re.IGNORECASE
)
MARKERS = ("scaled_fp8",)  # of whole files
WEIGHT = re.compile(r"(^|[._])q?weight(_packed|_codes)?(\._data)?$|_proj$|codes$", re.IGNORECASE)
QUANTISERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "mxfp4": "MXFP4"}
UNQUANTISED = "give the unquantised model that it was made from, and quantise the merge instead"


def refuse_quantised_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses a model whose configuration, or that of a part of it, tells of quantisation
    (CheckpointError).
    """
    parts = [config, *(part for key, part in config.items() if key.endswith("_config"))]
    quantisation = next(filter(None, map(_quantisation, parts)), None)
    if quantisation:
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
        raise CheckpointError(
            Problem(
                f"a model quantised by {QUANTISERS.get(str(method), str(method)[:60])} "
                "(quantization_config in config.json) cannot be merged",
                f"{UNQUANTISED}. If its tensors are in fact plain, remove quantization_config from "
                "config.json",
                str(folder),
            )
        )


def _quantisation(config: object) -> object:
    """What a configuration, or that of a part of a model (text_config), says about its quantisation."""
    return isinstance(config, dict) and (config.get("quantization_config") or config.get("quantization"))


def codes(folder: Path, infos: Sequence[TensorInfo]) -> Iterator[Problem]:
    """What is wrong with a model whose tensors are codes, told once."""
    names = [info.name for info in infos]
    if tensor := next((name for name in names if name.endswith(tuple(QUANTISED))), None):
        method = next(method for suffix, method in QUANTISED.items() if tensor.endswith(suffix))
        said = f"a model quantised by {method} (tensor {tensor!r}) cannot be merged"
        yield Problem(said, UNQUANTISED, str(folder), tensor)
        return
    modules: dict[str, list[TensorInfo]] = {}
    for info in infos:
        head = info.name.rpartition(".")[0]
        for module in {head, head.rpartition(".")[0], _module(info.name)} if info.dtype.is_float else ():
            modules.setdefault(module, []).append(info)
    for info in infos:
        if problem := _codes(folder, info, modules):
            yield problem
            return


def _codes(folder: Path, info: TensorInfo, modules: Mapping[str, Sequence[TensorInfo]]) -> Problem | None:
    """Why a tensor holds codes and no values, if it does: it has a scale beside it, or integers are called a
    weight."""
    if info.dtype.is_float and info.dtype.bits > 8:
        return None
    is_weight = bool(WEIGHT.search(info.name))
    is_table = not is_weight and info.dtype.name in BUFFERS
    if not info.dtype.is_float and not is_weight and len(info.shape) < 2:
        return None
    if is_table and BUFFER.search(info.name):
        return None
    beside = [
        other.name
        for prefix in dict.fromkeys((_module(info.name), info.name.rpartition(".")[0], info.name))
        for other in modules.get(prefix, ())
        if other.name != info.name and _is_scale(info, other, prefix, is_table)
    ]
    beside += [other.name for other in modules.get("", ()) if other.name in MARKERS and info.dtype.is_float]
    stored = f"{info.name!r} is stored in {info.dtype.torch_name}"
    if beside:
        said = f"a quantised model cannot be merged: tensor {stored}, with {beside[0]!r} beside it"
    elif not info.dtype.is_float and is_weight and len(info.shape) > 1:
        said = f"a quantised model cannot be merged: tensor {stored}, though it is a weight"
    else:
        return None
    return Problem(said, UNQUANTISED, str(folder), info.name)


def _is_scale(codes: TensorInfo, other: TensorInfo, prefix: str, is_table: bool) -> bool:
    """Whether ``other``, of the same module, is the scale of ``codes``: by its name or its shape; of what may
    be a table of indices, by both."""
    is_named = bool(SCALE.search(other.name.removeprefix(prefix)))
    if is_table:
        rows = codes.shape[0]
        return is_named and rows != 1 and (prod(other.shape) == 1 or other.shape[:1] == (rows,))
    return is_named or bool(prefix and _fits_as_scale(codes, other))


def _fits_as_scale(codes: TensorInfo, other: TensorInfo) -> bool:
    """Whether ``other``, of any name, has the shape of a scale: one value, or (of integers) one a row.

    A bias is none. Masks and tables of indices have none: their first axis is 1, or unlike their neighbour's.
    """
    if len(codes.shape) < 2 or codes.shape[0] == 1 or other.name.endswith("bias"):
        return False
    count = prod(other.shape)
    return count == 1 or (not codes.dtype.is_float and count == codes.shape[0])


def _module(name: str) -> str:
    """The module that owns a tensor; of X_blocks and X_scales the parameter X."""
    head, dot, last = name.rpartition(".")
    stem = re.sub(r"_(blocks|scales?|packed|codes|data)$", "", last)
    return f"{head}.{stem}" if dot and stem != last and not last.startswith(("weight", "_")) else head
