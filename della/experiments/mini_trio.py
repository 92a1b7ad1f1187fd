"""The miniature's models and problems: a Cell is merged in memory, rounded as on disk, and scored."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence

from della.arrays import merge_state_dicts
from della.checkpoint.source import open_source
from della.dtypes import Array
from della.errors import DellaError, EvaluationError
from della.evaluate.calibration import llama_norms
from della.evaluate.llama import Llama
from della.evaluate.tokenizer import load_tokenizer
from della.experiments.bench import Scored
from della.experiments.cells import Cell
from della.experiments.demo import EXPERTS, TRIO, tasks
from della.experiments.demo.score import Problems, correct, problems_of, score_problems
from della.sandbox.programs import calls
from della.sandbox.walls import Limits, Sandbox, open_sandbox

# The splits that are scored; the split "final" has the problems of "validation" and of "more".
STORED = ("validation", "more", "test")
MADE_OF = {"final": (("validation", None), ("more", None))}
CALIBRATION = 64  # training texts a task whose inputs make the norms of WANDA
# Time for a busy machine: a function that runs into it would count as wrong.
_LIMITS = Limits(seconds=5.0, processes=64)


class Programs:
    """Runs the functions of the Code task in a sandbox, each text once; where there is none, reads them as
    arithmetic and runs nothing.

    ``kind`` is "sandbox" or "arithmetic"; ``asked`` and ``run`` count texts; ``why`` says why there is no
    sandbox.
    """

    def __init__(self, sandbox: Sandbox | None, why: str = "") -> None:
        self.name = sandbox.name if sandbox else ""
        self.kind = "sandbox" if sandbox else "arithmetic"
        self.why = why
        self.asked = self.run = 0
        self._sandbox = sandbox
        self._known: dict[str, list[object]] = {}
        self._counting = threading.Lock()

    @staticmethod
    def open() -> Programs:
        """With the best sandbox of this machine, or without one."""
        try:
            return Programs(open_sandbox())
        except EvaluationError as error:
            return Programs(None, str(error))

    def right(self, items: Sequence[tasks.Item], answers: Sequence[str]) -> list[float]:
        """Of each problem, whether its answer returns what is asked for on every input."""
        if self._sandbox is None:
            return correct(items, answers)
        texts = [item.prompt + answer for item, answer in zip(items, answers, strict=True)]
        new = {text: item.group for item, text in zip(items, texts, strict=True) if text not in self._known}
        if new:
            found = calls(self._sandbox, list(new.items()), tasks.CODE_INPUTS, _LIMITS)
            self._known.update(zip(new, found, strict=True))
        with self._counting:
            self.asked += len(texts)
            self.run += len(new)
        expected = [[tasks.apply(x, item.steps) for x in tasks.CODE_INPUTS] for item in items]
        return [float(self._known[text] == values) for text, values in zip(texts, expected, strict=True)]


class Trio:
    """The trio's weights and problems, ready to merge and to score; it may be used by several threads.

    items: how many problems a task in each split.  ``problems`` has them by split and task, and as "more"
    those of "final" that are not of "validation".
    """

    def __init__(self, items: Mapping[str, int], programs: Programs) -> None:
        try:
            self._tokenizer = load_tokenizer(TRIO / "base")
        except DellaError as error:
            raise EvaluationError(
                "the miniature needs tokenizers; pip install '.[paper]' in della's checkout"
            ) from error
        self.programs = programs
        self._config = json.loads((TRIO / "base" / "config.json").read_text(encoding="utf-8"))
        self._weights = {name: _weights(name) for name in ("base", *EXPERTS)}
        self.problems: dict[tuple[str, str], Problems] = {}
        for task in EXPERTS:
            first = tasks.items(task, "validation", items["validation"])
            more = tasks.items(task, "validation", max(items["validation"], items["final"]))[len(first) :]
            validation, others = (problems_of(self._tokenizer, found) for found in (first, more))
            self.problems["validation", task], self.problems["more", task] = validation, others
            self.problems["final", task] = validation.followed_by(others)
            self.problems["test", task] = problems_of(
                self._tokenizer, tasks.items(task, "test", items["test"])
            )
        self._norms: dict[str, dict[str, Array]] = {}

    @property
    def tokens(self) -> dict[tuple[str, str], list[int]]:
        """Answer tokens by problem, of each split and task."""
        return {of: found.tokens for of, found in self.problems.items()}

    @property
    def digest(self) -> str:
        """A hash of all weights and problems: what scores depend on."""
        found = hashlib.sha256()
        for weights in self._weights.values():
            for name, array in weights.items():
                found.update(name.encode() + array.tobytes())
        found.update(repr([problems.pairs for problems in self.problems.values()]).encode())
        return found.hexdigest()[:16]

    def collect_norms(self) -> None:
        """Input norms of each expert on training texts of its own task, for importance: wanda."""
        for task in EXPERTS:
            texts = [item.prompt + item.answer for item in tasks.items(task, "train", CALIBRATION)]
            ids = [self._tokenizer.encode(text).ids for text in texts]
            self._norms[task] = llama_norms(Llama(self._config, self._weights[task]), ids)

    def merge(self, cell: Cell) -> dict[str, Array]:
        """The tensors of a cell, in the base's dtype."""
        if not cell.method:
            return self._weights[cell.experts[0]]
        options = cell.options()
        if options.get("importance") == "wanda":
            options["input_norms"] = [self._norms[name] for name in cell.experts]
        experts = [self._weights[name] for name in cell.experts]
        return merge_state_dicts(self._weights["base"], experts, **options)

    def key(self, cell: Cell, split: str) -> str:
        """What the scores of a cell are kept under."""
        return f"{split} {cell.name}"

    def score(self, cell: Cell, split: str) -> Scored:
        """Merge and score, on the tasks of the cell's experts, a model as it is on all: losses in nats by
        problem, and of Math and Code what is right.
        """
        model, found = Llama(self._config, self.merge(cell)), {}
        for task in cell.experts if cell.method else EXPERTS:
            right = self.programs.right if task == "code" else None
            found[task] = score_problems(model, self._tokenizer, task, self.problems[split, task], right)
        return found


def _weights(name: str) -> dict[str, Array]:
    with open_source(str(TRIO / name)) as source:
        return {tensor: view.read() for tensor, view in source.tensors.items()}
