"""The seam of methods: what a merge rule must say, and the registry that everything else asks.

A method is a class below `Method` with `@register` above it; an object of the class is the method with the
settings of one tensor.  methods/averages.py is a short one to begin from.  Reader, `della methods`, planner,
run, resume and verification know a method by what it says here, and by nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from della.dtypes import Array, DType
from della.errors import Problem
from della.merging.tile import Expert, Grain, Passes, Subject, Tile, canonical


@dataclass(frozen=True)
class Parameter:
    """One parameter of a recipe, declared once: reader, command line, documents and searches follow it.

    Args:
        name: As a recipe writes it.
        scope: "model" where each model may have its own value, "shared" where there is one.
        kind: The type of its values, or several.
        default: The value where the recipe says nothing; None where the method finds one.
        doc: What it is, in a few words.
        choices: All values that a text may have; the first is the usual one.
        low: The least number.
        high: The largest number.
        mergekit: The choices that mergekit 0.1.5 knows as well; None where it knows all of them.
        in_every_case: Whether cases by tensor name must have a value for every tensor, so that nothing is
            merged at a default by oversight.

    >>> Parameter("t", "shared", float, 0.5, "how far from the base", low=0.0, high=1.0).range
    '0 to 1'
    """

    name: str
    scope: Literal["model", "shared"]
    kind: type | tuple[type, ...]
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    mergekit: tuple[str, ...] | None = None
    in_every_case: bool = False

    @property
    def kinds(self) -> tuple[type, ...]:
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)

    @property
    def range(self) -> str:
        """What it may be, in words."""
        words = [", ".join(self.choices)] if self.choices else []
        words += ["true, false"] if bool in self.kinds else []
        if not words:
            number = "a whole number" if int in self.kinds else "a number"
            low, high = (None if end is None else f"{end:g}" for end in (self.low, self.high))
            if low and high:
                words = [f"{low} to {high}"]
            else:
                words = [f"{number} from {low}" if low else f"{number} up to {high}" if high else number]
        return ", ".join(words)


@dataclass(frozen=True)
class Asking:
    """The setting with which a method asks for more than a tensor: for norms of each model's inputs
    (``importance: wanda``), or for the whole model (``scope: model``)."""

    parameter: str
    value: str

    def __str__(self) -> str:
        return f"{self.parameter}: {self.value}"


@dataclass(frozen=True)
class WholeModel:
    """Why a method looks at all tensors before it merges one.

    Args:
        option: What asks for it, such as ``scope: model``.
        does: What it does: "chooses one threshold for the whole model".
        same: Parameters of a model that must be the same for all tensors.
        instead: The option without it: "scope: tensor".
    """

    option: Asking
    does: str
    same: tuple[str, ...]
    instead: str


class Method(ABC):
    """A merge rule.  The class says what it is; an object is the rule with the settings of one tensor.

    A class must give `name`, `formula`, `source`, `reference` and `apply`, and says by the other attributes
    what it needs.  The reference is the meaning; ``apply`` must give the same bytes.

    Args:
        shared: The shared parameters of a tensor; defaults where it has none.
        compat: mergekit's merge dtype where mergekit's rules are to be followed, else None.

    >>> class Median(Method):
    ...     name, source = "median_of_the_example", "this docstring"
    ...     formula = "base + lambda * the median of the experts' deltas, element by element"
    ...     takes = (Parameter("lambda", "shared", float, 1.0, "factor on the merged delta"),)
    ...
    ...     def reference(self, subject, base, models):
    ...         median = np.median(np.stack(models) - base, axis=0).astype(base.dtype)
    ...         return base + base.dtype.type(self.shared["lambda"]) * median
    ...
    ...     def apply(self, tile, facts, out):
    ...         median = np.median(tile.values, axis=0)
    ...         np.add(tile.base, np.float32(self.shared["lambda"]) * median, out=out)
    >>> models = [np.float32([1, 2]), np.float32([3, 5]), np.float32([4, 3])]
    >>> experts = [Median.expert(name, {}) for name in "abc"]
    >>> Median({"lambda": 2.0}).merge("w", np.float32([1, 1]), models, experts)
    array([5., 5.], dtype=float32)
    """

    name: ClassVar[str]
    """As `merge_method:` in a recipe."""
    formula: ClassVar[str]
    """What is computed, in words."""
    source: ClassVar[str]
    """The paper, and its equation or section."""
    takes: ClassVar[tuple[Parameter, ...]] = ()
    """Its parameters."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this method where they are not the parameter's own."""
    parameters: ClassVar[Mapping[str, Parameter]] = {}
    """`takes` with `defaults`, by name: made from these."""

    needs_base: ClassVar[bool] = True
    with_base: ClassVar[type[Method] | None] = None
    """What it is where a recipe has a base, for a method that can do without one."""
    experts: ClassVar[tuple[int, int | None]] = (1, None)
    """The least and the largest number of models, without the base; None: any."""
    remark: ClassVar[str] = ""
    """What a plan says of it because hardly anyone expects it."""
    of_deltas: ClassVar[bool] = True
    """Whether tiles hold expert - base instead of the experts' weights."""
    one_by_one: ClassVar[bool] = False
    """Whether `Tile.each` is enough, which needs less memory than all values of a tile at once."""
    is_random: ClassVar[bool] = False
    """Whether the seed can change the result."""
    is_in_mergekit: ClassVar[bool] = True
    is_wide_in_mergekit: ClassVar[bool] = False
    """Whether mergekit computes it in float32 whatever the merge dtype."""
    input_norms: ClassVar[Asking | None] = None
    """With which setting it needs norms of each model's inputs; None where it never does."""
    nanoseconds: ClassVar[float] = 1.0
    """Rough cost per element and expert on one core, for the estimate of time."""

    grain: Grain = Grain.ELEMENT
    whole_model: WholeModel | None = None
    """Where `learn` looks at all tensors before one is merged, why."""
    wants_norms: bool = False
    """Whether, with these settings, `Expert.norms` are used."""

    def __init_subclass__(cls) -> None:
        cls.parameters = {p.name: replace(p, default=cls.defaults.get(p.name, p.default)) for p in cls.takes}

    def __init__(self, shared: Mapping[str, Any] | None = None, compat: DType | None = None) -> None:
        given = shared or {}
        self.compat = compat
        self.shared: dict[str, Any] = {
            p.name: p.default if given.get(p.name) is None else given[p.name]
            for p in self.parameters.values()
            if p.scope == "shared"
        }
        """The shared parameters as they take effect."""

    # ---- settings ----

    @classmethod
    def expert(cls, identity: str, given: Mapping[str, Any], norms: Array | None = None) -> Expert:
        """One model with its parameters as they take effect.

        Args:
            identity: Its name, which keys its random stream.
            given: Its own parameters; defaults where it has none (or None).
            norms: Of its inputs to this tensor.

        Returns:
            The Expert, with every parameter of scope "model".
        """
        own = (p for p in cls.parameters.values() if p.scope == "model")
        values = {p.name: p.default if given.get(p.name) is None else given[p.name] for p in own}
        real = {k: float(v) if isinstance(v, (int, float)) else v for k, v in values.items()}
        return Expert(identity, real, norms)

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        """The rules that join several parameters: what is wrong with these settings of one tensor.

        Args:
            shared: The shared parameters.
            models: Each model's own by its identity, with ``input_norms`` where it brings such a file.

        Yields:
            A Problem for each rule that does not hold, with the ``parameter`` that is at fault and, as
            ``subject``, the identity of the model whose it is.
        """
        yield from ()

    @classmethod
    def count_problem(cls, identities: Sequence[str]) -> Problem | None:
        """What is wrong with so many models, if `experts` does not say so."""
        (least, most), count = cls.experts, len(identities)
        if least <= count and (most is None or count <= most):
            return None
        wanted = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
        beside = " beside base_model" if cls.needs_base else ""
        said = f"{cls.name} merges {wanted} model{'s' * (wanted != '1')}{beside}, found {count}"
        return Problem(f"{said}: {', '.join(identities)}", f"list {wanted} under 'models'")

    # ---- the merge ----

    @abstractmethod
    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        """The merged tensor in plain NumPy: what the method means.

        Args:
            subject: The tensor: its name, shape, experts and seed.
            base: Its values in the base (float32, or float64 where an input is float64).
            models: Its values in each expert, in canonical order.

        Returns:
            The merged values, in the type and shape of the inputs.
        """

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        """The same by mergekit's rules, in `compat`'s type; by default the reference, rounded to it."""
        assert self.compat is not None
        return np.asarray(self.reference(subject, base, models)).astype(self.compat.numpy)

    def learn(self, tensors: Sequence[tuple[Subject, Passes]]) -> dict[str, Any]:
        """What must be known of the whole model, for a method with `whole_model`.

        Args:
            tensors: Every tensor that is merged and passes over its tiles, in output order.

        Returns:
            For each tensor by name what `prepare` needs of it: lists, dicts, numbers and text, as JSON can
            hold, since it is kept for a resumed run.
        """
        return {}

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> Any:
        """What must be known of a tensor before its tiles are merged: thresholds, norms, angles.

        Args:
            subject: The tensor.
            passes: Starts a pass over its tiles, as often as it is called.
            learnt: What `learn` said of it, else None.

        Returns:
            Facts for `apply`, of any type; new ones at each call, as apply may count in them.
        """
        return learnt

    @abstractmethod
    def apply(self, tile: Tile, facts: Any, out: Array) -> None:
        """Merge one tile; the tiles of a tensor come in order.

        Args:
            tile: The values.
            facts: What `prepare` returned.
            out: Receives the merged values: float32, (rows, n).
        """

    def whole(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        """A tensor at once: by the reference, or by mergekit's rules where `compat` says so."""
        with np.errstate(all="ignore"):  # infinities are told when the result is rounded
            made = self.reference if self.compat is None else self.mergekit
            return np.asarray(made(subject, base, models))

    def merge(
        self, name: str, base: Array | None, models: Sequence[Array], experts: Sequence[Expert],
        seed: int = 42,
    ) -> Array:  # fmt: skip
        """`whole` of arrays, with the experts in any order."""
        order = canonical(experts)
        subject = Subject(name, models[0].shape, tuple(experts[t] for t in order), seed)
        return self.whole(subject, base, [models[t] for t in order])

    def copies(self, experts: Sequence[Expert]) -> bool:
        """Whether the result is the tensor of the one expert as it is stored."""
        return False

    # ---- what it costs, and how it differs from mergekit ----

    def idle_by(self, expert: Expert) -> str:
        """The parameter that leaves an expert without effect, such as a weight of 0; "" where none does."""
        return ""

    def memory(self, experts: int, tile: int, elements: int) -> int:
        """Bytes that one thread needs for a tensor of ``elements``: the values of every expert, the result
        and what was read, with a base also its values and what a drop takes; a ``tile`` of float32 each.
        """
        held = experts + (7 if self.needs_base else 2)
        return 4 * (elements if self.grain is Grain.TENSOR else tile) * held

    def beyond_mergekit(self) -> dict[str, Any]:
        """The settings that mergekit 0.1.5 lacks."""
        if not self.is_in_mergekit:
            return {"merge_method": self.name}
        rows = [p for p in self.parameters.values() if p.mergekit is not None]
        return {p.name: value for p in rows if (value := self.shared[p.name]) not in (p.mergekit or ())}

    def draws(self, subject: Subject) -> bool:
        """Whether random numbers decide about this tensor."""
        return self.is_random

    def departures(self, subject: Subject) -> dict[str, bool]:
        """What it computes otherwise than mergekit 0.1.5: each such line, and whether it holds here.  It
        names all that it knows, in an order of its own."""
        return {}

    def compat_warnings(self, subject: Subject) -> list[str]:
        """What of mergekit's own rules hardly anyone can want here, a line each."""
        return []


METHODS: dict[str, type[Method]] = {}
"""Every method by name; registry.py fills it."""
ALL_PARAMETERS: dict[str, Parameter] = {}
"""Every parameter of any method by name."""

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a method known by its name; a decorator of the class.

    Args:
        method: A class below `Method`.

    Returns:
        The same class.

    Raises:
        ValueError: The name is taken, or the class says too little.

    >>> from della.merging.registry import METHODS
    >>> register(METHODS["ties"])
    Traceback (most recent call last):
    ...
    ValueError: ties: there is such a method
    """
    for key in ("name", "formula", "source"):
        if not getattr(method, key, ""):
            raise ValueError(f"{method.__name__}: gives no {key}")
    if method.name in METHODS:
        raise ValueError(f"{method.name}: there is such a method")
    for parameter in method.takes:
        known = ALL_PARAMETERS.setdefault(parameter.name, parameter)
        if known.scope != parameter.scope:
            raise ValueError(f"{method.name}: {parameter.name} is {known.scope} in other methods")
    METHODS[method.name] = method
    return method
