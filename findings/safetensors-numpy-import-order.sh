#!/usr/bin/env bash
# Whether safetensors reads a bfloat16 file into NumPy hangs on an unrelated import.
#
# safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0, Python 3.11, Linux x86-64; seen on 2026-11-30.
#
# A valid file of one BF16 tensor, read by the three ways that safetensors.numpy has:
#
#                                     before `import ml_dtypes`             after it, in the same process
#   load_file(path)                   TypeError: data type 'bfloat16' ...   the array, dtype bfloat16
#   safe_open(path, "np").get_tensor  the same                              the array
#   load(bytes)                       KeyError: 'BF16'                      KeyError: 'BF16'
#
# ml_dtypes gives NumPy the name "bfloat16" when it is imported, and load_file asks NumPy for that name; load has a
# table of its own without it.  And save_file takes an ml_dtypes array and writes a valid BF16 file, so a program
# can write with one half of the module what the other half of it cannot read.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$place"
"$place/venv/bin/python" - <<'PY' | tee seen
import json
import struct

from safetensors import safe_open
from safetensors.numpy import load, load_file, save_file

header = json.dumps({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
raw = struct.pack("<Q", len(header)) + header + struct.pack("<2H", 0x3F80, 0x4000)
open("w.safetensors", "wb").write(raw)
WAYS = {
    "load_file": lambda: load_file("w.safetensors")["w"],
    "safe_open": lambda: safe_open("w.safetensors", "np").get_tensor("w"),
    "load": lambda: load(raw)["w"],
}


def look(when):
    for name, way in WAYS.items():
        try:
            found = way()
            print(when, name, found.dtype, found.astype("float32").tolist())
        except Exception as error:
            print(when, name, type(error).__name__, error)


look("before")
import ml_dtypes
import numpy as np

look("after")
save_file({"w": np.array([1, 2], ml_dtypes.bfloat16)}, "own.safetensors")
print("written", b'"BF16"' in open("own.safetensors", "rb").read())
PY
diff - seen <<'SEEN' && echo "as described"
before load_file TypeError data type 'bfloat16' not understood
before safe_open TypeError data type 'bfloat16' not understood
before load KeyError 'BF16'
after load_file bfloat16 [1.0, 2.0]
after safe_open bfloat16 [1.0, 2.0]
after load KeyError 'BF16'
written True
SEEN
