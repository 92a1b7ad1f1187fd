"""How a recipe names a model: as text, or as one of mergekit's mappings of path, revision and adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from della.errors import clip, distinct, suggest
from della.recipe.tree import Leaf, Node, Table, show

_WEIGHT_FILES = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf)$", re.IGNORECASE)
_HUB_REVISION = re.compile(r"@refs/[\w./-]+$")
_KEYS = ("model", "path", "revision", "lora", "override_architecture")
Tell = Callable[[Node, str, str | None], None]


def named_model(node: Node, subject: str, tell: Tell) -> Leaf | None:
    """The model as text, ``path@revision`` where a mapping has both; None after telling what is wrong.

    mergekit writes {path: X, revision: R}, {model: X, lora: Y}, and one in the other.
    """
    if isinstance(node, Leaf) and node.text.strip():
        return node
    if not isinstance(node, Table):
        tell(
            node,
            f"{subject} must be text, found {'empty text' if isinstance(node, Leaf) else show(node)}",
            None,
        )
        return None
    found = {key: entry.node for key, entry in node.entries.items() if not _is_null(entry.node)}
    for key in node.entries:
        if key not in _KEYS:
            tell(node.entries[key].node, f"unknown key {clip(key)!r} in {subject}", suggest(key, _KEYS))
            return None
    if "lora" in found:
        said = f"{subject} names a LoRA adapter ('lora'), which is not part of this version yet"
        tell(found["lora"], said, "merge the adapter into its base first")
        return None
    if "override_architecture" in found:
        said = f"'override_architecture' of {subject} cannot be followed"
        fix = "remove it: names and shapes of tensors are those in the files"
        tell(found["override_architecture"], said, fix)
        return None
    homes = [key for key in ("path", "model") if key in found]
    if len(homes) != 1:
        tell(node, f"{subject} is a mapping that needs one of 'path' and 'model'", "write the model as text")
        return None
    inner = named_model(found[homes[0]], subject, tell)
    revision = found.get("revision")
    if inner is None or revision is None:
        return inner
    if not isinstance(revision, Leaf):
        tell(revision, f"the revision of {subject} must be text, found {show(revision)}", None)
        return None
    return replace(inner, text=f"{inner.text}@{revision.text}", value=f"{inner.text}@{revision.text}")


def _is_null(node: Node) -> bool:
    return isinstance(node, Leaf) and node.value is None


def same(a: str, b: str) -> bool:
    """Whether two references are the same text but for a last slash."""
    return a.rstrip("/\\") == b.rstrip("/\\")


def identities(references: Iterable[str]) -> list[str]:
    """Each reference's last component, without revision; equal ones are made distinct."""
    names = []
    for reference in references:
        whole = _HUB_REVISION.sub("", reference).rstrip("/\\")
        last = re.split(r"[/\\]", whole)[-1]
        names.append(_WEIGHT_FILES.sub("", last.split("@")[0]) or reference)
    return distinct(names)
