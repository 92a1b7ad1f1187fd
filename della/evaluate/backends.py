"""What a backend is, which models it is given, and how prompts are put into batches."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import xxhash

from della.checkpoint.sides import HUB_FILES
from della.checkpoint.source import HUB_ID
from della.errors import EvaluationError, Problem
from della.evaluate.templates import Prompt
from della.output.manifest import MANIFEST

# Takes finished answers by the id of their prompts, and returns once they are on the disk.
Keep = Callable[[Mapping[str, str]], None]

BACKENDS = ("hf", "vllm", "openai", "numpy")
DTYPES = ("bfloat16", "float16", "float32")
_FILES = (*HUB_FILES, "*.safetensors", "*.bin")


class Backend(Protocol):
    """A model, ready to answer."""

    def answer(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        """Give every answer to ``keep`` as soon as it is there.  Raises EvaluationError."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be scored: the name that results carry; a folder, a hub id, or what a server calls it."""

    name: str
    reference: str

    @staticmethod
    def of(text: str) -> Model:
        """From ``[NAME=]MODEL``; the name is by default the last component of MODEL."""
        name, equals, reference = text.partition("=")
        if not equals or Path(text).exists():
            reference = text
            name = Path(text).resolve().name if Path(text).is_dir() else text.rstrip("/").rpartition("/")[2]
        if not re.fullmatch(r"[\w@:+-][\w.@:+-]{0,199}", name) or not reference:
            said = "a model needs a plain name for its results: NAME=MODEL"
            raise EvaluationError(Problem(said, subject=repr(text)))
        return Model(name, reference)

    @property
    def identity(self) -> str:
        """What answers depend on: a folder's files (by name, size and time of change, or the seal of its
        della.json), or the reference where there is no such folder.
        """
        folder = Path(self.reference)
        if not folder.is_dir():
            return self.reference
        try:
            manifest = folder / MANIFEST
            sealed = manifest.read_bytes() if manifest.is_file() else b""
            told = [xxhash.xxh3_128_hexdigest(sealed)]
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if any(fnmatchcase(entry.name, pattern) for pattern in _FILES) and entry.is_file():
                    stat = entry.stat()
                    told += [entry.name, str(stat.st_size), "" if sealed else str(stat.st_mtime_ns)]
        except OSError as error:
            raise EvaluationError(
                Problem(f"cannot be read ({error.strerror or error})", subject=str(folder))
            ) from error
        return f"files {xxhash.xxh3_128_hexdigest(chr(0).join(told).encode('utf-8', 'surrogateescape'))}"

    @property
    def local_or_hub(self) -> tuple[str, str | None]:
        """A folder, or a hub id, and its revision; EvaluationError for what can be neither."""
        if Path(self.reference).is_dir():
            return self.reference, None
        match = HUB_ID.fullmatch(self.reference)
        if not match:
            raise EvaluationError(
                Problem("no such folder, and no model of the Hub (owner/name)", subject=self.reference)
            )
        return match["repo"], match["revision"]


def batches(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Positions of prompts in batches of like length, the longest first.

    An evaluation that is resumed has answered the first of these batches whole, so the others are the
    same again, and so is every answer, however often it was cut short.
    """
    order = sorted(range(len(prompts)), key=lambda at: (-len(ids[at]), at))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]
