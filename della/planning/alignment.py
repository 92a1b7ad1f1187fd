"""Names that differ: a model whose tensors are the base's under another prefix is read under the base's.

What does not fit is said as what it is, and no cure is named that would leave the model out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from della.checkpoint.quantised import BUFFER, BUFFERS
from della.checkpoint.source import Source
from della.checkpoint.view import TensorView
from della.errors import CheckpointError, Collector, Problem, some
from della.planning import configs
from della.planning.tables import OF_THE_VOCABULARY

WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")
FUSED = re.compile(r"\.experts\.[a-z_]*(gate_up|down|w1|w2|w3|input|output)[a-z_]*")
MOST_PAIRS = 40  # of names that are looked at for a rule
SIZES = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "vocab_size", "num_experts", "num_local_experts", "n_routed_experts",
    "moe_intermediate_size", "n_embd", "n_layer", "n_head", "d_model", "d_ff", "num_layers",
)  # fmt: skip
FEW = 3  # tensors that do not fit are told one by one
MANY = 6  # such facts are told
MOST_COMPARED = 1 << 20  # bytes of a buffer


def aligned(base: Source, model: Source) -> tuple[Source, str]:
    """``model`` under the names of ``base``, and a note; itself and "" where its names are the base's, or no
    rule turns them into these one to one and with the same shapes."""
    mapping, rules = _mapping(base, model)
    if not mapping:
        return model, ""
    told = ", ".join(f"{a!r} here for {b!r} there" for a, b in rules)
    said = f"{len(mapping)} of {len(model.tensors)} names differ from {base.reference}'s by a prefix ({told})"
    return model.renamed(mapping), f"{model.reference}: {said}; they are read under the base's"


def _mapping(base: Source, model: Source) -> tuple[dict[str, str], list[tuple[str, str]]]:
    wanted = dict.fromkeys(_without(base.tensors, model.tensors))
    left = _without(model.tensors, base.tensors)
    rules = [pair for pair, _ in _rules(left, wanted).most_common(MANY)]
    mapping: dict[str, str] = {}
    used: dict[tuple[str, str], None] = {}
    for name in left:
        plain = WRAPPED.sub("", name)
        turned = ((rule, rule[1] + plain[len(rule[0]) :]) for rule in rules if plain.startswith(rule[0]))
        found = [(rule, new) for rule, new in turned if new in wanted]
        if not found:
            continue
        rule, new = found[0]
        cut = 1 if OF_THE_VOCABULARY.search(new) else 0  # how many tokens it has is looked at later
        ours, theirs = base.tensors[new].shape[cut:], model.tensors[name].shape[cut:]
        if len({new for _, new in found}) > 1 or ours != theirs:
            return {}, []
        mapping[name] = new
        used[("_orig_mod." if plain != name and rule == ("", "") else rule[0]), rule[1]] = None
    is_one_to_one = len(set(mapping.values())) == len(mapping)
    return (mapping, list(used)) if is_one_to_one else ({}, [])


def _without(names: Iterable[str], others: Mapping[str, object]) -> list[str]:
    """The names that are not among ``others``, but those of more layers of a stack that both have."""
    left = [name for name in names if name not in others]
    stacks = configs.stacks(others) if left else {}
    matches = ((name, configs.STACK.match(name)) for name in left)
    return [name for name, match in matches if not match or int(match[2]) < stacks.get(match[1], math.inf)]


def _rules(left: Sequence[str], wanted: Iterable[str]) -> Counter[tuple[str, str]]:
    """(prefix here, prefix there) that turn names of ``left`` into names of ``wanted``, with how often."""
    by_end: dict[str, list[list[str]]] = {}
    for name in wanted:
        parts = name.split(".")
        by_end.setdefault(parts[-1], []).append(parts)
    found: Counter[tuple[str, str]] = Counter()
    for name in _spread(left):
        parts = WRAPPED.sub("", name).split(".")
        best, longest = None, 0
        for other in by_end.get(parts[-1], ()):
            shared = _shared(parts, other)
            if shared > longest:
                best, longest = other, shared
        if best is not None:
            pair = parts[: len(parts) - longest], best[: len(best) - longest]
            if longest == 1 and all(pair):  # "weight" alone in common is no sign
                continue
            if not any(part.isdigit() for side in pair for part in side):
                found[".".join([*pair[0], ""]), ".".join([*pair[1], ""])] += 1
    return found


def _spread(names: Sequence[str]) -> Sequence[str]:
    """Some of the names, from the first to the last."""
    step = max(1, len(names) // MOST_PAIRS)
    return names[::step]


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts at their ends are equal."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count


def strangers(base: Source, model: Source, lacks: bool) -> Iterator[Problem]:
    """The one thing to say of a model that is of another kind than the base; nothing where it is not.

    ``lacks``: the recipe says that models may lack tensors (missing: base).
    """
    ours = {name for name, view in base.tensors.items() if view.dtype.is_float}
    common = ours & model.tensors.keys()
    if not model.tensors:
        yield Problem("holds no tensor", "give a model with weights", model.reference)
        return
    unlike = [name for name in base.tensors if name in common and _shapes(base, model, name)]
    resized = [name for name in unlike if not of_vocabulary(base.tensors[name], model.tensors[name])]
    is_near = 2 * len(common) > len(ours) or (lacks and common) or not ours
    is_fused = _is_fused(base, model)
    if is_near and not is_fused and 2 * len(unlike) <= len(common) and len(resized) <= FEW:
        return
    differs = _different(base, model)
    said = f"against {base.reference}: {len(common)} of {len(ours)} names in common"
    if unlike:
        said += f", {len(unlike)} of them of another shape"
    said += f" ({differs})" if differs else ""
    here = next((name for name in model.tensors if name not in base.tensors), "")
    there = next((name for name in base.tensors if name not in model.tensors), "")
    if resized:
        said += f": {resized[0]} has {_shapes(base, model, resized[0])}"
    elif here and there:
        said += f": {here} here, {there} there"
    fix = "all models must be fine-tunes of one base"
    if is_fused:
        said += "; experts are stored one by one in one of them, and fused in the other"
        fix = "save both with the same version of transformers"
    elif prefix := _prefix(here, there):
        said += f"; they differ by the prefix {prefix!r}"
    yield Problem(said, fix, model.reference, there or None)


def _shapes(base: Source, model: Source, name: str) -> str:
    """The two shapes of a tensor, where they differ."""
    theirs, ours = model.tensors[name].shape, base.tensors[name].shape
    return "" if theirs == ours else f"shape {list(theirs)}, expected {list(ours)}"


def of_vocabulary(ours: TensorView, theirs: TensorView) -> bool:
    """Whether two shapes differ by the rows of a vocabulary alone."""
    rows_alone = len(ours.shape) == 2 and theirs.shape[1:] == ours.shape[1:]
    return rows_alone and ("embed" in ours.name or "lm_head" in ours.name)


def _different(base: Source, model: Source) -> str:
    """The sizes that the two configurations tell otherwise."""
    pairs = [(key, _size(model.config, key), _size(base.config, key)) for key in SIZES]
    return ", ".join(
        f"{key} {a} against {b}" for key, a, b in pairs if a is not None and b is not None and a != b
    )


def _size(config: Mapping[str, object], key: str) -> object:
    part = config.get("text_config")
    return config.get(key, part.get(key) if isinstance(part, dict) else None)


def _is_fused(base: Source, model: Source) -> bool:
    kinds = [
        (
            any(ONE_BY_ONE.search(name) for name in source.tensors),
            any(FUSED.search(name) for name in source.tensors),
        )
        for source in (base, model)
    ]
    return {(True, False), (False, True)} == set(kinds)


def _prefix(here: str, there: str) -> str:
    a, b = here.split("."), there.split(".")
    for longer, shorter in ((a, b), (b, a)):
        for cut in range(1, len(longer)):
            if longer[cut:][:1] == shorter[:1] and longer[cut:] and shorter:
                return ".".join(longer[:cut]) + "."
    return ""


def differing_buffers(base: Source, model: Source, problems: Collector) -> str:
    """A note on the tensors of integers that a model has otherwise than the base, whose are copied; "" where
    there are none, or they are not here to be compared before the merge.

    Of large ones the first MiB is compared.  Those that by type, axes and name are no buffers, but weights in
    some other form, are ``problems``.
    """
    differ = []
    for name, ours in base.tensors.items():
        theirs = model.tensors.get(name)
        if theirs is None or ours.dtype.is_float or theirs.dtype.is_float:
            continue
        same = theirs.shape == ours.shape and theirs.dtype is ours.dtype
        with suppress(CheckpointError, OSError):  # what cannot be read is told when it is merged
            same = same and _start(theirs) == _start(ours)
        differ += [] if same else [name]
    odd = [name for name in differ if _is_odd(model.tensors[name])]
    if odd:
        kind = model.tensors[odd[0]].dtype.torch_name
        said = (
            f"{some(odd)} stored in {kind}, which is not merged, with other values than in {base.reference}"
        )
        fix = f"if it is no weight, give the model the {odd[0]} of {base.reference}"
        problems.add(said, fix, model.reference, odd[0])
    said = f"{some(differ)}: other values than in {base.reference}, whose are copied, as they are no weights"
    return f"{model.reference}: {said}" if differ and not odd else ""


def _is_odd(view: TensorView) -> bool:
    """Whether what is no float may yet be a weight: complex numbers, or small integers, in a table."""
    return len(view.shape) > 1 and view.dtype.name not in BUFFERS and not BUFFER.search(view.name)


def _start(view: TensorView) -> bytes:
    """The first bytes of a tensor as it is stored."""
    found = bytearray()
    for piece in (piece for part in view.parts for piece in part.pieces()):
        found += piece
        if len(found) >= MOST_COMPARED:
            break
    return bytes(found[:MOST_COMPARED])
