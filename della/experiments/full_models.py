"""The models of the paper at full size: their names, what is known of their files, and how they are made fit.

Most experts are pickles, and some have a row more of embeddings than the base (a padding token).  Each such
model is copied once, as safetensors, with the base's rows and the base's tokenizer; the others are used as
they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from della.checkpoint.source import Source, open_source
from della.checkpoint.view import TensorView
from della.errors import EvaluationError, Problem
from della.output.writer import StagedOutput
from della.planning.heads import EMBEDDINGS, HEAD

MARK = "prepared.json"
_PIECE = 1 << 26


@dataclass(frozen=True)
class Known:
    """A model of the paper: its id on the Hub and the bytes of its weights there."""

    hub_id: str
    nbytes: float


# As listed on the Hub: those of WizardMath are float32, those of the others 16 bits wide.  The first three
# are on the Hub as pickles alone.  WizardLM's maker has withdrawn most of its models, so two are mirrors.
MODELS = {
    "base": Known("meta-llama/Llama-2-13b-hf", 26.0e9),
    "lm": Known("WizardLMTeam/WizardLM-13B-V1.2", 26.0e9),
    "math": Known("vanillaOVO/WizardMath-13B-V1.0", 52.1e9),
    "code": Known("layoric/llama-2-13b-code-alpaca", 26.0e9),
    "coder": Known("vanillaOVO/WizardCoder-Python-13B-V1.0", 26.0e9),
    "coder_base": Known("codellama/CodeLlama-13b-Python-hf", 26.0e9),
}
BASE_OF = {"lm": "base", "math": "base", "code": "base", "coder": "coder_base"}
TASK_OF = {"lm": "alpaca_eval", "math": "gsm8k", "code": "mbpp", "coder": "mbpp"}


def references(given: Mapping[str, str], models_dir: Path | None, roles: Iterable[str]) -> dict[str, str]:
    """The reference of each role: as given, else a folder of ``models_dir``, else the id on the Hub.

    Raises EvaluationError for a role that is none, and for folders that are missing.
    """
    unknown = sorted(set(given) - set(MODELS))
    if unknown:
        raise EvaluationError(
            Problem(f"--models {unknown[0]}=...: expected one of {', '.join(MODELS)}", parameter="models")
        )
    found, missing = {}, []
    for role in roles:
        found[role] = given.get(role, MODELS[role].hub_id)
        if role not in given and models_dir is not None:
            folder = models_dir / MODELS[role].hub_id
            found[role] = str(folder)
            if not folder.is_dir():
                missing.append(
                    f"{folder}: no such folder; hf download {MODELS[role].hub_id} --local-dir {folder}, "
                    f"or say where the model is: --models {role}=FOLDER"
                )
    if missing:
        raise EvaluationError(*missing)
    return found


def prepare(
    role: str, found: Mapping[str, str], out: Path, allow_pickle: bool, tell: Callable[[str], None]
) -> str:
    """The model of ``role`` in a form that can be merged: its own reference, or a folder of ``out``."""
    with ExitStack() as stack:
        base = stack.enter_context(open_source(found[BASE_OF.get(role, role)], allow_pickle=allow_pickle))
        source = base
        if role in BASE_OF:
            source = stack.enter_context(open_source(found[role], allow_pickle=allow_pickle))
        rows = _rows(base)
        shapes = {name: _fitted(tensor, rows) for name, tensor in source.tensors.items()}
        is_plain = all(file.name.endswith(".safetensors") for file in source.files)
        if is_plain and all(shapes[name] == tensor.shape for name, tensor in source.tensors.items()):
            here = Path(found[role])
            return str(here.absolute()) if here.exists() else found[role]
        folder = out / Path(found[role]).name
        mark = {"from": found[role], "files": {file.name: file.fingerprint for file in source.files}}
        if folder.exists():
            if _read_mark(folder) != mark:
                raise EvaluationError(
                    Problem(f"not a copy of {found[role]}", "move it away", subject=str(folder))
                )
            return str(folder)
        tell(f"{found[role]}: copied as safetensors, with the {rows:,} rows of its base, to {folder}")
        _copy(source, base, shapes, folder, mark)
        return str(folder)


def _rows(base: Source) -> int:
    """The rows of the base's embeddings."""
    shapes = [tensor.shape for name, tensor in base.tensors.items() if EMBEDDINGS.search(name)]
    if len(shapes) != 1:
        raise EvaluationError(
            Problem(
                f"expected one tensor of embeddings, found {len(shapes)}",
                subject=base.reference,
            )
        )
    return shapes[0][0]


def _fitted(tensor: TensorView, rows: int) -> tuple[int, ...]:
    """The shape with no more rows of embeddings and head than the base has."""
    if HEAD.search(tensor.name) or EMBEDDINGS.search(tensor.name):
        return (min(tensor.shape[0], rows), *tensor.shape[1:])
    return tensor.shape


def _copy(
    source: Source, base: Source, shapes: Mapping[str, tuple[int, ...]], out: Path, mark: Mapping[str, object]
) -> None:
    tensors = [(name, tensor.dtype, shapes[name]) for name, tensor in source.tensors.items()]
    with StagedOutput(out, tensors, inputs=[*source.paths, *base.paths]) as staged:
        for name, dtype, shape in tensors:
            total, buffer = math.prod(shape), np.empty(_PIECE // dtype.bytes, dtype.numpy)
            for begin in range(0, total, buffer.size):  # leading rows lie first
                piece = buffer[: total - begin]
                source.tensors[name].read_into(begin, piece)
                staged.write(name, begin * dtype.bytes, piece.view(np.uint8).data)
        config = dict(source.config)
        if "vocab_size" in config:
            config["vocab_size"] = _rows(base)
        staged.add_file("config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, path in base.side_files().items():
            staged.add_file(name, path.read_bytes())
        staged.add_file(MARK, (json.dumps(mark, indent=1) + "\n").encode())
        staged.commit()


def _read_mark(folder: Path) -> object:
    try:
        return json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return None
