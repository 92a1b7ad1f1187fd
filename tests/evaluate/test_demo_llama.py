"""The demo's NumPy Llama against transformers, and its batched decoding against decoding one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy_llamas import CONFIGS, in_torch, make_config, random_tensors

from della.evaluate.llama import Llama
from della.evaluate.tokenizer import load_tokenizer
from della.experiments.demo import TRIO
from della.experiments.demo.score import score


def texts(rng: np.random.Generator, lengths: tuple[int, ...]) -> list[list[int]]:
    return [[int(token) for token in rng.integers(3, 61, length)] for length in lengths]


@pytest.mark.parametrize("variant", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_match_transformers(variant: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    config = make_config(variant)
    tensors = random_tensors(config)
    theirs = in_torch(config, tensors)
    (ids,) = texts(np.random.default_rng(1), (23,))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(Llama(config, tensors).logits(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", CONFIGS.values(), ids=CONFIGS.keys())
def test_batched_greedy_equals_one_by_one_and_no_cache(variant: dict[str, Any]) -> None:
    config = make_config(variant)
    model = Llama(config, random_tensors(config))
    prompts = texts(np.random.default_rng(2), (3, 9, 1, 14, 9))
    batched = model.greedy(prompts, most=12, end=1)
    assert batched == [model.greedy([prompt], most=12, end=1)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, batched, strict=True):
        text = list(prompt)
        for token in answer:
            assert int(model.logits(text)[-1].argmax()) == token
            text.append(token)


def test_greedy_stops_at_the_end_token() -> None:
    config = make_config(CONFIGS["plain"])
    model = Llama(config, random_tensors(config))
    prompts = texts(np.random.default_rng(3), (4, 7, 2, 5))
    free = model.greedy(prompts, most=10, end=-1)
    end = free[0][4]
    stopped = model.greedy(prompts, most=10, end=end)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]


def test_losses_are_the_log_softmax_of_the_logits() -> None:
    config = make_config(CONFIGS["grouped and tied"])
    model = Llama(config, random_tensors(config))
    prompts = texts(np.random.default_rng(4), (5, 2, 8))
    answers = texts(np.random.default_rng(5), (4, 6, 1))
    found = model.losses(list(zip(prompts, answers, strict=True)), rows=2)
    for prompt, answer, losses in zip(prompts, answers, found, strict=True):
        logits = model.logits([*prompt, *answer]).astype(np.float64)[len(prompt) - 1 : -1]
        expected = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(answer)), answer]
        np.testing.assert_allclose(losses, expected, atol=1e-4)


def test_answers_are_what_losses_and_greedy_find() -> None:
    config = make_config(CONFIGS["grouped and tied"])
    model = Llama(config, random_tensors(config))
    prompts = texts(np.random.default_rng(7), (5, 2, 8, 11, 3, 6, 4))
    free = model.greedy(prompts, most=9, end=-1)
    end = free[0][3]
    assert end not in free[0][:3] + free[4] + free[6]
    wrong = texts(np.random.default_rng(8), (4, 6, 1))
    # Wrong from the start, right and then wrong, right but too short, too long, and right to the last token.
    references = [free[0][:3], *wrong, free[4][:3], [*free[5][:2], 60, 60], free[6]]
    pairs = list(zip(prompts, references, strict=True))
    losses, answers = model.answers(pairs, most=9, end=end, rows=3)
    assert answers == model.greedy(prompts, most=9, end=end)
    for found, expected in zip(losses, model.losses(pairs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"hidden_act": "gelu"}, {"attention_bias": True}, {"rope_scaling": {"type": "linear", "factor": 2}}],
    ids=str,
)
def test_variants_it_does_not_compute_are_refused(change: dict[str, Any]) -> None:
    config = make_config(CONFIGS["plain"])
    with pytest.raises(ValueError, match="does not compute"):
        Llama(config | change, random_tensors(config))


def test_the_shipped_base_matches_transformers() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = TRIO / "base"
    ids = transformers.AutoTokenizer.from_pretrained(folder)("Story: Tim, fox, kite, park.")["input_ids"]
    assert ids == load_tokenizer(folder).encode("Story: Tim, fox, kite, park.").ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(Llama.from_folder(folder).logits(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_every_shipped_expert_is_better_than_the_base_at_its_own_task() -> None:
    pytest.importorskip("tokenizers")
    base = score(TRIO / "base", "validation", 40)
    assert score(TRIO / "lm", "validation", 40)["lm_loss"] < base["lm_loss"] - 0.05
    assert score(TRIO / "math", "validation", 40)["math"] > base["math"] + 0.2
    assert score(TRIO / "code", "validation", 40)["code"] > base["code"] + 0.2
