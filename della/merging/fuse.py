"""Elect and Fuse, fast: the kernels behind reference.elect and reference.fuse, on tiles (float32,
C-contiguous).

``dropped`` is (experts, rows, n) in canonical order.  Votes: 0 none, 1 weighted, 2 unweighted, 3 count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from della.merging.kernel import inlined, kernel

VOTES = {"none": 0, "weighted": 1, "unweighted": 2, "count": 3}
_BLOCK = 2048  # positions that pass through all stages together: they stay in the first cache


@inlined
def _sign(x: Any) -> Any:
    return np.float32(np.float32(x > 0) - np.float32(x < 0))


@inlined
def _elect(weights: Any, vote: Any, dropped: Any, r: Any, begin: Any, signs: Any) -> None:
    """The elected signs of positions ``begin ..`` of row ``r`` into ``signs``."""
    for i in range(signs.shape[0]):
        signs[i] = np.float32(0)
    for t in range(weights.shape[0]):
        values = dropped[t, r, begin : begin + signs.shape[0]]
        if vote == 3:
            for i in range(signs.shape[0]):
                signs[i] += _sign(weights[t] * values[i])
        else:
            w = weights[t] if vote == 1 else _sign(weights[t])
            for i in range(signs.shape[0]):
                signs[i] += w * values[i]
    for i in range(signs.shape[0]):
        signs[i] = _sign(signs[i])


@kernel
def elect(weights: Any, vote: Any, dropped: Any, signs: Any) -> None:
    """reference.elect into ``signs`` (rows, n); ones where ``vote`` is 0."""
    rows, n = signs.shape
    for r in range(rows):
        if vote == 0:
            signs[r, :] = 1
            continue
        for begin in range(0, n, _BLOCK):
            _elect(weights, vote, dropped, r, begin, signs[r, begin : min(n, begin + _BLOCK)])


@kernel
def count_elected(weights: Any, vote: Any, dropped: Any, signs: Any, counts: Any) -> None:
    """Into ``counts`` (experts, rows, 2): how many of an expert's deltas are nonzero, and how many are
    elected.
    """
    experts, rows, n = dropped.shape
    for t in range(experts):
        for r in range(rows):
            nonzero, elected = 0, 0
            for i in range(n):
                value = dropped[t, r, i]
                nonzero += value != 0
                agrees = vote == 0 or (_sign(weights[t] * value) == signs[r, i] and signs[r, i] != 0)
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
    base: Any,
    weights: Any,
    vote: Any,
    mean: Any,
    scale: Any,
    dropped: Any,
    factors: Any,
    divisor: Any,
    out: Any,
) -> None:
    """reference.fuse into ``out`` (rows, n).

    ``factors``: (experts, rows or 1) of the adaptive scaling, or (experts, 0) for none.  ``divisor``: (rows,
    n) of the calibration, or (0, n) for none.
    """
    rows, n = base.shape
    signs, above = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    below = np.empty(_BLOCK, np.float32)
    for r in range(rows):
        for begin in range(0, n, _BLOCK):
            size = min(n - begin, _BLOCK)
            if vote != 0:
                _elect(weights, vote, dropped, r, begin, signs[:size])
            for i in range(size):
                above[i] = np.float32(0)
                below[i] = np.float32(0)
            for t in range(weights.shape[0]):
                w = weights[t]
                factor = factors[t, r % factors.shape[1]] if factors.shape[1] > 0 else np.float32(1)
                values = dropped[t, r, begin : begin + size]
                if vote == 0:
                    for i in range(size):
                        above[i] += w * values[i] * factor
                        below[i] += w
                else:
                    for i in range(size):
                        part = w * values[i]
                        agrees = ((part > 0) & (signs[i] > 0)) | ((part < 0) & (signs[i] < 0))
                        above[i] += part * factor if agrees else np.float32(0)
                        below[i] += w if agrees else np.float32(0)
            if mean:
                for i in range(size):
                    empty = below[i] == 0 if vote != 0 else abs(below[i]) < 1e-8
                    above[i] /= np.float32(1) if empty else below[i]
            if divisor.shape[0] > 0:
                for i in range(size):
                    above[i] /= divisor[r, begin + i]
            for i in range(size):
                out[r, begin + i] = base[r, begin + i] + scale * above[i]
