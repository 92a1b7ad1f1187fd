"""Input norms, by which ``importance: wanda`` ranks: the files that hold them, and what they may hold.

A file is safetensors.  Under the name of a weight (out, in) it has a vector of length in, in any float type:
for each input feature of that layer its L2 norm over the tokens of calibration data (WANDA, Sun et al. 2023,
arXiv 2306.11695).  `della calibrate` makes it.  A weight without an entry is ranked by |delta| alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from della.checkpoint.source import Source
from della.checkpoint.view import Hashes, TensorView
from della.dtypes import Array, widen
from della.errors import CheckpointError, Problem, suggest


def misfits(norms: Source, base: Source) -> Iterator[Problem]:
    """What is wrong with the names, shapes and types of a file of norms, by its header."""
    for name, ours in norms.tensors.items():
        theirs = base.tensors.get(name)
        if theirs is None:
            said = f"is not a tensor of {base.reference}"
        elif not theirs.dtype.is_float:
            said = f"is stored as {theirs.dtype.name} in {base.reference}, and only floats are ranked"
        elif not ours.dtype.is_float:
            said = f"is stored as {ours.dtype.name}, expected floats"
        else:
            said = misfit(ours.shape, theirs.shape) or ""
        if said:
            fix = suggest(name, base.tensors) if theirs is None else None
            yield Problem(f"input norms: {name} {said}", fix, norms.reference, name)


def misfit(shape: Sequence[int], weight: Sequence[int]) -> str | None:
    """Why norms of one shape cannot be those of a weight of another."""
    if len(weight) != 2:
        return f"has shape {list(weight)}; only a matrix (out, in) has input norms"
    if tuple(shape) != (weight[1],):
        return f"has norms of shape {list(shape)}, expected [{weight[1]}], one for each input feature"
    return None


def read_norms(view: TensorView, hashes: Hashes | None = None) -> Array:
    """One vector of a file as float32; ``hashes`` are fed its bytes.  Raises CheckpointError for values that
    cannot be norms.
    """
    return checked(view.read(hashes), view.where, view.name)


def checked(stored: Array, subject: str, tensor: str) -> Array:
    """Stored norms of ``tensor`` as float32, finite and not negative, or a CheckpointError."""
    with np.errstate(over="ignore"):
        norms = widen(stored).astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms >= 0)))
    if bad.size:
        are = f"{bad.size} of {norms.size} {'are' if bad.size > 1 else 'is'} not"
        said = f"tensor {tensor}: an input norm must be a finite number from 0 up, and {are}"
        said += f" (feature {bad[0]}: {norms[bad[0]]})"
        raise CheckpointError(Problem(said, "calibrate again", subject, tensor))
    return norms
