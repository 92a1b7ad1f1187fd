"""The chat template of the result: whose it is, whether it can be rendered, and where it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import put
from recipes import told

import della
from della.errors import RecipeError
from della.recipe.templates import TEMPLATES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go"},
]
# By hand, with <s> and </s> as bos_token and eos_token, and the prompt of an answer.
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Yes?</s>[INST] Go [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?</s>\n\n### Instruction:\nGo\n\n"
    "### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Go\n"
    "[|assistant|]",
}
SHORT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
OTHER = SHORT.replace(": ", " > ")


def tokenizer(*tokens: str) -> dict[str, Any]:
    """tokenizer.json of words."""
    words = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", *tokens))}
    added = [{"id": n, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for t, n in words.items()]  # fmt: skip
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}}  # fmt: skip


SETTINGS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip


def model(folder: Path, value: float, template: str | None = None, **files: Any) -> None:
    put(folder, {
        "model.safetensors": {"w": np.full((3, 2), value, np.float32)},
        "config.json": {"model_type": "llama"},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": SETTINGS,
        **({"chat_template.jinja": template.encode()} if template else {}),
        **files,
    })  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("base", "one", "two", "three")):
        model(tmp_path / name, float(number))
    return tmp_path


def recipe(template: Any, *models: str) -> dict[str, Any]:
    listed = [{"model": name, "parameters": {"weight": 0.5}} for name in models or ("one", "two")]
    return {
        "merge_method": "task_arithmetic", "base_model": "base", "models": listed, "chat_template": template,
    }  # fmt: skip


def notes(template: Any, *models: str) -> str:
    with della.plan(recipe(template, *models)) as plan:
        return "\n".join(note for note in plan.notes if note.startswith("chat_template"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_write_what_they_are_for(here: Path, name: str) -> None:
    from jinja2 import Environment

    out = della.merge(recipe(name), "out").out
    text = (out / "chat_template.jinja").read_text()
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    found = environment.from_string(text).render(
        messages=TALK, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert found == WRITTEN[name]
    assert della.verify(out).is_well


def test_every_template_of_ours_is_held_against_a_text() -> None:
    assert WRITTEN.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_loads_and_renders_them(here: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    stale = {**SETTINGS, "chat_template": SHORT}
    model(here / "base", 0.0, OTHER, **{
        "tokenizer_config.json": stale, "additional_chat_templates/rag.jinja": SHORT.encode(),
    })  # fmt: skip
    out = della.merge(recipe(name), "out").out
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    assert loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == WRITTEN[name]


def test_no_other_template_is_left(here: Path) -> None:
    stale = {**SETTINGS, "chat_template": SHORT, "auto_map": {"AutoTokenizer": "x.py"}}
    model(here / "base", 0.0, None, **{
        "tokenizer_config.json": stale, "chat_template.json": {"chat_template": SHORT},
        "additional_chat_templates/rag.jinja": SHORT.encode(),
    })  # fmt: skip
    out = della.merge(recipe("chatml"), "out").out
    assert json.loads((out / "tokenizer_config.json").read_text()) == SETTINGS
    assert not (out / "chat_template.json").exists()
    assert not (out / "additional_chat_templates").exists()
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]


def test_without_the_key_the_bases_stays(here: Path) -> None:
    model(here / "base", 0.0, SHORT)
    plain = recipe(None)
    assert (della.merge(plain, "out").out / "chat_template.jinja").read_text() == SHORT


# ---- auto -----------------------------------------------------------------------------------------------


def test_auto_is_what_most_models_have(here: Path) -> None:
    model(here / "base", 0.0, SHORT)
    for number, name in enumerate(("one", "two"), 1):
        model(here / name, float(number), f"{OTHER}\n")
    out = della.merge(recipe("auto"), "out").out
    assert (out / "chat_template.jinja").read_text() == OTHER
    assert "auto, that of one, two" in notes("auto")


def test_a_tie_goes_to_the_base_and_else_to_the_first(here: Path) -> None:
    model(here / "one", 1.0, OTHER)
    model(here / "two", 2.0, SHORT)
    assert "auto, that of one" in notes("auto")
    assert "auto, that of two" in notes("auto", "two", "one")
    model(here / "base", 0.0, SHORT + "x")
    assert "auto, that of base" in notes("auto")


def test_auto_finds_templates_in_configurations_too(here: Path) -> None:
    model(here / "one", 1.0, None, **{"tokenizer_config.json": {**SETTINGS, "chat_template": OTHER}})
    out = della.merge(recipe("auto"), "out").out
    assert (out / "chat_template.jinja").read_text() == OTHER


def test_auto_where_no_model_has_one(here: Path) -> None:
    assert "no model has a template" in notes("auto")
    assert not (della.merge(recipe("auto"), "out").out / "chat_template.jinja").exists()


# ---- tokens -----------------------------------------------------------------------------------------------


def test_tokens_that_the_vocabulary_lacks_are_told(here: Path) -> None:
    assert "<|im_start|>, <|im_end|> are no tokens of the tokenizer" in notes("chatml")
    model(here / "base", 0.0, None, **{"tokenizer.json": tokenizer("<|im_start|>", "<|im_end|>")})
    assert "no token" not in notes("chatml")
    assert "[INST], [/INST]" in notes("mistral")
    assert "no token" not in notes("alpaca")


def test_a_missing_end_of_text_is_told(here: Path) -> None:
    model(here / "base", 0.0, None, **{"tokenizer_config.json": {}})
    assert "no bos_token" in notes("llama3")
    assert "no eos_token" in notes("alpaca")


def test_a_vocabulary_that_cannot_be_read_is_told(here: Path) -> None:
    model(here / "base", 0.0, None, **{"tokenizer.json": {}})
    assert "vocabulary cannot be read" in notes("chatml")


# ---- what cannot be -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "cannot be rendered"),
        ("{{ messages[0]['content'] }}{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 'always the same' }}", "leaves out"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages[0]['content'] * 1000000000 }}", "no number"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "no number"),
        ("{{ '%999999999d' % 1 }}", "no number"),
        ("{{ 'x'.ljust(999999999) }}", "unsafe"),
        ("{{ 'x' | center(999999999) }}", "center"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
    ],
)
def test_templates_that_cannot_be_rendered_are_refused_before_a_byte_is_written(
    here: Path, template: str, words: str
) -> None:
    with pytest.raises(RecipeError, match="chat_template") as caught:
        della.merge(recipe(template), "out")
    assert words in str(caught.value)
    assert "correct the template" in str(caught.value)
    assert sorted(path.name for path in here.iterdir()) == ["base", "one", "three", "two"]


def test_the_line_of_a_fault_in_a_template_is_told(here: Path) -> None:
    with pytest.raises(RecipeError, match="line 2 of it"):
        della.plan(recipe("{{ messages[0]['content'] }}\n{% if %}\n"))


def test_a_template_of_the_recipe_is_written_as_it_is(here: Path) -> None:
    text = "merge_method: linear\nmodels: [{model: one}, {model: two}]\nparameters: {weight: 1}\n"
    text += "chat_template: |\n  {%- for m in messages %}\n  {{- m['content'] }}\n  {%- endfor %}\n"
    out = della.merge(text, "out").out
    wanted = "{%- for m in messages %}\n{{- m['content'] }}\n{%- endfor %}\n"
    assert (out / "chat_template.jinja").read_text() == wanted


def test_a_template_that_wants_no_system_message_may_say_so(here: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + SHORT
    )
    assert "is written" in notes(strict)


def test_tags_that_transformers_knows(here: Path) -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%d') }}{{ messages | tojson(indent=2) }}"
    )
    assert "is written" in notes(text)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("vicuna 13", "write one of auto, chatml"),
        (["auto"], "must be text"),
    ],
)
def test_what_is_no_template(value: Any, words: str) -> None:
    assert words in told({"merge_method": "ties", "base_model": "b", "models": [{"model": "x"}],
                          "chat_template": value})  # fmt: skip


def test_the_cure_of_a_template_of_another_model_works(here: Path) -> None:
    model(here / "one", 1.0, "{% if %}")
    with pytest.raises(RecipeError, match="name another one, such as 'chat_template: chatml'"):
        della.plan(recipe("auto"))
    assert "is written" in notes("chatml")


def test_the_example_of_the_page(here: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/documents.md").read_text(encoding="utf-8")
    (text,) = (each for each in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "chat_template" in each)
    out = della.merge(text, "out").out
    assert (out / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
