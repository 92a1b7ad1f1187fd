"""Elect and Fuse, fast: the kernels behind reference.elect and reference.fuse, on tiles (float32,
C-contiguous).

``dropped`` holds delta' of the experts in canonical order, each (rows, n).  ``weights`` and ``votes`` (what
an expert's delta' counts for in the vote) are as many numbers.  Few experts come as tuples: their number is
then known to the compiler, which keeps all that belongs to one position in registers.  ``votes`` is None
where nothing is elected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.merging.kernels.compile import inlined, kernel


@inlined
def _sign(x: Any) -> Any:
    return np.float32(np.float32(x > 0) - np.float32(x < 0))


@kernel
def elect(votes: Any, by_count: Any, dropped: Any, signs: Any) -> None:
    """reference.elect into ``signs``, flat; ones where ``votes`` is None."""
    for i in range(signs.shape[0]):
        total = np.float32(0)
        if votes is not None:
            for t in range(len(dropped)):
                vote = votes[t] * dropped[t][i]
                total += vote if by_count is None else _sign(vote)
        signs[i] = np.float32(1) if votes is None else _sign(total)


@kernel
def count_elected(weights: Any, voted: Any, dropped: Any, signs: Any, counts: Any) -> None:
    """Into ``counts`` (experts, rows, 2): how many deltas of an expert (``dropped``: (experts, rows, n)) are
    nonzero, and how many of those are elected."""
    for t in range(len(dropped)):
        for r in range(signs.shape[0]):
            nonzero, elected = 0, 0
            for i in range(signs.shape[1]):
                value = dropped[t, r, i]
                agrees = not voted or (_sign(weights[t] * value) == signs[r, i] and signs[r, i] != 0)
                nonzero += value != 0
                elected += (value != 0) & agrees
            counts[t, r, 0], counts[t, r, 1] = nonzero, elected


@kernel
def calibrate(weights: Any, deltas: Any, q: Any, signs: Any, out: Any) -> None:
    """reference.calibration into ``out`` (rows, n), float32."""
    experts, rows, n = deltas.shape
    members = np.empty(experts, np.int64)
    for r in range(rows):
        for i in range(n):
            size = 0
            for t in range(experts):
                if signs[r, i] != 0 and _sign(deltas[t, r, i] * weights[t]) == signs[r, i]:
                    members[size] = t
                    size += 1
            total = 0.0
            for survivors in range(1 << size):
                chance, above, below = 1.0, 0.0, 0.0
                for k in range(size):
                    keep = np.float64(q[members[k], r, i])
                    weight = np.float64(abs(weights[members[k]]))
                    if (survivors >> (size - 1 - k)) & 1:
                        chance *= keep
                        if keep > 0.0:
                            above += weight / keep
                            below += weight
                    else:
                        chance *= 1.0 - keep
                if below > 0.0:
                    total += chance * (above / below)
            out[r, i] = np.float32(total if total > 0.0 else 1.0)


@kernel
def fuse(
    base: Any, weights: Any, votes: Any, by_count: Any, mean: Any, scale: Any, dropped: Any, factors: Any,
    divisor: Any, out: Any,
) -> None:  # fmt: skip
    """reference.fuse into ``out``; everything flat.

    ``factors``: one number for each expert from the adaptive scaling, or None.  ``divisor``: of the
    calibration, or None.
    """
    for i in range(base.shape[0]):
        total, above, below = np.float32(0), np.float32(0), np.float32(0)
        if votes is not None:  # as in elect; a function for it would keep LLVM from vectorising
            for t in range(len(dropped)):
                vote = votes[t] * dropped[t][i]
                total += vote if by_count is None else _sign(vote)
        for t in range(len(dropped)):
            part = weights[t] * dropped[t][i]
            agrees = True if votes is None else ((part > 0) & (total > 0)) | ((part < 0) & (total < 0))
            if factors is not None:
                part = part * factors[t]
            above += part if agrees else np.float32(0)
            below += abs(weights[t]) if agrees else np.float32(0)
        if mean:
            empty = below < 1e-8 if votes is None else below == 0
            above /= np.float32(1) if empty else below
        if divisor is not None:
            above /= divisor[i]
        out[i] = base[i] + scale * above
