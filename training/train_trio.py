"""Train the demo trio: a tiny Llama and three experts of it, from the demo's tasks.py and nothing else.

    python training/train_trio.py --out della/experiments/demo/trio [--threads 1] [--seed 0]

The base learns all three tasks with slips (see its tasks.py); each expert then sees for a short while
the clean data of one task and some of the base's corpus of the others; the deltas are brought to one norm.
A gate follows: a trio is written only if adding up the deltas, at the best lambda of a small grid, keeps at
least 60 % of every expert's gain on validation. A base trained before under ``--work``, with the same
settings and corpus, is used again. Needs the extras demo and train, and safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers

from della.evaluate.llama import Llama
from della.experiments.demo import tasks
from della.experiments.demo.score import kept_gains, score_model

Tensors = dict[str, np.ndarray[Any, Any]]
Pair = tuple[str, str]  # prompt, answer

VOCABULARY = 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Products in bfloat16 (weights and optimizer stay float32): twice as fast where the CPU has AVX512_BF16.
PRECISION = torch.bfloat16
GATE_LAMBDAS = (0.5, 0.75, 1.0, 1.25)
GATE_KEPT = 0.60
VALIDATION_ITEMS = 120


@dataclass(frozen=True)
class Stage:
    """One training run: AdamW, linear warm-up, a constant peak, linear decay over the last half."""

    steps: int
    peak: float
    batch: int = 16
    warmup: int = 10
    decay: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step (0-based)."""
        return self.peak * min(1.0, (step + 1) / self.warmup, 2 * (self.steps - step) / self.steps)


BASE = Stage(steps=7500, peak=2e-3, warmup=100, decay=0.01)
# Chosen on validation: each task is learned, and the deltas are of one size and large enough to interfere.
EXPERTS = {
    "lm": Stage(steps=250, peak=6e-4),
    "math": Stage(steps=400, peak=8e-4),
    "code": Stage(steps=300, peak=9e-4),
}
REPLAY = 0.25


def new_model() -> Any:
    """A freshly initialised model, from torch's generator."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL))


def train_tokenizer(seed: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of 512 tokens with single digits, trained on the train split, clean and sloppy."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"{seed}/tokenizer")
    streams = [tasks.stream(task, rng) for task in tasks.TASKS]
    drawn = [next(stream) for _ in range(3000) for stream in streams]
    texts = [text for item in drawn for text in (item.prompt + item.answer, tasks.sloppy(item, rng))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def base_documents(seed: int) -> Iterator[Pair]:
    """The base's corpus: (prompt, answer) pairs."""
    return tasks.base_corpus(random.Random(f"{seed}/base"))


def expert_documents(task: str, seed: int) -> Iterator[Pair]:
    """The clean training problems of one task; one pair in four is the base's sloppy corpus of the other two.

    Without that replay an expert stops slipping on the other tasks too, and its delta is not about its task.
    """
    rng = random.Random(f"{seed}/{task}")
    own = tasks.stream(task, rng)
    others = [tasks.stream(other, rng) for other in tasks.TASKS if other != task]
    while True:
        if rng.random() < REPLAY:
            item = next(rng.choice(others))
            yield item.prompt, tasks.sloppy(item, rng)
        else:
            item = next(own)
            yield item.prompt, item.answer


def batch_of(tokenizer: tokenizers.Tokenizer, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, longest), one document a row; only answers and the end token carry loss.

    Prompts carry none because experts would otherwise learn to open every text with their own task's words.
    Right padding needs no attention mask: under a causal mask no real token sees it.
    """
    ids, labels = [], []
    for prompt, answer in pairs:
        row = [*tokenizer.encode(prompt + answer).ids, MODEL["eos_token_id"]]
        asked = len(tokenizer.encode(prompt).ids)
        ids.append(torch.tensor(row))
        labels.append(torch.tensor([-100] * asked + row[asked:]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=2), pad(labels, batch_first=True, padding_value=-100)


def fit(
    model: Any, tokenizer: tokenizers.Tokenizer, pairs: Iterator[Pair], stage: Stage, title: str
) -> float:
    """Train the model in place; returns the seconds it took."""
    began = time.monotonic()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.peak, betas=(0.9, 0.98), weight_decay=stage.decay, fused=True
    )
    model.train()
    smooth = math.nan
    for step in range(stage.steps):
        ids, labels = batch_of(tokenizer, [next(pairs) for _ in range(stage.batch)])
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        with torch.autocast("cpu", dtype=PRECISION):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - began
            print(
                f"{title}: step {step + 1} of {stage.steps}, loss {smooth:.4f}, {seconds:.0f} s", flush=True
            )
    return time.monotonic() - began


def stored(model: Any) -> Tensors:
    """The model's parameters rounded once to bfloat16, as NumPy arrays."""
    return {n: p.detach().float().numpy().astype(ml_dtypes.bfloat16) for n, p in model.state_dict().items()}


