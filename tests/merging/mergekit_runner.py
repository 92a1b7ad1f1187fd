"""Runs in mergekit's environment, not in ours: what test_mergekit.py asks for, in one process.

    python mergekit_runner.py TASKS.json

TASKS: ``merges``, pairs of a recipe file and the folder for its result; ``values``, pairs of a recipe file
and the file for the value of every parameter at every tensor; ``bias``, a file with deltas of shape
(rows, n), how often to drop from them, density, epsilon and the file for the mean, if any.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def merge(pairs: list[tuple[str, str]]) -> None:
    """Each recipe by mergekit's own merge, as its command line does it."""
    merging, config = importlib.import_module("mergekit.merge"), importlib.import_module("mergekit.config")
    yaml = importlib.import_module("yaml")
    options = merging.MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    for recipe, out in pairs:
        text = Path(recipe).read_text()
        checked = config.MergeConfiguration.model_validate(yaml.safe_load(text))
        merging.run_merge(checked, out, options, config_source=text)


def values(pairs: list[tuple[str, str]]) -> None:
    """Of each recipe what mergekit gives its method for each tensor: {tensor: [shared, {model: own}]}."""
    planning: Any = importlib.import_module("mergekit.plan")
    task = planning.ExecuteMergeMethodTask
    for recipe, out in pairs:
        found: dict[str, Any] = {}

        def noted(found: dict[str, Any] = found, **given: Any) -> Any:
            own = {str(model): dict(each.items()) for model, each in given["input_parameters"].items()}
            found[given["output_weight"].name] = [dict(given["parameters"].items()), own]
            return task(**given)

        planning.ExecuteMergeMethodTask = noted
        merge([(recipe, f"{out}-merged")])
        Path(out).write_text(json.dumps(found))
    planning.ExecuteMergeMethodTask = task


def mean_of_drops(task: dict[str, Any]) -> None:
    """The mean over many draws of what mergekit's MAGPRUNE with its l1 rescale makes of one tensor."""
    torch, numpy = importlib.import_module("torch"), importlib.import_module("numpy")
    sparsify = importlib.import_module("mergekit.sparsify")
    delta = torch.from_numpy(numpy.load(task["delta"]))
    total = torch.zeros_like(delta, dtype=torch.float64)
    torch.manual_seed(0)
    for _ in range(task["draws"]):
        total += sparsify.della_magprune(delta, task["density"], task["epsilon"], sparsify.RescaleNorm.l1)
    numpy.save(task["out"], (total / task["draws"]).numpy())


if __name__ == "__main__":
    tasks = json.loads(Path(sys.argv[1]).read_text())
    merge(tasks.get("merges", []))
    values(tasks.get("values", []))
    if "bias" in tasks:
        mean_of_drops(tasks["bias"])
