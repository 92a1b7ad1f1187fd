"""Counter-based uniforms: element i of a stream is a pure function of (key, i), whatever was drawn before.

SplitMix64 (Steele, Lea and Flood, 2014) in counter form: state ``key + (i + 1) * GAMMA`` through its
finaliser. A uniform is the top 24 bits over 2^24, exact in float32, so a comparison ``u < q`` is the same on
every machine.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

GAMMA = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
UNIFORM_BITS = 24
DEFAULT_SEED = 42


def stream_key(seed: int, identity: str, tensor: str, purpose: str = "drop") -> int:
    """The 64-bit key of one stream: a hash of all that it is for.

    Args:
        seed: Of the merge.
        identity: Of the expert; empty for the stream that all share (systematic coupling).
        tensor: Its name.
        purpose: Keeps the random ranking order apart from the draws.

    >>> stream_key(42, "math", "w") == stream_key(42, "code", "w")
    False
    """
    parts = [str(seed), identity, tensor, purpose]
    message = b"".join(len(part := text.encode()).to_bytes(8, "little") + part for text in parts)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def bits64(key: int, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Elements ``start .. start + count`` of the stream as 64 random bits each, uint64 of shape (count,)."""
    index = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(key) + index * np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX2)
    return np.asarray(z ^ (z >> np.uint64(31)))


def uniforms(key: int, start: int, count: int, shift: int = 0) -> npt.NDArray[np.float32]:
    """Uniforms in [0, 1).

    Args:
        key: Of the stream.
        start: The first element.
        count: How many.
        shift: Rotates them around the circle, in units of 2^-24.

    Returns:
        float32 of shape (count,).

    >>> np.array_equal(uniforms(7, 0, 5)[2:], uniforms(7, 2, 3))
    True
    """
    ticks = (bits64(key, start, count) >> np.uint64(64 - UNIFORM_BITS)).astype(np.int64)
    ticks = (ticks + shift) & ((1 << UNIFORM_BITS) - 1)
    return np.asarray(ticks.astype(np.float32) * np.float32(2.0**-UNIFORM_BITS))


def systematic_shift(position: int, experts: int) -> int:
    """The rotation of expert ``position`` of ``experts`` that share one uniform: position / experts of a
    circle.
    """
    return (position << UNIFORM_BITS) // experts
