"""Adapters: factors that peft, kohya's scripts, LyCORIS, diffusers or mlx train beside a model.

What a model learns is a product of such factors, or more; so their means are no mean of models.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from della.checkpoint.header import TensorInfo
from della.checkpoint.strict import json_object
from della.errors import CheckpointError, Problem

CONFIG = "adapter_config.json"
FILES = ("adapter_model", "pytorch_lora_weights", "adapters.safetensors")
# How the tensors of each kind are called, at any "." or "_" of a name; a kind before those whose names it has
# as well.  All tuners of peft 0.21.2, LyCORIS 4.1.3.
KINDS = {
    "X-LoRA": r"internal_xlora_classifier",
    "Poly": r"poly_(lora_[AB]|router)",
    "SHADOW": r"shadow_(down|up|update_gate|update_transform|backbone)",
    "Supertuning": r"supertuning_(indices|values|lora_[AB])",
    "AdaLoRA": r"lora_E",
    "DoRA": r"lora_magnitude_vector|dora_scale",
    "LoRA": r"lora[_.](A|B|a|b|up|down|mid|embedding_A|embedding_B)|lora_linear_layer",
    "LoHa": r"hada_(w[12]|t[12])(_[ab])?",
    "LoKr": r"lokr_(w[12](_[ab])?|t[12])",
    "BOFT": r"boft_(R|s)",
    "OFT": r"oft_(blocks|diag|R|r|s|embedding_R)",
    "IA3": r"ia3_l",
    "PVeRA": r"pvera_(A|B|lambda_[bd])",
    "VeRA": r"vera_(A|B|lambda_[bd])",
    "Adaption Prompt": r"adaption_(prompt|gate)",
    "AdaMSS": r"adamss_(A|B|newB)",
    "BEFT": r"beft_bias",
    "C3A": r"c3a_kernel",
    "DEFT": r"deft_(P|R|para)",
    "DeLoRA": r"delora_(A|B|lambda|w_norm)",
    "FourierFT": r"fourierft_spectrum",
    "FRoD": r"frod_(U|V|lambda_l|lambda_s_values|s_indices|s_size)",
    "GLoRA": r"glora_[A-E]",
    "GraLoRA": r"gralora_[AB](_general)?",
    "HiRA": r"hira_(embedding_)?[AB]",
    "HRA": r"hra_u",
    "Lily": r"lily_(A|B|router)",
    "LN Tuning": r"ln_tuning_layers",
    "MiSS": r"miss_block",
    "Bone": r"bone_(block|[AB])",
    "OSF": r"osf_svd_params",
    "PEANuT": r"peanut_(A|B|encoders|decoders)",
    "PSOFT": r"psoft_[ABR]",
    "RandLoRA": r"randlora_(A|B|gamma|lambda)",
    "RoAd": r"road_(theta|alpha)",
    "SHiRA": r"shira_(weight|indices)",
    "TinyLoRA": r"tinylora_[ABPv]",
    "Uni-LoRA": r"unilora_(theta_d|(indices|scales)_[AB])",
    "VB-LoRA": r"vblora_(logits_[AB](_topk_(indices|weights))?|vector_bank)",
    "WaveFT": r"waveft_(spectrum|indices)",
    "Trainable Tokens": r"trainable_tokens_(delta|original)",
    "Multitask Prompt Tuning": r"prefix_task_(cols|rows)",
}
FACTOR = re.compile(rf"(^|[._])({'|'.join(KINDS.values())})([._]|$)")
PROMPTS = "prompt_embeddings"  # the whole name
# Of LyCORIS and kohya's scripts: names of modules in one piece, differences, scales of an input.
LYCORIS = re.compile(r"^(lora|lycoris)_[A-Za-z0-9]\w*\.|\.(diff|diff_b|on_input)$")
SIDES = {"_A": "_B", "_a": "_b", "_down": "_up"}
# What changes no weights of its base, but what it is shown or how it computes (peft: no merge_and_unload).
BESIDE = (
    "adaptionprompt", "cartridge", "cpt", "lily", "multitaskprompttuning", "ptuning", "poly", "prefixtuning",
    "prompttuning", "shadow", "xlora",
)  # fmt: skip


def factors(folder: Path, infos: Sequence[TensorInfo], files: Collection[str]) -> Iterator[Problem]:
    """That ``files`` of ``folder``, which hold ``infos``, hold the factors of an adapter, if they do."""
    if found := _factors(folder, infos, files):
        kind, tensor = found
        kind = said_kind(folder) or kind
        said = f"holds the factors of an adapter ({kind}; tensor {tensor!r}), whose mean is no mean of models"
        yield Problem(said, cure(folder, kind), str(folder), tensor)


def _factors(folder: Path, infos: Sequence[TensorInfo], files: Collection[str]) -> tuple[str, str] | None:
    """(kind, first tensor) of an adapter, by the names of tensors, by their shapes, or by what is beside."""
    names = sorted(info.name for info in infos)
    if hits := [name for name in names if FACTOR.search(name)]:
        by_kind = ((kind, re.compile(rf"(^|[._])({pattern})([._]|$)")) for kind, pattern in KINDS.items())
        return next((kind, name) for kind, pattern in by_kind for name in hits if pattern.search(name))
    if PROMPTS in names:
        return "Prompt Tuning", PROMPTS
    if piece := next(filter(LYCORIS.search, names), None):
        return "LyCORIS", piece
    if pair := _pair({info.name: info.shape for info in infos}):
        return "of an unknown kind", pair
    if names and (any(name.startswith(FILES) for name in files) or _is_alone(folder)):
        return "of an unknown kind", names[0]
    return None


def _pair(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of two factors of any name, X_A and X_B, whose inner axes are equal and the shortest: in a
    file of peft, as w1_a and w1_b, or beside a scalar alpha."""
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        side = next((side for side in SIDES if stem.endswith(side)), None)
        if side is None or len(shape) != 2:
            continue
        module, _, last = stem.rpartition(".")
        other = shapes.get(stem.removesuffix(side) + SIDES[side] + name.removeprefix(stem), ())
        is_named = last in ("w1_a", "w2_a") or (name.startswith("base_model.") and side != "_down")
        if len(other) != 2 or not (is_named or shapes.get(f"{module}.alpha") == ()):
            continue
        ways = ((shape, other), (shape[::-1], other[::-1]))
        if any(one[1] == two[0] < min(one[0], two[1]) for one, two in ways):
            return name
    return None


