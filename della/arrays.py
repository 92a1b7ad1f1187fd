"""Merging arrays in memory: NumPy arrays, ml_dtypes arrays, and torch CPU tensors (torch is never imported).

Inputs are used where they lie, without a copy in another format; results are of the kind of the base.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from della.checkpoint.norms import checked, misfit
from della.dtypes import Array, DType, of_array, round_to, widen
from della.errors import CheckpointError, Collector, OutputError, Problem, RecipeError, suggest, unknown
from della.merging.random import DEFAULT_SEED
from della.merging.registry import ALL_PARAMETERS, METHODS, Method, Parameter
from della.merging.tile import Expert, Subject, canonical
from della.options import TILE
from della.recipe import values as recipe_values


def magprune(
    delta: Any, density: float, epsilon: float = 0.15, *, seed: int = DEFAULT_SEED, name: str = "delta",
    expert: str = "expert", rank_by: str = "row", ladder: str = "symmetric", rescale: str = "per_element",
    input_norms: Any = None,
) -> Any:  # fmt: skip
    """Drop by MAGPRUNE (arXiv 2406.11617, section 2.1): keep each delta with a probability that grows with
    the rank of its magnitude in its row, and divide survivors by it.

    Args:
        delta: floats of any shape; a row is its last axis.
        density: the mean probability, above 0 and up to 1.
        epsilon: probabilities run from density - epsilon to density + epsilon.
        seed: with ``name`` and ``expert`` it keys the random stream.
        name: the tensor's name.
        expert: the expert's identity.
        rank_by: what is ranked, and within what, as in a recipe.
        ladder: how a rank becomes a probability, as in a recipe.
        rescale: what survivors are divided by, as in a recipe.
        input_norms: of a delta (out, in), the norms of the ``in`` input features; then |delta| times its norm
            is ranked (``importance: wanda``).

    Returns:
        float32 (float64 for float64) of the same shape; a torch tensor for one.

    Raises:
        RecipeError: a value is out of range.
        CheckpointError: an array does not fit.

    Example:
        >>> import della, numpy as np
        >>> delta = np.array([[0.5, -0.25, 0.125, 1.0]], np.float32)
        >>> della.magprune(delta, density=0.5, epsilon=0.25)
        array([[0.85714287, 0.        , 0.        , 1.3333334 ]], dtype=float32)
    """
    values = widen(_as_array(delta, "delta"))
    method = METHODS["della_linear"]
    given = {"rank_by": rank_by, "ladder": ladder, "rescale": rescale}
    shared = _shared(method, given | ({} if input_norms is None else {"importance": "wanda"}))
    (own,) = _own({"weight": 1.0, "density": density, "epsilon": epsilon}, [expert])
    _check(method, shared, {expert: own})
    norms = None if input_norms is None else _norms(input_norms, name, values.shape, "input_norms")
    made = method.expert(expert, own, norms)
    return _like(delta, _merge(method(shared), np.zeros_like(values), [values], [made], seed, name))


def merge_tensors(
    base: Any, experts: Sequence[Any], *, method: str = "della", weights: Sequence[float] | float = 1.0,
    density: Sequence[float] | float = 1.0, epsilon: Sequence[float] | float | None = None,
    gamma: Sequence[float] | float | None = None, names: Sequence[str] | None = None,
    input_norms: Sequence[Any] | None = None, seed: int = DEFAULT_SEED, name: str = "tensor",
    **parameters: Any,
) -> Any:  # fmt: skip
    """Merge one tensor: Drop, Elect, Fuse, with the same bytes as a merge of checkpoints.

    Args:
        base: floats of any shape; None for a method that needs no base.
        experts: arrays of the same shape.
        method: its name in a recipe.
        weights: one value for all experts, or one each; so are the next three.
        density: the share of deltas that is kept.
        epsilon: half the range of keep probabilities (della).
        gamma: the share of largest deltas that is dropped (breadcrumbs).
        names: identities that key the experts' random streams (by default expert1, expert2, ...).
        input_norms: for ``importance="wanda"``, for each expert the norms of this tensor's input features, or
            a mapping that may have them under ``name``; where there are none, |delta| is ranked.
        seed: of the random draws.
        name: the tensor's name, which keys them too.
        parameters: the method's others (``lambda_``, ``vote``, ...); a model's own as one value, or one each.

    Returns:
        An array of the base's dtype (the first expert's where there is no base); a torch tensor for one.

    Raises:
        RecipeError: an argument cannot be.
        CheckpointError: an array does not fit the others.
        OutputError: a value is too large for the dtype.

    Example:
        >>> import della, numpy as np
        >>> base, one, two = np.zeros(3, np.float32), np.float32([1, -2, 0]), np.float32([3, 1, 1])
        >>> della.merge_tensors(base, [one, two], method="ties", density=1.0)
        array([ 2., -2.,  1.], dtype=float32)
    """
    row, shared, more = _split(_method(method, base is not None), parameters)
    models = [_as_array(e, f"{name} of expert {k}") for k, e in enumerate(experts, 1)]
    _some(experts)
    if base is None and row.needs_base:
        raise RecipeError(Problem(f"{method} needs a base", parameter="base"))
    base = base if row.needs_base else None
    root = models[0] if base is None else _as_array(base, f"{name} of the base")
    picked = row(shared)
    if why := picked.whole_model:
        fix = "merge checkpoints instead, or " + re.sub("^(.+): (.+)$", r'give \1="\2"', why.instead)
        raise RecipeError(Problem(f"{why.option} needs the whole model", fix, parameter=why.option.parameter))
    for k, model in enumerate(models, 1):
        if model.shape != root.shape:
            said = f"has shape {list(model.shape)}, expected {list(root.shape)}"
            raise CheckpointError(Problem(said, subject=f"{name} of expert {k}", tensor=name))
    columns = {"weight": weights, "density": density, "epsilon": epsilon, "gamma": gamma} | more
    own = _own(columns, identities := _identities(names, len(models)))
    _check(row, shared, dict(zip(identities, own, strict=True)))
    norms = _all_norms(picked, input_norms, name, root.shape, len(models))
    made = [row.expert(*each) for each in zip(identities, own, norms, strict=True)]
    merged = _merge(picked, None if base is None else root, models, made, seed, name)
    return _like(experts[0] if base is None else base, _rounded(merged, of_array(root), name))


def merge_state_dicts(
    base: Mapping[str, Any] | None, experts: Sequence[Mapping[str, Any]], **options: Any
) -> dict[str, Any]:
    """Merge whole models, given as mappings from names to arrays.

    Args:
        base: the base; None for a method that needs none.
        experts: models that have every tensor of the base; what it lacks is left out.
        options: those of `merge_tensors` but ``name``; ``input_norms`` are mappings here.

    Returns:
        The merged model; tensors that are not floats are the base's.

    Raises:
        RecipeError: an option cannot be.
        CheckpointError: an expert lacks a tensor, an array does not fit, or norms are of no tensor.
        OutputError: a value is too large for its dtype.

    Example:
        >>> import della, numpy as np
        >>> base, expert = {"w": np.float32([1, 2])}, {"w": np.float32([3, 2])}
        >>> della.merge_state_dicts(base, [expert], method="task_arithmetic", weights=0.5)
        {'w': array([2., 2.], dtype=float32)}
    """
    _some(experts)
    needs_base = _method(options.get("method", "della"), base is not None).needs_base
    root = experts[0] if base is None or not needs_base else base
    problems = Collector(CheckpointError)
    for k, expert in enumerate(experts, 1):
        for name in (name for name in root if name not in expert):
            problems.add(f"lacks {name}", subject=f"expert {k}", tensor=name)
    for k, norms in enumerate(options.get("input_norms") or (), 1):
        for name in [name for name in norms if name not in root] if isinstance(norms, Mapping) else ():
            said = f"{name} is not a tensor of the base"
            problems.add(said, subject=f"input norms of expert {k}", tensor=name)
    problems.raise_any()
    merged = {}
    for name, value in root.items():
        array = _as_array(value, name, floats_only=False)
        if not of_array(array).is_float:
            merged[name] = _like(value, array.copy())
        else:
            own = [e[name] for e in experts]
            merged[name] = merge_tensors(value if root is base else None, own, name=name, **options)
    return merged


def _all_norms(
    method: Method, given: Sequence[Any] | None, name: str, shape: Sequence[int], experts: int
) -> list[Array | None]:
    """The norms of each expert's inputs; None where they are not used."""
    wanted, asking = method.wants_norms, method.input_norms
    if asking is None and given is not None:
        said = f"input_norms has no effect with method {method.name}"
        raise RecipeError(Problem(said, "remove it", parameter="input_norms"))
    if asking is not None and wanted != (given is not None):
        said = "needs input_norms" if wanted else "is needed where input_norms are given"
        raise RecipeError(Problem(f"{asking.parameter}={asking.value!r} {said}", parameter="input_norms"))
    each = [None] * experts if given is None else list(given)
    if len(each) != experts or isinstance(given, Mapping) or (wanted and any(own is None for own in each)):
        said = f"input_norms: expected an array or a mapping for each of {experts} experts"
        raise RecipeError(Problem(said, parameter="input_norms"))
    found = [own.get(name) if isinstance(own, Mapping) else own for own in each]
    return [
        None if own is None else _norms(own, name, shape, f"input norms of expert {k}")
        for k, own in enumerate(found, 1)
    ]


