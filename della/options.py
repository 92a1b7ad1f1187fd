"""Options as values: frozen dataclasses whose fields say what they are for.

An option is declared once, as a field made by `option` (or `argument`).  The command line is derived from
such classes by cli/options.py; anything else that asks a user can read the same with `declared` and make a
value of what it was told with `build`.  Nothing heavy is imported here: ``della --help`` reads this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from della.errors import DellaError, Problem, RecipeError, either

T = TypeVar("T")

TILE = 1 << 18  # elements of a tile: large enough to forget Python's overhead, small enough for the caches


@dataclass(frozen=True)
class Spec:
    """What a field says of itself.

    Args:
        help: One sentence.
        flags: How it is written, by default ``--`` and its name.
        metavar: What stands for its value.
        least: The smallest number allowed.
        shown: Whether help shows the default.
        many: It may be given several times.
        read: Makes the value from text (from a list of texts with ``many``).
        after: The earlier field whose value ``read`` gets too.
        text: The default as text, where there is ``read``.
        bare: What the option alone stands for, where its value may be left out.
        is_argument: It is given by position.

    >>> declared(Target)["overwrite"].help
    'Replace OUT, in one step, when all is done: what della has made, or any model.'
    """

    help: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    least: int | None = None
    shown: bool = True
    many: bool = False
    read: Callable[..., Any] | None = None
    after: str = ""
    text: str | None = None
    bare: str | None = None
    is_argument: bool = False


def option(help_: str, default: Any = MISSING, *flags: str, **more: Any) -> Any:
    """A field of a dataclass that is an option; without ``default`` it is required.

    Args:
        help_: one sentence on what it is for.
        default: the value where it is not given; a mapping or list is made by its type, such as ``dict``.
        flags: how it is written, such as "--quiet", "-q"; by default "--" and the name of the field.  A flag
            of a field that is True by default says no: ``fsync`` is "--no-fsync".
        more: further fields of `Spec`.

    Returns:
        What `dataclasses.field` returns.
    """
    return _field(Spec(help_, flags, **more), default)


def argument(help_: str, default: Any = MISSING, **more: Any) -> Any:
    """As `option`, for what a command line takes by position."""
    return _field(Spec(help_, is_argument=True, shown=False, **more), default)


def _field(spec: Spec, default: Any) -> Any:
    metadata = {"option": spec}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(cls: type[Any]) -> dict[str, Spec]:
    """The options of a class by the names of their fields; fields that are no options are left out."""
    return {each.name: each.metadata["option"] for each in fields(cls) if "option" in each.metadata}


def build(cls: type[T], given: Mapping[str, Any]) -> T:
    """A value of ``cls`` from what a user gave: texts are read; None and no texts mean the default.

    Args:
        cls: a class of options.
        given: by name of field; names that are no options of ``cls`` are ignored.

    Returns:
        The value.

    Raises:
        DellaError: a text says nothing that can be used.
    """
    values: dict[str, Any] = {}
    for name, spec in declared(cls).items():
        value = given.get(name)
        if value is None or (spec.many and not value):
            continue
        if spec.read is not None:
            value = spec.read(value, values[spec.after]) if spec.after else spec.read(value)
        values[name] = tuple(value) if spec.many and isinstance(value, list) else value
    return cls(**values)


# ---- how messages name options ----------------------------------------------------------------------------


def spelt(cls: type[Any], name: str, value: bool | str | None = None) -> str:
    """An option as its user writes it, such as ``--allow-idle``, in Python ``allow_idle=True``.

    Args:
        cls: The class that declares it.
        name: The name of its field, which is that of the argument in Python too.
        value: What it shall be; a word in capitals stands for a value.  None: the option alone.

    >>> spelt(Target, "overwrite", "any")
    'overwrite="any"'
    >>> from della.errors import command_line
    >>> with command_line():
    ...     spelt(Target, "overwrite", "any"), spelt(Checks, "base_dir", "FOLDER"), spelt(Execution, "finish")
    ('--overwrite=any', '--from FOLDER', '--finish')
    """
    spec = declared(cls)[name]
    literal = value if value is True or str(value).isupper() else f'"{value}"'
    python = name if value is None else f"{name}={literal}"
    if value is True:
        value = spec.metavar if spec.read and not spec.bare else None
    between = "=" if spec.bare else " "
    return either(written(name, spec)[0] + (f"{between}{value}" if value else ""), python)


def written(name: str, spec: Spec) -> tuple[str, ...]:
    """How an option is written on the command line."""
    return spec.flags or ("--" + name.replace("_", "-"),)


# ---- how values are written -------------------------------------------------------------------------------

_WORDS = (("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12))
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def refused(
    kind: type[DellaError], name: str, value: object, said: str, fix: str | None = None
) -> DellaError:
    """The error that the option or argument ``name`` cannot be ``value``."""
    parameter = name.lstrip("-").replace("-", "_")
    return kind(Problem(said, fix, f"{name} {value}", parameter=parameter))


def size_of(text: str, name: str = "--shard-size") -> int:
    """Bytes from ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        RecipeError: it is none, or less than one byte; ``name`` is what the error calls it.
    """
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+) *([kmg]?i?)b? *", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS.get(match[2].lower(), 0)) if match and len(match[1]) < 20 else 0
    if size < 1:
        raise refused(RecipeError, name, text, "expected a size such as 5GB or 500MB")
    return size


def size_text(count: int) -> str:
    """Bytes in words, with three digits: 38 bytes, 37.8 kB, 5.34 GB."""
    if count < 1000:
        return f"{count} byte{'s' * (count != 1)}"
    unit, size = next((pair for pair in _WORDS if count < 999.5 * pair[1]), _WORDS[-1])
    value = count / size
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def percent_of(text: str) -> float:
    """A share above 0 and up to 1 from ``5%``.  Raises RecipeError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise refused(
            RecipeError, "--sources", text, "expected a percentage above 0 and up to 100%, such as 5%"
        )
    return float(match[1]) / 100


