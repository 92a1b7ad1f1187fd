"""An OpenAI-compatible server, over real HTTP: what is sent, what comes back, and every way it can fail."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from threading import Thread

import pytest
from stub_server import REFUSAL, Hangup, Raw, Reply, Rule, Slow, Status, StubServer, answer

from della.errors import EvaluationError
from della.evaluate.endpoint import Endpoint

pytest.importorskip("openai", reason="the extra eval is not installed")

KEY = "sk-a-secret-0123456789"


@contextmanager
def served(rule: Rule, timeout: float = 5.0, retries: int = 0) -> Iterator[tuple[Endpoint, StubServer]]:
    with (
        StubServer(rule) as server,
        closing(
            Endpoint(server.url, "stub", key_env="STUB_KEY", timeout=timeout, retries=retries)
        ) as endpoint,
    ):
        yield endpoint, server


def in_turn(*replies: Reply) -> Rule:
    """The first reply to the first request, and so on."""
    return lambda request: replies[request.number]


def complete(endpoint: Endpoint) -> str:
    return endpoint.complete("say", max_tokens=4)


def chat(endpoint: Endpoint) -> str:
    return endpoint.chat([{"role": "user", "content": "say"}], max_tokens=4)


BOTH = pytest.mark.parametrize("ask", [complete, chat])
Ask = Callable[[Endpoint], str]


def test_a_completion_sends_what_was_asked_for_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", KEY)
    with served(lambda request: " 42\n") as (endpoint, server):
        assert endpoint.complete("6 * 7 =", max_tokens=4, stop=("\n\n", "Q:"), seed=3) == " 42\n"
        assert endpoint.complete("6 * 7 =", max_tokens=9) == " 42\n"
    first, second = server.requests
    assert first.path == "/v1/completions"
    assert first.body == {
        "model": "stub", "prompt": "6 * 7 =", "max_tokens": 4, "temperature": 0.0, "stop": ["\n\n", "Q:"],
        "seed": 3,
    }  # fmt: skip
    assert second.body == {"model": "stub", "prompt": "6 * 7 =", "max_tokens": 9, "temperature": 0.0}
    assert first.headers["authorization"] == f"Bearer {KEY}"


def test_a_chat_sends_its_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUB_KEY", raising=False)
    said = [{"role": "system", "content": "be short"}, {"role": "user", "content": "6 * 7?"}]
    with served(lambda request: "42") as (endpoint, server):
        assert endpoint.chat(said, max_tokens=4, temperature=0.5) == "42"
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].body == {
        "model": "stub", "messages": said, "max_tokens": 4, "temperature": 0.5,
    }  # fmt: skip
    assert server.requests[0].headers["authorization"] == "Bearer none", "a dummy where no key is set"


def test_a_refusal_and_silence_are_answers() -> None:
    path = "/v1/chat/completions"
    refused, silent = Raw(answer(path, {}, None, refusal=REFUSAL)), Raw(answer(path, {}, None))
    filtered = Status(400, "the prompt was filtered", kind="content_filter")
    with served(in_turn(refused, silent, "", filtered)) as (endpoint, _):
        assert [chat(endpoint) for _ in range(4)] == [REFUSAL, "", "", ""]


@BOTH
def test_half_a_surrogate_becomes_a_question_mark(ask: Ask) -> None:
    with served(lambda request: "a\ud800b") as (endpoint, _):
        assert ask(endpoint) == "a?b"


@BOTH
@pytest.mark.parametrize(
    "fault", [Status(429, retry_after=0.01), Status(500, retry_after=0.01), Status(503, retry_after=0.01)]
)
def test_what_passes_is_tried_again(ask: Ask, fault: Status) -> None:
    with served(in_turn(fault, fault, "there"), retries=2) as (endpoint, server):
        assert ask(endpoint) == "there"
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [Hangup(), Slow(0.6, "late")])
def test_a_broken_or_silent_connection_is_tried_again(fault: Reply) -> None:
    with served(in_turn(fault, "there"), timeout=0.3, retries=1) as (endpoint, server):
        assert complete(endpoint) == "there"
    assert len(server.requests) == 2


GARBAGE = {
    "bytes": Raw(b"\xff\xfe\x00garbage"),
    "a page": Raw(b"<html>gateway</html>", "text/html"),
    "half of it": Raw(b'{"choices": ['),
    "nothing": Raw(b""),
    "null": Raw(b"null"),
    "a list": Raw(b"[]"),
    "no choices": Raw(b'{"choices": []}'),
    "a number of choices": Raw(b'{"choices": 3}'),
    "a choice of another kind": Raw(b'{"choices": [3]}'),
    "no text": Raw(b'{"choices": [{"text": 3, "message": {"content": 4}}]}'),
    "a maze": Raw(b"[" * 100_000),
}


@BOTH
@pytest.mark.parametrize("fault", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_tried_again_and_then_told(ask: Ask, fault: Raw) -> None:
    with served(in_turn(fault, "there", fault, fault), retries=1) as (endpoint, server):
        assert ask(endpoint) == "there"
        with pytest.raises(EvaluationError) as error:
            ask(endpoint)
    assert len(server.requests) == 4
    assert str(error.value) == (
        f"{server.url}, model stub: HTTP 200 without an answer in it; "
        "is it a server that speaks the OpenAI protocol?"
    )


@BOTH
@pytest.mark.parametrize(
    ("code", "told"),
    [
        (400, "the server refuses the request: does it take these options, and is the prompt too long?"),
        (401, "set the server's key in the environment variable STUB_KEY"),
        (403, "the key in the environment variable STUB_KEY has no right to this"),
        (404, "is the base URL whole (most end in /v1), and does the server have this model?"),
        (429, "wait or ask for a higher limit, then run again: what is finished is kept"),
        (502, "see the server's own log, then run again: what is finished is kept"),
    ],
)
def test_giving_up_says_where_what_and_what_to_do(ask: Ask, code: int, told: str) -> None:
    with (
        served(lambda request: Status(code, "no way")) as (endpoint, server),
        pytest.raises(EvaluationError) as error,
    ):
        ask(endpoint)
    assert str(error.value) == f"{server.url}, model stub: HTTP {code}: no way; {told}"
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [400, 401, 403, 404])
def test_what_does_not_pass_is_not_tried_again(code: int) -> None:
    with (
        served(lambda request: Status(code), retries=3) as (endpoint, server),
        pytest.raises(EvaluationError),
    ):
        complete(endpoint)
    assert len(server.requests) == 1


def test_a_silent_server_is_given_up() -> None:
    with (
        served(lambda request: Slow(0.4), timeout=0.1) as (endpoint, server),
        pytest.raises(EvaluationError) as error,
    ):
        complete(endpoint)
    assert str(error.value) == (
        f"{server.url}, model stub: no answer within 0.1 s; is the server overloaded? "
        "A longer time-out or fewer requests at once may help"
    )


def test_no_server_at_all() -> None:
    with StubServer(lambda request: "") as server:
        url = server.url
    with (
        closing(Endpoint(url, "stub", retries=0)) as endpoint,
        pytest.raises(
            EvaluationError, match=r"^.*, model stub: cannot be reached \(.*\); is the server running\?$"
        ),
    ):
        complete(endpoint)


@pytest.mark.parametrize("code", [401, 429, 500])
def test_the_key_is_never_told(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", KEY)
    with served(lambda request: Status(code, f"the key {KEY} is bad")) as (endpoint, _):
        with pytest.raises(EvaluationError, match=r"the key \*\*\* is bad") as error:
            complete(endpoint)
        assert KEY not in str(error.value)
        assert KEY not in repr(endpoint)


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", "sk-ä"])
def test_a_key_that_no_header_can_hold_is_refused_untold(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library below would fail with the whole header in its message."""
    monkeypatch.setenv("STUB_KEY", key)
    with pytest.raises(EvaluationError) as error:
        Endpoint("http://localhost/v1", "stub", key_env="STUB_KEY")
    assert str(error.value) == (
        "the key in the environment variable STUB_KEY holds a blank, a line break or a character beyond "
        "ASCII, which no server takes; set it anew"
    )


