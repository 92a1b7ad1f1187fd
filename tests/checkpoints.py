"""Making checkpoints for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from della.checkpoint.source import open_source
from della.dtypes import DTYPES, of_array
from della.errors import CheckpointError
from della.output.writer import StagedOutput

RNG = np.random.default_rng(7)
ONE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(folder: Path, files: dict[str, Any]) -> Path:
    """Tensors become a safetensors file, bytes stay, everything else becomes JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors") and isinstance(content, dict):
            save_file(content, path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def index(**weight_map: str) -> dict[str, object]:
    return {"metadata": {"total_size": 0}, "weight_map": weight_map}


def refusal(reference: object, base_dir: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(str(reference), base_dir=base_dir)
    assert caught.value.exit_code == 3
    return str(caught.value)


TENSORS: dict[str, Any] = {
    "a.weight": RNG.standard_normal((5, 7)).astype(ml_dtypes.bfloat16),
    "b.scalar": np.array(3, np.int64),
    "c.weight": RNG.standard_normal((4, 4)).astype(ml_dtypes.float8_e4m3fn),
    "d.empty": np.zeros((0, 3), np.float16),
    "e.weight": RNG.standard_normal(9),
    "f.flags": np.array([True, False, True]),
}


PLAN = [(name, of_array(array), array.shape) for name, array in TENSORS.items()]


def save_model(out: Path, value: float = 0.0, **options: Any) -> Path:
    """A small model of one tensor, written to the end."""
    with StagedOutput(out, [("w", DTYPES["F64"], (2,))], **options) as output:
        output.write("w", 0, np.full(2, value).tobytes())
        output.commit()
    return out


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def numbers(out: Path) -> list[float]:
    """What `save_model` stored."""
    with open_source(str(out)) as source:
        values: list[float] = source.tensors["w"].read().tolist()
    return values