def _norms(given: Any, name: str, shape: Sequence[int], where: str) -> Array:
    array = _as_array(given, where)
    said = misfit(array.shape, shape)
    if said:
        raise CheckpointError(Problem(f"{name} {said}", subject=where, tensor=name))
    return checked(array, where, name)


def _merge(
    method: Method, base: Array | None, models: Sequence[Array], experts: Sequence[Expert], seed: int,
    name: str,
) -> Array:  # fmt: skip
    """The merge in arithmetic values: by the kernels, or by the reference where an input is float64."""
    from della.merging.driver import merge_arrays

    order = canonical(experts)
    subject = Subject(name, models[0].shape, tuple(experts[t] for t in order), seed)
    wide = [widen(np.asarray(models[t], order="C")) for t in order]
    root = None if base is None else widen(np.asarray(base, order="C"))
    if all(array.dtype == np.float32 for array in (*wide, *([] if root is None else [root]))):
        return merge_arrays(method, subject, root, wide, TILE)
    double = [array.astype(np.float64) for array in wide]
    return method.whole(subject, None if root is None else root.astype(np.float64), double)


def _rounded(values: Array, dtype: DType, name: str) -> Array:
    stored = round_to(values, dtype)
    bad = np.flatnonzero(~np.isfinite(stored))
    if bad.size:
        becomes = f"element {bad[0]} becomes {stored.reshape(-1)[bad[0]]} when it is rounded to"
        fix = "give arrays of a wider dtype, or a smaller lambda_"
        raise OutputError(Problem(f"{becomes} {dtype.torch_name}", fix, name, name))
    return stored


