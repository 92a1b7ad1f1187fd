"""`--tasks loss`: nats a token, held against transformers in float64 and a softmax in plain NumPy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_files import lines, records, sums
from commands import Command
from hypothesis import given
from hypothesis import strategies as st
from numpy_llamas import CONFIGS, in_torch, make_config, random_tensors

from della.errors import EvaluationError
from della.evaluate import evaluation
from della.evaluate import loss as module
from della.evaluate.backends import Model
from della.evaluate.llama import Llama
from della.evaluate.loss import Window, loss_of, measure, scorer, windows
from della.evaluate.loss import answer as answer_all
from della.evaluate.numpy_backend import NumpyScorer
from della.evaluate.options import EvaluationOptions
from della.evaluate.problems import Item, load
from della.experiments.demo import TRIO

PAIRS = [
    {"prompt": "What is 3 + 4?\n", "response": "3 + 4 = 7"},
    {"prompt": "Once upon a time", "response": " there was a little girl."},
    {"prompt": "", "response": "A dog."},
    {"text": "The sun was warm, and Tom ran to the park with his red ball. " * 4},
]


class Letters:
    """A tokenizer without file: a begin token, then an id a character."""

    def encode(self, sequence: str) -> Any:
        return SimpleNamespace(ids=[1, *(2 + ord(letter) % 59 for letter in sequence)])

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def token_to_id(self, token: str) -> int | None:
        raise NotImplementedError


def item(prompt: str, response: str, key: str = "0") -> Item:
    return Item(key, "loss", prompt, response)


def nats(logits: np.ndarray[Any, Any], ids: Sequence[int], first: int) -> float:
    """The sum of -log softmax of each token from ``first`` on, given the row before it; plain NumPy."""
    return sum(
        float(np.log(np.exp(logits[at - 1] - logits[at - 1].max()).sum()) - logits[at - 1][ids[at]])
        + float(logits[at - 1].max())
        for at in range(first, len(ids))
    )


# ---- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_transformers_in_float64(name: str) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    config = make_config(CONFIGS[name])
    tensors = random_tensors(config)
    model = in_torch(config, tensors).double()
    items = [item("abc", "defg"), item("", "a text of its own", "1"), item("a long prompt", "x", "2")]
    ours = measure(NumpyScorer(Letters(), Llama(config, tensors), 64), items)
    theirs = []
    for one, first in zip(items, (4, 1, 14), strict=True):
        ids = Letters().encode(one.instruction + one.reference).ids
        with torch.inference_mode():
            theirs.append(nats(model(torch.tensor([ids])).logits[0].numpy(), ids, first))
    assert ours.tokens == (4, 17, 1)
    np.testing.assert_allclose(ours.sums, theirs, rtol=1e-4)
    assert ours.value == pytest.approx(sum(theirs) / 22, rel=1e-4)
    assert ours.perplexity == pytest.approx(math.exp(sum(theirs) / 22), rel=1e-3)


def test_hf_and_numpy_agree_on_the_trio(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    file = lines(tmp_path / "pairs.jsonl", *PAIRS)
    ours = measure(TRIO / "lm", file, backend="numpy", window=40)
    theirs = measure(TRIO / "lm", file, backend="hf", dtype="float32", window=40)
    assert (ours.tokens, ours.windows) == (theirs.tokens, theirs.windows)
    assert ours.windows[3] > 1
    np.testing.assert_allclose(ours.sums, theirs.sums, rtol=1e-4)


def test_long_texts_count_each_token_once_in_windows_with_the_begin_token() -> None:
    config = make_config(CONFIGS["plain"])
    llama = Llama(config, random_tensors(config))
    text = "".join(chr(97 + n % 26) for n in range(40))
    ids = Letters().encode(text).ids
    found = measure(NumpyScorer(Letters(), llama, 16), [item("", text)])
    expected, done = nats(llama.logits(ids[:16]), ids[:16], 1), 16
    while done < 41:
        end = min(41, done + 8)
        window = [1, *ids[end - 15 : end]]
        expected += nats(llama.logits(window), window, 16 - (end - done))
        done = end
    assert (found.tokens, found.windows) == ((40,), (5,))
    assert found.sums[0] == pytest.approx(expected, rel=1e-5)


@given(
    st.integers(2, 60), st.integers(1, 60), st.integers(2, 20), st.booleans(),
)  # fmt: skip
def test_windows_hold_each_token_once_and_half_a_window_before_it(
    length: int, first: int, size: int, begins: bool
) -> None:
    ids = list(range(100, 100 + length))
    cut = list(windows(ids, first, size, ids[:1] if begins else []))
    counted = [token for window, count in cut for token in window[len(window) - count :]]
    assert counted == ids[first:]
    for number, (window, count) in enumerate(cut):
        assert 1 <= count < len(window) <= size
        assert not begins or window[0] == 100
        assert window[int(begins) :] == list(range(window[int(begins)], window[-1] + 1))
        if number:
            assert len(window) - count >= size // 2


@given(batch=st.integers(1, 9), window=st.sampled_from([6, 13, 64]))
def test_batches_change_nothing_but_rounding(batch: int, window: int) -> None:
    config = make_config(CONFIGS["grouped and tied"])
    model = NumpyScorer(Letters(), Llama(config, random_tensors(config)), 64)
    items = [item("p" * (n % 3), "abcdefgh" * n, str(n)) for n in range(1, 6)]
    one, many = (
        measure(model, items, window=window, batch=1),
        measure(model, items, window=window, batch=batch),
    )
    assert one.tokens == many.tokens
    np.testing.assert_allclose(one.sums, many.sums, rtol=2e-5)


class Told:
    """A scorer that tells 1 nat a token, and what it was asked; its tokens are pairs of letters."""

    context, rows = None, 1_000_000

    def __init__(self, sum_of: float = 1.0) -> None:
        self.asked: list[Window] = []
        self._sum_of = sum_of

    def encode(self, text: str) -> list[int]:
        return [ord(text[at]) * 1000 + ord((text + "\0")[at + 1]) for at in range(0, len(text), 2)]

    def sums(self, windows: Sequence[Window]) -> list[float]:
        self.asked += windows
        return [self._sum_of * count for _, count in windows]


def test_a_token_over_the_border_is_the_responses_and_the_first_of_all_never_counts() -> None:
    found = measure(
        Told(), [item("abc", "de"), item("ab", "cd", "1"), item("", "abcd", "2"), item("", "a", "3")]
    )
    assert found.tokens == (2, 1, 1, 0)
    assert (found.sums, found.value) == ((2.0, 1.0, 1.0, 0.0), 1.0)


def test_the_mean_is_over_tokens_and_the_interval_over_texts() -> None:
    loss = loss_of(json.dumps({"loss": s, "tokens": n, "windows": 1}) for s, n in ((6, 2), (1, 1), (3, 3)))
    assert loss.value == pytest.approx(10 / 6)
    found = loss.interval()
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 3, (20_000, 3))
    means = np.array([6, 1, 3])[chosen].sum(1) / np.array([2, 1, 3])[chosen].sum(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05)
    assert math.isnan(loss_of(['{"loss": 3.0, "tokens": 2, "windows": 1}']).interval().low)


def test_a_model_that_overflows_is_told(tmp_path: Path) -> None:
    config = make_config(CONFIGS["plain"])
    broken = random_tensors(config)
    broken["model.norm.weight"] *= np.float32(1e30)
    broken["lm_head.weight"] *= np.float32(1e30)
    loss = measure(NumpyScorer(Letters(), Llama(config, broken)), [item("", "abc"), item("", "de", "1")])
    assert not math.isfinite(loss.value)
    for worst, said in ((math.inf, "inf"), (math.nan, "nan")):
        answers: dict[str, str] = {}
        answer_all(Told(worst), [item("", "abcd")], answers.update)
        assert json.loads(answers["0"])["loss"] == said
        assert str(loss_of(answers.values()).value) == said  # type: ignore[arg-type]


# ---- files ------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(st.lists(st.one_of(WORDS, st.tuples(st.one_of(st.just(""), WORDS), WORDS)), min_size=1, max_size=6))
def test_json_lines_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, told: Any
) -> None:
    file = tmp_path_factory.mktemp("read") / "texts.jsonl"
    lines(file, *({"text": x} if isinstance(x, str) else {"prompt": x[0], "response": x[1]} for x in told))
    assert [(i.id, i.instruction, i.reference) for i in load("loss", file)] == [
        (str(n), *(("", x) if isinstance(x, str) else x)) for n, x in enumerate(told)
    ]


LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1).filter(
    str.strip
)


@given(
    st.lists(st.lists(LINES, min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n"]), st.sampled_from([b"", b"\xef\xbb\xbf"]),
)  # fmt: skip
def test_blank_lines_divide_the_texts_of_a_txt_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], end: str, mark: bytes
) -> None:
    file = tmp_path_factory.mktemp("read") / "texts.txt"
    written = f"{end} \t{end}{end}".join(end.join(text) for text in texts)
    file.write_bytes(mark + (written + end).encode())
    found = ["\n".join(text) for text in texts]
    if found[0].startswith("\ufeff") and not mark:
        found[0] = found[0][1:]
    assert [i.reference for i in load("loss", file)] == found


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', (":2", "invalid JSON", "'prompt' and 'response'")),
        ("a.jsonl", b"", ("no text in it", "'text'")),
        ("a.txt", b" \n\n", ("no text in it", ".txt")),
        ("a.jsonl", b'{"text": "a"}\n\n{"words": "b"}', (":3", '["words"]', "'prompt' and 'response'")),
        ("a.jsonl", b'{"text": "a", "response": "b"}', (":1", '["text", "response"]')),
        ("a.jsonl", b'{"response": "b"}', (":1", '["response"]')),
        ("a.jsonl", b'{"prompt": "a", "response": ""}', (":1", "expected a text as 'response'")),
        ("a.jsonl", b'{"prompt": 1, "response": "b"}', (":1", "expected a text as 'prompt', found 1")),
        ("a.jsonl", b'{"text": ["a"]}', (":1", "expected a text as 'text'")),
        ("a.txt", b"a\xff", ("not UTF-8", "save it as UTF-8")),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, name: str, content: bytes, words: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError) as caught:
        load("loss", tmp_path / name)
    for word in (name, *words):
        assert word in str(caught.value)


def test_texts_of_which_no_token_counts() -> None:
    with pytest.raises(EvaluationError, match=r"no token counts in its 2 texts.*a prompt before them"):
        measure(Told(), [item("", "a"), item("", "b", "1")])
    assert measure(Told(), [item("pr", "a"), item("", "b", "1")]).tokens == (1, 0)


def test_a_window_that_holds_no_pair() -> None:
    with pytest.raises(EvaluationError, match=r"window of 1 tokens .*give window=N of at least 2"):
        measure(Told(), [item("", "abcdef")], window=1)
    assert measure(Told(), [item("", "abcdef")], window=2).windows == (2,)


def test_an_id_without_a_row_of_embeddings_is_refused() -> None:
    config = make_config(CONFIGS["plain"]) | {"vocab_size": 20}
    model = NumpyScorer(Letters(), Llama(config, random_tensors(config)))
    with pytest.raises(EvaluationError, match=r"text 0: .*20 rows of embeddings; take the tokenizer"):
        measure(model, [item("", "abc")])


def test_a_tokenizers_own_truncation_does_not_cut_texts(tmp_path: Path) -> None:
    shutil.copytree(TRIO / "lm", tmp_path, dirs_exist_ok=True)
    raw = json.loads((TRIO / "lm/tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    text = "Once upon a time there was a girl who ran to the park."
    assert scorer(Model("m", str(tmp_path)), "numpy").encode(text) == (
        scorer(Model("m", str(TRIO / "lm")), "numpy").encode(text)
    )


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_resumes_compares_and_tells_perplexity(command: Command, tmp_path: Path) -> None:
    lines(tmp_path / "pairs.jsonl", *PAIRS * 2)
    given = (
        "eval", str(TRIO / "base"), str(TRIO / "lm"), "--tasks", "loss", "--data", "pairs.jsonl",
        "--backend", "numpy", "--window", "32",
    )  # fmt: skip
    ended = command(tmp_path, *given, "--json")
    assert ended.returncode == 0, ended.stderr
    event = json.loads(ended.stdout.splitlines()[-1])
    expected = measure(TRIO / "lm", tmp_path / "pairs.jsonl", backend="numpy", window=32)
    (loss, perplexity) = event["results"][2:]
    assert (loss["metric"], loss["tokens"], loss["items"]) == ("loss", sum(expected.tokens), 8)
    assert loss["value"] == pytest.approx(expected.value, rel=1e-6)
    assert loss["low"] < loss["value"] < loss["high"]
    assert perplexity["value"] == pytest.approx(math.exp(loss["value"]), rel=1e-6)
    (difference,) = event["differences"]
    assert difference["value"] == pytest.approx(loss["value"] - event["results"][0]["value"], rel=1e-5)
    assert "nats a token" in difference["message"]
    stored = tmp_path / "eval-out/lm/loss.jsonl"
    whole = stored.read_bytes()
    stored.write_bytes(b"".join(whole.splitlines(keepends=True)[:-3]))
    again = command(tmp_path, *given, "--batch", "2")
    assert again.returncode == 0, again.stderr
    assert "lm     loss  loss" in again.stdout
    assert f"{loss['value']:.4f}" in again.stdout
    assert "read in several" in again.stderr
    assert len(stored.read_bytes().splitlines()) == len(whole.splitlines())
    assert sum(one["tokens"] for one in records(tmp_path / "eval-out/lm/loss.items.jsonl")) == loss["tokens"]
    ended = command(tmp_path, *given, "--window", "16")
    assert (ended.returncode, "window 32, now 16" in ended.stderr) == (6, True)


@pytest.mark.parametrize("backend", ["openai", "vllm"])
def test_servers_are_refused_with_what_to_give_instead(
    command: Command, tmp_path: Path, backend: str
) -> None:
    lines(tmp_path / "pairs.jsonl", *PAIRS)
    given = ("eval", str(TRIO / "lm"), "--tasks", "loss", "--data", "pairs.jsonl", "--backend")
    ended = command(tmp_path, *given, backend, "--base-url", "http://127.0.0.1:1")
    assert ended.returncode == 6
    assert all(word in ended.stderr for word in (backend, "--backend hf", "--backend numpy"))
    assert command(tmp_path, *given, "numpy").returncode == 0


def test_loss_needs_a_file_and_takes_no_template(command: Command, tmp_path: Path) -> None:
    lines(tmp_path / "pairs.jsonl", *PAIRS)
    lines(tmp_path / "gsm8k.jsonl", *sums(1))
    given = ("eval", str(TRIO / "lm"), "--backend", "numpy", "--max-tokens", "1")
    ended = command(tmp_path, *given, "--tasks", "loss")
    assert (ended.returncode, "--data loss=FILE" in ended.stderr) == (6, True)
    both = ("--tasks", "gsm8k,loss", "--data", "gsm8k=gsm8k.jsonl", "--data", "loss=pairs.jsonl")
    ended = command(tmp_path, *given, *both, "--template", "vicuna")
    assert (ended.returncode, "--template TASK=NAME" in ended.stderr) == (6, True)
    ended = command(tmp_path, *given, *both, "--template", "gsm8k=vicuna")
    assert ended.returncode == 0, ended.stderr


def test_a_loss_that_is_no_number_is_told_and_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines(tmp_path / "pairs.jsonl", *PAIRS)
    monkeypatch.setattr(module, "scorer", lambda model, *_: Told(math.nan if model.name == "code" else 1.0))
    settings = EvaluationOptions(tasks=("loss",), data={"loss": file}, out=tmp_path / "out", backend="numpy")
    notes: list[str] = []
    results = evaluation.evaluate([str(TRIO / "lm"), str(TRIO / "code")], settings, tell=notes.append)
    assert [
        note for note in notes if note.startswith("code, loss: 4 of 4 texts have a loss that is no finite")
    ]
    assert evaluation.differences(results) == []
    told = json.loads((tmp_path / "out/scores.json").read_text(), parse_constant=pytest.fail)
    assert [one["value"] for one in told["results"][2:]] == [None, None]
