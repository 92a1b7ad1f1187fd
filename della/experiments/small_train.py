"""The three experts of the 135 M experiment: LoRA on every linear layer, folded into full weights.

A run that was cut short is resumed from its last checkpoint.  Needs the extra train.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from della.errors import EvaluationError, Problem
from della.experiments.demo import EXPERTS as TASKS
from della.experiments.small_data import Example, check_data, data_file, examples
from della.experiments.small_model import (
    base_folder,
    libraries,
    model_of,
    response_losses,
    tokenizer_of,
    versions,
)

Tell = Callable[[str], None]

CHECKPOINT_STEPS = 16
VALIDATION_ITEMS = 60


@dataclass(frozen=True, slots=True)
class Tuning:
    """What decides an expert, beside base, data and seed."""

    steps: int = 80
    batch: int = 8
    peak: float = 3e-4
    warmup: int = 8
    rank: int = 16
    alpha: int = 32
    longest: int = 256

    def rate(self, step: int) -> float:
        """The learning rate of a step (0-based): linear warm-up, then linear decay."""
        down = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.peak * min(1.0, (step + 1) / self.warmup, down)


def train_experts(
    model: str, data: Path, out: Path, tell: Tell, tuning: Tuning = Tuning(), seed: int = 0
) -> dict[str, Any]:
    """Make out/base, out/lm, out/math and out/code as float32 folders; returns out/training.json.

    model: as for `small_model.base_folder`.  data: a folder of TASK.train.jsonl and TASK.validation.jsonl.
    What is there is used again; EvaluationError if it was made with other settings.
    """
    check_data(data, ("train", "validation"))
    base = base_folder(model, out / "base")
    record = out / "training.json"
    known: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    wanted = {"seed": seed, "tuning": asdict(tuning)}
    for task in TASKS:
        if task not in known:
            known[task] = {
                **_train(base, task, data, out, tuning, seed, tell),
                **wanted,
                "versions": _versions(),
            }
            record.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        elif {key: known[task].get(key) for key in wanted} != wanted:
            fix = "choose another folder, or remove this one"
            raise EvaluationError(Problem("was trained with other settings", fix, subject=str(out / task)))
    return known


def _versions() -> dict[str, str]:
    return versions() | {"peft": str(_peft().__version__)}


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise EvaluationError("peft is missing; pip install '.[train]' in della's checkout") from error
    return peft


def batches(pool: Sequence[Example], tuning: Tuning, seed: str) -> Iterator[list[Example]]:
    """Batches without end, examples of like length together; the seed alone decides them."""
    if len(pool) < tuning.batch:
        raise EvaluationError(f"{len(pool)} training pairs are fewer than a batch of {tuning.batch}")
    rng = random.Random(seed)
    while True:
        order = rng.sample(list(pool), len(pool))
        made = []
        for begin in range(0, len(order), 8 * tuning.batch):
            part = sorted(order[begin : begin + 8 * tuning.batch], key=lambda one: len(one.ids))
            made += [part[i : i + tuning.batch] for i in range(0, len(part), tuning.batch)]
        rng.shuffle(made)
        yield from (batch for batch in made if len(batch) == tuning.batch)


class Adapter:
    """A base in bfloat16 with float32 LoRA weights in every linear layer."""

    def __init__(self, base: Path, tuning: Tuning, seed: int) -> None:
        torch, _ = libraries()
        peft = _peft()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=tuning.rank, lora_alpha=tuning.alpha, target_modules="all-linear")
        with warnings.catch_warnings():  # peft asks transformers in a way that is going out
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.get_peft_model(model_of(base, "bfloat16"), config)
        self.model = wrapped.get_base_model()
        self.weights = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=tuning.peak, weight_decay=0.0)

    def save(self, path: Path, step: int, before: float) -> None:
        """Replace the checkpoint: ``step`` steps are done, ``before`` was the loss without any."""
        torch, _ = libraries()
        state = {"step": step, "before": before, "weights": self.weights}
        torch.save({**state, "optimizer": self.optimizer.state_dict()}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> tuple[int, float]:
        """Go back to a checkpoint; its step and its loss before training."""
        torch, _ = libraries()
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["before"]

    def step(self, batch: Sequence[Example], rate: float) -> float:
        """One step of AdamW; returns the loss."""
        torch, _ = libraries()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = response_losses(self.model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def loss(self, items: Sequence[Example], batch: int = 8) -> float:
        """Mean loss per response token."""
        torch, _ = libraries()
        self.model.train(False)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            parts = [response_losses(self.model, items[i : i + batch]) for i in range(0, len(items), batch)]
        return float(torch.cat(parts).mean())

    def folded(self, base: Path) -> tuple[Any, float]:
        """The full model in float32, and |delta| / |base| over all weights."""
        model = model_of(base, "float32")
        before = sum(float(p.detach().double().square().sum()) for p in model.parameters())
        moved = 0.0
        for name, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default").detach().float()
                model.get_submodule(name).weight.data += delta
                moved += float(delta.double().square().sum())
        return model, math.sqrt(moved / before)


def _train(
    base: Path, task: str, data: Path, out: Path, tuning: Tuning, seed: int, tell: Tell
) -> dict[str, Any]:
    began = time.monotonic()
    tokenizer = tokenizer_of(base)
    pool = examples(tokenizer, data_file(data, task, "train"), tuning.longest)
    held = examples(tokenizer, data_file(data, task, "validation"), tuning.longest)[:VALIDATION_ITEMS]
    adapter = Adapter(base, tuning, seed)
    checkpoint = out / f"{task}.checkpoint"
    first, before = adapter.load(checkpoint) if checkpoint.is_file() else (0, adapter.loss(held))
    stream, tokens = batches(pool, tuning, f"{seed}/{task}"), 0
    for step in range(tuning.steps):
        batch = next(stream)
        tokens += sum(len(one.ids) for one in batch)
        if step < first:
            continue
        loss = adapter.step(batch, tuning.rate(step))
        if (step + 1) % CHECKPOINT_STEPS == 0:
            adapter.save(checkpoint, step + 1, before)
            tell(f"{task}: step {step + 1} of {tuning.steps}, loss {loss:.3f}")
    after = adapter.loss(held)
    model, moved = adapter.folded(base)
    staged = out / f"{task}.staged"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(out / task, ignore_errors=True)
    os.rename(staged, out / task)
    checkpoint.unlink(missing_ok=True)
    tell(f"{task}: loss on validation {before:.3f} -> {after:.3f} a token, |delta| / |base| {moved:.5f}")
    return {
        "loss_before": before,
        "loss_after": after,
        "relative_delta": moved,
        "training_tokens": tokens,
        "seconds": round(time.monotonic() - began, 1),
    }