def test_neither_is_a_password_in_the_url() -> None:
    with StubServer(lambda request: Status(500)) as server:
        url = server.url.replace("//", "//ann:secret@")
        with (
            closing(Endpoint(url, "stub", retries=0)) as endpoint,
            pytest.raises(EvaluationError, match=f"^{re.escape(server.url)}, model stub: ") as error,
        ):
            complete(endpoint)
    assert "secret" not in str(error.value)


def test_a_long_message_is_cut() -> None:
    with (
        served(lambda request: Status(500, "x" * 10_000)) as (endpoint, _),
        pytest.raises(EvaluationError) as error,
    ):
        complete(endpoint)
    assert "x" * 280 + "...; see" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "/v1"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(EvaluationError) as error:
        Endpoint(url, "stub")
    assert str(error.value) == f"{url!r}: expected a base URL such as http://localhost:8000/v1"


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EvaluationError, match=r"pip install '.\[eval\]' in della's checkout$"):
        Endpoint("http://localhost/v1", "stub")


def test_several_threads_share_one_endpoint() -> None:
    with served(lambda request: Slow(0.1, request.prompt[::-1])) as (endpoint, server):
        found: dict[int, str] = {}

        def ask(number: int) -> None:
            found[number] = endpoint.complete(f"{number:03}", max_tokens=4)

        threads = [Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {number: f"{number:03}"[::-1] for number in range(8)}
    assert server.most_at_once > 1