def _is_alone(folder: Path) -> bool:
    """Whether a folder says that it is an adapter's, and not that it is also a model's."""
    names = {path.name for path in folder.iterdir()}
    beside = any(name.startswith("adapter_model") for name in names)
    return CONFIG in names and "config.json" not in names and not beside


def cure(folder: Path, kind: str) -> str:
    """What to do about an adapter of this kind."""
    if _plain(kind) in BESIDE:
        return (
            "it cannot become a part of its base model: take it out of the recipe, and load it on the result"
        )
    return f"merge it into its base model{_base(folder)} first (peft: merge_and_unload), and give the result"


def said_kind(folder: Path) -> str:
    """The kind of adapter that adapter_config.json names, or ""."""
    found = _config(folder)
    said = found.get("peft_type") or found.get("fine_tune_type")
    if not isinstance(said, str):
        return ""
    if said.upper() == "LORA" and found.get("use_dora") is True:
        return "DoRA"
    return next((kind for kind in KINDS if _plain(kind) == _plain(said)), said[:60])


def _plain(kind: str) -> str:
    return re.sub(r"[-_ ]", "", kind).lower()


def _base(folder: Path) -> str:
    """`` (NAME)``, the base that adapter_config.json names; "" where it names none."""
    base = _config(folder).get("base_model_name_or_path")
    return f" ({base[:200]})" if isinstance(base, str) and base else ""


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        return json_object(path.read_bytes(), str(path))
    except (OSError, CheckpointError):
        return {}
