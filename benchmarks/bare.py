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

import della.cli
from della import compute, run
from della.checkpoint.journal import Journal
from della.merging import cast
from della.merging.kernel import kernel


class NoDigest:
    """In the place of xxhash."""

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


def strip(what: str) -> None:
    """Take away the safety that ``what`` names."""
    if what in ("finite", "all"):
        cast.widen_bf16 = widen_unseen
        cast.all_clear = lambda bits, special: True
    if what == "all":
        fake: Any = SimpleNamespace(xxh3_128=NoDigest, xxh3_128_hexdigest=lambda _: "0" * 32)
        vars(run)["xxhash"] = vars(compute)["xxhash"] = fake
        Journal._append = lambda self, record: None  # type: ignore[method-assign]


if __name__ == "__main__":
    assert numba.__version__  # started before the clock of the merge, as in `della` itself
    strip(sys.argv.pop(1))
    della.cli.main()
