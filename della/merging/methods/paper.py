"""The methods as the DELLA paper compares them (table 1): with one vote and one mean for all."""

from __future__ import annotations

from della.merging.drops.bernoulli import Bernoulli
from della.merging.drops.by_size import Top
from della.merging.drops.drop import Drop
from della.merging.drops.magprune import Magprune
from della.merging.method import register
from della.merging.methods.task_vectors import NO_RESCALE, PER_ELEMENT, TaskVectors

_PAPER = {"vote": "unweighted", "fuse": "mean"}


class _Paper(TaskVectors):
    """As in table 1 of the DELLA paper: the unweighted vote and the mean, whatever is dropped."""

    drops = Drop
    source = "arXiv 2406.11617, table 1"
    is_in_mergekit = False


@register
class PaperTa(_Paper):
    """Task arithmetic in that table."""

    name, drops = "paper_ta", Drop
    defaults = _PAPER


@register
class PaperDare(_Paper):
    """DARE in that table."""

    name, drops = "paper_dare", Bernoulli
    defaults = _PAPER | PER_ELEMENT


@register
class PaperTies(_Paper):
    """TIES in that table."""

    name, drops = "paper_ties", Top
    defaults = _PAPER | NO_RESCALE


@register
class PaperDella(_Paper):
    """DELLA in that table."""

    name, drops = "paper_della", Magprune
    defaults = _PAPER | PER_ELEMENT
