"""Tokenizers and models that transformers made, merged by token, and loaded by it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import put
from vocabularies import CORPORA, TEXTS, family, ids, recipe, write

import della

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch = pytest.importorskip("torch", reason="needs torch")

CLASSES = {
    "GPT2Tokenizer": "bytes", "Qwen2Tokenizer": "bytes", "T5Tokenizer": "unigram", "LlamaTokenizer": "bpe",
    "XLMRobertaTokenizer": "unigram", "BertTokenizer": "wordpiece",
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("source", ["base", "union", "one"])
def test_every_class_of_tokenizers(tmp_path: Path, name: str, source: str) -> None:
    """What transformers saved is merged; it gives the ids of the source's tokenizer, and the new ones."""
    family(tmp_path, CLASSES[name])
    for seed, model in enumerate(CORPORA):
        settings = {"tokenizer_class": name, "eos_token": "</s>", "unk_token": "<unk>"}
        put(tmp_path / model, {"tokenizer_config.json": settings})
        made = transformers.AutoTokenizer.from_pretrained(tmp_path / model)
        write(tmp_path / model, made.backend_tokenizer, seed)
        made.save_pretrained(tmp_path / model)
    chosen = str(tmp_path / "one") if source == "one" else source
    della.merge(recipe(tmp_path, tokenizer_source=chosen), tmp_path / "out", fsync=False)
    owner = "base" if source == "union" else source
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(tmp_path / each) for each in ("out", owner))
    assert {token: ours.convert_tokens_to_ids(token) for token in ids(tmp_path / "out")} == ids(
        tmp_path / "out"
    )
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS[::8]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    if source == "union":
        numbers = [ids(tmp_path / "out")[token] for token in ("<|b|>", "<|c|>")]
        assert [n for n in ours("cat <|b|> cat <|c|>")["input_ids"] if n in numbers] == numbers


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_transformers_answers_by_token(tmp_path: Path, tied: bool) -> None:
    """passthrough of one model in another's tokenizer: the same logits for the same tokens."""
    family(tmp_path, "bytes")
    for seed, name in enumerate(CORPORA):
        torch.manual_seed(seed)
        config: dict[str, Any] = {
            "vocab_size": len(ids(tmp_path / name)), "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": tied,
        }  # fmt: skip
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path / name)
    listed = [{"model": str(tmp_path / "two")}]
    made: dict[str, Any] = {
        "merge_method": "passthrough",
        "models": listed,
        "tokenizer_source": str(tmp_path / "one"),
    }
    zero = {
        token: {"source": {"kind": "zero"}} for token in ids(tmp_path / "one").keys() - ids(tmp_path / "two")
    }
    made |= {"tokenizer": {"source": made.pop("tokenizer_source"), "tokens": zero}}
    della.merge(made, tmp_path / "out", fsync=False, allow_idle=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    two = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    here, there = ids(tmp_path / "out"), ids(tmp_path / "two")
    shared = sorted(here.keys() & there.keys())
    tokens = shared[:6]
    with torch.no_grad():
        a = model(torch.tensor([[here[token] for token in tokens]])).logits[0]
        b = two(torch.tensor([[there[token] for token in tokens]])).logits[0]
    a, b = a[:, [here[token] for token in shared]], b[:, [there[token] for token in shared]]
    assert torch.allclose(a, b, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(here)
