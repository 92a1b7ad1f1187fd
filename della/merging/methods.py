"""The table of methods: every method is a choice of Drop, Elect and Fuse, and a set of parameters with
defaults.

A new method of the family is one row of METHODS; what its choices mean is in reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from della.dtypes import Array, DType
from della.errors import Problem

TOLERANCE = 1e-9  # 0.7 + 0.3 may be a rounding error above 1
NORMS_CURE = "write 'input_norms: FILE' beside 'model:' (`della calibrate` makes the file)"
RANDOM = ("random", "random_tensor")  # rank_by that ignores magnitude: the paper's controls
OF_TENSOR = ("tensor", "random_tensor")  # rank_by that ranks a whole tensor at once


@dataclass(frozen=True)
class Parameter:
    """One parameter of a recipe: where it may stand, what it may be, and what it is when not written."""

    name: str
    scope: Literal["model", "shared"]
    kind: type | tuple[type, ...]
    default: Any
    doc: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


def _model(
    name: str, default: float | None, doc: str, low: float | None = None, high: float = 1.0
) -> Parameter:
    return Parameter(name, "model", float, default, doc, (), low, None if low is None else high)


def _choice(name: str, doc: str, *choices: str) -> Parameter:
    return Parameter(name, "shared", str, choices[0], doc, choices)


ALL_PARAMETERS: dict[str, Parameter] = {
    p.name: p
    for p in (
        _model("weight", 1.0, "how much of this expert"),
        _model("density", 1.0, "share of the deltas that is kept, 1 - p", low=0.0),
        _model("epsilon", None, "half-width of the range of keep probabilities; 0.15", low=0.0, high=0.5),
        _model("window_size", None, "2 * epsilon, as the authors call it", low=0.0),
        _model("gamma", 0.01, "share of the largest deltas that is dropped", low=0.0),
        Parameter("lambda", "shared", float, 1.0, "factor on the merged delta"),
        Parameter("normalize", "shared", bool, None, "true: fuse: mean; false: fuse: sum"),
        Parameter(
            "rescale",
            "shared",
            (str, bool),
            None,
            "how survivors are enlarged; true: as the method does by default, false: none",
            ("per_element", "none", "l1"),
        ),
        _choice("rank_by", "what ranks magnitudes", "row", "tensor", *RANDOM, "magnitude", "optimal"),
        _choice("importance", "what is ranked: |delta|, or that times input norms", "magnitude", "wanda"),
        _choice("ladder", "from ranks to keep probabilities", "symmetric", "paper"),
        _choice("coupling", "how the experts' draws depend on each other", "independent", "systematic"),
        _choice("scope", "what the largest deltas are chosen from", "tensor", "row", "model"),
        _choice("vote", "how the sign is elected", "weighted", "unweighted", "count", "none"),
        _choice("fuse", "how the agreeing deltas are combined", "mean", "sum", "calibrated"),
        _choice("lambda_scaling", "a factor instead of lambda", "constant", "row", "row_inverse", "tensor"),
        Parameter("int8_mask", "shared", bool, None, "mergekit's memory option; without effect here"),
    )
}

Drop = Literal["none", "magprune", "bernoulli", "top", "band", "average"]


@dataclass(frozen=True)
class Method:
    """One row of the table.  ``drop`` is the kind of Drop; "average" is the plain mean of models, without a
    base.
    """

    name: str
    drop: Drop
    defaults: Mapping[str, Any]
    source: str

    @property
    def needs_base(self) -> bool:
        return self.drop != "average"

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters that this method uses, with this method's defaults."""
        names = {
            "none": ("weight",),
            "magprune": (
                "weight",
                "density",
                "epsilon",
                "window_size",
                "rescale",
                "rank_by",
                "importance",
                "ladder",
                "coupling",
            ),
            "bernoulli": ("weight", "density", "rescale", "coupling"),
            "top": ("weight", "density", "rescale", "scope", "importance"),
            "band": ("weight", "density", "gamma", "rescale", "importance"),
            "average": ("weight", "normalize"),
        }[self.drop]
        if self.needs_base:
            names += ("lambda", "normalize", "vote", "fuse", "lambda_scaling")
        return {
            n: replace(ALL_PARAMETERS[n], default=self.defaults.get(n, ALL_PARAMETERS[n].default))
            for n in names
        }


