"""The tokenizer of a model's folder, by the tokenizers library: texts to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from della.errors import DellaError, Problem


class Encoding(Protocol):
    """What the tokenizers library returns for one text."""

    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """The part of ``tokenizers.Tokenizer`` used here."""

    def encode(self, sequence: str) -> Encoding: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_to_id(self, token: str) -> int | None: ...


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, from its tokenizer.json; DellaError without the extra demo."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise DellaError(
            Problem("the demo needs the package tokenizers", "pip install '.[demo]' in della's checkout")
        ) from error
    loaded = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    loaded.no_truncation()  # a setting of the training that saved the file; transformers drops it too
    loaded.no_padding()
    found: Tokenizer = loaded
    return found
