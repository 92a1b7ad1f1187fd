"""Whole safetensors files that mutations start from, written by the official package and by della."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from della.checkpoint.header import build_header
from della.dtypes import DTYPES

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16


def _ramp(dtype: Any, *shape: int) -> Any:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)


def _ours(*tensors: tuple[str, str, tuple[int, ...]], **metadata: str) -> bytes:
    raw, spans = build_header([(name, DTYPES[dtype], shape) for name, dtype, shape in tensors], metadata)
    return raw + bytes(n % 251 for n in range(max(end for _, end in spans.values())))


@cache
def files() -> tuple[bytes, ...]:
    """A dozen files: many dtypes, scalars, empty tensors, metadata, odd names, one tensor and hundreds.

    The official package writes several keys of metadata in random order, so those are left to della.
    """
    layer = {"q_proj": (4, 6), "k_proj": (2, 6), "v_proj": (2, 6), "norm": (6,)}
    model = {f"model.layers.{n}.{part}.weight": shape for n in range(8) for part, shape in layer.items()}
    return (
        save({"w": _ramp(F32, 2, 3)}),
        save({"w": _ramp(F16, 5)}, {"format": "pt"}),
        save({"a": _ramp(BF16, 3, 4), "b": _ramp(np.int64, 2), "c": _ramp(np.uint8, 7)}),
        save({"scalar": _ramp(np.float64), "flags": np.array([True, False]), "one": _ramp(F32, 1, 1)}),
        save({"empty": _ramp(F16, 0, 3), "none": _ramp(F32, 0), "full": _ramp(F32, 2)}),
        save(
            {"é": _ramp(F32, 1), "名前.weight": _ramp(F32, 2), "a b\tc": _ramp(F32, 1), "🎈": _ramp(F32, 1)}
        ),
        save({"x": _ramp(F32, 2)}, {'a "quote", a \\ and \n': "värde" * 9}),
        save({name: _ramp(BF16, *shape) for name, shape in model.items()}, {"format": "pt"}),
        save({f"t{n}": _ramp(np.uint8, n % 3) for n in range(150)}),
        _ours(("e", "F8_E4M3", (3, 2)), ("f", "F8_E5M2", (4,)), ("g", "I8", (2, 2)), k="v"),
        _ours(("z.weight", "BF16", (4, 4)), ("y.bias", "F16", ()), ("x", "I32", (0, 2)), ("v", "U16", (3,))),
        _ours(
            ("tied", "F64", (1,)),
            ("deep", "F32", (1, 1, 2, 1)),
            ("bool", "BOOL", (5,)),
            format="pt",
            note="é",
            more="",
        ),
    )
