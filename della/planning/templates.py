"""The chat template of the result, where the recipe names one: chosen, tried, and put where programs look.

transformers 5 takes chat_template.jinja before all else; what other files say of templates is removed, so
that no program finds an old one.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from della.checkpoint.layout import read_small
from della.checkpoint.sides import TEMPLATES as FURTHER
from della.checkpoint.sides import checked_side_files
from della.checkpoint.source import Source
from della.checkpoint.strict import json_object
from della.checkpoint.vocabulary import MOST_BYTES, Vocabulary, chat_template, read_vocabulary
from della.errors import Collector, Problem, RecipeError, clip
from della.recipe.models import Recipe
from della.recipe.templates import AUTO, ChatTemplate

FILE, SETTINGS, OLD = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
_MOST_STEPS = 300_000  # of a rendering: a template of the usual kind takes some thousand
_SPECIAL = re.compile(r"<\|[^<>|\s]{1,40}\|>|\[\|\w{1,40}\|\]|\[/?[A-Z_]{2,40}\]|<(?:start|end)_of_\w{1,40}>")
_PADS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"))
_SAID = ("Tell me of the sea.", "It is wide.", "And of the moon?")
_ASKED = [{"role": "user", "content": _SAID[0]}]
_ANSWERED = [*_ASKED, {"role": "assistant", "content": _SAID[1]}]
_LONG = [{"role": "system", "content": "Be brief."}, *_ANSWERED, {"role": "user", "content": _SAID[2]}]


class _Refused(Exception):
    """A template says so itself, by raise_exception."""


class _TooLong(Exception):
    """A template does not come to an end."""


def settle_template(
    recipe: Recipe, base: Source, sources: Iterable[Source], check: Collector
) -> Iterator[str]:
    """Puts the chat template that the recipe asks for in place of the base's files; notes on it."""
    wanted = recipe.chat_template
    if wanted is None:
        return
    text, name = wanted.text, wanted.name or "of the recipe"
    if wanted.name == AUTO:
        found = _commonest([base, *sources])
        if found is None:
            yield "chat_template: auto: no model has a template, and so the result has none"
            return
        text, owners = found
        name = f"auto, that of {', '.join(owners)}"
    vocabulary = _vocabulary(base)
    with check:
        written = _rendered(text, wanted, vocabulary.special)
        yield f"chat_template: {name}, is written to {FILE}"
        base.instead = {**base.instead, **_without_others(base), FILE: text.encode(errors="replace")}
        yield from _lacking(written, text, vocabulary)


def _commonest(sources: Iterable[Source]) -> tuple[str, list[str]] | None:
    """The template that most models have, the base's or the first among equals; and who has it."""
    owners: dict[str, list[str]] = {}
    for source in {each.reference: each for each in sources}.values():
        if text := _own(source):
            owners.setdefault(text.strip(), []).append(source.reference)
    counts = Counter({text: len(names) for text, names in owners.items()})
    return (counts.most_common(1)[0][0], owners[counts.most_common(1)[0][0]]) if counts else None


def _own(source: Source) -> str | None:
    """The template of a model, also where its files were replaced."""
    instead = source.instead.get(FILE)
    if isinstance(instead, bytes):
        return instead.decode()
    found = chat_template(source.folder)
    return found[1] if found else None


def _vocabulary(base: Source) -> Vocabulary:
    """That of the result, whose tokenizer.json may have new tokens."""
    fast, own = base.instead.get("tokenizer.json"), read_vocabulary(base.folder)
    if isinstance(fast, Path):
        return read_vocabulary(fast.parent)
    if isinstance(fast, bytes):
        rows = json.loads(fast).get("added_tokens") or []
        own.tokens.update({row["id"]: row["content"] for row in rows})
    return own