def _as_array(value: Any, what: str, *, floats_only: bool = True) -> Array:
    """A view of an array or of a torch CPU tensor; RecipeError for anything that is neither."""
    if _is_torch(value):
        value = _from_torch(value, what)
    array = np.asarray(value)
    try:
        dtype = of_array(array)
    except KeyError:
        said = f"dtype {array.dtype} is not one that models are stored in"
        raise CheckpointError(Problem(said, subject=what)) from None
    if floats_only and not dtype.is_float:
        raise CheckpointError(Problem(f"dtype {array.dtype}", "only floats are merged", what))
    if dtype.is_float and not (finite := np.isfinite(widen(array))).all():  # slow in the narrow dtypes
        first = np.flatnonzero(~finite)[0]
        said = f"holds NaN or infinity (element {first} is {array.reshape(-1)[first]})"
        raise CheckpointError(Problem(said, subject=what))
    return array


def _from_torch(tensor: Any, what: str) -> Array:
    """Zero copy: torch's own NumPy view, or for types that NumPy lacks the view of their bits."""
    if tensor.device.type != "cpu":
        raise CheckpointError(Problem(f"on device {tensor.device}", "move it to the CPU first: .cpu()", what))
    tensor = tensor.detach()
    name = str(tensor.dtype).removeprefix("torch.")
    twin = getattr(ml_dtypes, name, None)
    if twin is None:
        return np.asarray(tensor.numpy())
    integer = "int16" if np.dtype(twin).itemsize == 2 else "uint8"
    return np.asarray(tensor.view(getattr(sys.modules["torch"], integer)).numpy()).view(twin)


