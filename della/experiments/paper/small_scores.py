"""Scores of the 135 M experiment: models are merged, scored and deleted one by one; a file keeps scores."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from della.api import merge
from della.experiments.paper.small_grid import Cell, recipe
from della.experiments.paper.small_items import TASKS, Example
from della.experiments.paper.small_model import item_losses

Losses = dict[str, list[float]]  # by task, one sum of nats an item
Tell = Callable[[str], None]
BATCH = 16
EXACT, EXACT_ITEMS = "exact", 100  # the first test items of each task again, in float32 throughout


def fingerprint(experts: Path, items: Mapping[str, Mapping[str, Sequence[Example]]]) -> str:
    """What scores depend on beside the cell: the items, and the models by size and time of change."""
    digest = xxhash.xxh3_128()
    for split, tasks in sorted(items.items()):
        for task, examples in sorted(tasks.items()):
            digest.update(json.dumps([split, task, [(one.ids, one.asked) for one in examples]]).encode())
    for name in ("base", *TASKS):
        found = (experts / name / "model.safetensors").stat()
        digest.update(f"{name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


class Scores:
    """The losses of models on two splits.  ``items`` are by split and task.

    What a line of the file says is not computed again, so a run that was cut short is gone on with by the
    same call; lines of other items or experts are passed over.
    """

    def __init__(
        self, out: Path, experts: Path, items: Mapping[str, Mapping[str, Sequence[Example]]],
        threads: int, tell: Tell,
    ) -> None:  # fmt: skip
        self.out, self.experts, self.threads, self.tell = out, experts, threads, tell
        self.key = fingerprint(experts, items)
        first = {task: found[:EXACT_ITEMS] for task, found in items["test"].items()}
        self.items = {**items, EXACT: first}
        self.file = out / "scores.jsonl"
        self.known: dict[tuple[str, str], Losses] = {}
        self.seconds = 0.0  # that all known scores took, merges included
        whole = self.file.read_bytes().rpartition(b"\n")[0] if self.file.is_file() else b""
        for line in whole.split(b"\n") if whole else []:
            row = json.loads(line)
            if row["key"] == self.key:
                self.known[row["model"], row["split"]] = row["losses"]
                self.seconds += row["seconds"]
        out.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:  # a damaged last line is cut off
            file.truncate(len(whole) + 1 if whole else 0)

    def expert(self, name: str, split: str) -> Losses:
        """Of the base or an expert."""
        return self._of(name, split, lambda: self.experts / name)

    def cell(self, cell: Cell, split: str) -> Losses:
        """Of a merge, which is made by `della.merge` if it is not scored yet, and deleted afterwards; its
        recipe stays in OUT/recipes.
        """
        merged, text = self.out / "merged", recipe(cell)
        written = self.out / "recipes" / f"{cell.id}.yml"
        written.parent.mkdir(exist_ok=True)
        written.write_text(text, encoding="utf-8")

        def make() -> Path:
            places = {"base_model": "base"} | {f"models.{i}.model": task for i, task in enumerate(TASKS)}
            overrides = [f"{key}={json.dumps(str(self.experts / name))}" for key, name in places.items()]
            shutil.rmtree(merged, ignore_errors=True)
            merge(text, merged, overrides=overrides, threads=self.threads, fsync=False)
            return merged

        try:
            return self._of(cell.id, split, make)
        finally:
            shutil.rmtree(merged, ignore_errors=True)

    def _of(self, name: str, split: str, make: Callable[[], Path]) -> Losses:
        if (name, split) not in self.known:
            began = time.monotonic()
            tasks = self.items[split]
            every = [one for task in TASKS for one in tasks[task]]
            flat = iter(item_losses(make(), every, "float32" if split == EXACT else "bfloat16", BATCH))
            losses = {task: [next(flat) for _ in tasks[task]] for task in TASKS}
            took = round(time.monotonic() - began, 2)
            row = {"key": self.key, "model": name, "split": split, "seconds": took, "losses": losses}
            with self.file.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self.known[name, split] = losses
            self.seconds += took
            means = (f"{t} {sum(losses[t]) / sum(o.answered for o in tasks[t]):.4f}" for t in TASKS)
            self.tell(f"{split}: {name}: {', '.join(means)}; {took:.0f} s")
        return self.known[name, split]