def _without_others(base: Source) -> Mapping[str, Path | bytes | None]:
    """What stands in place of the files that hold other templates."""
    made: dict[str, Path | bytes | None] = {}
    now: dict[str, Path | bytes | None] = {**checked_side_files(base.folder), **base.instead}
    for name, held in now.items():
        if name == OLD or name.startswith(f"{FURTHER}/"):
            made[name] = None
        elif name == SETTINGS and held is not None:
            raw = held if isinstance(held, bytes) else read_small(held, MOST_BYTES)
            settings = json_object(raw, name)
            if settings.pop("chat_template", None) is not None:
                made[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return made


def _lacking(written: str, text: str, vocabulary: Vocabulary) -> Iterator[str]:
    """What a template needs and the vocabulary has not."""
    if not vocabulary.tokens:
        yield "chat_template: the vocabulary cannot be read, so nobody knows whether it has the tokens"
        return
    known = set(vocabulary.tokens.values())
    wanted = dict.fromkeys(_SPECIAL.findall(written))
    if lost := [token for token in wanted if token not in known]:
        said = "is no token" if len(lost) == 1 else "are no tokens"
        said = f"{', '.join(map(clip, lost))} {said} of the tokenizer, which cuts such text into pieces"
        yield f"chat_template: {said}"
    for kind in ("bos_token", "eos_token"):
        if re.search(rf"\b{kind}\b", text) and kind not in vocabulary.special:
            yield f"chat_template: the tokenizer has no {kind}, which the template writes"


def _rendered(text: str, wanted: ChatTemplate, special: Mapping[str, str]) -> str:
    """What a template writes of talks like those that it is for.  Raises RecipeError."""

    def refused(said: str, fix: str) -> RecipeError:
        return RecipeError(Problem(said, fix, location=wanted.location, parameter="chat_template"))

    fix = "correct the template" if not wanted.name else "name another one, such as 'chat_template: chatml'"
    values = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": "", **special}
    try:
        render = _compiled(text)
        written = [_limited(lambda: render(messages=_ASKED, add_generation_prompt=True, **values))]
        written.append(_limited(lambda: render(messages=_ANSWERED, add_generation_prompt=False, **values)))
        with suppress(_Refused):  # it may want no system message
            written.append(_limited(lambda: render(messages=_LONG, add_generation_prompt=True, **values)))
    except Exception as error:  # of Jinja, and whatever the template's own operations raise
        line = getattr(error, "lineno", None)
        at = f", line {line} of it" if isinstance(line, int) else ""
        said = clip(" ".join(str(error).split()) or type(error).__name__, 200)
        raise refused(f"the chat template cannot be rendered{at}: {said}", fix) from error
    for said, messages in zip(written, (_ASKED, _ANSWERED), strict=False):
        if left := next((each["content"] for each in messages if each["content"] not in said), None):
            raise refused(f"the chat template leaves out what is said: {left!r} is not in its text", fix)
    return "".join(written)


def _limited(render: Callable[[], str]) -> str:
    """What ``render`` gives, unless it takes more steps than any template for talks needs."""
    left, before = _MOST_STEPS, sys.gettrace()

    def trace(*_: object) -> Callable[..., Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong(f"it takes more than {_MOST_STEPS:,} steps")
        return trace

    sys.settrace(trace)
    try:
        return render()
    finally:
        sys.settrace(before)


def _compiled(text: str) -> Callable[..., str]:
    """A template's rendering in Jinja's sandbox, in an environment like that of transformers."""
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks for training what the assistant says."""

        tags = frozenset(("generation",))  # type: ignore[assignment]

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Without what makes long texts of short ones."""

        intercepted_binops = frozenset(("*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or not all(isinstance(each, int | float) for each in (left, right)):
                raise SecurityError(f"{operator} of what is no number")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return attr not in _PADS and super().is_safe_attribute(obj, attr, value)

    def raise_exception(message: object) -> NoReturn:
        raise _Refused(str(message))

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in ("center", "format", "wordwrap", "pprint"):
        made.filters.pop(name, None)
    made.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _: "1 Dec 2026"}
    return made.from_string(text).render
