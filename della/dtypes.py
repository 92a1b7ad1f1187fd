"""The storage types of safetensors: one table, and how each widens to the arithmetic type and rounds back.

Arithmetic is float32, or float64 where an input is float64.  Widening is exact; rounding is once, to nearest
even.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MAGNITUDE_BITS = np.uint32(0x7FFFFFFF)  # of a float32: as an integer they grow with |x|


@dataclass(frozen=True)
class DType:
    """One storage type: its safetensors ``name``, size in bytes, and its names elsewhere.

    ``kind`` is ``"float"`` (merged), ``"exact"`` (integers, bool: copied from the base) or ``"opaque"``
    (recognised so that it can be refused by name).  ``bits`` is the size of one element.
    """

    name: str
    bits: int
    kind: str
    numpy_name: str
    torch_name: str

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy (or ml_dtypes) twin."""
        scalar = getattr(ml_dtypes, self.numpy_name, None) or getattr(np, self.numpy_name)
        dtype: np.dtype[Any] = np.dtype(scalar)
        return dtype

    @property
    def is_float(self) -> bool:
        return self.kind == "float"


DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        DType("F64", 64, "float", "float64", "float64"),
        DType("F32", 32, "float", "float32", "float32"),
        DType("F16", 16, "float", "float16", "float16"),
        DType("BF16", 16, "float", "bfloat16", "bfloat16"),
        DType("F8_E4M3", 8, "float", "float8_e4m3fn", "float8_e4m3fn"),
        DType("F8_E5M2", 8, "float", "float8_e5m2", "float8_e5m2"),
        DType("I64", 64, "exact", "int64", "int64"),
        DType("I32", 32, "exact", "int32", "int32"),
        DType("I16", 16, "exact", "int16", "int16"),
        DType("I8", 8, "exact", "int8", "int8"),
        DType("U64", 64, "exact", "uint64", "uint64"),
        DType("U32", 32, "exact", "uint32", "uint32"),
        DType("U16", 16, "exact", "uint16", "uint16"),
        DType("U8", 8, "exact", "uint8", "uint8"),
        DType("BOOL", 8, "exact", "bool_", "bool"),
        DType("C64", 64, "exact", "complex64", "complex64"),
        DType("F8_E8M0", 8, "opaque", "float8_e8m0fnu", "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "opaque", "float8_e4m3fnuz", "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "opaque", "float8_e5m2fnuz", "float8_e5m2fnuz"),
        DType("F6_E2M3", 6, "opaque", "float6_e2m3fn", ""),
        DType("F6_E3M2", 6, "opaque", "float6_e3m2fn", ""),
        DType("F4", 4, "opaque", "float4_e2m1fn", ""),
    )
}

# What a recipe may write after `dtype:` and `out_dtype:`.
RECIPE_NAMES: dict[str, DType] = {
    **{d.torch_name: d for d in DTYPES.values() if d.kind == "float"},
    "bf16": DTYPES["BF16"],
    "fp16": DTYPES["F16"],
    "half": DTYPES["F16"],
    "fp32": DTYPES["F32"],
    "float": DTYPES["F32"],
    "fp64": DTYPES["F64"],
    "double": DTYPES["F64"],
}

_BY_NUMPY = {d.numpy: d for d in DTYPES.values() if d.kind != "opaque"}


def of_array(array: Array) -> DType:
    """The table row of an array's dtype; ``KeyError`` for a dtype that safetensors does not store.

    >>> of_array(np.zeros(2, np.float16)).name
    'F16'
    """
    return _BY_NUMPY[array.dtype]


def widen(stored: Array, out: Array | None = None) -> Array:
    """Stored values as arithmetic values, exactly: float64 stays, every other float becomes float32.

    Args:
        stored: Floats of any shape and type.
        out: float32 of the same shape, which receives the result.

    Returns:
        ``out``, or a new array (``stored`` itself where it has the type already).

    >>> widen(np.array([1.5], ml_dtypes.bfloat16))
    array([1.5], dtype=float32)
    """
    if stored.dtype == np.float64 or (stored.dtype == np.float32 and out is None):
        return stored
    if out is None:
        out = np.empty(stored.shape, np.float32)
    if stored.dtype == ml_dtypes.bfloat16:
        np.left_shift(stored.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    elif stored.dtype.itemsize == 1:
        np.take(_byte_table(stored.dtype), stored.view(np.uint8), out=out, mode="clip")
    else:
        np.copyto(out, stored)
    return out


_TABLES: dict[np.dtype[Any], Array] = {}


def _byte_table(dtype: np.dtype[Any]) -> Array:
    """All 256 values of an 8-bit float as float32: a look-up is faster than ml_dtypes' own cast."""
    if dtype not in _TABLES:
        _TABLES[dtype] = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return _TABLES[dtype]


def round_to(values: Array, dtype: DType) -> Array:
    """Arithmetic values rounded once, to nearest even, into a storage dtype.

    Overflow becomes infinity, or NaN where the type has none.

    >>> round_to(np.float32([2049, 1e6]), DTYPES["F16"]).tolist()
    [2048.0, inf]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if values.dtype == np.float64 and dtype.numpy_name not in ("float64", "float32", "float16"):
            values = _to_odd(values)
        return np.asarray(values.astype(dtype.numpy))


def _to_odd(values: Array) -> Array:
    """float64 to float32 by rounding to odd, after which rounding to a narrower type is right.

    ml_dtypes goes through float32 to nearest, and would round twice.
    """
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = np.isfinite(near) & (near.astype(np.float64) != values)
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(values))
    return np.where(inexact, (bits - away) | np.uint32(1), bits).view(np.float32)
