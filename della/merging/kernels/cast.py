"""Between storage and arithmetic, fast: widening, rounding, adding up, and the search for infinities.

bfloat16, which most models are stored in, has kernels of its own; other types go through NumPy (dtypes.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.dtypes import MAGNITUDE_BITS
from della.merging.kernels.compile import kernel

# Of the storage types with an exponent of all ones for infinities and NaNs: the bits of a magnitude, and the
# least one that is not finite.  A maximum is nearly free beside a pass over memory; finding a pattern is not.
MAGNITUDE = {
    "F16": (np.uint16(0x7FFF), 0x7C00),
    "BF16": (np.uint16(0x7FFF), 0x7F80),
    "F32": (MAGNITUDE_BITS, 0x7F800000),
}
_INFINITE = np.uint32(0x7F800000)
_OVERFLOW = np.uint32(0x7F7F8000)  # the least magnitude that bfloat16 rounds to infinity
_BLOCK = 1 << 13


@kernel
def widen_bf16(stored: Any, out: Any) -> Any:
    """bfloat16 bits (flat uint16) to float32 bits (uint32); whether all of them are finite."""
    largest = np.uint32(0)
    for i in range(out.shape[0]):
        wide = np.uint32(stored[i]) << np.uint32(16)
        out[i] = wide
        largest = max(largest, np.uint32(wide & MAGNITUDE_BITS))
    return largest < _INFINITE


@kernel
def subtract_bf16(stored: Any, base: Any, out: Any, bits: Any) -> Any:
    """out = stored - base, flat float32; ``stored`` are bfloat16 bits (uint16), ``bits`` is ``out`` as bits.

    Whether all of ``stored`` is finite.  Block by block, so that what is widened is still in the first cache.
    """
    largest = np.uint32(0)
    for start in range(0, out.shape[0], _BLOCK):
        end = min(start + _BLOCK, out.shape[0])
        narrow, wide = stored[start:end], bits[start:end]
        for i in range(wide.shape[0]):
            value = np.uint32(narrow[i]) << np.uint32(16)
            wide[i] = value
            largest = max(largest, np.uint32(value & MAGNITUDE_BITS))
        difference, subtrahend = out[start:end], base[start:end]
        for i in range(difference.shape[0]):
            difference[i] -= subtrahend[i]
    return largest < _INFINITE


@kernel
def largest_magnitude(bits: Any, magnitude: Any) -> Any:
    """The largest of ``bits & magnitude`` (flat, unsigned)."""
    largest = np.uint32(0)
    for i in range(bits.shape[0]):
        largest = max(largest, np.uint32(bits[i] & magnitude))
    return largest


def all_finite(values: Any, dtype: str) -> bool:
    """Whether no value (flat, in the storage type of this name in MAGNITUDE, or its bits) is inf or NaN."""
    magnitude, infinite = MAGNITUDE[dtype]
    return bool(largest_magnitude(values.view(magnitude.dtype), magnitude) < infinite)


@kernel
def accumulate(total: Any, weight: Any, values: Any) -> None:
    """total += weight * values, flat."""
    for i in range(total.shape[0]):
        total[i] += weight * values[i]


@kernel
def round_bf16(values: Any, out: Any) -> Any:
    """float32 bits (flat uint32) to bfloat16 bits (uint16), to nearest even; a NaN stays a (quiet) NaN.

    Whether all results are finite.
    """
    largest = np.uint32(0)
    for i in range(out.shape[0]):
        x = values[i]
        largest = max(largest, np.uint32(x & MAGNITUDE_BITS))
        out[i] = np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    if largest > _INFINITE:
        for i in range(out.shape[0]):
            if (values[i] & MAGNITUDE_BITS) > _INFINITE:
                out[i] = np.uint16((values[i] >> np.uint32(16)) | np.uint32(0x40))
    return largest < _OVERFLOW
