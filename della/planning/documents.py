"""Plans of a recipe of several documents: the result of one is an input of another before it is merged.

What a later plan needs to know of it (names, shapes, types, configuration) stands in its own plan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from della.checkpoint.source import Source
from della.checkpoint.view import Renamed, TensorView
from della.errors import CheckpointError, Collector, Problem
from della.options import Permissions, Target
from della.planning.card import config_json
from della.planning.job import Job, Plan
from della.planning.planner import make_plan
from della.recipe.models import Recipe


class Future(TensorView):
    """A tensor of a document's result, of which no number is known yet."""

    def __init__(self, job: Job, document: str) -> None:
        super().__init__(job.name, job.shape, job.dtype)
        self.document = document

    def read_into(self, *_: object) -> NoReturn:
        said = f"tensor {self.name!r} is of the result of another document, and not merged yet"
        raise CheckpointError(Problem(said, subject=self.document, tensor=self.name))

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.bytes

    @property
    def where(self) -> str:
        return self.document

    @property
    def reference(self) -> str:
        return self.document


class Planned(Source):
    """The result of a document that is not merged yet, as a model."""

    def __init__(self, plan: Plan, name: str) -> None:
        vars(self).update(vars(plan.base))
        self.reference, self.path = name, Path(name)
        self.files, self.notes, self.revision = [], [], None
        self.config = json.loads(config_json(plan.base.config, plan.jobs)) if plan.base.config else {}
        self.tensors = {
            job.name: Future(job, name) if job.method else Renamed(job.name, job.base) for job in plan.jobs
        }

    @property
    def paths(self) -> list[Path]:
        return []

    @property
    def identity(self) -> tuple[object, ...]:
        return ("document", self.reference)

    def close(self) -> None:
        """What is beneath it belongs to its plan."""


def plan_documents(
    recipe: Recipe, *, weights: bool = True, target: Target | None = None,
    permissions: Permissions = Permissions(), given: Mapping[str, Source] | None = None,
) -> Plan:  # fmt: skip
    """As `make_plan`, for a recipe of any number of documents: those that lead to the result are planned too,
    and stand in ``before`` of the result's plan.

    ``given`` are results of documents that are there already.
    """
    if not recipe.others or given:
        return make_plan(recipe, weights=weights, target=target, permissions=permissions, given=given or {})
    check = Collector(CheckpointError)
    known: dict[str, Source] = {}
    with ExitStack() as stack:
        plans: list[Plan] = []
        for each in (*recipe.others, recipe):
            missing = {other.name for other in recipe.others} - known.keys()
            if missing & {each.base_model, *each.references}:
                continue  # what it needs cannot be, which is told
            with check:
                place = target if each is recipe else None
                made = make_plan(each, weights=weights, target=place, permissions=permissions, given=known)
                plans.append(stack.enter_context(made))
                if each.name is not None:
                    known[each.name] = Planned(made, each.name)
        check.raise_any()
        *before, last = plans
        last.before = tuple(before)
        stack.pop_all()
    for made in before:
        last.opened.enter_context(made)
    return last
