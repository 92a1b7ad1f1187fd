"""A server over loopback that speaks the OpenAI protocol as scripted: answers, delays, faults, and a record.

    with StubServer(lambda request: "42") as server:
        Endpoint(server.url, "stub").complete("6 * 7 =", max_tokens=4)
        assert server.requests[0].prompt == "6 * 7 ="

The rule is called for each request, with its number, and says what comes back: a text is a proper answer, the
other replies are below.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

REFUSAL = "I'm sorry, but I cannot help with that."


@dataclass(frozen=True)
class Request:
    """One request: its number from 0, its path, its JSON, and its headers by lower-case name."""

    number: int
    path: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def prompt(self) -> str:
        """The prompt of a completion, or what the messages of a chat say."""
        if "prompt" in self.body:
            return str(self.body["prompt"])
        return "\n".join(str(message["content"]) for message in self.body["messages"])


@dataclass(frozen=True)
class Status:
    """An HTTP error: the server's message, its own code for it, and the seconds after which to come back."""

    code: int
    message: str = "scripted"
    retry_after: float | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Raw:
    """These bytes as the body of a 200, whatever they are."""

    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True)
class Slow:
    """Another reply, late by some seconds."""

    seconds: float
    reply: str | Status = ""


class Hangup:
    """The connection is closed without a word."""


Reply = str | Status | Raw | Slow | Hangup
Rule = Callable[[Request], Reply]


def answer(path: str, body: dict[str, Any], text: str | None, **message: Any) -> bytes:
    """What a real server sends around ``text``; further fields of a chat's message as keywords."""
    chat = path.endswith("/chat/completions")
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text, **message}} if chat else {"text": text}
    kind = "chat.completion" if chat else "text_completion"
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    whole = {"id": "stub", "object": kind, "created": 0, "model": body.get("model", ""), "choices": [choice]}
    return json.dumps({**whole, "usage": usage}).encode()


@dataclass
class StubServer:
    """Serves while the context is open; ``most_at_once`` is the largest number of requests in work."""

    rule: Rule
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._lock, self._at_once = threading.Lock(), 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """The base URL, with /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _took(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Request:
        with self._lock:
            request = Request(len(self.requests), path, body, headers)
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return request

    def _done(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    stub: StubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is part of the script."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        stub = self.server.stub
        request = stub._took(self.path, body, headers)
        try:
            known = self.path in ("/v1/completions", "/v1/chat/completions")
            self._reply(request, stub.rule(request) if known else Status(404, f"no {self.path}"))
        finally:
            stub._done()

    def _reply(self, request: Request, reply: Reply) -> None:
        if isinstance(reply, Slow):
            time.sleep(reply.seconds)
            return self._reply(request, reply.reply)
        if isinstance(reply, Hangup):
            self.close_connection = True
        elif isinstance(reply, Status):
            error = {"error": {"message": reply.message, "type": "scripted", "code": reply.kind}}
            self._send(reply.code, json.dumps(error).encode(), "application/json", reply.retry_after)
        elif isinstance(reply, Raw):
            self._send(200, reply.body, reply.content_type)
        else:
            self._send(200, answer(self.path, request.body, reply), "application/json")

    def _send(self, code: int, body: bytes, kind: str, retry_after: float | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests look at ``requests``."""
