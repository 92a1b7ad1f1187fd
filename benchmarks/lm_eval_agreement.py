"""Hold della's GSM8K scores against lm-eval's own on the same generations, item by item (scripts/agree).

    python -m benchmarks.lm_eval_agreement --model DIR --data FILE [--limit 50] [--save FILE]
    python -m benchmarks.lm_eval_agreement --generations FILE

--model lets lm-eval generate with the model of DIR for questions of FILE, GSM8K's JSONL of {question,
answer}; --save keeps what it generated, as JSONL of {question, answer, output}, which --generations takes.
Either way a task file of lm-eval scores them: its own gsm8k_cot_zeroshot with its metric and its flexible
filter, the paper's strict filter, and that without its slip.  Answers made to be hard are scored along.
The exit code is 1 where one item differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from della.evaluate import gsm8k

Row = dict[str, str]  # question, answer, and output once it is known
OURS: dict[str, Callable[[str], str | None]] = {
    "strict": gsm8k.strict,
    "published": gsm8k.published,
    "flexible-extract": gsm8k.flexible,
}
# As YAML in the paper's release and, with lm-eval's number for it, in lm-eval.
STRICT = r"The answer is: (\-?[0-9\.\,]+)"

# Worked examples, so that a small model knows how an answer ends.
SHOTS = (
    (
        "A box holds 6 pens. How many pens are in 4 boxes?",
        "One box holds 6 pens. 4 boxes hold 4 * 6 = 24",
        24,
    ),
    (
        "Ana had $30. She bought two books for $8 each. How many dollars are left?",
        "Two books cost 2 * 8 = 16 dollars. So 30 - 16 = 14 dollars are left",
        14,
    ),
    (
        "A train has 5 cars with 40 seats each. 150 seats are taken. How many are free?",
        "The train has 5 * 40 = 200 seats. So 200 - 150 = 50 seats are free",
        50,
    ),
)
PROMPT = "".join(f"Q: {q}\nA: {a}. The answer is: {n}.\n\n" for q, a, n in SHOTS) + "Q: {{question}}\nA:"

# Endings on which readers of numbers differ, each with the reference 1234.
HARD = (
    "", " ", "I cannot help with that.", "one thousand", "The answer is: 1234", "The answer is: 1234.",
    "The answer is: 1,234.", "The answer is: $1,234.", "The answer is: 1234\n", "The answer is: 1234.00",
    "The answer is: 1234 .", "The answer is 1234.", "the answer is: 1234.", "The answer is: -1234.",
    "The answer is: 1234. The answer is: 5.", "The answer is: 5. No, The answer is: 1234.", "It is 1234...",
    "It is $1,234", "1234 of 99", "so 1.234,00", "#### 1234", "The answer is:1234.", "The answer is: .",
    "The answer is: ,,1234,,", "...", "$$", "1234$", "-1234", "--1234", "- 1234", "12 34", "x=1234=x",
    "The answer is: 12345", "The answer is: 4", "The answer is: 1234%", "Ⅻ 1234 ١٢٣٤", "1234\u00a0",
    "a\x00b 1234", "The answer is: 1234\x00", "1234\r\n", "The answer is: 1234.\nQ: And 7?",
)  # fmt: skip


def rows_of(path: Path, limit: int | None) -> list[Row]:
    """The rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()][:limit]


