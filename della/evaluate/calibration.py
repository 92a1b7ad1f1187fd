"""Norms of the inputs of a model's linear layers on calibration data: what ``importance: wanda`` ranks by.

norm_j of a layer is the L2 norm over all tokens of its input feature j (WANDA, Sun et al. 2023, arXiv
2306.11695).  Texts go through the model one by one, and squares are added in float64 in their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from della.checkpoint.header import build_header
from della.checkpoint.norms import checked
from della.checkpoint.strict import json_object
from della.dtypes import DTYPES, Array
from della.errors import CheckpointError, EvaluationError, OutputError, Problem, unknown
from della.evaluate import hf, numpy_backend
from della.evaluate.backends import Model
from della.evaluate.llama import Llama
from della.output.disk import put

MOST_TOKENS = 2048  # of one text, as in the paper; a model that knows fewer positions gets fewer
FORM = "expected an object with 'text', or with 'prompt' and 'answer', all of them texts"

Norms = dict[str, Array]
Texts = Iterable[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was collected: norms of so many ``layers`` over so many ``texts`` and ``tokens``."""

    out: Path
    layers: int
    texts: int
    tokens: int


def calibrate(
    model: str, data: Path, out: Path, *, backend: str = "hf", limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:  # fmt: skip
    """Run the texts of ``data`` through ``model`` and write the norms to ``out``, a .safetensors file.

    backend: "hf" (any model that transformers loads) or "numpy" (a folder with a small Llama).  limit: only
    the first texts.  progress: called with (texts done, texts of all).  The same texts give the same bytes on
    one machine.  Raises EvaluationError, OutputError, and CheckpointError for a damaged model.
    """
    if backend not in BACKENDS:
        raise EvaluationError(unknown("backend", backend, BACKENDS))
    if out.suffix != ".safetensors":
        raise EvaluationError(Problem("expected a name that ends in .safetensors", subject=str(out)))
    if os.path.lexists(out):
        raise EvaluationError(Problem("exists already", "remove it, or choose another name", str(out)))
    if not os.access(out.parent, os.W_OK):  # told now, not when all is computed
        raise OutputError(
            Problem(
                f"cannot be written, there is no folder {out.parent} that may be written to", subject=str(out)
            )
        )
    texts = read_texts(data, limit)
    encode, collect = BACKENDS[backend](model)
    ids = [encoded for text in texts if (encoded := encode(text)[:MOST_TOKENS])]
    if not ids:
        raise EvaluationError(Problem("the tokenizer makes no token of its texts", subject=str(data)))

    def told() -> Iterable[Sequence[int]]:
        for done, each in enumerate(ids, 1):
            yield each
            if progress is not None:
                progress(done, len(ids))

    norms = collect(told())
    if not norms:
        raise EvaluationError(
            Problem("has no linear layer (torch.nn.Linear) whose inputs could be seen", subject=str(model))
        )
    for name, vector in norms.items():
        checked(vector, str(model), name)
    put(out, _contents(norms))
    return Calibration(out, len(norms), len(ids), sum(map(len, ids)))


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The texts of a file: its lines, or of a .jsonl file each line's ``text`` (or ``prompt`` + ``answer``).

    Blank lines are left out.  Raises EvaluationError.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            numbered = ((number, line.strip("\r\n")) for number, line in enumerate(file, 1))
            lines = list(islice(((n, line) for n, line in numbered if line.strip()), limit))
    except OSError as error:
        raise EvaluationError(Problem(f"cannot be read ({error.strerror})", subject=str(path))) from error
    except UnicodeError as error:
        raise EvaluationError(Problem(f"not UTF-8 text ({error})", subject=str(path))) from error
    if not lines:
        raise EvaluationError(
            Problem("holds no text", "expected one a line, or JSON lines in a .jsonl file", str(path))
        )
    return [_text(f"{path}:{n}", line) if path.suffix == ".jsonl" else line for n, line in lines]


def _text(where: str, line: str) -> str:
    try:
        record = json_object(line.encode(), where)
    except CheckpointError:
        raise EvaluationError(Problem(FORM, subject=where)) from None
    parts = [record.get(key) for key in (("text",) if "text" in record else ("prompt", "answer"))]
    if not all(isinstance(part, str) for part in parts):
        raise EvaluationError(Problem(FORM, subject=where))
    return "".join(map(str, parts))


# ---- collecting -------------------------------------------------------------------------------------------


def llama_norms(model: Llama, texts: Texts) -> Norms:
    """The norms of the demo's NumPy Llama over texts of token ids, by the names of its weights."""
    sums: dict[str, Array] = {}

    def watch(name: str, x: Array) -> None:
        squares = np.square(x.reshape(-1, x.shape[-1]), dtype=np.float64).sum(axis=0)
        sums[name] = sums.get(name, 0.0) + squares

    model.watch = watch
    try:
        for ids in texts:
            model.logits(ids)
    finally:
        model.watch = None
    return _roots(sums)


def hf_norms(model: Any, texts: Texts) -> Norms:
    """The norms of every nn.Linear of a torch model, but of a head that is tied to the embeddings."""
    import torch

    sums: dict[str, Any] = {}
    embeddings: Any = model.get_input_embeddings()

    def watcher(name: str) -> Callable[..., None]:
        def watch(_: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            squares = x.reshape(-1, x.shape[-1]).double().square().sum(dim=0).cpu().numpy()
            sums[name] = sums.get(name, 0.0) + squares

        return watch

    linear = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer.weight is not embeddings.weight
    }
    hooks = [layer.register_forward_pre_hook(watcher(name)) for name, layer in linear.items()]
    try:
        with torch.no_grad():
            for ids in texts:
                model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _roots(sums)


def _roots(sums: Mapping[str, Array]) -> Norms:
    return {name: np.sqrt(total).astype(np.float32) for name, total in sums.items()}


# ---- models -----------------------------------------------------------------------------------------------

Encode = Callable[[str], Sequence[int]]
Collect = Callable[[Texts], Norms]


def _numpy(model: str) -> tuple[Encode, Collect]:
    tokenizer, llama = numpy_backend.load(model)
    return lambda text: tokenizer.encode(text).ids, lambda texts: llama_norms(llama, texts)


def _hf(model: str) -> tuple[Encode, Collect]:
    """In float32 on a CPU, in the model's own type on a GPU."""
    tokenizer, loaded, _ = hf.load(Model(model, model), "auto")
    most = getattr(loaded.config, "max_position_embeddings", None) or MOST_TOKENS
    return lambda text: tokenizer(text)["input_ids"][:most], lambda texts: hf_norms(loaded, texts)


BACKENDS: dict[str, Callable[[str], tuple[Encode, Collect]]] = {"hf": _hf, "numpy": _numpy}


def _contents(norms: Mapping[str, Array]) -> bytes:
    """A whole safetensors file; the same bytes for the same norms."""
    ordered = sorted(norms)
    header, _ = build_header([(name, DTYPES["F32"], norms[name].shape) for name in ordered])
    return header + b"".join(norms[name].tobytes() for name in ordered)
