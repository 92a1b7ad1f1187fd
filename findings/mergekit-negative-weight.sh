#!/usr/bin/env bash
# A negative weight in mergekit's ties adds what it should subtract.
#
# mergekit 0.1.5, torch 2.13.0 (CPU), transformers 5.24.0, Python 3.11, Linux x86-64; seen on 2026-12-01.
#
# The base is all zeros and the one expert all 0.5, in every tensor of a one-layer Llama, dtype float32:
#
#     merge_method      weight   normalize   the merged values
#     task_arithmetic   -0.3     false       -0.15
#     ties              -0.3     false       -0.15
#     ties              -0.3     true        +0.5
#     ties              +0.3     true        +0.5
#
# The vote elects minus, as it should; but normalize (the default of ties and della) divides the sum of weight * delta by
# the sum of the weights, -0.15 / -0.3, and the sign is gone.  So with normalize a task cannot be negated: both weights
# give the same model, and nothing says so.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    mergekit==0.1.5 torch==2.13.0 transformers==5.24.0
cd "$place"
cat > look.py <<'PY'
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 12,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32",
}
LAYER = "model.layers.0."
SHAPES = {"model.embed_tokens.weight": (12, 8), "lm_head.weight": (12, 8), "model.norm.weight": (8,)}
SHAPES |= {f"{LAYER}self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"}
SHAPES |= {f"{LAYER}mlp.{x}_proj.weight": (16, 8) for x in ("gate", "up")}
SHAPES |= {f"{LAYER}mlp.down_proj.weight": (8, 16)}
SHAPES |= {f"{LAYER}{x}_layernorm.weight": (8,) for x in ("input", "post_attention")}
for name, value in (("base", 0.0), ("expert", 0.5)):
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps(CONFIG))
    save_file({n: torch.full(s, value) for n, s in SHAPES.items()}, f"{name}/model.safetensors")
RECIPE = """merge_method: {}
base_model: {here}/base
models: [{{model: {here}/expert, parameters: {{weight: {}}}}}]
parameters: {{normalize: {}}}
dtype: float32
"""
CASES = [("task_arithmetic", -0.3, "false"), ("ties", -0.3, "false"), ("ties", -0.3, "true"), ("ties", 0.3, "true")]
for number, case in enumerate(CASES):
    Path("recipe.yml").write_text(RECIPE.format(*case, here=Path.cwd()))
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), "recipe.yml", f"out{number}", "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    files = sorted(Path(f"out{number}").glob("*.safetensors"))
    values = {round(x, 6) for file in files for t in load_file(file).values() for x in t.flatten().tolist()}
    print(*case, *values)
PY
"$place/venv/bin/python" look.py 2> errors | tee seen || { cat errors >&2; exit 1; }
diff seen - <<'SEEN'
task_arithmetic -0.3 false -0.15
ties -0.3 false -0.15
ties -0.3 true 0.5
ties 0.3 true 0.5
SEEN
