"""`della` without some of its safety, to measure what that costs: python -m benchmarks.bare WHAT merge ...

WHAT is "nothing" (della as it is), "finite" (values are not looked at for NaN and infinity), or "all" (in
addition: nothing is hashed, and no journal is written).  The product has no switch for this; its functions
are replaced here.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np

import della.cli.main
from della.merging.kernels import cast
from della.merging.kernels.compile import kernel
from della.output.journal import Journal
from della.running import compute, run


class NoDigest:
    """Instead of xxhash."""

    def update(self, _: Any) -> None:
        """Looks at nothing."""

    def hexdigest(self) -> str:
        return "0" * 32


@kernel
def widen_unseen(stored: Any, out: Any) -> Any:
    """cast.widen_bf16 without a look at the values."""
    for i in range(out.shape[0]):
        out[i] = np.uint32(stored[i]) << np.uint32(16)
    return True


@kernel
def subtract_unseen(stored: Any, base: Any, out: Any, bits: Any) -> Any:
    """cast.subtract_bf16 without a look at the values."""
    for start in range(0, out.shape[0], 1 << 13):
        end = min(start + (1 << 13), out.shape[0])
        narrow, wide = stored[start:end], bits[start:end]
        for i in range(wide.shape[0]):
            wide[i] = np.uint32(narrow[i]) << np.uint32(16)
        difference, subtrahend = out[start:end], base[start:end]
        for i in range(difference.shape[0]):
            difference[i] -= subtrahend[i]
    return True


@kernel
def round_unseen(values: Any, out: Any) -> Any:
    """cast.round_bf16 without a look at the values."""
    for i in range(out.shape[0]):
        x = values[i]
        out[i] = np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return True


def strip(what: str) -> None:
    """Take away the safety that ``what`` names."""
    if what in ("finite", "all"):
        cast.widen_bf16, cast.subtract_bf16, cast.round_bf16 = widen_unseen, subtract_unseen, round_unseen
        cast.all_finite = lambda values, dtype: True
    if what == "all":
        fake: Any = SimpleNamespace(xxh3_128=NoDigest, xxh3_128_hexdigest=lambda _: "0" * 32)
        vars(run)["xxhash"] = vars(compute)["xxhash"] = fake
        Journal._append = lambda self, record: None  # type: ignore[method-assign]


if __name__ == "__main__":
    assert numba.__version__  # started before the clock of the merge, as in `della` itself
    strip(sys.argv.pop(1))
    della.cli.main.main()