def _like(template: Any, result: Array) -> Any:
    """The result as a torch tensor over the same memory where the template is one, else as it is."""
    if not _is_torch(template):
        return result
    torch = sys.modules["torch"]
    if not hasattr(ml_dtypes, result.dtype.name):
        return torch.from_numpy(result)
    bits = result.view(np.int16 if result.dtype.itemsize == 2 else np.uint8)
    return torch.from_numpy(bits).view(getattr(torch, result.dtype.name))


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _some(experts: Sequence[Any]) -> None:
    if len(experts) == 0:
        raise RecipeError(Problem("no experts: at least one is needed", parameter="experts"))


def _identities(names: Sequence[str] | None, experts: int) -> list[str]:
    found = [f"expert{k}" for k in range(1, experts + 1)] if names is None else list(names)
    if len(found) != experts or len(set(found)) != experts:
        said = f"names: expected {experts} different names, found {found}"
        raise RecipeError(Problem(said, parameter="names"))
    return found


def _method(name: str, has_base: bool) -> type[Method]:
    if name not in METHODS:
        raise RecipeError(unknown("method", name, METHODS))
    method = METHODS[name]
    return method.with_base or method if has_base else method


def _split(
    method: type[Method], parameters: Mapping[str, Any]
) -> tuple[type[Method], dict[str, Any], dict[str, Any]]:
    """(the method, its shared parameters, those of its models) of a call."""
    own = {key for key, p in method.parameters.items() if p.scope == "model"}
    more = {key: value for key, value in parameters.items() if key in own}
    return method, _shared(method, {k: v for k, v in parameters.items() if k not in more}), more


def _shared(method: type[Method], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The shared parameters of a call, each of its type."""
    known = {k: p for k, p in method.parameters.items() if p.scope == "shared"}
    shared, problems = {}, Collector(RecipeError)
    for name, value in parameters.items():
        key = name.removesuffix("_")
        if key not in known:
            said = f"{method.name} has no parameter {key!r}"
            problems.add(said, suggest(key, known), parameter=key)
        else:
            shared[key] = _value(known[key], value, problems)
    problems.raise_any()
    return shared


def _own(columns: Mapping[str, Any], identities: Sequence[str]) -> list[dict[str, Any]]:
    """Each expert's own parameters: of one value for all, or of a sequence that has one for each."""
    own: list[dict[str, Any]] = [{} for _ in identities]
    problems = Collector(RecipeError)
    for name, column in columns.items():
        values = [column] * len(own) if _is_one(column) else list(column)
        if len(values) != len(own):
            said = f"{name}: {len(values)} values for {len(own)} experts"
            problems.add(said, parameter=name)
        for mine, value in zip(own, values, strict=False):
            if value is not None:
                mine[name] = _value(ALL_PARAMETERS[name], value, problems)
    problems.raise_any()
    return own


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float, str, np.generic)) or np.ndim(value) == 0


def _value(parameter: Parameter, value: Any, problems: Collector) -> Any:
    found = recipe_values.checked(parameter, value.item() if isinstance(value, np.generic) else value)
    if isinstance(found, Problem):
        problems.extend([found])
    return found


def _check(method: type[Method], shared: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold the rules that join several parameters."""
    given = {identity: {**own, "input_norms": "as arrays"} for identity, own in models.items()}
    problems = Collector(RecipeError)
    problems.extend(filter(None, [method.count_problem([*given])]))
    problems.extend(method.problems(shared, given))
    problems.raise_any()