def task_file(folder: Path, rows: Sequence[Row]) -> Any:
    """The task over ``rows``, and what finds it, from the file that lm-eval brings."""
    lm_eval, yaml = importlib.import_module("lm_eval"), importlib.import_module("yaml")
    theirs = Path(lm_eval.__path__[0]) / "tasks/gsm8k/gsm8k-cot-zeroshot.yaml"
    task = yaml.safe_load(theirs.read_text(encoding="utf-8"))
    for key in ("tag", "dataset_name", "training_split", "fewshot_split"):
        task.pop(key)
    (flexible,) = (one for one in task["filter_list"] if one["name"] == "flexible-extract")
    strict, published = (
        {
            "name": name,
            "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}],
        }
        for name, pattern in (("strict", STRICT), ("published", STRICT + "."))
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task |= {
        "task": "gsm8k_della", "dataset_path": "json", "doc_to_text": PROMPT,
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "filter_list": [strict, published, flexible],
    }  # fmt: skip
    (folder / "gsm8k_della.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    return manager(include_path=str(folder), include_defaults=False)


def evaluated(rows: Sequence[Row], model: Any, **more: Any) -> list[dict[str, Any]]:
    """What lm-eval logs: a sample for each row and filter."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=folder)
        evaluate = importlib.import_module("lm_eval").simple_evaluate
        manager = task_file(Path(folder), rows)
        found = evaluate(model, tasks=["gsm8k_della"], task_manager=manager, bootstrap_iters=0, **more)
        samples: list[dict[str, Any]] = found["samples"]["gsm8k_della"]
        return samples


def generated(rows: Sequence[Row], model: Path, most_tokens: int) -> list[Row]:
    """The rows with what lm-eval's own backend generates for them."""
    arguments = {"pretrained": str(model), "dtype": "float32"}
    options = {"model_args": arguments, "batch_size": 16, "device": "cpu"}
    samples = evaluated(rows, "hf", gen_kwargs={"max_gen_toks": most_tokens}, **options)
    outputs = {sample["doc_id"]: sample["resps"][0][0] for sample in samples}
    return [{**row, "output": outputs[number]} for number, row in enumerate(rows)]


def stored(rows: Sequence[Row]) -> Any:
    """A model, in lm-eval's sense, that gives the stored outputs."""
    base = importlib.import_module("lm_eval.api.model").LM

    def generate_until(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [rows[request.doc_id]["output"] for request in requests]

    def unasked(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    methods = {"generate_until": generate_until, "loglikelihood": unasked, "loglikelihood_rolling": unasked}
    return type("Stored", (base,), methods)()


def compare(rows: Sequence[Row]) -> int:
    """Print both scores by filter, and each item that differs; the number of those."""
    theirs: dict[tuple[str, int], tuple[str, bool]] = {
        (sample["filter"], sample["doc_id"]): (sample["filtered_resps"][0], sample["exact_match"] == 1)
        for sample in evaluated(rows, stored(rows))
    }
    differ = 0
    print(f"{'filter':18}{'lm-eval':>12}{'della':>12}{'no number':>11}{'differ':>8}  of {len(rows)} items")
    for name, read in OURS.items():
        found = [read(row["output"]) for row in rows]
        right = [gsm8k.right(number, row["answer"]) for number, row in zip(found, rows, strict=True)]
        expected = [theirs[name, number] for number in range(len(rows))]
        odd = [
            number
            for number, (text, score) in enumerate(expected)
            if score != right[number] or text != (found[number] or "[invalid]")
        ]
        none = sum(number is None for number in found)
        print(f"{name:18}{sum(score for _, score in expected):12}{sum(right):12}{none:11}{len(odd):8}")
        for number in odd:
            print(f"  item {number}: {expected[number]} there, {(found[number], right[number])} here")
        differ += len(odd)
    return differ


def main() -> int:
    """0 where every item agrees, 1 where one does not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--model", type=Path, help="a folder in the format of transformers; needs --data")
    given.add_argument("--generations", type=Path, help="JSONL of {question, answer, output}")
    parser.add_argument("--data", type=Path, help="JSONL of {question, answer}")
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--max-tokens", type=int, default=192, help="of an answer (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="where what was generated is kept")
    options = parser.parse_args()
    if options.model and not options.data:
        parser.error("--model needs --data")
    rows = rows_of(options.data if options.model else options.generations, options.limit)
    if options.model:
        rows = generated(rows, options.model, options.max_tokens)
    if options.save:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        options.save.write_text("".join(lines), encoding="utf-8")
    hard = [{"question": "", "answer": "Made up.\n#### 1234", "output": output} for output in HARD]
    return 1 if compare([*rows, *hard]) else 0


if __name__ == "__main__":
    sys.exit(main())
