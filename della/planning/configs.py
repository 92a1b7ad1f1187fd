"""Configurations held against the base's: what makes the same numbers mean something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from della.checkpoint.source import Source
from della.errors import Problem, clip

# Fields that say what weights mean; other fields (dtype, cache, names) do not.
MEANING = re.compile(
    r"^(rope_.*|no_rope_.*|rotary_.*|partial_rotary_factor|.*_heads|.*_kv_heads|.*head_dim|n_head|n_embd|n_layers?"
    r"|n_inner|.*ffn_dim|feed_forward_proj|.*_act_fn|is_gated_act|encoder_layers|decoder_layers|num_decoder_layers"
    r"|.*lora_rank|n_routed_experts|n_shared_experts|n_group|topk_.*|scoring_func|first_k_dense_replace|moe_.*"
    r"|routed_scaling_factor|do_layer_norm_before|norm_type|use_parallel_residual|relative_attention_.*"
    r"|state_size|conv_kernel|use_sliding_window|attention_chunk_size"
    r"|hidden_act|activation.*|hidden_activation|.*norm_eps|.*norm_epsilon|.*_eps|.*_bias|bias|hidden_size"
    r"|intermediate_size|num_hidden_layers|num_layers|layer_types|sliding_window.*|max_window_layers|num_local_experts"
    r"|num_experts.*|norm_topk_prob|attn_logit_softcapping|final_logit_softcapping|query_pre_attn_scalar"
    r"|embedding_multiplier|logits_scaling|residual_multiplier|attention_multiplier|scale_.*|logit_scale"
    r"|tie_word_embeddings|qk_norm|use_qk_norm|parallel_attn|alibi|pos_emb.*|position_embedding_type|id2label"
    r"|d_model|d_kv|d_ff|type_vocab_size|feed_forward_proj|use_parallel_residual|routed_scaling_factor"
    r"|mlp_only_layers|no_rope_layers|use_sliding_window|first_k_dense_replace|norm_type|do_layer_norm_before"
    r"|relative_attention_.*|num_decoder_layers|encoder_layers|decoder_layers|depth|depths)$"
)
STACK = re.compile(r"(.*?)\.(\d+)\.")
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
    stacks = _stacks(base)  # a configuration may be silent, or count another stack
    for stack, count in _stacks(model).items():
        if stack in stacks and count != stacks[stack]:
            return f"{count} layers of {stack} against {stacks[stack]}"
    return ""


def _stacks(source: Source) -> dict[str, int]:
    """How many layers each stack has, by what stands before their number: model.layers, h, blocks."""
    found: dict[str, int] = {}
    for name in source.tensors:
        if match := STACK.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _depth(source: Source) -> int:
    for part in (source.config, source.config.get("text_config")):
        if isinstance(part, dict):
            for key in DEPTH:
                if isinstance(part.get(key), int):
                    return int(part[key])
    numbers = [int(match[1]) for name in source.tensors if (match := re.search(r"\blayers?\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