_ELECT_MEAN = {"vote": "weighted", "fuse": "mean"}
_ELECT_SUM = {"vote": "weighted", "fuse": "sum"}
_SUM = {"vote": "none", "fuse": "sum"}
_PAPER = {"vote": "unweighted", "fuse": "mean"}
_DELLA, _DARE, _TIES = "arXiv 2406.11617", "arXiv 2311.03099", "arXiv 2306.01708"
_PER_ELEMENT, _NO_RESCALE = {"rescale": "per_element"}, {"rescale": "none"}

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("della", "magprune", _ELECT_MEAN | _PER_ELEMENT, _DELLA),
        Method("della_linear", "magprune", _SUM | _PER_ELEMENT, _DELLA),
        Method("dare_ties", "bernoulli", _ELECT_SUM | _PER_ELEMENT, _DARE),
        Method("dare_linear", "bernoulli", _SUM | _PER_ELEMENT, _DARE),
        Method("ties", "top", _ELECT_MEAN | _NO_RESCALE, _TIES),
        Method("task_arithmetic", "none", _SUM, "arXiv 2212.04089"),
        Method("breadcrumbs", "band", _SUM | _NO_RESCALE, "arXiv 2312.06795"),
        Method("breadcrumbs_ties", "band", _ELECT_SUM | _NO_RESCALE, "arXiv 2312.06795"),
        Method("linear", "average", {"normalize": True}, "arXiv 2203.05482"),
        Method("paper_ta", "none", _PAPER, _DELLA + ", table 1"),
        Method("paper_dare", "bernoulli", _PAPER | _PER_ELEMENT, _DELLA + ", table 1"),
        Method("paper_ties", "top", _PAPER | _NO_RESCALE, _DELLA + ", table 1"),
        Method("paper_della", "magprune", _PAPER | _PER_ELEMENT, _DELLA + ", table 1"),
    )
}

LATER_METHODS = frozenset(
    [
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "model_stock",
        "nearswap",
        "passthrough",
        "arcee_fusion",
        "sce",
        "ram",
        "ramplus_tl",
    ]
)


@dataclass(frozen=True)
class Choice:
    """What the three stages do with one tensor: the shared settings, resolved and normalised."""

    drop: Drop
    rank_by: str
    importance: str
    ladder: str
    rescale: str
    coupling: str
    scope: str
    vote: str
    fuse: str
    lambda_scaling: str
    lambda_: float
    compat: DType | None = None  # mergekit's rules, in arithmetic of this type


@dataclass(frozen=True)
class Expert:
    """What the stages do with one expert: its identity (for the random stream), its own settings, and for
    importance: wanda the norms of the tensor's input features (float32, one a column; None where there are
    none).
    """

    identity: str
    weight: float = 1.0
    density: float = 1.0
    epsilon: float = 0.15
    gamma: float = 0.01
    norms: Array | None = field(default=None, compare=False, repr=False)


def choice(method: Method, shared: Mapping[str, Any], compat: DType | None = None) -> Choice:
    """The shared settings of one tensor (defaults where ``shared`` has none) as a Choice; the
    rules are check_settings'."""
    known = method.parameters
    value = {name: p.default for name, p in known.items()} | {
        k: v for k, v in shared.items() if v is not None
    }
    rescale = value.get("rescale", "none")
    if rescale is True:  # mergekit's spelling: the rescale that this kind of Drop has
        rescale = "per_element" if method.drop in ("magprune", "bernoulli") else "l1"
    elif rescale is False:
        rescale = "none"
    fuse = value.get("fuse", "mean")
    if value.get("normalize") is not None:
        fuse = ("calibrated" if fuse == "calibrated" else "mean") if value["normalize"] else "sum"
    return Choice(
        drop=method.drop,
        rank_by=value.get("rank_by", "row"),
        importance=value.get("importance", "magnitude"),
        ladder=value.get("ladder", "symmetric"),
        rescale=rescale,
        coupling=value.get("coupling", "independent"),
        scope=value.get("scope", "tensor"),
        vote=value.get("vote", "none"),
        fuse=fuse,
        lambda_scaling=value.get("lambda_scaling", "constant"),
        lambda_=float(value.get("lambda", 1.0)),
        compat=compat,
    )


