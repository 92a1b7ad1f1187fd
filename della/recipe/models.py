"""What a recipe says, once it is read: the Recipe, and which settings hold for which tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from della.dtypes import DType
from della.errors import Collector, Location, Problem, RecipeError, clip, some, suggest
from della.merging.method import Method
from della.recipe.settings import Filtered, Gradient, Scalar, Setting, choose, possible
from della.recipe.templates import ChatTemplate
from della.recipe.tokens import Tokenizer

_MOST_COMPLAINTS = 5


@dataclass(frozen=True)
class ModelEntry:
    """One expert: ``reference`` as written, ``identity`` (it keys the random stream), own settings, and the
    file of its input norms.
    """

    reference: str
    identity: str
    parameters: Mapping[str, Setting]
    input_norms: str | None
    location: Location = field(compare=False, repr=False)
    norms_location: Location | None = field(compare=False, repr=False)
    layers: tuple[int, int] | None = None  # of a source of a slice: from which layer to before which

    @property
    def line(self) -> int:
        """The line of the recipe in which it begins; 0 for a recipe that was not read from text."""
        return self.location.line if self.location.column else 0


@dataclass(frozen=True)
class Recipe:
    """What to merge and how.  ``text`` is the recipe as YAML; ``notes`` are warnings for the user.

    ``models`` are the experts (for ``linear``, all models); ``parameters`` are the recipe's own settings.
    Settings that the method does not use are in neither.  What to do about unfit inputs: ``nonfinite``
    ("error", "keep", "zero"), ``missing`` ("error", "base"), ``extra`` ("error", "ignore", "copy"),
    ``mismatch`` of model types ("error", "ignore");
    ``plain_fp8``: float8 tensors are values, no codes; ``tokenizer`` and ``chat_template``: those that the
    result shall have.

    A recipe of slices or modules has ``parts``, a recipe each; then ``models`` are those of all parts.

    Where the text has several documents, this is the result's, and ``others`` are those that lead to it.
    """

    path: Path | None
    text: str
    name: str | None
    base_model: str | None
    models: tuple[ModelEntry, ...]
    merge_method: str
    method: type[Method]
    parameters: Mapping[str, Setting]
    dtype: DType | None
    out_dtype: DType | None
    seed: int
    compat: bool
    nonfinite: str
    missing: str
    extra: str
    mismatch: str
    plain_fp8: bool
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    notes: tuple[str, ...]
    location: Location = field(compare=False, repr=False)
    parts: tuple[Part, ...] = ()
    others: tuple[Recipe, ...] = ()

    @property
    def template(self) -> str:
        """The model that gives names, shapes and side files: the base, or the first model without one.

        Of parts the base gives them whatever their methods are, and what no part makes.
        """
        references = [m.reference for m in self.models]
        has_part = bool(self.parts) or self.method.needs_base or self.base_model in references
        return self.base_model if self.base_model and has_part else references[0]

    @property
    def references(self) -> list[str]:
        """The models, and the bases, that are opened."""
        bases = [part.recipe.template for part in self.parts]
        return list(dict.fromkeys([self.template, *(m.reference for m in self.models), *bases]))

    def resolve(self, tensor_name: str, depth: float) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
        """The settings of one tensor: (shared values, values of each model in the order of ``models``).

        ``depth`` is 0 at the first layer, 1 at the last, and 0 for tensors outside the layers.
        Every parameter of the method is there, with the method's default where the recipe says nothing; and a
        model's ``input_norms``, if it has such a file.
        """
        shared, *models = (plan.values(tensor_name, depth) for plan in self._plans)
        for entry, own in zip(self.models, models, strict=True):
            if entry.input_norms is not None:
                own["input_norms"] = entry.input_norms
        return shared, tuple(models)

    def check(self, points: Iterable[tuple[str, float, str]]) -> None:
        """Hold the rules that join several parameters at every ``(tensor name, depth, label as "layer 7")``.

        Raises RecipeError with the first few points where they break; the same everywhere is told once.
        """
        seen: set[Any] = set()
        complaints: dict[Problem, Problem] = {}
        for tensor, depth, label in points:
            shared, models = self.resolve(tensor, depth)
            key = (tuple(shared.values()), *(tuple(own.values()) for own in models))
            if key in seen:
                continue
            seen.add(key)
            at = (f", at {label}" + (f" ({clip(tensor)})" if tensor else "")) if label else ""
            own = {entry.identity: values for entry, values in zip(self.models, models, strict=True)}
            for problem in self.method.problems(shared, own):
                told = self.located(problem, tensor)
                known = replace(told, tensor=None)
                complaints.setdefault(known, replace(told, said=told.said + at))
            if len(complaints) >= _MOST_COMPLAINTS:
                break
        if complaints:
            raise RecipeError(*complaints.values())

    def located(self, problem: Problem, tensor: str = "") -> Problem:
        """The problem with its tensor, and with where the parameter at fault was written: by its model, by
        any, or for all.
        """
        entries = [m for m in self.models if problem.subject in (None, m.identity)]
        location = entries[0].location if problem.subject else self.location
        for source in (*(m.parameters for m in entries), self.parameters):
            written = source.get(problem.parameter or "")
            setting = choose((written,), tensor) if written else None
            if setting is not None:
                location = setting.location
                break
        return replace(problem, location=location, tensor=tensor or None)

    def matches(self, names: Sequence[str]) -> Iterator[tuple[str, str, Filtered, list[int]]]:
        """(model or "", parameter, cases, how many of the tensors ``names`` each case holds for), for every
        parameter that is written as cases."""
        owners = [(entry.reference, entry.parameters) for entry in self.models]
        for owner, parameters in (*owners, ("", self.parameters)):
            for name, setting in parameters.items():
                if isinstance(setting, Filtered):
                    found = Counter(map(setting.case, names))
                    yield owner, name, setting, [found[k] for k in range(len(setting.cases))]

    def matched(self, names: Sequence[str]) -> Iterator[Location]:
        """Where the cases stand that hold for one of the tensors ``names``."""
        for _, _, setting, counts in self.matches(names):
            yield from (case.location for (_, case), n in zip(setting.cases, counts, strict=True) if n)

    def check_cases(self, names: Sequence[str], elsewhere: Collection[Location] = ()) -> None:
        """Every case must hold for one of the tensors ``names`` that are merged, or stand where one does that
        holds ``elsewhere``; and some parameters need a value for each of them.

        Raises RecipeError.
        """
        found = []
        for _, parameter, setting, counts in self.matches(names):
            for (part, case), count in zip(setting.cases, counts, strict=True):
                if not count and case.location not in elsewhere and not any(map(part.fits, names)):
                    said = f"the filter {clip(str(part))!r} of {parameter!r} is in the name of no tensor"
                    said = said if part.is_plain else said.replace("is in the name of", "holds for")
                    fix = _in_a_name(part.part, names) if part.is_plain else None
                    fix = fix or f"a tensor is called, for example, {names[0]}"
                    found.append(Problem(said, fix, parameter=parameter, location=case.location))
        needed = [p.name for p in self.method.parameters.values() if p.in_every_case]
        for entry, parameter in product(self.models, needed):
            chain = tuple(p[parameter] for p in (entry.parameters, self.parameters) if parameter in p)
            left = [name for name in names if chain and choose(chain, name) is None]
            if left:
                said = f"{parameter!r} of {entry.reference} has no value for {some(left)}"
                fix = "add a last case without filter, such as '- value: 0.5', or a value for all models"
                at = chain[0].location
                found.append(Problem(said, fix, tensor=left[0], parameter=parameter, location=at))
        if found:
            raise RecipeError(*dict.fromkeys(found))

    def check_count(self) -> None:
        """Hold that there are as many models as the method can merge; each part of a recipe has its own.

        Raises RecipeError.
        """
        wrong = None if self.parts else self.method.count_problem([m.identity for m in self.models])
        if wrong:
            raise RecipeError(replace(wrong, location=self.location))

    def check_at_once(self) -> None:
        """Hold the rules already while reading, where no tensor's name is needed."""
        if self.parts:
            problems = Collector(RecipeError)
            for part in self.parts:
                with problems:
                    part.recipe.check_at_once()
            problems.raise_any()
            return
        idle = [model.norms_location for model in self.models if model.input_norms is not None]
        asking = self.method.input_norms
        if idle and not (asking and asking.value in possible(self.parameters.get(asking.parameter))):
            raise RecipeError(*(replace(self._idle_norms, location=location) for location in idle))
        settings = [
            s for source in (self.parameters, *(m.parameters for m in self.models)) for s in source.values()
        ]
        if any(isinstance(s, Filtered) for s in settings):
            return
        if any(isinstance(s, Gradient) for s in settings):
            ends = [("", 0.0, "the first layer (depth 0)"), ("", 1.0, "the last layer (depth 1)")]
            self.check(ends)
        else:
            self.check([("", 0.0, "")])

    @property
    def _idle_norms(self) -> Problem:
        asking = self.method.input_norms
        if asking and asking.parameter in self.method.parameters:
            said = f"'input_norms' has no effect without '{asking}' in the recipe's own parameters"
            return Problem(said, parameter="input_norms")
        said = f"'input_norms' has no effect with merge_method {self.merge_method}"
        return Problem(said, "remove it", parameter="input_norms")

    @cached_property
    def _plans(self) -> tuple[_Plan, ...]:
        known = self.method.parameters.values()
        everything = {"shared": {p.name: p.default for p in known if p.scope == "shared"}}
        everything["model"] = {p.name: p.default for p in known if p.scope == "model"}
        plans = [_Plan.of(everything["shared"], (self.parameters,))]
        plans += [_Plan.of(everything["model"], (entry.parameters, self.parameters)) for entry in self.models]
        return tuple(plans)


