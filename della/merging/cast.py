"""Between storage and arithmetic, fast: widening, rounding, adding up, and the search for infinities.

bfloat16, which most models are stored in, has kernels of its own; other types go through NumPy (dtypes.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.merging.kernel import kernel

# The bits of infinities and NaNs in the storage types that have an exponent of all ones.
SPECIAL = {"F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80), "F32": np.uint32(0x7F800000)}
_EXPONENT = np.uint16(0x7F80)


@kernel
def widen_bf16(stored: Any, out: Any) -> Any:
    """bfloat16 bits (flat uint16) to float32 bits (uint32); whether all of them are finite."""
    special = np.uint16(0)
    for i in range(out.shape[0]):
        out[i] = np.uint32(stored[i]) << np.uint32(16)
        special |= np.uint16((stored[i] & _EXPONENT) == _EXPONENT)
    return special == 0


@kernel
def all_clear(bits: Any, special: Any) -> Any:
    """Whether no value (flat, as unsigned bits) has all bits of ``special``: its exponent's, for inf and
    NaN.
    """
    none = special ^ special
    found = none
    for i in range(bits.shape[0]):
        found |= special if (bits[i] & special) == special else none
    return found == none


@kernel
def accumulate(total: Any, weight: Any, values: Any) -> None:
    """total += weight * values, flat."""
    for i in range(total.shape[0]):
        total[i] += weight * values[i]


@kernel
def round_bf16(values: Any, out: Any) -> None:
    """float32 bits (flat uint32) to bfloat16 bits (uint16), to nearest even; a NaN stays a (quiet) NaN."""
    for i in range(out.shape[0]):
        x = values[i]
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (x >> np.uint32(16)) | np.uint32(0x40)
        out[i] = np.uint16(quiet if (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)