def overwriting(text: str) -> bool | str:
    """What may be replaced: "any" model, or (True) what della has made.  Raises RecipeError."""
    if text not in ("any", "della"):
        raise RecipeError(f"--overwrite={text}: write --overwrite, or --overwrite=any")
    return text if text == "any" else True


def is_mergekit(text: str) -> bool:
    """Whether other rules than ours are asked for.  Raises RecipeError for rules that are not known."""
    if text != "mergekit":
        said = "the only other rules known are mergekit's"
        raise refused(RecipeError, "--compat", text, said, "give --compat mergekit")
    return True


@dataclass(frozen=True)
class Share:
    """One of equal shares of a merge.

    Args:
        number: Which, from 1.
        count: Of how many.

    Raises:
        RecipeError: there is no such share.

    >>> Share.parse("2/7")
    Share(number=2, count=7)
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            said = f"expected {either('i/n', '(i, n)')} with 1 <= i <= n, such as {either('2/7', '(2, 7)')}"
            raise refused(RecipeError, spelt(Execution, "part"), self, said)

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    @staticmethod
    def parse(text: str) -> Share:
        """From ``I/N``, such as 2/7.  Raises RecipeError."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not match:
            raise refused(RecipeError, "--part", text, "expected I/N, such as 2/7")
        return Share(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


# ---- the options of a merge -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """What the caller changes in a recipe.

    >>> Changes(overrides=("lambda=0.8",))
    Changes(seed=None, overrides=('lambda=0.8',), compat=False, lenient=False)
    """

    seed: int | None = option("Seed of the random draws, instead of the recipe's.", None)
    overrides: tuple[str, ...] = option(
        "Change the recipe: lambda=0.8, models.0.parameters.weight=1.", (), "--set", metavar="KEY=VALUE",
        many=True,
    )  # fmt: skip
    compat: bool = option(
        "Follow mergekit's rules where they differ.", False, metavar="mergekit", read=is_mergekit
    )
    lenient: bool = option("Ignore keys of the recipe that are not known, with a note.", False)


@dataclass(frozen=True)
class Target:
    """Where a result shall go, and whether it may replace what is there.

    >>> Target(Path("out.safetensors")).is_single
    True
    """

    out: Path = argument("Where to: a folder, or a .safetensors file.", metavar="OUT")
    overwrite: bool | str = option(
        "Replace OUT, in one step, when all is done: what della has made, or any model.", False,
        metavar="[any]", read=overwriting, bare="della",
    )  # fmt: skip
    record_paths: bool = option("Keep absolute paths of models in della.json and README.md.", False)

    @property
    def is_single(self) -> bool:
        """Whether it is one file."""
        return self.out.suffix == ".safetensors"


@dataclass(frozen=True)
class Permissions:
    """What only the caller, and never a recipe, may allow.

    >>> Permissions(allow_pickle=True)
    Permissions(allow_pickle=True, keep_auto_map=False, allow_idle=False)
    """

    allow_pickle: bool = option("Read .bin and .pt models too, by torch, as weights only.", False)
    keep_auto_map: bool = option("Keep what config.json says of code of its own.", False)
    allow_idle: bool = option("Merge although a model takes no part, or changes nothing.", False)


@dataclass(frozen=True)
class Execution:
    """How a plan is executed; none of this changes a byte of the weights.

    Args:
        tile: Elements that are worked on at a time.

    Raises:
        RecipeError: it cannot be executed so.

    >>> Execution(threads=2).workers
    2
    """

    threads: int | None = option(
        "Threads; the result does not depend on it. [default: all processors]", None, least=1
    )
    shard_bytes: int = option(
        "Most bytes of weights in one file.", 5_000_000_000, "--shard-size", metavar="SIZE", read=size_of,
        text="5GB",
    )  # fmt: skip
    part: Share = option(
        "Compute only the I-th of N shares of the files.", Share(), metavar="I/N", read=Share.parse
    )
    finish: bool = option("Check what all parts have computed, and make OUT of it.", False)
    fsync: bool = option("Do not wait until OUT is safe on the disk.", True, "--no-fsync")
    tile: int = TILE
    keep_intermediates: bool = option("Keep the results of a recipe's other documents, beside OUT.", False)

    def __post_init__(self) -> None:
        for name in ("threads", "tile", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise refused(RecipeError, name, value, "expected a whole number from 1 up")
        if self.finish and not self.part.is_whole:
            said = f"{spelt(Execution, 'finish')} puts all parts together"
            raise RecipeError(Problem(said, f"leave out {spelt(Execution, 'part')}"))

    @property
    def workers(self) -> int:
        """How many threads there are."""
        return self.threads or default_threads()


@dataclass(frozen=True)
class Checks:
    """What of a merged model is checked beside its own bytes.

    Raises:
        RecipeError: it cannot be checked so.

    >>> Checks(inputs=True)
    Checks(sources=None, inputs=True, strict=False, base_dir=None)
    """

    sources: float | None = option(
        "Compute K% of the tensors from the sources again, chosen at random. [without a value: 5%]", None,
        metavar="[K%]", read=percent_of, bare="5%",
    )  # fmt: skip
    inputs: bool = option("Check that the inputs are still what was merged.", False)
    strict: bool = option("A model card that was edited is a fault too.", False)
    base_dir: Path | None = option(
        "Where relative paths of the recipe start. "
        "[default: the working directory, or the nearest folder above OUT that holds them all]", None,
        "--from", metavar="FOLDER",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.sources is not None and not 0 < self.sources <= 1:
            said = "expected a share above 0 and at most 1 (100%)"
            raise refused(RecipeError, "sources", self.sources, said)


def default_threads() -> int:
    """As many threads as this process may use processors."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
