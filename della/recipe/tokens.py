"""What a recipe says of the tokenizer of the result: whose it is, and where single rows come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from della.errors import Collector, Location, clip, suggest
from della.merging.registry import Parameter
from della.recipe.references import named_model
from della.recipe.settings import read_value
from della.recipe.tree import Leaf, Node, Table, show

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_TOKEN_KEYS = ("source", "force")
_KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}
_PAD = Parameter("pad_to_multiple_of", "shared", int, 1, "", low=1, high=1 << 20)
_FORCE = Parameter("force", "shared", bool, False, "")
_TOKEN_ID = Parameter("token_id", "shared", int, None, "", low=0, high=1 << 31)


@dataclass(frozen=True)
class Row:
    """Where the row of one token comes from in a model that lacks it, or, with ``force``, in every model.

    ``kind`` is "zero"; "token": that token (``token`` or ``token_id``) of ``model``; or "", where the recipe
    only names the token, so that the result has it.
    """

    kind: str
    location: Location = field(compare=False, repr=False)
    model: str = ""
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """``source`` is "base", "union" or a model; ``key`` is where it was written."""

    source: str
    rows: Mapping[str, Row]
    pad: int
    key: str
    location: Location = field(compare=False, repr=False)


def read_tokenizer(root: Table, problems: Collector) -> Tokenizer | None:
    """The tokenizer that a recipe asks for; None where it does not."""
    nodes = {
        key: root.entries[key].node for key in ("tokenizer_source", "tokenizer") if not _absent(root, key)
    }
    if len(nodes) == 2:
        at = root.entries["tokenizer"].key
        said, fix = (
            "'tokenizer' and 'tokenizer_source' say the same",
            "keep 'tokenizer' alone, with its 'source'",
        )
        problems.add(said, fix, location=at, parameter="tokenizer")
        return None
    read = _Reader(problems)
    for key, node in nodes.items():
        if key == "tokenizer_source":
            source = read.named(node, f"'{key}'", key)
            return Tokenizer(source, {}, 1, key, node.location) if source else None
        if isinstance(node, Table):
            return read.table(node)
        said = f"'tokenizer' must be a mapping with 'source', found {show(node)}"
        fix = "write 'tokenizer: {source: union}', or 'tokenizer_source: base'"
        problems.add(said, fix, location=node.location, parameter=key)
    return None


def _absent(table: Table, key: str) -> bool:
    if key not in table.entries:
        return True
    node = table.entries[key].node
    return isinstance(node, Leaf) and node.value is None


class _Reader:
    """Reads the mapping ``tokenizer``; what is wrong goes to ``problems``."""

    def __init__(self, problems: Collector) -> None:
        self.problems = problems

    def tell(self, node: Node | Location, key: str, said: str, fix: str | None = None) -> None:
        at = node if isinstance(node, Location) else node.location
        self.problems.add(said, fix, location=at, parameter=key)

    def named(self, node: Node, subject: str, key: str) -> str:
        """A model as text, "base" or "union"; "" after telling what is wrong."""
        leaf = named_model(node, subject, lambda at, said, fix: self.tell(at, key, said, fix))
        return leaf.text if leaf else ""

    def table(self, table: Table) -> Tokenizer:
        self.strange(table, _KEYS, "in 'tokenizer'")
        source = "union"
        if not _absent(table, "source"):
            source = self.named(table.entries["source"].node, "'source' of 'tokenizer'", "tokenizer")
        rows: dict[str, Row] = {}
        if not _absent(table, "tokens"):
            node = table.entries["tokens"].node
            if isinstance(node, Table):
                found = {token: self.row(token, entry.node) for token, entry in node.entries.items()}
                rows = {token: row for token, row in found.items() if row}
            else:
                said = f"'tokens' must map tokens to where their rows come from, found {show(node)}"
                self.tell(node, "tokens", said, "write 'tokens: {\"<|im_end|>\": {source: MODEL}}'")
        pad = self.value(table, _PAD, "'pad_to_multiple_of'")
        return Tokenizer(source or "union", rows, pad or 1, "tokenizer", table.location)

    def strange(self, table: Table, known: tuple[str, ...], where: str) -> None:
        for key, entry in table.entries.items():
            if key not in known:
                fix = suggest(key, known) or f"there is {', '.join(known)}"
                self.tell(entry.key, key, f"unknown key {clip(key)!r} {where}", fix)

    def value(self, table: Table, parameter: Parameter, subject: str) -> Any:
        if _absent(table, parameter.name):
            return None
        node = table.entries[parameter.name].node
        if isinstance(node, Leaf):
            return read_value(parameter, node, subject, self.problems)
        self.tell(node, parameter.name, f"{subject} must be a single value, found {show(node)}")
        return None

    def row(self, token: str, node: Node) -> Row | None:
        of = f"of token {clip(token)!r}"
        if isinstance(node, Leaf) and node.value is None:
            return Row("", node.location)
        if not isinstance(node, Table):
            fix = "write {source: MODEL}, {source: {kind: zero}} or {} to have it in the result"
            self.tell(node, "tokens", f"what is said {of} must be a mapping, found {show(node)}", fix)
            return None
        self.strange(node, _TOKEN_KEYS, of)
        force = bool(self.value(node, _FORCE, f"'force' {of}"))
        if _absent(node, "source"):
            if force:
                fix = "add 'source: MODEL' or 'source: {kind: zero}', or remove 'force'"
                self.tell(
                    node, "force", f"'force' {of} replaces its row everywhere, and needs a 'source'", fix
                )
            return Row("", node.location)
        return self.source(token, node.entries["source"].node, f"'source' {of}", force)

    def source(self, token: str, node: Node, subject: str, force: bool) -> Row | None:
        if not isinstance(node, Table) or "kind" not in node.entries:
            model = self.named(node, subject, "tokens")
            return Row("token", node.location, model, token, None, force) if model else None
        leaf = node.entries["kind"].node
        kind = leaf.text if isinstance(leaf, Leaf) else ""
        if kind not in _KINDS:
            fix = suggest(kind, _KINDS) or f"there is {', '.join(_KINDS)}; a model is written 'source: MODEL'"
            self.tell(leaf, "kind", f"unknown kind {clip(kind)!r} in {subject}", fix)
            return None
        self.strange(node, _KINDS[kind], f"in {subject}")
        if kind == "zero":
            return Row("zero", node.location, force=force)
        given = [key for key in ("token", "token_id") if not _absent(node, key)]
        if len(given) != 1 or _absent(node, "model"):
            said = f"{subject} of kind model_token needs 'model', and one of 'token' and 'token_id'"
            fix = "write {kind: model_token, model: MODEL, token: TOKEN}"
            self.tell(node, "kind", said, fix)
            return None
        model = self.named(node.entries["model"].node, f"'model' in {subject}", "model")
        if given == ["token"]:
            at = node.entries["token"].node
            if not isinstance(at, Leaf):
                self.tell(at, "token", f"'token' in {subject} must be text, found {show(at)}")
                return None
            return Row("token", node.location, model, at.text, None, force) if model else None
        number = self.value(node, _TOKEN_ID, f"'token_id' in {subject}")
        return (
            Row("token", node.location, model, None, number, force) if model and number is not None else None
        )
