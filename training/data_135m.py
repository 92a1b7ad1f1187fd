"""Make the nine data files of the 135 M experiment from GSM8K, MBPP and plain text files of novels.

    python training/data_135m.py --gsm8k FOLDER --mbpp mbpp.jsonl --out DATA \\
        --prose emma.txt mansfieldpark.txt prideprejudice.txt \\
        --prose-validation northangerabbey.txt --prose-test persuasion.txt sensesensibility.txt

Each file, DATA/TASK.SPLIT.jsonl, has lines {"prompt": ..., "response": ...}; nothing is downloaded.

- math: GSM8K (MIT): FOLDER/train.jsonl and test.jsonl as published. Calculator marks are taken out, and the
  last line reads "The answer is: N". Validation: 500 problems of the train file, apart from the others.
- code: MBPP (CC-BY-4.0), mbpp.jsonl as published. Test: ids 11 to 510; validation: 511 to 600; train: above.
- lm: passages of novels; whole novels make a split. A passage is some sentences (from 30 words up) as prompt
  and the sentences after them (from 60 words up) as response. Any plain text with blank lines between its
  paragraphs does. Jane Austen's six are in the public domain and in the R package janeaustenr, where this
  writes them out: Rscript -e 'library(janeaustenr); for (n in c("emma", "mansfieldpark", "northangerabbey",
  "persuasion", "prideprejudice", "sensesensibility")) writeLines(get(n), paste0(n, ".txt"))'
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

Pair = tuple[str, str]  # prompt, response

MATH_VALIDATION = 500
CODE_TEST, CODE_VALIDATION = range(11, 511), range(511, 601)
OPENING_WORDS, RESPONSE_WORDS, MOST_WORDS = 30, 60, 150
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"']))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+")


def lines(path: Path) -> list[dict[str, object]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def math_pairs(path: Path) -> list[Pair]:
    """GSM8K's problems with their worked solutions."""
    pairs = []
    for row in lines(path):
        steps, _, number = str(row["answer"]).partition("####")
        steps = re.sub(r"<<[^>]*>>", "", steps).strip()
        pairs.append((str(row["question"]).strip(), f"{steps}\nThe answer is: {number.strip()}"))
    return pairs


def code_pairs(path: Path) -> dict[int, Pair]:
    """MBPP's problems by id, each with its three tests in the prompt."""
    pairs = {}
    for row in lines(path):
        tests = row["test_list"]
        assert isinstance(tests, list)
        prompt = "\n".join([str(row["text"]).strip(), "Your code should pass these tests:", *map(str, tests)])
        code = str(row["code"]).replace("\r\n", "\n").strip()
        pairs[int(str(row["task_id"]))] = (prompt, code)
    return pairs


def prose_pairs(text: str) -> list[Pair]:
    """The passages of one novel, in order and without overlap; headings are left out."""
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    told = " ".join(p for p in paragraphs if len(p.split()) >= 12)
    sentences = [s for s in SENTENCE_END.split(told.replace("_", "")) if s]
    pairs: list[Pair] = []
    opening: list[str] = []
    following: list[str] = []
    for sentence in sentences:
        if sum(len(s.split()) for s in opening) < OPENING_WORDS:
            opening.append(sentence)
            continue
        following.append(sentence)
        if sum(len(s.split()) for s in following) >= RESPONSE_WORDS:
            if len(" ".join([*opening, *following]).split()) <= MOST_WORDS:
                pairs.append(("Continue this passage.\n\n" + " ".join(opening), " ".join(following)))
            opening, following = [], []
    return pairs


def write(path: Path, pairs: Iterable[Pair], seed: int) -> None:
    """One JSONL file, in an order that the seed and the file's name decide."""
    rows = [json.dumps({"prompt": p, "response": r}, ensure_ascii=False) for p, r in pairs]
    random.Random(f"{seed}/{path.name}").shuffle(rows)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} pairs")


def main() -> int:
    """Write the nine files."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--mbpp", type=Path, required=True)
    for split in ("", "-validation", "-test"):
        parser.add_argument(f"--prose{split}", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    known = math_pairs(options.gsm8k / "train.jsonl")
    code = code_pairs(options.mbpp)
    last = max(CODE_VALIDATION)
    splits = {
        "math.validation": known[:MATH_VALIDATION],
        "math.train": known[MATH_VALIDATION:],
        "math.test": math_pairs(options.gsm8k / "test.jsonl"),
        "code.validation": [code[i] for i in CODE_VALIDATION if i in code],
        "code.train": [pair for i, pair in code.items() if i > last],
        "code.test": [code[i] for i in CODE_TEST if i in code],
    }
    novels = {"train": options.prose, "validation": options.prose_validation, "test": options.prose_test}
    for split, paths in novels.items():
        splits[f"lm.{split}"] = [
            pair for path in paths for pair in prose_pairs(path.read_text(encoding="utf-8"))
        ]
    for name, pairs in splits.items():
        write(options.out / f"{name}.jsonl", pairs, options.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
