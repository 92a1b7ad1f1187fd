"""Models behind an OpenAI-compatible server: completions and chats as plain text.

The package openai (extra eval) has the connections, the time-outs and the retries: after a time-out, a broken
connection, or HTTP 408, 409, 429 and 5xx, and after a growing pause or the one that the server asks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from della.errors import EvaluationError, Problem

NO_KEY = "none"  # what servers that need no key are sent: the package insists on one
MOST_OF_A_MESSAGE = 300  # characters of a server's own words that are shown

_ADVICE = {
    400: "the server refuses the request: does it take these options, and is the prompt too long?",
    401: "set the server's key in the environment variable {key_env}",
    403: "the key in the environment variable {key_env} has no right to this",
    404: "is the base URL whole (most end in /v1), and does the server have this model?",
    429: "wait or ask for a higher limit, then run again: what is finished is kept",
}
_SERVER_ADVICE = "see the server's own log, then run again: what is finished is kept"


class Endpoint:
    """One model of one server; may be used by several threads at once.

    base_url: as the server gives it, mostly with /v1 at its end.  key_env: the environment variable that
    holds the key; a dummy is sent where it is not set.  timeout: seconds that the server may be silent.
    retries: how often a request is sent again.  Without the extra eval: EvaluationError.
    """

    def __init__(
        self, base_url: str, model: str, *, key_env: str = "OPENAI_API_KEY", timeout: float = 60.0,
        retries: int = 5,
    ) -> None:  # fmt: skip
        try:
            import openai
        except ModuleNotFoundError as error:
            raise EvaluationError(
                Problem(
                    "a model server is spoken to by the package openai",
                    "pip install '.[eval]' in della's checkout",
                )
            ) from error
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            said = "expected a base URL such as http://localhost:8000/v1"
            raise EvaluationError(Problem(said, subject=repr(base_url)))
        self.base_url, self.model = base_url, model
        self.name = f"{public(base_url)}, model {model}"
        self._key_env, self._key = key_env, key_in(key_env)
        self._timeout, self._retries = timeout, retries
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key, timeout=timeout, max_retries=retries
        )

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:  # fmt: skip
        """The text that follows ``prompt``; EvaluationError when the server does not give one."""
        options = _options(max_tokens, stop, temperature, seed)
        return self._ask(self._client.completions.create, {"prompt": prompt, **options}, _completion)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int, stop: Sequence[str] = (),
        temperature: float = 0.0, seed: int | None = None,
    ) -> str:  # fmt: skip
        """The answer to a conversation of {role, content}: "" where the model says nothing or the server's
        filter stands before it, its words where it refuses.  EvaluationError when there is none.
        """
        options = _options(max_tokens, stop, temperature, seed)
        said = [dict(message) for message in messages]
        return self._ask(self._client.chat.completions.create, {"messages": said, **options}, _message)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(
        self, create: Callable[..., Any], arguments: dict[str, Any], text: Callable[[Any], str | None]
    ) -> str:
        """The package repeats what failed; a 200 that holds no answer is repeated here."""
        import openai

        for _ in range(1 + self._retries):
            try:
                found = text(create(model=self.model, **arguments))
            except openai.APIStatusError as error:
                if error.code == "content_filter":  # of a server that will not show its model this prompt
                    return ""
                raise self._refused(error) from error
            except openai.APITimeoutError as error:
                raise self._failed(
                    f"no answer within {self._timeout:g} s",
                    "is the server overloaded? A longer time-out or fewer requests at once may help",
                ) from error
            except openai.APIConnectionError as error:
                why = str(error.__cause__ or error)
                raise self._failed(f"cannot be reached ({why})", "is the server running?") from error
            except (openai.OpenAIError, ValueError, RecursionError):  # the body is no JSON, or a maze of it
                continue
            if found is not None:
                return found.encode("utf-8", "replace").decode()  # half a surrogate could not be stored
        raise self._failed(
            "HTTP 200 without an answer in it", "is it a server that speaks the OpenAI protocol?"
        )

    def _refused(self, error: Any) -> EvaluationError:
        """In the server's own words, where it has some."""
        status = error.status_code
        said = error.body.get("message") if isinstance(error.body, dict) else None
        advice = _ADVICE.get(status, _SERVER_ADVICE if status >= 500 else _ADVICE[400])
        return self._failed(f"HTTP {status}: {said or error.message}", advice.format(key_env=self._key_env))

    def _failed(self, what: str, advice: str) -> EvaluationError:
        what = without_key(what, self._key)
        if len(what) > MOST_OF_A_MESSAGE:
            what = what[:MOST_OF_A_MESSAGE] + "..."
        return EvaluationError(Problem(what, advice, self.name))


def key_in(key_env: str) -> str:
    """The key in an environment variable, NO_KEY without one; EvaluationError for what cannot be one.

    A line break would fail only later, in a library whose message holds the whole header.
    """
    key = os.environ.get(key_env) or NO_KEY
    if not all("!" <= c <= "~" for c in key):
        raise EvaluationError(
            Problem(
                f"the key in the environment variable {key_env} holds a blank, a line break or a "
                "character beyond ASCII, which no server takes",
                "set it anew",
            )
        )
    return key


def public(base_url: str) -> str:
    """A base URL without user, password and query: what may be shown and stored."""
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def without_key(text: str, key: str) -> str:
    """Servers repeat keys in their messages; we do not."""
    return text if key == NO_KEY else text.replace(key, "***")


def _options(max_tokens: int, stop: Sequence[str], temperature: float, seed: int | None) -> dict[str, Any]:
    """What is not asked for is not sent: not every server knows every option."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    return options | ({"stop": list(stop)} if stop else {}) | ({} if seed is None else {"seed": seed})


def _completion(reply: Any) -> str | None:
    choices = getattr(reply, "choices", None)
    text = getattr(choices[0], "text", None) if isinstance(choices, list) and choices else None
    return text if isinstance(text, str) else None


def _message(reply: Any) -> str | None:
    choices = getattr(reply, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None:
        return None
    text = getattr(message, "content", None) or getattr(message, "refusal", None) or ""
    return text if isinstance(text, str) else None
