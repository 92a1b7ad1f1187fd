"""Configurations held against the base's: what makes the same numbers mean something else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from della.checkpoint.source import Source
from della.errors import Problem, clip

# Fields that say what weights mean; other fields (dtype, cache, names) do not.
MEANING = re.compile(
    r"^(.*_act_fn|.*_bias|.*_eps|.*_heads|.*ffn_dim|.*head_dim|.*lora_rank|.*norm_eps|.*norm_epsilon"
    r"|activation.*|alibi|attention_chunk_size|attention_multiplier|attn_logit_softcapping|bias"
    r"|conv_kernel|d_ff|d_kv|d_model|decoder_layers|depth|depths|do_layer_norm_before"
    r"|embedding_multiplier|encoder_layers|feed_forward_proj|final_logit_softcapping"
    r"|first_k_dense_replace|hidden_act|hidden_activation|hidden_size|id2label|intermediate_size"
    r"|is_gated_act|layer_types|logit_scale|logits_scaling|max_window_layers|mlp_only_layers|moe_.*"
    r"|n_embd|n_group|n_head|n_inner|n_layers?|n_routed_experts|n_shared_experts|no_rope_.*"
    r"|norm_topk_prob|norm_type|num_decoder_layers|num_experts.*|num_hidden_layers|num_layers"
    r"|num_local_experts|parallel_attn|partial_rotary_factor|pos_emb.*|position_embedding_type|qk_norm"
    r"|query_pre_attn_scalar|relative_attention_.*|residual_multiplier|rope_.*|rotary_.*"
    r"|routed_scaling_factor|scale_.*|scoring_func|sliding_window.*|state_size|tie_word_embeddings"
    r"|topk_.*|type_vocab_size|use_parallel_residual|use_qk_norm|use_sliding_window)$"
)
STACK = re.compile(r"(.*?)\.(\d+)\.")  # what is before the first number of a name, and that number
NUMBER = re.compile(r"\.(\d+)(?=\.)")
DEPTH = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MOST = 5


def differences(base: Source, model: Source) -> list[str]:
    """Fields that change what weights mean, as "rope_theta 1000000.0 against 10000.0"; nested ones too."""
    return list(_differ(base.config, model.config, "")) if base.config and model.config else []


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> Iterator[str]:
    ours, theirs = _plain(ours), _plain(theirs)
    for key in dict.fromkeys((*ours, *theirs)):
        a, b = theirs.get(key, _derived(theirs, key)), ours.get(key, _derived(ours, key))
        if isinstance(a, dict) and isinstance(b, dict) and key.endswith("_config"):
            yield from _differ(b, a, f"{path}{key}.")
        elif MEANING.match(key) and a != b and not _are_empty(a, b):
            yield f"{path}{key} {_shown(a)} against {_shown(b)}"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with rope as it was written before transformers 5."""
    made = dict(config)
    rope = {**(_table(made.get("rope_scaling"))), **(_table(made.get("rope_parameters")))}
    if not any(isinstance(value, dict) for value in rope.values()):  # else it is by kinds of layers
        rope |= {"rope_type": rope.pop("type")} if "type" in rope else {}
        for key in ("rope_theta", "partial_rotary_factor"):
            made |= {key: rope.pop(key)} if key in rope else {}
        rope = {} if rope == {"rope_type": "default"} else rope
        made.pop("rope_parameters", None)
        made["rope_scaling"] = rope or None
    return made


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _derived(config: Mapping[str, Any], key: str) -> Any:
    """What a silent configuration means."""
    heads, size = config.get("num_attention_heads"), config.get("hidden_size")
    if key == "head_dim" and isinstance(heads, int) and isinstance(size, int) and heads:
        return size // heads
    return heads if key == "num_key_value_heads" else None


def _are_empty(a: Any, b: Any) -> bool:
    """Where one is silent, and the other says what says nothing."""
    return (a is None and b in (None, False, {}, [])) or (b is None and a in (None, False, {}, []))


def _shown(value: Any) -> str:
    return "unset" if value is None else clip(str(value), 80)


def note(base: Source, model: Source) -> str:
    """One line on a model whose configuration gives weights another meaning; "" where it does not."""
    found = [text for text in differences(base, model) if not text.startswith("tie_word_embeddings")]
    if not found:
        return ""
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    said = f"config.json differs: {', '.join(found[:_MOST])}{more}"
    return f"{model.reference}: {said}; the result has {base.reference}'s"


def other_type(base: Source, model: Source) -> Iterator[Problem]:
    """Why a model of another type is none to merge."""
    for path, theirs, ours in _types(base.config, model.config, ""):
        said = f"against {base.reference}: {path}model_type {clip(str(theirs))}, expected {clip(str(ours))}"
        fix = "all models must be fine-tunes of one base; if they are, write 'mismatch: ignore'"
        yield Problem(said, fix, model.reference, parameter="mismatch")
        return


def _types(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two configurations name other types, the outermost first."""
    a, b = theirs.get("model_type"), ours.get("model_type")
    if a and b and a != b:
        yield path, a, b
    for key, part in ours.items():
        if key.endswith("_config") and isinstance(part, dict) and isinstance(theirs.get(key), dict):
            yield from _types(part, theirs[key], f"{path}{key}.")


def depths(base: Source, model: Source) -> str:
    """ "3 layers against 2" where the configurations, or else the tensors, tell of other depths; else ""."""
    theirs, ours = _depth(model), _depth(base)
    if theirs and ours and theirs != ours:
        return f"{theirs} layers against {ours}"
    known = stacks(base.tensors)  # a configuration may be silent, or count another stack
    for stack, count in stacks(model.tensors).items():
        if stack in known and count != known[stack]:
            return f"{count} layers of {stack} against {known[stack]}"
    return ""


def stacks(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, by what stands before their number: model.layers, h, blocks."""
    found: dict[str, int] = {}
    for name in names:
        if match := STACK.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _depth(source: Source) -> int:
    """As config.json counts; 0 where it does not."""
    for part in (source.config, source.config.get("text_config")):
        if isinstance(part, dict):
            for key in DEPTH:
                if isinstance(part.get(key), int):
                    return int(part[key])
    return 0
