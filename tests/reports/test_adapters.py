"""Adapters in files that look like a model's: what any tuner of peft 0.21.2, LyCORIS 4.1.3 and kohya's
scripts writes is refused as what it is, by its names, by its shapes, or by what stands beside it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import della
from della.errors import DellaError

Tensors = dict[str, Any]
IDLE: dict[str, Any] = {"missing": "base", "extra": "ignore"}


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


BASE: Tensors = {f"model.layers.{k}.q.weight": normal(k, 8, 8) for k in range(2)}


def pair(folder: Path, base: Tensors, expert: Tensors, beside: Any = None, **more: Any) -> Path:
    for name, tensors in (("BASE", base), ("FT", expert)):
        (folder / name).mkdir(exist_ok=True)
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text("{}")
    if beside is not None:
        (folder / "FT" / "adapter_config.json").write_text(json.dumps(beside))
    made = {"merge_method": "task_arithmetic", "base_model": "BASE", "models": [{"model": "FT"}]} | more
    (folder / "recipe.yml").write_text(json.dumps(made))
    return folder / "recipe.yml"


def refused(path: Path) -> str:
    with pytest.raises(DellaError) as caught:
        della.plan(path)
    return str(caught.value)


# What peft writes of each tuner: its names after "base_model.model.LAYER.", or whole ones (=).
TUNERS: dict[str, list[str]] = {
    "LORA": ["lora_A.weight", "lora_embedding_B", "base_layer.lora_A.weight"],
    "ADALORA": ["lora_E"], "ADAMSS": ["adamss_A.0", "adamss_newB"], "BEFT": ["beft_bias"],
    "ADAPTION_PROMPT": ["adaption_gate", "adaption_prompt"], "BOFT": ["boft_R", "boft_s"],
    "C3A": ["c3a_kernel"], "DEFT": ["deft_P", "deft_R"],
    "DELORA": ["delora_A", "delora_lambda", "delora_w_norm"],
    "FOURIERFT": ["fourierft_spectrum"],
    "FROD": ["=base_model.frod_V.self_attn_q_proj", "frod_lambda_l", "frod_lambda_s_values"],
    "GLORA": ["glora_A.Xd", "glora_C.zeros"], "GRALORA": ["gralora_A", "gralora_B"], "HIRA": ["hira_A"],
    "HRA": ["hra_u"], "IA3": ["ia3_l"], "LILY": ["lily_A.weight", "lily_router.weight"],
    "LN_TUNING": ["ln_tuning_layers.weight"], "LOHA": ["hada_w1_a", "hada_w2_b"],
    "LOKR": ["lokr_w1", "lokr_w2"],
    "MISS": ["miss_block"], "OFT": ["oft_R.weight"], "OSF": ["osf_svd_params.S_low", "osf_svd_params.U_low"],
    "PEANUT": ["peanut_A.weight", "peanut_B.weight"], "POLY": ["poly_lora_A", "poly_router.module_logits"],
    "PSOFT": ["psoft_R.vector_a", "psoft_R.weight"], "PVERA": ["pvera_lambda_b", "=base_model.pvera_A"],
    "RANDLORA": ["randlora_A", "randlora_gamma"], "ROAD": ["road_theta", "road_alpha"],
    "SHADOW": ["shadow_down.default.weight", "shadow_update_gate.default.0.bias"],
    "SHIRA": ["shira_weight", "shira_indices"], "SUPERTUNING": ["supertuning_values"],
    "TINYLORA": ["tinylora_A", "tinylora_P", "=base_model.tinylora_v.0"],
    "TRAINABLE_TOKENS": ["trainable_tokens_delta", "token_adapter.trainable_tokens_delta"],
    "UNILORA": ["=base_model.unilora_theta_d"], "VERA": ["vera_lambda_b", "=base_model.vera_A"],
    "VBLORA": ["vblora_logits_A", "=base_model.vblora_vector_bank", "vblora_logits_A_topk_weights"],
    "WAVEFT": ["waveft_spectrum"], "PROMPT_TUNING": ["=prompt_embeddings"], "XLORA": [],
    "MULTITASK_PROMPT_TUNING": ["=prefix_task_cols"],
}  # fmt: skip
ALONE = (
    "ADAPTION_PROMPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PROMPT_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
MADE = [(kind, name) for kind, names in TUNERS.items() for name in names]


def plain(text: str) -> str:
    return "".join(letter for letter in text.upper() if letter.isalnum())


@pytest.mark.parametrize(("kind", "name"), MADE)
@pytest.mark.parametrize("inside", [False, True])
def test_factors_of_every_tuner_are_named_as_such(tmp_path: Path, kind: str, name: str, inside: bool) -> None:
    full = name[1:] if name.startswith("=") else f"base_model.model.model.layers.0.q.{name}"
    model = (BASE if inside else {}) | {full: normal(1, 2, 8)}
    said = refused(pair(tmp_path, model, model | {full: normal(3, 2, 8)}, **IDLE))
    assert f"adapter ({kind}; " in said.replace(said.split("(")[1].split(";")[0], kind, 1)
    assert plain(said.split("(")[1].split(";")[0]) == plain(kind)
    assert full in said
    assert ("merge_and_unload" in said) == (kind not in ALONE)
    assert ("take it out of the recipe" in said) == (kind in ALONE)


LYCORIS = [
    "lycoris_blocks_0_q.weight", "lycoris_q.on_input", "lora_unet_mid_block_q.a1.weight", "lora_te1_q.alpha",
    "lycoris_q.q_layer.weight", "diffusion_model.blocks.0.q.diff", "diffusion_model.blocks.0.q.diff_b",
    "lora_unet_q.w_norm", "unet.q.on_input",
]  # fmt: skip


@pytest.mark.parametrize("name", LYCORIS)
def test_what_lycoris_and_kohya_write(tmp_path: Path, name: str) -> None:
    model = {name: normal(1, 8, 8)}
    said = refused(pair(tmp_path, model, {name: normal(2, 8, 8)}, **IDLE))
    assert "factors of an adapter" in said
    assert name in said


@pytest.mark.parametrize(
    ("names", "alpha"),
    [
        (("q.w1_a", "q.w1_b"), None), (("q.new_a.weight", "q.new_b.weight"), "q.alpha"),
        (("base_model.model.q.new_A", "base_model.model.q.new_B"), None), (("q.down", "q.up"), None),
        (("q.x_down.weight", "q.x_up.weight"), "q.alpha"),
    ],
)  # fmt: skip
def test_factors_of_unknown_names_are_known_by_their_shapes(
    tmp_path: Path, names: tuple[str, str], alpha: str | None
) -> None:
    model = {names[0]: normal(1, 2, 8), names[1]: normal(2, 8, 2)}
    model |= {alpha: np.array(4, np.float32)} if alpha else {}
    path = pair(tmp_path, model, {name: np.asarray(values * 2) for name, values in model.items()})
    if names[0] == "q.down":  # no sign of an adapter
        della.plan(path).close()
    else:
        assert "factors of an adapter" in (said := refused(path))
        assert names[0] in said


WORDS = [
    "q.missed_block.weight", "layers.road.weight", "shadow_map", "hra_unit", "layers.0.alpha",
    "poly_a.weight",
    "text.prompt_embeddings.weight", "diff.weight", "layers.lily.weight", "soft_s", "osf", "mlp.w1_b",
    "attn.wq_a.weight", "mixer.A_log", "experts.w1_a_norm", "loran_A.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_words_like_those_of_tuners_are_weights(tmp_path: Path, name: str) -> None:
    model = BASE | {name: normal(1, 2, 8)}
    with della.plan(pair(tmp_path, model, model | {name: normal(3, 2, 8)})) as plan:
        assert plan.coverage[0].merged == 3


@pytest.mark.parametrize(
    "names", [("attn.wq_a.weight", "attn.wq_b.weight"), ("mlp.ffn_down.weight", "mlp.ffn_up.weight")]
)
def test_native_weights_of_low_rank_are_weights(tmp_path: Path, names: tuple[str, str]) -> None:
    model = BASE | {names[0]: normal(1, 2, 8), names[1]: normal(2, 8, 2)}
    della.plan(pair(tmp_path, model, {name: values * 2 for name, values in model.items()})).close()


KINDS = [
    ({"peft_type": "MISS"}, "MiSS"), ({"peft_type": "LORA", "use_dora": True}, "DoRA"),
    ({"peft_type": "LORA"}, "LoRA"), ({"fine_tune_type": "dora"}, "DoRA"), ({"peft_type": "NEW"}, "NEW"),
    ({"peft_type": "P_TUNING"}, "P_TUNING"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "kind"), KINDS)
def test_the_kind_is_what_adapter_config_says(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    beside = config | {"base_model_name_or_path": "owner/base"}
    path = pair(tmp_path, BASE, {"base_model.model.q.lora_A.weight": normal(1, 2, 8)}, beside)
    for _ in range(2):
        assert f"({kind}" in (said := refused(path))
        assert ("owner/base" in said) == (kind != "P_TUNING")
        # then the folder as peft saves it
        if (tmp_path / "FT" / "model.safetensors").exists():
            (tmp_path / "FT" / "model.safetensors").rename(tmp_path / "FT" / "adapter_model.safetensors")


@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors", "adapters.safetensors"])
def test_whatever_is_in_an_adapters_file_is_an_adapter(tmp_path: Path, file: str) -> None:
    path = pair(tmp_path, BASE, BASE, {"peft_type": "NEW"})
    (tmp_path / "FT" / "config.json").unlink()
    (tmp_path / "FT" / "model.safetensors").rename(tmp_path / "FT" / file)
    recipe = json.loads(path.read_text())
    recipe["models"][0]["model"] = f"FT/{file}"
    path.write_text(json.dumps(recipe))
    assert "(NEW" in refused(path)


def test_a_model_with_an_adapter_or_its_old_configuration_beside_it_is_a_model(tmp_path: Path) -> None:
    tuned = {name: values + 1 for name, values in BASE.items()}
    path = pair(tmp_path, BASE, tuned, {"peft_type": "LORA"})
    della.plan(path).close()
    save_file({"q.lora_A.weight": normal(1, 2, 8)}, tmp_path / "FT" / "adapter_model.safetensors")
    (tmp_path / "FT" / "config.json").unlink()
    with della.plan(path) as plan:
        assert any("adapter_model.safetensors" in note for note in plan.notes)


def test_without_the_adapter_the_recipe_is_planned(tmp_path: Path) -> None:
    path = pair(tmp_path, BASE, {"prompt_embeddings": normal(1, 4, 8)})
    (tmp_path / "TWO").mkdir()
    save_file({name: values + 1 for name, values in BASE.items()}, tmp_path / "TWO" / "model.safetensors")
    recipe = json.loads(path.read_text())
    for models, taken in ((["FT", "TWO"], False), (["TWO"], True)):
        path.write_text(json.dumps(recipe | {"models": [{"model": name} for name in models]}))
        if taken:
            della.plan(path).close()
        else:
            assert "take it out of the recipe" in refused(path)


# Options that a tuner needs on a Llama of 16 hidden units; those that are not here need none.
VIRTUAL: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "target_modules": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {"use_dora": True}, "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 4}, "FOURIERFT": {"n_frequency": 8},
    "WAVEFT": {"n_frequency": 8}, "OFT": {"r": 0, "oft_block_size": 4},
    "VBLORA": {"num_vectors": 8, "vector_length": 4}, "POLY": {"n_tasks": 2},
    "IA3": {"feedforward_modules": []}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [1], "target_modules": ["embed_tokens"]}, "ROAD": {"group_size": 4},
    "PROMPT_TUNING": VIRTUAL, "PREFIX_TUNING": VIRTUAL, "P_TUNING": VIRTUAL, "CARTRIDGE": VIRTUAL,
    "MULTITASK_PROMPT_TUNING": VIRTUAL | {"num_tasks": 2},
    "ADAPTION_PROMPT": {
        "adapter_len": 4, "adapter_layers": 1, "target_modules": None, "task_type": "CAUSAL_LM",
    },
    "CPT": {
        "cpt_token_ids": [1], "cpt_mask": [1], "cpt_tokens_type_mask": [1], "task_type": "CAUSAL_LM",
        "target_modules": None,
    },
}  # fmt: skip
NOT_TRIED = ("XLORA", "ADAMSS")  # need adapters on the disk, scikit-learn


@pytest.mark.slow
def test_every_adapter_that_peft_writes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    mapping = pytest.importorskip("peft.mapping")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    weights = {"model.embed_tokens.weight": normal(1, 16, 16)}
    for kind, of_kind in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind in NOT_TRIED:
            continue
        ranks = {"r": 2} if "r" in of_kind.__dataclass_fields__ else {}
        options: dict[str, Any] = {"target_modules": ["q_proj"]} | ranks | OPTIONS.get(kind, {})
        options = {name: value for name, value in options.items() if value is not None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.LlamaForCausalLM(config)
            peft.get_peft_model(model, of_kind(**options)).save_pretrained(tmp_path / kind)
        path = pair(tmp_path, weights, weights, **IDLE)
        (tmp_path / kind / "adapter_model.safetensors").rename(tmp_path / "FT" / "model.safetensors")
        assert "factors of an adapter" in (said := refused(path)), kind
        assert "unknown kind" not in said
        (tmp_path / "FT" / "adapter_config.json").write_bytes(
            (tmp_path / kind / "adapter_config.json").read_bytes()
        )
        wanted = "DORA" if kind == "LORA" else kind
        assert plain(refused(path).split("(")[1].split(";")[0]) == plain(wanted)
        (tmp_path / "FT" / "adapter_config.json").unlink()
