"""How kernels are compiled: by Numba on first use, without the GIL, cached on disk, without fast-math.

Fast-math would let the compiler reorder sums and fuse multiplications, and the bytes would depend on the
machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core import event

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile ``function`` for the argument types it is first called with."""
    return numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False)(function)  # type: ignore


def inlined(function: F) -> F:
    """A piece of kernels: compiled into each of them, and not to be called from Python."""
    return numba.njit(  # type: ignore
        nogil=True, error_model="numpy", boundscheck=False, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)


class _Listener(event.Listener):
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def on_start(self, _: Any) -> None:
        self.callback()

    def on_end(self, _: Any) -> None:
        pass


def on_compile(callback: Callable[[], None]) -> None:
    """Call ``callback`` from now on whenever a kernel is compiled; not where it is found on disk."""
    event.register("numba:compile", _Listener(callback))  # type: ignore[no-untyped-call]
