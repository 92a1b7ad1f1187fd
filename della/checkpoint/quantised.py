"""Quantised models, recognised by name: their tensors are codes, and no mean of codes has a meaning."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def quantised_tensors(folder: Path, tensors: Collection[str]) -> Iterator[Problem]:
    """What is wrong with a model that has tensors which only a quantised one has; told once."""
    for tensor in tensors:
        for suffix, method in QUANTISED.items():
            if tensor.endswith(suffix):
                yield (
                    Problem(
                        f"a model quantised by {method} (tensor {tensor!r}) cannot be merged",
                        UNQUANTISED,
                        str(folder),
                        tensor,
                    )
                )
                return