def expert(identity: str, own: Mapping[str, Any]) -> Expert:
    """One model's resolved settings as an Expert; ``window_size`` is 2 * epsilon."""
    fields = ("weight", "density", "epsilon", "gamma", "window_size")
    given = {k: float(own[k]) for k in fields if own.get(k) is not None}
    if "window_size" in given:
        given["epsilon"] = given.pop("window_size") / 2
    return Expert(identity, norms=None, **given)


def check_settings(
    method: Method, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
) -> Iterator[Problem]:
    """The rules that join several parameters: what breaks them, with the parameter that is at fault and, as
    ``subject``, the model whose it is.

    ``models`` are the resolved settings of each by its identity; beside its parameters a model has
    ``input_norms`` where it brings such a file.
    """
    what = choice(method, shared)
    yield from _check_fuse(method, shared, what, len(models))
    if what.rescale == "per_element" and method.drop in ("top", "band"):
        said = f"rescale: per_element needs keep probabilities, and {method.name} has none"
        yield Problem(said, "use l1 or none", parameter="rescale")
    if method.drop == "average" and what.fuse != "sum" and models:
        total = sum(expert(identity, own).weight for identity, own in models.items())
        if abs(total) < 1e-8:
            said = f"the weights add up to {total:g}, so they have no mean"
            yield Problem(said, "use normalize: false", parameter="weight")
    if what.importance == "wanda" and what.rank_by in RANDOM:
        said = f"importance: wanda has no part in rank_by: {what.rank_by}, which ranks nothing"
        yield Problem(said, "remove one", parameter="importance")
    elif what.importance == "wanda":
        said = "importance: wanda needs the norms of each model's inputs"
        for identity, own in models.items():
            if not own.get("input_norms"):
                yield Problem(said, NORMS_CURE, identity, parameter="input_norms")
    for identity, own in models.items() if method.drop == "magprune" else ():
        yield from _check_probabilities(identity, own)


def _check_fuse(method: Method, shared: Mapping[str, Any], what: Choice, experts: int) -> Iterator[Problem]:
    normalize = shared.get("normalize")
    written = shared.get("fuse") if shared.get("fuse") != method.defaults.get("fuse") else None
    if normalize is not None and written is not None and (written == "sum") == bool(normalize):
        said = f"normalize: {str(normalize).lower()} contradicts fuse: {written}"
        yield Problem(said, "keep one of them", parameter="normalize")
    elif what.fuse == "calibrated" and what.vote == "none":
        said = "fuse: calibrated corrects what Elect inflates, so it needs a vote other than none"
        yield Problem(said, parameter="fuse")
    elif what.fuse == "calibrated" and method.drop not in ("magprune", "bernoulli"):
        said = f"fuse: calibrated needs keep probabilities, and {method.name} has none"
        yield Problem(said, "use fuse: mean", parameter="fuse")
    elif what.fuse == "calibrated" and experts > 8:
        said = f"fuse: calibrated is computed for at most 8 experts, and here are {experts}"
        yield Problem(said, "use fuse: mean", parameter="fuse")


def _check_probabilities(identity: str, own: Mapping[str, Any]) -> Iterator[Problem]:
    if own.get("window_size") is not None and own.get("epsilon") is not None:
        said = "window_size is 2 * epsilon, so only one of them may be given"
        yield Problem(said, subject=identity, parameter="window_size")
        return
    e = expert(identity, own)
    if e.density in (0.0, 1.0):  # nothing or everything is kept, whatever epsilon says
        return
    low, high = e.density - e.epsilon, e.density + e.epsilon
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        yield Problem(
            f"density {e.density:g} with epsilon {e.epsilon:g} gives keep probabilities from {low:g} to "
            f"{high:g}, which leave [0, 1]",
            f"use an epsilon of at most {min(e.density, 1 - e.density):g}",
            identity,
            parameter="density",
        )
