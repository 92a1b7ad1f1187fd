"""Methods that work on deltas (task vectors): each is a choice of Drop, Elect and Fuse.

A new one of the family is one class of three lines at the end; what its stages mean is in reference.py and
drops/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from della.dtypes import Array, DType
from della.errors import Problem
from della.merging import compat, reference
from della.merging.drops.bernoulli import Bernoulli
from della.merging.drops.by_size import Middle, Top
from della.merging.drops.drop import Drop
from della.merging.drops.magprune import Magprune
from della.merging.method import Asking, Method, register
from della.merging.options import (
    FUSE,
    FUSES,
    LAMBDA,
    LAMBDA_SCALING,
    NORMALIZE,
    SCALINGS,
    VOTE,
    VOTES,
    WEIGHT,
    fuse_of,
)
from della.merging.tile import MOST_HELD, Expert, Grain, Passes, Subject, Tile, as_rows

MOST_CALIBRATED = 8
MOST_UNROLLED = 8  # experts whose number the compiler knows
_FUSED = {
    "mean": "the sum of weight * delta' / the sum of |weight|",
    "sum": "the sum of weight * delta'",
    "calibrated": "the calibrated mean of delta'",
}
_ELECTED = {
    "weighted": " over the experts that have the sign of the sum of weight * delta'",
    "unweighted": " over the experts that have the sign of the sum of delta'",
    "count": " over the experts that have the sign which most have",
    "none": "",
}


@dataclass
class _Facts:
    """What one pass over the tiles of a tensor works with."""

    drop: Any  # what the Drop learnt, and may count in
    weights: Array
    votes: Array | None
    rescale: list[np.float32]  # l1: a factor for each expert
    factors: Array | None = None  # lambda_scaling: tensor: one for each expert


class TaskVectors(Method):
    """base + lambda * Fuse(Elect(Drop(expert - base)))."""

    drops: ClassVar[type[Drop]]
    needs_base = True
    input_norms = Asking("importance", "wanda")

    def __init_subclass__(cls) -> None:
        cls.takes = (WEIGHT, *cls.drops.parameters, LAMBDA, NORMALIZE, VOTE, FUSE, LAMBDA_SCALING)
        cls.is_random, cls.nanoseconds = cls.drops.has_probabilities, cls.drops.nanoseconds
        super().__init_subclass__()
        vote, fuse = (cls.parameters[p.name].default for p in (VOTE, FUSE))
        cls.formula = f"base + lambda * {_FUSED[fuse]}{_ELECTED[vote]}; delta' = {cls.drops.words}"

    def __init__(self, shared: Mapping[str, Any] | None = None, compat: DType | None = None) -> None:
        super().__init__(shared, compat)
        value = self.shared
        value["fuse"] = fuse_of(value["fuse"], value["normalize"])
        if "rescale" in value:
            value["rescale"] = self.drops.rescale_of(value["rescale"])
        self.drop = self.drops(value)
        self.vote, self.fuse = VOTES[value["vote"]], FUSES[value["fuse"]]
        self.scaling = SCALINGS[value["lambda_scaling"]]
        value["normalize"] = self.fuse.mean
        by_row = self.drop.rescale.l1 or self.drop.wants_norms or (self.scaling and self.scaling.by_row)
        self.grain = Grain.ROW if by_row else self.drop.grain
        self.whole_model, self.wants_norms = self.drop.whole_model, self.drop.wants_norms

    # ---- settings ----

    @classmethod
    def expert(cls, identity: str, given: Mapping[str, Any], norms: Array | None = None) -> Expert:
        made = super().expert(identity, given, norms)
        return Expert(identity, cls.drops.values_of(made.values), norms)

    @classmethod
    def problems(
        cls, shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]
    ) -> Iterator[Problem]:
        what = cls(shared)
        yield from what._fuse_problems(shared, len(models))
        if what.drop.rescale.per_element and not cls.drops.has_probabilities:
            said = f"rescale: per_element needs keep probabilities, and {cls.name} has none"
            yield Problem(said, "use l1 or none", parameter="rescale")
        yield from what.drop.problems(models)

    def _fuse_problems(self, shared: Mapping[str, Any], experts: int) -> Iterator[Problem]:
        normalize, written = shared.get("normalize"), shared.get("fuse")
        written = None if written == self.defaults.get("fuse") else written
        calibrated = f"{FUSE.name}: {self.shared['fuse']}"
        if normalize is not None and written is not None and FUSES[written].mean != bool(normalize):
            said = f"normalize: {str(normalize).lower()} contradicts fuse: {written}"
            yield Problem(said, "keep one of them", parameter="normalize")
        elif not self.fuse.calibrated:
            return
        elif self.vote is None:
            said = f"{calibrated} corrects what Elect inflates, so it needs a vote other than none"
            yield Problem(said, parameter="fuse")
        elif not self.drops.has_probabilities:
            said = f"{calibrated} needs keep probabilities, and {self.name} has none"
            yield Problem(said, "use fuse: mean", parameter="fuse")
        elif experts > MOST_CALIBRATED:
            said = f"{calibrated} is computed for at most {MOST_CALIBRATED} experts, and here are {experts}"
            yield Problem(said, "use fuse: mean", parameter="fuse")

    # ---- the reference, and mergekit ----

    def reference(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        rows = as_rows(subject.name, base)
        deltas = [as_rows(subject.name, model) - rows for model in models]
        pairs = [self.drop.reference(subject, t, delta) for t, delta in enumerate(deltas)]
        dropped, q = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        weights, signs = subject.column("weight"), None
        if self.vote is not None:
            votes = [float(self.vote.of_weight(w)) for w in weights]
            signs = reference.elect(votes, self.vote.by_count, dropped)
        merged = reference.fuse(
            self.fuse, self.scaling, weights, signs, self.shared["lambda"], rows, deltas, dropped, q
        )
        return merged.reshape(base.shape)

    def mergekit(self, subject: Subject, base: Array | None, models: Sequence[Array]) -> Array:
        assert base is not None
        assert self.compat is not None
        dtype = self.compat.numpy
        base = base.astype(dtype)
        parts = [self.drop.mergekit(subject, t, m.astype(dtype) - base) for t, m in enumerate(models)]
        weights, lambda_ = subject.column("weight"), self.shared["lambda"]
        return compat.combined(base, parts, weights, self.vote, self.fuse.mean, lambda_)

    # ---- numbers of the whole tensor ----

    def learn(self, tensors: Sequence[tuple[Subject, Passes]]) -> dict[str, Any]:
        return self.drop.learn(tensors)

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> _Facts:
        weights = np.array(subject.column("weight"), np.float32)
        votes = None if self.vote is None else np.asarray(self.vote.of_weight(weights))
        known = self.drop.prepare(subject, passes, learnt)
        facts = _Facts(self.drop.begin(known), weights, votes, [])
        if self.drop.rescale.l1:
            facts.rescale = self._l1_factors(facts, passes())
            facts.drop = self.drop.begin(known)
        if self.scaling is not None and not self.scaling.by_row:
            counts = np.zeros((len(weights), 1, 2), np.int64)
            for tile in passes():
                counts += self._counts(facts, self._drop(tile, facts)).sum(axis=1, keepdims=True)
            facts.factors = self._adaptive(counts)[:, 0]
            facts.drop = self.drop.begin(known)
        return facts

    def _l1_factors(self, facts: _Facts, tiles: Iterable[Tile]) -> list[np.float32]:
        from della.merging.kernels import largest

        before: list[list[Array]] = [[] for _ in facts.weights]
        after: list[list[Array]] = [[] for _ in facts.weights]
        for tile in tiles:
            for t, delta in enumerate(tile.values):
                before[t].append(largest.sums_of_rows(delta))
                self.drop.apply(tile, t, delta, facts.drop, None)
                after[t].append(largest.sums_of_rows(delta))
        sums = [[reference.ordered_sum(np.concatenate(x)) for x in pair] for pair in zip(before, after)]
        return [np.float32(reference.l1_ratio(*pair)) for pair in sums]

    # ---- one tile ----

    def apply(self, tile: Tile, facts: _Facts, out: Array) -> None:
        from della.merging.kernels import fuse as fusing

        (rows, n), q, deltas, workspace = tile.shape, None, tile.values, tile.workspace
        if self.fuse.calibrated:
            q = workspace.array("q", deltas.shape)
            kept = deltas
            deltas = workspace.array("deltas", kept.shape)
            deltas[:] = kept
        dropped = self._drop(tile, facts, q).reshape(len(facts.weights), -1)
        divisor = None
        if q is not None:
            signs, divisor = workspace.array("signs", (rows, n)), workspace.array("divisor", (rows, n))
            fusing.elect(_few(facts.votes), self._by_count, _few(dropped), signs.reshape(-1))
            fusing.calibrate(facts.weights, deltas, q, signs, divisor)
            divisor = divisor.reshape(-1)
        assert tile.base is not None
        base, out = tile.base.reshape(-1), out.reshape(-1)
        if self.scaling is None or not self.scaling.by_row:
            self._fuse(facts, base, dropped, facts.factors, divisor, out)
            return
        factors = self._adaptive(self._counts(facts, tile.values))
        for r in range(rows):
            at = slice(r * n, (r + 1) * n)
            by_row = None if divisor is None else divisor[at]
            self._fuse(facts, base[at], dropped[:, at], factors[:, r], by_row, out[at])

    def _drop(self, tile: Tile, facts: _Facts, q: Array | None = None) -> Array:
        for t, delta in enumerate(tile.values):
            self.drop.apply(tile, t, delta, facts.drop, None if q is None else q[t])
            if facts.rescale:
                np.multiply(delta, facts.rescale[t], out=delta)
        return tile.values

    @property
    def _by_count(self) -> bool | None:
        return True if self.vote is not None and self.vote.by_count else None

    def _fuse(
        self, facts: _Facts, base: Array, dropped: Array, factors: Array | None, divisor: Array | None,
        out: Array,
    ) -> None:  # fmt: skip
        from della.merging.kernels import fuse as fusing

        scale = np.float32(self.shared["lambda"] if self.scaling is None else 1.0)
        fusing.fuse(
            base, _few(facts.weights), _few(facts.votes), self._by_count, self.fuse.mean, scale,
            _few(dropped), _few(factors), divisor, out,
        )  # fmt: skip

    def _counts(self, facts: _Facts, dropped: Array) -> Array:
        """(experts, rows, 2): the nonzero and the elected deltas of each expert in each row."""
        from della.merging.kernels import fuse as fusing

        signs = np.empty(dropped.shape[1:], np.float32)
        flat = dropped.reshape(len(dropped), -1)
        fusing.elect(_few(facts.votes), self._by_count, _few(flat), signs.reshape(-1))
        counts = np.empty((*dropped.shape[:2], 2), np.int64)
        fusing.count_elected(facts.weights, facts.votes is not None, dropped, signs, counts)
        return counts

    def _adaptive(self, counts: Array) -> Array:
        assert self.scaling is not None
        return reference.adaptive_factor(self.scaling, counts[..., 0], counts[..., 1]).astype(np.float32)

    # ---- what it costs, and how it differs from mergekit ----

    def idle_by(self, expert: Expert) -> str:
        factors = {**expert.values, "lambda": 1 if self.scaling else self.shared["lambda"]}
        return next((name for name in ("weight", "density", "lambda") if factors.get(name) == 0), "")

    def memory(self, experts: int, tile: int, elements: int) -> int:
        more = experts * (2 * self.fuse.calibrated + self.wants_norms)
        stored = 2 * (experts + 1) * elements
        held = stored if self.drop.looks and stored <= MOST_HELD else 0
        table = self.drop.table_bytes * elements
        return super().memory(experts, tile, elements) + 4 * tile * more + table + held

    def draws(self, subject: Subject) -> bool:
        return self.drop.draws(subject)

    def departures(self, subject: Subject) -> dict[str, bool]:
        tied = self.vote is not None and len(subject.experts) > 1
        return self.drop.departures(subject) | {
            "a tied sign vote elects nothing (mergekit: the positive sign)": tied,
            "the mean divides by the sum of |weight| (mergekit: of weight, so that a negative weight turns "
            "its own sign round)": self._has_negative(subject),
        }

    def compat_warnings(self, subject: Subject) -> list[str]:
        said = "compat mergekit: the mean divides by the sum of weights, so a negative weight turns its own "
        said += "sign round, and weights that nearly cancel blow up"
        return [said] if self._has_negative(subject) else []

    def _has_negative(self, subject: Subject) -> bool:
        return self.fuse.mean and min(subject.column("weight"), default=0) < 0


def _few(values: Array | None) -> Any:
    """Few experts as a tuple, so that the compiler knows their number."""
    return tuple(values) if values is not None and len(values) <= MOST_UNROLLED else values


# ---- the methods -------------------------------------------------------------------------------------------

_ELECT_MEAN = {"vote": "weighted", "fuse": "mean"}
_ELECT_SUM = {"vote": "weighted", "fuse": "sum"}
_SUM = {"vote": "none", "fuse": "sum"}
PER_ELEMENT, NO_RESCALE = {"rescale": "per_element"}, {"rescale": "none"}


@register
class Della(TaskVectors):
    """DELLA-Merging: MAGPRUNE, the weighted sign vote, and the mean of what agrees."""

    name, drops, source = "della", Magprune, "arXiv 2406.11617, section 2"
    defaults = _ELECT_MEAN | PER_ELEMENT


@register
class DellaLinear(TaskVectors):
    """MAGPRUNE and the sum, without a vote."""

    name, drops, source = "della_linear", Magprune, "arXiv 2406.11617, section 2.1"
    defaults = _SUM | PER_ELEMENT


@register
class DareTies(TaskVectors):
    """DARE's Drop, and the vote and sum of TIES."""

    name, drops, source = "dare_ties", Bernoulli, "arXiv 2311.03099, section 3"
    defaults = _ELECT_SUM | PER_ELEMENT


@register
class DareLinear(TaskVectors):
    """DARE's Drop and the sum."""

    name, drops, source = "dare_linear", Bernoulli, "arXiv 2311.03099, section 3"
    defaults = _SUM | PER_ELEMENT


@register
class Ties(TaskVectors):
    """TIES-Merging: trim, elect, and the mean of what agrees."""

    name, drops, source = "ties", Top, "arXiv 2306.01708, section 3"
    defaults = _ELECT_MEAN | NO_RESCALE


@register
class TaskArithmetic(TaskVectors):
    """Task arithmetic: the sum of all deltas."""

    name, drops, source = "task_arithmetic", Drop, "arXiv 2212.04089, section 2"
    defaults = _SUM


@register
class Breadcrumbs(TaskVectors):
    """Model breadcrumbs: the largest and the smallest deltas are dropped, the others added."""

    name, drops, source = "breadcrumbs", Middle, "arXiv 2312.06795, section 3"
    defaults = _SUM | NO_RESCALE


@register
class BreadcrumbsTies(TaskVectors):
    """Model breadcrumbs with the vote of TIES."""

    name, drops, source = "breadcrumbs_ties", Middle, "arXiv 2312.06795, section 3"
    defaults = _ELECT_SUM | NO_RESCALE
