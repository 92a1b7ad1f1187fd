"""The full experiment with stand-ins: tiny random Llamas under the names of the paper's models, a few
problems of each benchmark, a stub server as the judge, and a command instead of alpaca_eval's.

    python tests/paper_stand_in.py [OUT]          (scripts/paper-stand-in)

Everything runs as with the real models; what comes out is noise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import put
from stub_server import Request, StubServer

from della.experiments.demo import TRIO
from della.experiments.full_data import GSM8K_VALIDATION
from della.experiments.full_models import BASE_OF, MODELS
from della.experiments.options import ExperimentOptions
from della.options import build

HIDDEN, WIDE, VOCABULARY = 32, 64, 512  # the vocabulary is the demo's
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float16", "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "vocab_size": VOCABULARY,
}  # fmt: skip
ADDED = {"math": 1}  # rows of embeddings that an expert has beyond the base's, as WizardMath does
COUNT = 5

# In the place of alpaca_eval: it asks the judge over HTTP which answer is better, and writes what that
# package writes.
ALPACA = """#!{python}
import ast, csv, json, os, pathlib, sys, urllib.request
options = {{k: ast.literal_eval(v) for k, v in (w[2:].split("=", 1) for w in sys.argv[2:])}}
read = lambda key: json.loads(pathlib.Path(options[key]).read_text())
url = json.loads(pathlib.Path(os.environ["OPENAI_CLIENT_CONFIG_PATH"]).read_text())["default"][0]["base_url"]
known = {{row["instruction"]: row["output"] for row in read("reference_outputs")}}
rows = []
for row in read("model_outputs"):
    said = "Better, m or M? m: " + row["output"] + " M: " + known[row["instruction"]]
    body = {{"model": "judge", "messages": [{{"role": "user", "content": said}}]}}
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(),
                                     {{"Content-Type": "application/json"}})
    reply = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
    rows.append({{"instruction": row["instruction"], "preference": 2.0 if reply == "m" else 1.0}})
place = pathlib.Path(options["output_path"]) / options["annotators_config"]
place.mkdir(exist_ok=True)
won = sum(row["preference"] - 1 for row in rows) / len(rows)
error = (won * (1 - won) / len(rows)) ** 0.5
(place / "annotations.json").write_text(json.dumps(rows))
with (place / "leaderboard.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["", "win_rate", "standard_error", "n_total"])
    writer.writerow(["model", 100 * won, 100 * error, len(rows)])
"""


def judge(request: Request) -> str:
    """A judge that goes by the length of what it reads."""
    odd = len(request.prompt) % 2
    if request.prompt.startswith("Better"):
        return "m" if odd else "M"
    return "Looks fine. [[correct]]" if odd else "No. [[wrong]]"


def make_models(folder: Path) -> None:
    """Two bases and their experts, each as OWNER/NAME under ``folder``."""
    named = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    layer = "model.layers.0."
    named |= {f"{layer}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
    named |= {f"{layer}mlp.{part}_proj.weight": (WIDE, HIDDEN) for part in ("gate", "up")}
    named |= {f"{layer}mlp.down_proj.weight": (HIDDEN, WIDE), "lm_head.weight": (VOCABULARY, HIDDEN)}
    named |= {f"{layer}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, Any]] = {}
    for role in sorted(MODELS, key=lambda role: role in BASE_OF):  # bases first
        around = made.get(BASE_OF.get(role, ""), {})
        scale = 0.05 if around else 0.3
        made[role] = {}
        for name, shape in named.items():
            start = around[name].astype(np.float64) if around else float(name.endswith("norm.weight"))
            made[role][name] = (start + scale * rng.standard_normal(shape)).astype(np.float16)
        _save(folder / MODELS[role].hub_id, made[role], ADDED.get(role, 0))


def _save(folder: Path, tensors: Mapping[str, Any], added: int) -> None:
    rows = np.zeros((added, HIDDEN), np.float16)
    heads = ("model.embed_tokens.weight", "lm_head.weight")
    stored = {name: np.concatenate([t, rows]) if name in heads else t for name, t in tensors.items()}
    config = CONFIG | {"vocab_size": VOCABULARY + added}
    put(folder, {"model.safetensors": stored, "config.json": config})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TRIO / "base" / name).read_bytes())


def make_data(folder: Path, count: int = COUNT) -> dict[str, Path]:
    """Files in the benchmarks' formats, with ``count`` problems of each split."""
    sums = [
        {"question": f"What is {n} plus 2?", "answer": f"{n} + 2\n#### {n + 2}"}
        for n in range(GSM8K_VALIDATION + 16)
    ]
    programs = [
        {
            "task_id": number, "text": f"Write a function to add {number}.",
            "code": f"def f(x):\n    return x + {number}", "test_setup_code": "",
            "test_list": [f"assert f({n}) == {n + number}" for n in (1, 2, 3)],
        }
        for begin in (11, 511, 601)
        for number in range(begin, begin + count)
    ]  # fmt: skip
    said = [{"instruction": f"Name {n} things.", "output": "One thing. " * n} for n in range(8 * count)]
    files: dict[str, Any] = {
        "gsm8k": sums[:count],
        "gsm8k_train": sums,
        "mbpp": programs,
        "alpaca_eval": said,
    }
    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    found["text"] = folder / "text.txt"
    found["text"].write_text("".join(f"The {n} foxes went to the park with a kite.\n" for n in range(16)))
    return found


def make_alpaca(folder: Path) -> str:
    """The command instead of alpaca_eval's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "alpaca_eval"
    path.write_text(ALPACA.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def make_options(place: Path, judge_url: str, **more: Any) -> ExperimentOptions:
    """The options of a run in ``place``/out, and everything it needs beside it."""
    make_models(place / "models")
    data = tuple(f"{name}={path}" for name, path in make_data(place / "data").items())
    said = {
        "scale": "13b", "out": place / "out", "backend": "numpy", "max_tokens": 8, "limit": COUNT,
        "batch": 16,
        "judge": "judge", "judge_url": judge_url, "annotator": "stand_in",
        "alpaca_command": make_alpaca(place / "bin"), "models_dir": place / "models", "data": data,
        "threads": 1,
    }  # fmt: skip
    return build(ExperimentOptions, said | more)


def command(place: Path, judge_url: str) -> list[str]:
    """The same as a command line, with one value of each hyperparameter; everything it needs is made."""
    make_models(place / "models")
    named = {
        "out": place / "out", "models-dir": place / "models", "backend": "numpy", "max-tokens": 8,
        "limit": COUNT, "batch": 16, "judge": "judge", "judge-url": judge_url, "annotator": "stand_in",
        "alpaca-command": make_alpaca(place / "bin"), "drop-rates": 0.5, "lambdas": 1, "pruned": 0.5,
        "seeds": 1, "threads": 1,
    }  # fmt: skip
    words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    files = [
        word for name, path in make_data(place / "data").items() for word in ("--data", f"{name}={path}")
    ]
    return [sys.executable, "-m", "della.cli.main", "paper", "--scale", "13b", *words, *files]


def main() -> int:
    """All tables, with one value of each hyperparameter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("paper-stand-in"), metavar="OUT")
    place = parser.parse_args().out
    began = time.monotonic()
    with StubServer(judge) as server:
        words = command(place, server.url)
        print("della", *words[3:], flush=True)
        subprocess.run([*words, "--plan"], check=True)
        code = subprocess.run(words, check=False).returncode
        if code == 0:
            seconds = time.monotonic() - began
            print(f"\n{(place / 'out/tables.md').read_text()}")
            print(f"{len(server.requests)} calls of the judge, {seconds:.0f} s; see {place}/out")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
