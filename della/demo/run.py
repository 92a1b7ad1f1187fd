"""The demo: merge the trio's experts with four methods and score every model on held-out problems.

    python -m della.demo.run [--out DIR] [--items N]

Each merge is an ordinary della merge of a recipe file, which is left beside its output.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from della.demo import EXPERTS, TRIO
from della.demo.score import ITEMS, kept_gains, score


@dataclass(frozen=True, slots=True)
class Setting:
    """One merge of the demo: a method with the parameters that its recipe states (None: not stated)."""

    method: str
    lambda_: float
    density: float | None = None
    epsilon: float | None = None
    normalize: bool | None = None

    def recipe(self, trio: Path) -> str:
        """The recipe as YAML text."""
        own = {"weight": 1.0, "density": self.density}
        shared = {"lambda": self.lambda_, "epsilon": self.epsilon, "normalize": self.normalize}
        lines = ["models:"]
        for expert in EXPERTS:
            lines += [f"  - model: {json.dumps(str(trio / expert))}", "    parameters:", *_stated(own, 6)]
        lines += [f"base_model: {json.dumps(str(trio / 'base'))}", f"merge_method: {self.method}"]
        lines += ["parameters:", *_stated(shared, 2), "dtype: bfloat16"]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        stated = {"density": self.density, "epsilon": self.epsilon, "lambda": self.lambda_}
        return " ".join(f"{name} {value:g}" for name, value in stated.items() if value is not None)


# Chosen on the validation split (120 problems a task), never on test: SELECTION
SETTINGS = (
    Setting("task_arithmetic", lambda_=1.0),
    Setting("ties", lambda_=1.5, density=0.5, normalize=True),
    Setting("dare_ties", lambda_=1.5, density=0.5, normalize=True),
    Setting("della", lambda_=1.5, density=0.5, epsilon=0.3, normalize=True),
)

Scores = Mapping[str, float]


def table(rows: Sequence[tuple[str, str, Scores, float | None]]) -> str:
    """Aligned text: one row a model, of name, settings, scores and kept gain."""
    cells = [("model", "settings", "LM loss", "Math %", "Code %", "kept gain")]
    for name, settings, scores, kept in rows:
        shown = f"{scores['lm_loss']:.3f}", f"{100 * scores['math']:.1f}", f"{100 * scores['code']:.1f}"
        cells.append((name, settings, *shown, "" if kept is None else f"{kept:.2f}"))
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    rule = tuple("-" * width for width in widths)
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def merge_all(out: Path) -> dict[str, float]:
    """Merge by every setting into ``out/METHOD``, the recipe in ``out/METHOD.yml``; seconds by method."""
    import della

    out.mkdir(parents=True, exist_ok=True)
    took = {}
    for setting in SETTINGS:
        recipe = out / f"{setting.method}.yml"
        recipe.write_text(setting.recipe(TRIO), encoding="utf-8")
        began = time.monotonic()
        della.merge(recipe, out / setting.method, overwrite=True)
        took[setting.method] = time.monotonic() - began
        print(f"merged {setting.method} in {took[setting.method]:.1f} s", flush=True)
    return took


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge, score, print."""
    parser = argparse.ArgumentParser(prog="python -m della.demo.run", description=main.__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("della-demo"), help="where the merges go (%(default)s)"
    )
    parser.add_argument("--items", type=int, default=ITEMS, help="test problems a task (%(default)s)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    took = merge_all(options.out)
    scores = {name: score(TRIO / name, "test", options.items) for name in ("base", *EXPERTS)}
    experts = {name: scores[name] for name in EXPERTS}
    rows: list[tuple[str, str, Scores, float | None]] = [("base", "", scores["base"], None)]
    rows += [(f"{name} expert", "", experts[name], None) for name in EXPERTS]
    for setting in SETTINGS:
        merged = score(options.out / setting.method, "test", options.items)
        kept = kept_gains(merged, scores["base"], experts).values()
        rows.append((setting.method, str(setting), merged, sum(kept) / len(kept)))
    print(f"\n{table(rows)}\n")
    print(
        f"{options.items} held-out problems a task: one standard error of Math and Code is up to "
        f"{50 / math.sqrt(options.items):.1f} points.\n"
        "Kept gain: the mean over the tasks of (merge - base) / (own expert - base).\n"
        f"The merges took {sum(took.values()):.1f} s, everything {time.monotonic() - began:.1f} s; "
        f"models and recipes are in {options.out}."
    )
    return 0


def _stated(values: Mapping[str, float | None], indent: int) -> list[str]:
    return [
        f"{' ' * indent}{name}: {json.dumps(value)}" for name, value in values.items() if value is not None
    ]


if __name__ == "__main__":
    raise SystemExit(main())
