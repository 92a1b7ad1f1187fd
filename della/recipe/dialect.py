"""What recipes of mergekit hold that is no key of ours, and what recipes of other tools look like.

mergekit passes over every key that it does not know, so its command line's options are found in recipes too.
"""

from __future__ import annotations

import re

from della.errors import clip
from della.merging.method import Parameter
from della.merging.random import DEFAULT_SEED
from della.options import Execution, Permissions, spelt
from della.recipe.tree import Leaf, Node, Table, show

SEED = Parameter("seed", "shared", int, DEFAULT_SEED, "", low=0, high=2**64 - 1)
PLAIN_FP8 = Parameter("plain_fp8", "shared", bool, False, "")
COMPAT = Parameter("compat", "shared", str, None, "", choices=("mergekit",))
POLICIES = {
    name: Parameter(name, "shared", str, choices[0], "", choices=choices)
    for name, choices in (
        ("nonfinite", ("error", "keep", "zero")),
        ("missing", ("error", "base")),
        ("extra", ("error", "ignore", "copy")),
        ("mismatch", ("error", "ignore")),
    )
}
"""What to do about inputs that are not as they should be; the first choice is the default."""

_SPEED = "how fast a merge is depends on {threads} alone"
_MEMORY = "tensors are read in small pieces, so memory stays small"
_TYPES = "models of another type are refused unless the recipe says 'mismatch: ignore'"
_ADAPTERS = "adapters are not merged into copies of their base"
_OUTPUT = "how much is told is nothing that a recipe says"
WITHOUT_EFFECT = {
    "int8_mask": "masks are not kept, so they take no memory",
    "trust_remote_code": "code of a model is never run",
    "write_model_card": "a model card, README.md, is always written",
    "architecture": "names and shapes of tensors are those in the files",
    "allow_crimes": _TYPES,
    "copy_tokenizer": "the tokenizer's files are copied from the base, or as tokenizer_source says",
    "safe_serialization": "results are always safetensors files",
    "out_shard_size": "it is told beside the recipe: {shard_bytes}",
    "lazy_unpickle": ".bin files are read with {allow_pickle} alone, and then piece by piece",
    "transformers_cache": "where models of the Hub lie is up to HF_HOME",
    "residual_weight": "mergekit takes it and never reads it; scale o_proj and down_proj instead",
    **dict.fromkeys(("lora_merge_cache", "lora_merge_dtype"), _ADAPTERS),
    **dict.fromkeys(("low_cpu_memory", "clone_tensors"), _MEMORY),
    **dict.fromkeys(("cuda", "device", "read_to_gpu", "multi_gpu", "gpu_rich"), "merges run on processors"),
    **dict.fromkeys(("num_threads", "async_write", "write_threads"), _SPEED),
    **dict.fromkeys(("quiet", "verbose", "verbosity"), _OUTPUT),
}
"""mergekit's keys and options that change no result of ours, each with the reason (see `reason`)."""
RENAMED = {"random_seed": "mergekit's option; here write 'seed' at the top level"}
"""mergekit's options that would change the result, each with what to write instead."""


def reason(key: str) -> str:
    """Why a key of `WITHOUT_EFFECT` has none, with options as their reader writes them."""
    return WITHOUT_EFFECT[key].format(
        threads=spelt(Execution, "threads"), shard_bytes=spelt(Execution, "shard_bytes"),
        allow_pickle=spelt(Permissions, "allow_pickle", True),
    )  # fmt: skip


# Keys of which one is enough to tell the recipe of another tool; what that is; and what to do.
_LIST_MODELS = "list the models under 'models', and say how in 'merge_method'"
_OTHERS: tuple[tuple[set[str], str, str], ...] = (
    (
        {"experts", "gate_mode", "experts_per_token", "shared_experts", "positive_prompts"},
        "a recipe of mergekit-moe, which joins models as the experts of one mixture",
        "della merges models into one of their own size: list them under 'models'",
    ),
    (
        {"genome", "population_size", "random_init"},
        "a recipe of mergekit-evolve, which searches for weights",
        "merge one set of them: " + _LIST_MODELS,
    ),
    (
        {"peft_type", "lora_alpha", "target_modules"},
        "the configuration of a PEFT adapter (adapter_config.json), and no recipe",
        "merge the adapter into its base first, and name the result under 'models'",
    ),
    (
        {"architectures", "hidden_size", "num_hidden_layers"},
        "the configuration of a model (config.json), and no recipe",
        _LIST_MODELS,
    ),
    (
        {"weight_map"},
        "the index of a model's files, and no recipe",
        _LIST_MODELS,
    ),
)  # fmt: skip
# The beginning of a text of another tool; what it is; and what to do.
_TEXTS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"^[ \t]*(MODEL_NAME|yaml_config)[ \t]*=.*", re.MULTILINE),
        "Python of a notebook (LazyMergekit), in which the recipe is a text in quotes",
        'keep only the lines between the two """',
    ),
    (
        re.compile(r"\A\s*version \d+\.\d+\.\d+[ \t]*$", re.MULTILINE),
        "a recipe of sd-mecha, which has a language of its own",
        "write it as YAML: " + _LIST_MODELS,
    ),
)  # fmt: skip


def other_tool(root: Table) -> tuple[str, str] | None:
    """(what it is, what to do) where ``root`` is no recipe of ours or of mergekit's."""
    for keys, what, fix in _OTHERS:
        if keys & root.entries.keys() and not {"merge_method", "models"} <= root.entries.keys():
            return f"this is {what}", fix
    return None


def other_text(text: str) -> tuple[int, str, str] | None:
    """(where, what it is, what to do) where a text is no YAML of ours but what another tool reads."""
    for pattern, what, fix in _TEXTS:
        if found := pattern.search(text):
            return found.start(), f"this is {what}", fix
    return None


def no_mapping(root: Node) -> tuple[str, str | None]:
    """(what is wrong, what to do) about a text that is no mapping."""
    said = "a recipe is a mapping that begins with a key such as 'models:', but this is"
    if not isinstance(root, Leaf):
        return f"{said} {show(root)}", None
    if root.value is None:
        return f"{said} empty", None
    if not root.plain and ":" in root.text:
        return f"{said} one text in quotes, {clip(repr(root.text), 30)}", "remove the quotes around it"
    return f"{said} {show(root)}", None
