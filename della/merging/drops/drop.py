"""A kind of Drop: what is kept of each expert's delta, and how it is enlarged.

Each kind says what it keeps three times: in plain NumPy (`kept`), by mergekit's rules (`kept_by_mergekit`),
and in place of a tile by the kernels (`apply`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from della.dtypes import Array
from della.errors import Problem
from della.merging import reference
from della.merging.compat import rescaled
from della.merging.method import Parameter, WholeModel
from della.merging.options import IMPORTANCES, RESCALES
from della.merging.tile import Expert, Grain, Passes, Subject, Tile

NORMS_CURE = "write 'input_norms: FILE' beside 'model:' (`della calibrate` makes the file)"


class Drop:
    """Keep everything; the base of the other kinds.  An object has the settings of one tensor.

    Args:
        shared: The shared parameters as they take effect.
    """

    words: ClassVar[str] = "delta"
    """What delta' is, for the formula of a method."""
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    nanoseconds: ClassVar[float] = 0.8
    has_probabilities: ClassVar[bool] = False
    """Whether chance decides, with a keep probability that is known of each delta."""
    own_rescale: ClassVar[str] = "none"
    """What ``rescale: true`` means."""
    table_bytes: int = 0
    """Bytes of a table of the whole tensor, for each of its elements."""

    looks: ClassVar[bool] = False
    """Whether a pass goes before the one that merges, for which small tensors are kept as they were read."""

    grain: Grain = Grain.ELEMENT
    whole_model: WholeModel | None = None

    def __init__(self, shared: Mapping[str, Any]) -> None:
        names = {p.name for p in self.parameters}
        self.rescale = RESCALES[shared["rescale"] if "rescale" in names else "none"]
        self.wants_norms = "importance" in names and IMPORTANCES[shared["importance"]]

    @classmethod
    def rescale_of(cls, rescale: str | bool) -> str:
        """The value of ``rescale`` in mergekit's spelling, resolved."""
        return rescale if isinstance(rescale, str) else cls.own_rescale if rescale else "none"

    @classmethod
    def values_of(cls, own: Mapping[str, Any]) -> dict[str, Any]:
        """A model's own parameters as they take effect, of those given or their defaults."""
        return dict(own)

    def problems(self, models: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
        """As `Method.problems`."""
        for identity, own in models.items():
            if self.wants_norms and not own.get("input_norms"):
                said = "importance: wanda needs the norms of each model's inputs"
                yield Problem(said, NORMS_CURE, identity, parameter="input_norms")

    # ---- the reference, and mergekit ----

    def reference(self, subject: Subject, t: int, delta: Array) -> tuple[Array, Array]:
        """delta' of expert ``t`` for a tensor given as (rows, n), and the keep probabilities (float32)."""
        kept, q = self.kept(subject, t, delta)
        if self.rescale.l1:
            kept = kept * delta.dtype.type(reference.l1_factor(delta, kept))
        return kept, q

    def kept(self, subject: Subject, t: int, delta: Array) -> tuple[Array, Array]:
        """The same without a rescale of the whole tensor."""
        return delta, np.ones(delta.shape, np.float32)

    def mergekit(self, subject: Subject, t: int, delta: Array) -> Array:
        """The same by mergekit's rules: ``delta`` of any shape, in the merge dtype."""
        density = subject.experts[t].values.get("density", 1.0)
        if density >= 1:
            return delta
        if density <= 0 or delta.size == 0:
            return np.zeros_like(delta)
        kept = np.where(self.kept_by_mergekit(subject, t, delta), delta, np.zeros_like(delta))
        return rescaled(delta, kept) if self.rescale.per_element or self.rescale.l1 else kept

    def kept_by_mergekit(self, subject: Subject, t: int, delta: Array) -> Array:
        """A mask of what mergekit keeps, for a density between 0 and 1."""
        return np.ones(delta.shape, bool)

    # ---- tiles ----

    def learn(self, tensors: Sequence[tuple[Subject, Passes]]) -> dict[str, Any]:
        """As `Method.learn`."""
        return {}

    def prepare(self, subject: Subject, passes: Passes, learnt: Any) -> Any:
        """What must be known of the tensor before a tile can be dropped; it is not changed by `apply`."""
        return None

    def begin(self, facts: Any) -> Any:
        """What `apply` is given in one pass over the tiles; it may count in that."""
        return facts

    def apply(self, tile: Tile, t: int, delta: Array, facts: Any, q: Array | None) -> None:
        """Drop in place from ``delta`` (rows, n) of expert ``t``; its probabilities into ``q``."""

    # ---- how it differs from mergekit ----

    def draws(self, subject: Subject) -> bool:
        """Whether random numbers decide about this tensor."""
        return self.has_probabilities and any(0 < d < 1 for d in subject.column("density"))

    def departures(self, subject: Subject) -> dict[str, bool]:
        """As `Method.departures`."""
        return {}


WANDA = "importance: wanda ranks |delta| times input norms (mergekit: |delta|)"


def tile_saliency(expert: Expert, delta: Array) -> Array:
    """reference.saliency of a tile (rows, n) but for its signs; ``delta`` itself where there are no norms."""
    if expert.norms is None:
        return delta
    with np.errstate(all="ignore"):
        sizes = np.asarray(delta * expert.norms)
    return np.clip(sizes, -reference.LARGEST, reference.LARGEST, out=sizes)
