#!/usr/bin/env bash
# One slice assigned to another inside a Numba kernel makes it compile an error's text, several times the kernel itself.
#
# numba 0.68.1, llvmlite and numpy as it asks for, Python 3.11, Linux x86-64; seen on 2026-12-01.
#
# The kernels copy n elements from one array to another, one by a loop, the other by a[:n] = b[:n].  The first compiles one
# function; the second many more: repr and str of integers and tuples, concatenation of strings, code points, all
# for the message of "cannot assign slice of shape ...", though both slices have one dimension and the same length, and
# though error_model="numpy" and boundscheck=False are set.  It takes twenty times as long to compile (0.12 s and 2.7 s or
# more here; 2.7 s of 7 s in a real kernel), each time the kernel is not found in the cache.
# a[:] = 0 compiles nothing of the kind.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check numba==0.68.1
cat > "$place/look.py" <<'PY'
import numba
import numpy as np
from numba.core import event

options = {"nogil": True, "error_model": "numpy", "boundscheck": False}


@numba.njit(**options)
def by_loop(a, b, n):
    for i in range(n):
        a[i] = b[i]


@numba.njit(**options)
def by_slices(a, b, n):
    a[:n] = b[:n]


@numba.njit(**options)
def by_number(a, b, n):
    a[:] = 0


@numba.njit(**options)
def nothing(a, b, n):
    pass


a, b = np.zeros(9, np.uint64), np.arange(9, dtype=np.uint64)
nothing(a, b, 5)  # Numba's own start
for kernel in (by_loop, by_number, by_slices):
    with event.install_recorder("numba:compile") as recorder:
        kernel(a, b, 5)
    names = [each.data["dispatcher"].py_func.__qualname__ for _, each in recorder.buffer if each.is_start]
    text = [name for name in names if "repr" in name or "str" in name or "unicode" in name or "concat" in name]
    several = "more than 10" if len(names) > 10 else len(names)
    print(kernel.__name__, "functions compiled:", several, "of text:", "more than 5" if len(text) > 5 else len(text))
PY
"$place/venv/bin/python" "$place/look.py" | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
by_loop functions compiled: 1 of text: 0
by_number functions compiled: 1 of text: 0
by_slices functions compiled: more than 10 of text: more than 5
SEEN
