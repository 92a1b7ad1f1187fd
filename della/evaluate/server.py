"""Answers of a model behind an OpenAI-compatible server, several requests at once."""

from __future__ import annotations

from collections.abc import Sequence

from della.evaluate.backends import Keep
from della.evaluate.endpoint import Endpoint
from della.evaluate.templates import Prompt
from della.running.workers import each


class ServedModel:
    """A model of a server: chats for the template `chat`, completions for all others."""

    def __init__(self, endpoint: Endpoint, *, concurrency: int, max_tokens: int, seed: int) -> None:
        self._endpoint, self._most, self._seed = endpoint, max_tokens, seed
        self._concurrency = concurrency

    def answer(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        """Greedy answers; a thread asks for the next one when its last is on the disk.

        After an error nothing more is asked for, and what was asked for is still waited for and kept.
        """
        each(lambda p: keep({p.id: self._ask(p)}), prompts, self._concurrency, apart=True)

    def _ask(self, prompt: Prompt) -> str:
        if prompt.is_chat:
            said = [{"role": "user", "content": prompt.text}]
            return self._endpoint.chat(
                said, max_tokens=self._most, stop=prompt.stops, temperature=0.0, seed=self._seed
            )
        return self._endpoint.complete(
            prompt.text, max_tokens=self._most, stop=prompt.stops, temperature=0.0, seed=self._seed
        )
