"""The whole Drop of `della` on rows of many kinds, beside the kernels of another checkout: medians of ratios.

    git worktree add OLD 22ea711; python -m benchmarks.ranking OLD [--rows 1024,4096] [--repeat 25] [KIND...]

Both run in turn in one loop, on the same tile of 65,536 deltas, and must give the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
TILE = 1 << 16
BF16 = np.uint32(0xFFFF0000)


def _cut(x: Array) -> Array:
    cut: Array = (x.view(np.uint32) & BF16).view(np.float32)
    return cut


def _bf16(base: Array, delta: Array) -> Array:
    found: Array = _cut(_cut(base) + delta) - _cut(base)
    return found


def _fp16(g: Array, more: Array) -> Array:
    base = (g * np.float32(0.02)).astype(np.float16).astype(np.float32)
    found: Array = (base + more * np.float32(0.001)).astype(np.float16).astype(np.float32) - base
    return found


KINDS: dict[str, Callable[[Any, Array], Array]] = {
    "gauss": lambda rng, g: g,
    "student t3": lambda rng, g: rng.standard_t(3, g.shape),
    "lora": lambda rng, g: rng.standard_normal((len(g), 16)) @ rng.standard_normal((16, g.shape[1])),
    "half zeros": lambda rng, g: np.where(rng.random(g.shape) < 0.5, g, 0),
    "70 % zeros": lambda rng, g: np.where(rng.random(g.shape) < 0.3, g, 0),
    "bf16": lambda rng, g: _bf16(g * np.float32(0.02), g[:, ::-1] * np.float32(0.001)),
    "fp16": lambda rng, g: _fp16(g, g[:, ::-1]),
    "constant": lambda rng, g: np.full(g.shape, 1.2345678),
    "5 distinct": lambda rng, g: g[0, rng.integers(0, 5, g.shape)],
    "1000 distinct": lambda rng, g: g[0, rng.integers(0, 1000, g.shape)],
    "log-normal": lambda rng, g: np.exp(3 * g),
    "uniform": lambda rng, g: rng.random(g.shape),
    "outlier columns": lambda rng, g: np.where(np.arange(g.shape[1]) < 16, g * 1000, g),
    "half x 1e-4": lambda rng, g: np.where(np.arange(g.shape[1]) % 2 == 0, g * 1e-4, g),
    "narrow": lambda rng, g: 1 + g * 1e-4,
    "every other row bf16": lambda rng, g: np.where(np.arange(len(g))[:, None] % 2 == 0, _cut(g), g),
    "random order": lambda rng, g: g,
}  # fmt: skip


def kernels(folder: str) -> Callable[[Array, bool], None]:
    """The Drop of the checkout in ``folder``, in place."""
    for name in [name for name in sys.modules if name.split(".")[0] == "della"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    magprune = importlib.import_module("della.merging.drops.magprune")
    tiles = importlib.import_module("della.merging.tile")
    for name in ("drop", "continuous"):
        with suppress(ModuleNotFoundError):  # before there was one
            importlib.import_module(f"della.merging.kernels.{name}")
    sys.path.pop(0)
    own = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "della"}
    subject = SimpleNamespace(experts=[tiles.Expert("a")], key=lambda t, what: 7)
    tile = SimpleNamespace(subject=subject, start=0)

    def run(x: Array, random_order: bool) -> None:
        sys.modules.update(own)  # as kernels are imported where they are called
        drop = SimpleNamespace(
            ladder_of=lambda *about: (0.4, 0.1 / x.shape[1]),
            stream=lambda *about: (9, 0),
            rescale=SimpleNamespace(per_element=True),
        )
        magprune._Rows(not random_order).apply(drop, tile, 0, x, [], None)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old")
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rows", default="1024,4096,14336", help="lengths of rows")
    parser.add_argument("--repeat", type=int, default=25)
    given = parser.parse_intermixed_args()
    runs = kernels(given.old), kernels(".")
    for kind in given.kinds:
        for n in map(int, given.rows.split(",")):
            rng = np.random.default_rng(n)
            gauss = rng.standard_normal((max(TILE // n, 1), n)).astype(np.float32)
            x = np.ascontiguousarray(KINDS[kind](rng, gauss), np.float32)
            times: list[tuple[float, float]] = []
            for turn in range(given.repeat + 1):
                took, tiles = [0.0, 0.0], [x.copy(), x.copy()]
                for which in (0, 1) if turn % 2 else (1, 0):
                    start = time.perf_counter()
                    runs[which](tiles[which], kind == "random order")
                    took[which] = (time.perf_counter() - start) / x.size * 1e9
                assert tiles[0].tobytes() == tiles[1].tobytes(), (kind, n)
                times += [(took[0], took[1])] if turn else []
            old, new = (min(column) for column in zip(*times, strict=True))
            ratio = statistics.median(a / b for a, b in times)
            print(f"{kind:22} {n:6} old {old:6.2f} new {new:6.2f} ns  old / new {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()