@dataclass(frozen=True)
class Part:
    """A part of a model: a slice or a module, or a slice of a module; what it is made of says ``recipe``.

    Args:
        label: "slice 2", "module encoder".
        recipe: Its models, method and settings.
        module: The name of its module; "" where it is of the whole model.
        is_cut: Whether it is a slice.
        base_layers: The layers of the base that a slice lists.
        location: Where it is written.
    """

    label: str
    recipe: Recipe
    module: str
    is_cut: bool
    base_layers: tuple[int, int] | None = None
    location: Location = field(compare=False, repr=False, default=Location(0, 0, "recipe"))


_SIGNS = r"[*?\[\]^$|\\]"


def _in_a_name(part: str, names: Sequence[str]) -> str:
    """What to write instead of a filter that is in no name."""
    if set(part) & set(_SIGNS):
        counts = {piece: sum(piece in name for name in names) for piece in re.split(_SIGNS, part) if piece}
        rarest = min((piece for piece, count in counts.items() if count), key=counts.__getitem__, default="")
        such = f", such as {rarest!r}" if rarest else ""
        said = "a filter is a part of a tensor's name, and no pattern: write a part without such signs"
        return f"{said}{such}; a regular expression begins with 're:'"
    parts = {piece for name in names for piece in name.split(".") if not piece.isdigit()}
    return suggest(part, parts) or f"a filter is a part of a tensor's name, such as {names[0]}"


@dataclass(frozen=True)
class _Plan:
    """The settings of one model, or the shared ones: what is the same for every tensor, and what is not."""

    constant: dict[str, Any]
    varying: tuple[tuple[str, tuple[Setting, ...]], ...]

    @classmethod
    def of(cls, defaults: Mapping[str, Any], sources: Sequence[Mapping[str, Setting]]) -> _Plan:
        constant, varying = dict(defaults), []
        for name in defaults:
            chain = tuple(source[name] for source in sources if name in source)
            if chain and isinstance(chain[0], Scalar):
                constant[name] = chain[0].value
            elif chain:
                varying.append((name, chain))
        return cls(constant, tuple(varying))

    def values(self, tensor_name: str, depth: float) -> dict[str, Any]:
        values = dict(self.constant)
        for name, chain in self.varying:
            setting = choose(chain, tensor_name)
            if setting is not None:
                values[name] = setting.at(depth)
        return values
