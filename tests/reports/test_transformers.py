"""Models that transformers made, of many families: it loads every result, nothing missing and nothing left
over, and its logits are those of the merged tensors, which torch computes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import della

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch = pytest.importorskip("torch", reason="needs torch")

LM, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
TEXTS, CLASSES = "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification"
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {key: SMALL[key] for key in list(SMALL)[:4]} | {"vocab_size": 40}
BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 60,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 64}
OPT = ENCODER | {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
MAMBA = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (LM, "llama", SMALL), "llama, tied": (LM, "llama", SMALL | {"tie_word_embeddings": True}),
    "qwen2": (LM, "qwen2", SMALL), "qwen3": (LM, "qwen3", SMALL | {"tie_word_embeddings": True}),
    "gemma": (LM, "gemma", SMALL), "gemma2": (LM, "gemma2", SMALL), "mistral": (LM, "mistral", SMALL),
    "starcoder2": (LM, "starcoder2", SMALL), "gpt_neox": (LM, "gpt_neox", SMALL), "gpt2": (LM, "gpt2", GPT2),
    "opt": (LM, "opt", OPT), "mamba": (LM, "mamba", MAMBA), "t5": (TEXTS, "t5", T5),
    "bart": (TEXTS, "bart", BART), "mbart": (TEXTS, "mbart", BART), "bert": (MASKED, "bert", ENCODER),
    "classes": (CLASSES, "bert", ENCODER),
    "deberta": (MASKED, "deberta-v2", ENCODER), "qwen3_moe": (LM, "qwen3_moe", SMALL | EXPERTS),
    "mixtral": (LM, "mixtral", SMALL | {"num_local_experts": 4}),
}  # fmt: skip
OWN_HEADS = (
    "llama, tied",
    "qwen3",
    "gemma",
    "gemma2",
    "starcoder2",
    "gpt2",
    "opt",
    "mamba",
    "t5",
    "bart",
    "mbart",
)
IDS = torch.tensor([[3, 4, 5, 6]])


def pair(folder: Path, family: str) -> tuple[Any, Any, Any]:
    """A class of models, a base that it made, saved and loaded, and a fine-tune of it, not yet saved."""
    loader, kind, sizes = FAMILIES[family]
    auto = getattr(transformers, loader)
    torch.manual_seed(0)
    auto.from_config(transformers.AutoConfig.for_model(kind, **sizes)).save_pretrained(folder / "base")
    base, expert = (auto.from_pretrained(folder / "base").eval() for _ in range(2))
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return auto, base, expert


def merged(folder: Path, auto: Any) -> Any:
    """The model halfway between base and expert, loaded without a missing or unexpected name."""
    lines = (
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: ft, parameters: {weight: 0.5}}]\n"
    )
    (folder / "recipe.yml").write_text(lines)
    della.merge(folder / "recipe.yml", folder / "out", fsync=False)
    model, told = auto.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def logits(model: Any) -> Any:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_merged_and_loaded(tmp_path: Path, family: str) -> None:
    auto, base, expert = pair(tmp_path, family)
    expert.save_pretrained(tmp_path / "ft")
    out = merged(tmp_path, auto)
    before, after = dict(base.named_parameters()), dict(expert.named_parameters())
    with torch.no_grad():
        assert out.state_dict().keys() == base.state_dict().keys()
        for name, found in out.named_parameters():
            torch.testing.assert_close(
                found, before[name] + 0.5 * (after[name] - before[name]), rtol=0, atol=1e-6
            )
        for name, parameter in base.named_parameters():
            parameter += 0.5 * (after[name] - parameter)
    torch.testing.assert_close(logits(out), logits(base), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", OWN_HEADS)
def test_a_head_of_its_own_on_a_tied_base(tmp_path: Path, family: str) -> None:
    """The head starts from the base's embeddings, which were its head; tables of tokens stay as they are."""
    auto, base, expert = pair(tmp_path, family)
    table = expert.get_input_embeddings().weight.detach()
    head = torch.nn.Parameter(table + torch.randn_like(table) * 0.1)
    expert.config.tie_word_embeddings = False
    expert.get_output_embeddings().weight = head
    expert.save_pretrained(tmp_path / "ft")
    out = merged(tmp_path, auto)
    start = base.get_input_embeddings().weight
    for found, own in (
        (out.get_input_embeddings().weight, table),
        (out.get_output_embeddings().weight, head),
    ):
        torch.testing.assert_close(found, start + 0.5 * (own - start), rtol=0, atol=1e-6)
    if out.config.is_encoder_decoder:
        for part in (out.get_encoder(), out.get_decoder()):
            assert torch.equal(part.get_input_embeddings().weight, out.get_input_embeddings().weight)
    out.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "again").eval()), logits(out))
