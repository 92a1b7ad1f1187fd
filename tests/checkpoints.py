"""Making checkpoints for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from della.checkpoint.source import open_source
from della.errors import CheckpointError

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
