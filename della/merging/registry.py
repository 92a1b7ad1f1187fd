"""Every method and every parameter that there is.  A new file of methods is one import more here."""

# ruff: noqa: I001  (a family registers its methods when it is imported, and they are shown in this order)
from __future__ import annotations

from della.merging.methods import task_vectors
from della.merging.methods import averages
from della.merging.methods import passthrough
from della.merging.methods import spheres
from della.merging.methods import selections
from della.merging.methods import paper
from della.merging.method import ALL_PARAMETERS, METHODS, Method, Parameter, register

__all__ = ["ALL_PARAMETERS", "METHODS", "Method", "Parameter", "register"]

FAMILIES = (task_vectors, averages, passthrough, spheres, selections, paper)

# mergekit's memory option: accepted, and without effect here.
_UNUSED = Parameter("int8_mask", "shared", bool, None, "mergekit's memory option; without effect here")
ALL_PARAMETERS[_UNUSED.name] = _UNUSED
