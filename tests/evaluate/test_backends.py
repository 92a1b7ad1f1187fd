"""The backends: what models answer, in which batches, and which models are distinguished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from stub_server import Request, StubServer

from della.errors import EvaluationError
from della.evaluate.backends import Backend, Model, batches
from della.evaluate.endpoint import Endpoint
from della.evaluate.numpy_backend import NumpyModel
from della.evaluate.server import ServedModel
from della.evaluate.templates import Prompt
from della.experiments.demo import TRIO, tasks

ITEMS = tasks.items("math", "test", 5)
PROMPTS = [Prompt(str(at), item.prompt) for at, item in enumerate(ITEMS)]


class Kept(dict[str, str]):
    """Answers, and how many came at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def keep(self, answers: Mapping[str, str]) -> None:
        self.counts.append(len(answers))
        self.update(answers)


# ---- models -----------------------------------------------------------------------------------------------


def test_a_model_is_named_by_its_last_component_or_by_the_user(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert Model.of("owner/name@main") == Model("name@main", "owner/name@main")
    assert Model.of("mine=owner/name") == Model("mine", "owner/name")
    assert Model.of(f"mine={tmp_path}/a=b") == Model("mine", f"{tmp_path}/a=b")
    for text in (f"{tmp_path}/a=b", "owner/..", "a b", "x/=y", "=y", "x=", "..=y"):
        with pytest.raises(EvaluationError, match=r"a model needs a plain name for its results: NAME=MODEL$"):
            Model.of(text)


def test_a_folder_is_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(TRIO / "base", folder)
    one = Model("m", str(folder)).identity
    assert one.startswith("files ")
    assert one == Model("another", f"{folder}/").identity
    (folder / "README.md").write_text("of no weight")
    assert Model("m", str(folder)).identity == one
    os.utime(folder / "tokenizer.json", ns=(0, 0))
    two = Model("m", str(folder)).identity
    (folder / "added_tokens.json").write_text("{}")
    assert len({one, two, Model("m", str(folder)).identity}) == 3


def test_a_merged_folder_is_known_by_its_seal_wherever_it_is_copied_to(tmp_path: Path) -> None:
    for name, seal in (("a", "1"), ("b", "1"), ("c", "2")):
        shutil.copytree(TRIO / "base", tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name / "della.json").write_text(json.dumps({"seal": seal}))
    a, b, c = (Model(name, str(tmp_path / name)).identity for name in "abc")
    assert a == b != c


def test_what_is_no_folder_is_of_the_hub_or_nothing() -> None:
    assert Model("m", "owner/name@v1").identity == "owner/name@v1"
    assert Model("m", "owner/name@v1").local_or_hub == ("owner/name", "v1")
    with pytest.raises(
        EvaluationError, match=r"^\./none: no such folder, and no model of the Hub \(owner/name\)$"
    ):
        _ = Model("m", "./none").local_or_hub


# ---- batches ----------------------------------------------------------------------------------------------


def test_batches_are_of_like_length_and_stay_the_same_when_the_first_are_done() -> None:
    prompts = [Prompt(str(at), "") for at in range(7)]
    ids = [[0] * length for length in (3, 9, 1, 9, 4, 7, 2)]
    whole = list(batches(prompts, ids, 2))
    assert whole == [[1, 3], [5, 4], [0, 6], [2]]
    left = [at for at in range(7) if at not in whole[0]]
    again = batches([prompts[at] for at in left], [ids[at] for at in left], 2)
    assert [[left[at] for at in batch] for batch in again] == whole[1:]


# ---- numpy and hf -----------------------------------------------------------------------------------------


def test_numpy_answers_as_the_demo_does() -> None:
    kept = Kept()
    NumpyModel(str(TRIO / "math"), batch=2, max_tokens=48).answer(PROMPTS, kept.keep)
    assert kept.counts == [2, 2, 1]
    assert sorted(kept) == ["0", "1", "2", "3", "4"]
    right = [tasks.correct(item, kept[prompt.id]) for item, prompt in zip(ITEMS, PROMPTS, strict=True)]
    assert sum(right) >= 3, "the expert knows its own task"


def test_numpy_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match='knows no chat templates; use backend="hf"'):
        NumpyModel(str(TRIO / "math"), batch=2, max_tokens=4).answer([Prompt("0", "", True)], Kept().keep)
    with pytest.raises(
        EvaluationError, match="none: no such folder; the numpy backend reads local models only"
    ):
        NumpyModel(str(tmp_path / "none"), batch=2, max_tokens=4)
    shutil.copytree(TRIO / "base", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(
        EvaluationError, match=r"m: .* does not compute this attention_bias; try backend=\"hf\"$"
    ):
        NumpyModel(str(tmp_path / "m"), batch=2, max_tokens=4)
    (tmp_path / "m/generation_config.json").unlink()
    for changes, message in (
        ({"eos_token_id": None}, r"m: no eos_token_id in its config\.json, so no answer would end; add it$"),
        ({"tie_word_embeddings": False, "num_hidden_layers": None}, r"m: .*; try backend=\"hf\"$"),
    ):
        (tmp_path / "m/config.json").write_text(json.dumps(config | changes))
        with pytest.raises(EvaluationError, match=message):
            NumpyModel(str(tmp_path / "m"), batch=2, max_tokens=4)
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(
        EvaluationError, match=r"m: its config\.json or its weights lack 'num_attention_heads'$"
    ):
        NumpyModel(str(tmp_path / "m"), batch=2, max_tokens=4)
    (tmp_path / "m/config.json").unlink()
    with pytest.raises(
        EvaluationError, match=r"m/config\.json: cannot be read \(No such file or directory\)$"
    ):
        NumpyModel(str(tmp_path / "m"), batch=2, max_tokens=4)
    (tmp_path / "m/tokenizer.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"tokenizer\.json: cannot be read \("):
        NumpyModel(str(tmp_path / "m"), batch=2, max_tokens=4)


def test_a_chat_template_that_fails_is_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs torch and transformers")
    from della.evaluate.hf import HfModel

    shutil.copytree(TRIO / "base", tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    model = HfModel(Model("m", str(tmp_path / "m")), dtype="float32", batch=2, max_tokens=4)
    with pytest.raises(
        EvaluationError,
        match=r"m: its chat template fails: .*roles must alternate; choose other templates$",
    ):
        model.answer([Prompt("0", "", True)], Kept().keep)


def test_hf_answers_as_numpy_does() -> None:
    hf = hf_model(TRIO / "math")
    ours, theirs = Kept(), Kept()
    NumpyModel(str(TRIO / "math"), batch=2, max_tokens=48).answer(PROMPTS, ours.keep)
    hf.answer(PROMPTS, theirs.keep)
    assert theirs == ours
    assert theirs.counts == [2, 2, 1]


def test_hf_ends_at_stops_of_each_prompt() -> None:
    plain, stopped = Kept(), Kept()
    model = hf_model(TRIO / "math")
    model.answer(PROMPTS[:2], plain.keep)
    assert all("So " in answer and not answer.endswith("So ") for answer in plain.values())
    model.answer([PROMPTS[0], Prompt("1", PROMPTS[1].text, stops=("So ",))], stopped.keep)
    assert stopped["0"] == plain["0"]
    assert plain["1"].startswith(stopped["1"])
    assert "So" in stopped["1"][-6:], "it may hold the stop, which is cut later, and little behind it"


def test_hf_follows_the_models_chat_template_and_tells_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError) as error:
        hf_model(TRIO / "math").answer([Prompt("0", "Hello", True)], Kept().keep)
    assert str(error.value) == (
        f"{TRIO / 'math'}: its tokenizer has no chat template; choose other templates"
    )
    shutil.copytree(TRIO / "math", tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text(
        "{% for message in messages %}Q: {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %} A:{% endif %}"
    )
    said = PROMPTS[0].text.removeprefix("Q: ").removesuffix(" A:")
    assert f"Q: {said} A:" == PROMPTS[0].text
    plain, chat = Kept(), Kept()
    hf_model(TRIO / "math").answer(PROMPTS[:1], plain.keep)
    hf_model(tmp_path / "chat").answer([Prompt("0", said, is_chat=True)], chat.keep)
    assert chat == plain


def test_hf_tells_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"empty: transformers cannot load it: \w+: "):
        hf_model(tmp_path / "empty")


def hf_model(folder: Path) -> Backend:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from della.evaluate.hf import HfModel

    return HfModel(Model("m", str(folder)), dtype="float32", batch=2, max_tokens=48)


# ---- a server ---------------------------------------------------------------------------------------------


def test_a_server_is_asked_for_completions_and_for_chats() -> None:
    prompts = [Prompt("0", "one", stops=("Q:", "</s>")), Prompt("1", "two", is_chat=True)]
    kept = Kept()
    with StubServer(lambda request: f"<{request.prompt}>") as server:
        ServedModel(Endpoint(server.url, "m"), concurrency=1, max_tokens=9, seed=7).answer(prompts, kept.keep)
        common = {"model": "m", "max_tokens": 9, "temperature": 0.0, "seed": 7}
        assert [(request.path, request.body) for request in server.requests] == [
            ("/v1/completions", common | {"prompt": "one", "stop": ["Q:", "</s>"]}),
            ("/v1/chat/completions", common | {"messages": [{"role": "user", "content": "two"}]}),
        ]
    assert kept == {"0": "<one>", "1": "<two>"}


def test_as_many_requests_at_once_as_asked_for() -> None:
    """None is answered before four are there."""
    from threading import Barrier

    together, kept = Barrier(4), Kept()

    def rule(request: Request) -> str:
        together.wait(timeout=20)
        return "a"

    prompts = [Prompt(str(at), str(at)) for at in range(8)]
    with StubServer(rule) as server:
        ServedModel(Endpoint(server.url, "m"), concurrency=4, max_tokens=9, seed=7).answer(prompts, kept.keep)
        assert server.most_at_once == 4
    assert len(kept) == 8


def test_after_an_error_nothing_more_is_asked_for_and_what_came_is_kept() -> None:
    from stub_server import Status

    def rule(request: Request) -> str | Status:
        return "a" if request.number < 3 else Status(400, "too long")

    kept = Kept()
    prompts = [Prompt(str(at), str(at)) for at in range(8)]
    with StubServer(rule) as server:
        served = ServedModel(Endpoint(server.url, "m", retries=0), concurrency=1, max_tokens=9, seed=7)
        with pytest.raises(EvaluationError, match="HTTP 400: too long; the server refuses the request"):
            served.answer(prompts, kept.keep)
        assert len(server.requests) == 4
    assert list(kept) == ["0", "1", "2"]
