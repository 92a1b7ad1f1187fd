#!/usr/bin/env bash
# Importing ml_dtypes 0.7.0 takes a second of processor time; 0.6.0 takes a hundredth of that.
#
# ml_dtypes 0.6.0 and 0.7.0, numpy 2.4.6, Python 3.11, Linux x86-64; seen on 2026-12-01: 0.014 s and 0.93 s, each time
# (2 cores of a server), beyond importing NumPy, which takes 0.09 s.  No file is read for it and the disk is not at fault:
# a sampling profiler finds nine tenths inside of NumPy's PyUFunc_AddLoop, called by PyUFunc_AddPromoter from the module's
# start.  0.7.0 registers a rule for each pair of its types with each function, and NumPy walks the whole list of a
# function's rules whenever one is added, so the work grows with the square of the number of types.
# Every program that imports it waits: JAX, Keras, ONNX's and most tools that write bfloat16 by NumPy.
#
# What the rules change can be seen as well: the sum of a bfloat16 and a float8_e4m3fn array, which was float32, is bfloat16.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
python="$place/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6
cat > "$place/look.py" <<'PY'
import time

import numpy as np

started = time.process_time()
import ml_dtypes

seconds = time.process_time() - started
kind = (np.ones(1, ml_dtypes.bfloat16) + np.ones(1, ml_dtypes.float8_e4m3fn)).dtype
print(ml_dtypes.__version__, "below 0.1 s" if seconds < 0.1 else "above 0.3 s" if seconds > 0.3 else f"{seconds:.2f} s", kind)
PY
for version in 0.6.0 0.7.0; do
    "$python" -m pip install --quiet --disable-pip-version-check "ml_dtypes==$version"
    "$python" "$place/look.py" > /dev/null # its bytecode is written
    "$python" "$place/look.py"
done | tee "$place/seen"
diff "$place/seen" - <<'SEEN'
0.6.0 below 0.1 s float32
0.7.0 above 0.3 s bfloat16
SEEN