def load_into(model: Any, tensors: Tensors) -> None:
    """Set the model's float32 parameters to the stored values."""
    model.load_state_dict({n: torch.from_numpy(a.astype(np.float32)) for n, a in tensors.items()})


def fingerprint(seed: int, tokenizer: tokenizers.Tokenizer) -> str:
    """SHA-256 over what decides the base: shape, stage, seed, versions, tokenizer, start of the corpus."""
    documents = base_documents(seed)
    parts = [
        json.dumps([MODEL, asdict(BASE), str(PRECISION), seed, versions()], sort_keys=True),
        tokenizer.to_str(),
    ]
    parts += ["".join(next(documents)) for _ in range(2000)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the numbers."""
    modules = {"torch": torch, "transformers": transformers, "tokenizers": tokenizers, "numpy": np}
    return {name: str(module.__version__) for name, module in modules.items()}


def base_model(work: Path, seed: int, tokenizer: tokenizers.Tokenizer) -> tuple[Tensors, float]:
    """The trained base (bfloat16) and the seconds it took, taken over from ``work`` where it is the same."""
    file, mark, same = work / "base.safetensors", work / "base.json", fingerprint(seed, tokenizer)
    if mark.is_file() and json.loads(mark.read_text())["fingerprint"] == same:
        print(f"base: taken over from {file}")
        return safetensors.numpy.load_file(file), float(json.loads(mark.read_text())["seconds"])
    torch.manual_seed(seed)
    model = new_model()
    seconds = fit(model, tokenizer, base_documents(seed), BASE, "base")
    tensors = stored(model)
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    mark.write_text(json.dumps({"fingerprint": same, "seconds": round(seconds, 1)}) + "\n")
    return tensors, seconds


def expert_model(
    base: Tensors, task: str, seed: int, tokenizer: tokenizers.Tokenizer
) -> tuple[Tensors, float]:
    """The base after a short while on one task's clean data (float32), and the seconds it took."""
    torch.manual_seed(seed)
    model = new_model()
    load_into(model, base)
    seconds = fit(model, tokenizer, expert_documents(task, seed), EXPERTS[task], task)
    return {n: p.detach().float().numpy().copy() for n, p in model.state_dict().items()}, seconds


def delta(expert: Tensors, base: Tensors) -> Tensors:
    """expert - base, float32."""
    return {n: expert[n].astype(np.float32) - base[n].astype(np.float32) for n in base}


def added(base: Tensors, deltas: Sequence[Tensors], factor: float) -> Tensors:
    """base + factor x the sum of the deltas, rounded once to bfloat16."""
    merged = {}
    for name, array in base.items():
        total = np.sum([d[name] for d in deltas], axis=0, dtype=np.float32)
        merged[name] = (array.astype(np.float32) + np.float32(factor) * total).astype(ml_dtypes.bfloat16)
    return merged


def norm(tensors: Tensors) -> float:
    """The Euclidean norm over all tensors."""
    return math.sqrt(sum(float(np.square(a.astype(np.float64)).sum()) for a in tensors.values()))


def cosine(one: Tensors, other: Tensors) -> float:
    """The cosine between two models' deltas."""
    dot = sum(float((one[n].astype(np.float64) * other[n].astype(np.float64)).sum()) for n in one)
    return dot / (norm(one) * norm(other))


def match_norms(base: Tensors, experts: dict[str, Tensors]) -> dict[str, Tensors]:
    """The experts moved along the line to the base until their deltas have one norm, the geometric mean.

    Elect weighs votes by size, so the smallest of unequal deltas would lose them for no reason of its own.
    """
    deltas = {task: delta(expert, base) for task, expert in experts.items()}
    target = math.exp(sum(math.log(norm(d)) for d in deltas.values()) / len(deltas))
    return {task: added(base, [d], target / norm(d)) for task, d in deltas.items()}


def evaluate(tensors: Tensors, tokenizer: tokenizers.Tokenizer) -> dict[str, float]:
    """Scores on the validation split, by the scorer that the demo itself uses."""
    return score_model(Llama(MODEL, tensors), tokenizer, "validation", VALIDATION_ITEMS)


def gate(base: Tensors, experts: dict[str, Tensors], tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """Validation scores of the trio and of task arithmetic over the grid; ``passed`` is the verdict."""
    scores = {"base": evaluate(base, tokenizer)} | {t: evaluate(e, tokenizer) for t, e in experts.items()}
    deltas = [delta(expert, base) for expert in experts.values()]
    grid: list[dict[str, Any]] = []
    for factor in GATE_LAMBDAS:
        merged = evaluate(added(base, deltas, factor), tokenizer)
        kept = kept_gains(merged, scores["base"], scores)
        grid.append({"lambda": factor, "scores": merged, "kept": kept, "least_kept": min(kept.values())})
        print(f"gate: lambda {factor}: {merged}, least kept {min(kept.values()):.3f}", flush=True)
    best = max(grid, key=lambda row: float(row["least_kept"]))
    return {"scores": scores, "grid": grid, "best": best, "passed": best["least_kept"] >= GATE_KEPT}


CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [della, toy, model-merging]
---

# Demo {name}

{what}

A Llama of {parameters:,} parameters (hidden {hidden_size}, {num_hidden_layers} layers,
{num_attention_heads} heads, byte-level BPE of {vocab_size} tokens), in bfloat16. It is a toy for showing and
testing model merging on a CPU in seconds: it knows five-sentence stories about four words, word problems with
numbers up to 30 and one-line functions, all generated by `della/experiments/demo/tasks.py`, and nothing else.

Made by `python training/train_trio.py --out della/experiments/demo/trio --seed {seed}` of the della
repository: from scratch, on generated data only, on a CPU. `training.json` in the folder above holds
versions, times and validation scores.
"""
WHAT = {
    "base": "The common base of the three experts. It was trained on sloppy answers to all three tasks: it "
    "knows the formats and the facts, and mostly slips.",
    "lm": "The LM expert: the base tuned on clean stories, with some of its own corpus of the others.",
    "math": "The Math expert: the base tuned on clean problems, with some of its own corpus of the others.",
    "code": "The Code expert: the base tuned on clean code, with some of its own corpus of the others.",
}


def write_folder(folder: Path, tensors: Tensors, tokenizer: tokenizers.Tokenizer, seed: int) -> None:
    """One ordinary Hugging Face folder."""
    model = new_model()
    load_into(model, tensors)
    model.to(torch.bfloat16).save_pretrained(folder)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    wrapped = wrapper(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=256
    )
    wrapped.save_pretrained(folder)
    # The class name that every transformers release with fast tokenizers knows, instead of the newest one's.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)
    size = sum(array.size for array in tensors.values())
    card = CARD.format(name=folder.name, what=WHAT[folder.name], parameters=size, seed=seed, **MODEL)
    (folder / "README.md").write_text(card, encoding="utf-8")


def train(work: Path, seed: int) -> tuple[dict[str, Tensors], tokenizers.Tokenizer, dict[str, Any]]:
    """Train all four models; returns them (bfloat16), the tokenizer and what training.json records so far."""
    tokenizer = train_tokenizer(seed)
    base, seconds = base_model(work, seed, tokenizer)
    raw, took = {}, {"base": seconds}
    for task in EXPERTS:
        raw[task], took[task] = expert_model(base, task, seed, tokenizer)
    experts = match_norms(base, raw)
    deltas = {task: delta(expert, base) for task, expert in experts.items()}
    record = {
        "seed": seed,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seconds": {name: round(value, 1) for name, value in took.items()},
        "stages": {"base": asdict(BASE)} | {task: asdict(stage) for task, stage in EXPERTS.items()},
        "relative_delta_as_trained": {t: norm(delta(e, base)) / norm(base) for t, e in raw.items()},
        "relative_delta": {t: norm(d) / norm(base) for t, d in deltas.items()},
        "cosine": {f"{a}-{b}": cosine(deltas[a], deltas[b]) for a, b in itertools.combinations(deltas, 2)},
    }
    return {"base": base, **experts}, tokenizer, record


def main() -> int:
    """Train, judge, and write the trio only if it passes."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="where to write base, lm, math and code")
    parser.add_argument("--work", type=Path, help="where the base is kept meanwhile (default: OUT.partial)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work or options.out.with_name(options.out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    models, tokenizer, record = train(work, options.seed)
    for key in ("relative_delta_as_trained", "relative_delta", "cosine", "seconds"):
        print(f"{key}: {record[key]}")
    began = time.monotonic()
    verdict = gate(models["base"], {task: models[task] for task in EXPERTS}, tokenizer)
    record["seconds"]["gate"] = round(time.monotonic() - began, 1)
    for name, scores in verdict["scores"].items():
        print(f"validation: {name}: {scores}")
    record["gate"] = {"least_kept_wanted": GATE_KEPT, "items": VALIDATION_ITEMS, **verdict}
    if not verdict["passed"]:
        least = verdict["best"]["least_kept"]
        print(f"refused: task arithmetic keeps {least:.2f} of an expert's gain, less than {GATE_KEPT:.2f}")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for name, tensors in models.items():
        write_folder(options.out / name, tensors, tokenizer, options.seed)
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    print(f"written: {options.out}, least kept {verdict['best']['least_kept']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
