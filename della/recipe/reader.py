"""Recipes: YAML or Python objects to a Recipe.  Strict: every mistake is told, with its line and what to do.

The dialect is the one that mergekit's users write.  A setting may be a scalar, a gradient over the layers, or
cases by tensor name (recipe_settings.py); a model's own setting goes before the recipe's, and that before the
default.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from della.dtypes import RECIPE_NAMES, DType
from della.errors import Collector, Location, RecipeError, clip, suggest
from della.merging.random import DEFAULT_SEED
from della.merging.registry import ALL_PARAMETERS, METHODS, Method, Parameter
from della.recipe import dialect
from della.recipe.models import ModelEntry, Part, Recipe
from della.recipe.overrides import apply_overrides
from della.recipe.references import identities, named_model, same
from della.recipe.remarks import told_twice, without_effect
from della.recipe.settings import Setting, read_setting, read_value
from della.recipe.slices import check_lengths, is_parted, joined, layer_range, pieces
from della.recipe.templates import read_template
from della.recipe.text import dump, load_text, parse
from della.recipe.tokens import read_tokenizer
from della.recipe.tree import Items, Leaf, Node, Table, example, from_objects, refusal, show

__all__ = ["DEFAULT_SEED", "ModelEntry", "Recipe", "read_recipe"]

_TOP_KEYS = (
    "models", "base_model", "merge_method", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "name", "seed", "compat", "nonfinite", "plain_fp8", "missing", "extra", "mismatch", "slices", "modules",
    "tokenizer", "chat_template",
)  # fmt: skip
_MODEL_KEYS = ("model", "parameters", "input_norms")
_BESIDE = "names a file of one model, so it belongs beside 'model:' in an entry of 'models'"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def read_recipe(
    source: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), check: bool = True,
    lenient: bool = False,
) -> Recipe:  # fmt: skip
    """Read a recipe: a path, YAML text (a str with a line break in it), or the same as Python objects.

    ``overrides`` are ``KEY=VALUE``: KEY is a dotted path into the recipe (``models.0.parameters.weight``), or
    the bare name of a parameter, which then has this value for every model; VALUE is YAML.

    ``check=False`` leaves the rules that join several parameters to `planning.make_plan`, which tells of them
    together with what is wrong about the models.  ``lenient`` ignores keys that are not known, with a note.

    Raises RecipeError, which lists everything that is wrong, each with ``file:line:column``.
    """
    problems = Collector(RecipeError)
    path, text, name = None, None, "recipe"
    if isinstance(source, Mapping):
        root = from_objects(source)
    else:
        path, name, text = load_text(source)
        root = parse(text, name, problems)
    if isinstance(overrides, str):
        overrides = (overrides,)
    recipe = read_tree(root, path, None if overrides else text, problems, overrides, lenient)
    if check:
        recipe.check_count()
        recipe.check_at_once()
    return recipe


def read_tree(
    root: Node, path: Path | None, text: str | None, problems: Collector, overrides: Sequence[str],
    lenient: bool,
) -> Recipe:  # fmt: skip
    """The Recipe of one document; where ``text`` is None it is made from ``root``.  Raises RecipeError."""
    if not isinstance(root, Table):
        raise refusal(root.location, *dialect.no_mapping(root))
    notes = apply_overrides(root, overrides, _TOP_KEYS, problems)
    return _Reader(problems, notes, lenient).recipe(root, path, text)


class _Reader:
    """Walks the tree of one recipe: what is wrong goes to ``problems``, what deserves a word to ``notes``."""

    def __init__(
        self, problems: Collector, notes: list[str], lenient: bool, of: str = "", is_cut: bool = False
    ) -> None:
        self.problems, self.notes, self.lenient = problems, notes, lenient
        self.of, self.is_cut = of, is_cut  # the part, as " of slice 2"; whether its models give layers
        self.ignored: list[tuple[Table, str]] = []
        self.base_layers: tuple[int, int] | None = None
        self.method: type[Method] | None = None
        self.known: Mapping[str, Parameter] = {}
        self.folder = Path()  # where relative references start
        self.bases = 0
        self.ranges: list[tuple[str, tuple[int, int] | None, Location]] = []
        self.unused: dict[str, list[Location]] = {}

    def recipe(self, root: Table, path: Path | None, text: str | None) -> Recipe:
        """The Recipe in ``root``; ``text`` is its YAML, None where that must be made from ``root``."""
        if found := dialect.other_tool(root):
            raise refusal(root.location, *found)
        self.folder = path.parent if path else self.folder
        self._refuse_strange_keys(root, _TOP_KEYS, "at the top level", "")
        if is_parted(root):
            return self._parted(root, path, dump(root) if text is None else text)
        tokenizer, template = read_tokenizer(root, self.problems), read_template(root, self.problems)
        self._method(root)
        base = self._named(root, "base_model", "'base_model'")
        if base is not None:
            self._reference(base, "base_model", "'base_model'")
        shared = self._parameters(root, None)
        models = self._models(root, base.text if base else None)
        dtypes = [self._dtype(root, key) for key in ("dtype", "out_dtype")]
        seed, compat = self._value(root, dialect.SEED), self._value(root, dialect.COMPAT)
        policies = {name: self._value(root, row) or row.default for name, row in dialect.POLICIES.items()}
        name = self._text(root, "name", "'name'")
        location = (
            root.entries["merge_method"].node.location if "merge_method" in root.entries else root.location
        )
        if self.method is not None and self.method.needs_base and base is None:
            self._missing(root, "base_model", location, f"merge_method {self.method.name} needs a base_model")
        if self.method is not None and not self.method.needs_base and policies["missing"] == "base":
            said = f"'missing: base' has no meaning: merge_method {self.method.name} has no base"
            at = root.entries["missing"].key
            self._tell(at, "missing", said, "remove it")
        self.problems.raise_any()
        assert self.method is not None
        self.notes += without_effect(self.method, self.unused, base, models)
        self._drop_ignored()
        return Recipe(
            path=path,
            text=dump(root) if text is None or self.ignored else text,
            name=name.text if name else None,
            base_model=base.text if base else None,
            models=models,
            merge_method=self.method.name,
            method=self.method,
            parameters=shared,
            dtype=dtypes[0],
            out_dtype=dtypes[1],
            seed=DEFAULT_SEED if seed is None else int(seed),
            compat=compat is not None,
            plain_fp8=bool(self._value(root, dialect.PLAIN_FP8)),
            tokenizer=tokenizer,
            chat_template=template,
            **policies,
            notes=tuple(self.notes),
            location=location,
        )

    def _parted(self, root: Table, path: Path | None, text: str) -> Recipe:
        """The Recipe of slices or modules, each of which is read as a recipe of its own."""
        parts = []
        self._drop_ignored()
        for table, label, module, at, is_cut in pieces(root, self._tell, self._refuse_strange_keys):
            reader = _Reader(Collector(RecipeError), [], self.lenient, f" of {label}", is_cut)
            with self.problems:
                made = reader.recipe(table, path, text)
                parts.append(Part(label, made, module, is_cut, reader.base_layers, at))
            self.ignored += reader.ignored
        self._drop_ignored()
        text = dump(root) if self.ignored else text
        name, base = self._text(root, "name", "'name'"), self._entry(root, "base_model")
        self.problems.raise_any()
        top = named_model(base, "'base_model'", lambda *_: None) if base else None
        return joined(parts, top.text if top else None, name.text if name else None, text, self.notes)

    def _drop_ignored(self) -> None:
        for table, key in self.ignored:
            table.entries.pop(key, None)

    def _refuse_strange_keys(self, table: Table, allowed: Sequence[str], where: str, owner: str) -> None:
        """Tell of every key that may not stand in ``table``; ``owner`` is "model 2", or "" for the recipe."""
        misplaced: dict[str, dict[str, Node]] = {"model": {}, "shared": {}}
        for key, entry in table.entries.items():
            if key in allowed or self._has_no_effect(key, entry.key):
                continue
            if key in ALL_PARAMETERS:
                misplaced[ALL_PARAMETERS[key].scope if owner else "shared"][key] = entry.node
            elif key in _TOP_KEYS:
                said = f"{key!r} belongs at the top level of the recipe, not {where}"
                self._tell(entry.key, key, said)
            elif key == "input_norms":
                self._tell(entry.key, key, f"{key!r} {_BESIDE}")
            else:
                self._unknown(table, key, where, (*allowed, *ALL_PARAMETERS))
        for scope, nodes in misplaced.items():
            self._belongs(table, nodes, owner if scope == "model" else "", "")

    def _belongs(self, table: Table, nodes: Mapping[str, Node], owner: str, why: str) -> None:
        if not nodes:
            return
        names = ", ".join(repr(key) for key in nodes)
        verb = "belongs" if len(nodes) == 1 else "belong"
        target = f"the parameters of {owner}" if owner else "the recipe's own parameters"
        lines = "".join(f"\n        {key}: {example(node)}" for key, node in nodes.items())
        key = next(iter(nodes))
        said = f"{names} {verb} under {target}{why}:\n      parameters:{lines}"
        self._tell(table.entries[key].key, key, said)

    def _has_no_effect(self, key: str, location: Location) -> bool:
        """Whether it is a key of mergekit's that changes nothing here; a note says why."""
        if key in dialect.WITHOUT_EFFECT:
            self.notes.append(f"{location}: {key!r} has no effect here: {dialect.reason(key)}")
        return key in dialect.WITHOUT_EFFECT

    def _unknown(self, table: Table, key: str, where: str, known: Iterable[str]) -> None:
        said, hint = f"unknown key {clip(key)!r} {where}", dialect.RENAMED.get(key) or suggest(key, known)
        if not self.lenient or key in dialect.RENAMED:
            self._tell(table.entries[key].key, key, said, hint)
            return
        self.ignored.append((table, key))
        self.notes.append(f"{table.entries[key].key}: {said}, ignored{f'; {hint}' if hint else ''}")

    def _tell(self, location: Location, key: str, said: str, fix: str | None = None) -> None:
        self.problems.add(said, fix, location=location, parameter=key)

    def _entry(self, table: Table, key: str) -> Node | None:
        """The node of a key; None where it is absent or has no value."""
        node = table.entries[key].node if key in table.entries else None
        return None if isinstance(node, Leaf) and node.value is None else node

    def _text(self, table: Table, key: str, subject: str) -> Leaf | None:
        node = self._entry(table, key)
        if node is None:
            return None
        if isinstance(node, Leaf) and node.text.strip():
            return node
        found = "empty text" if isinstance(node, Leaf) else show(node)
        said = f"{subject} must be text, found {found}"
        self._tell(node.location, key, said)
        return None

    def _named(self, table: Table, key: str, subject: str) -> Leaf | None:
        """A model as text; None where there is none, or after telling what is wrong."""
        node = self._entry(table, key)
        told = lambda at, said, fix: self._tell(at.location, key, said, fix)  # noqa: E731
        return None if node is None else named_model(node, subject, told)

    def _value(self, root: Table, parameter: Parameter) -> Any:
        node = self._entry(root, parameter.name)
        if node is None:
            return None
        if isinstance(node, Leaf):
            return read_value(parameter, node, repr(parameter.name), self.problems)
        said = f"{parameter.name!r} must be a single value, found {show(node)}"
        self._tell(node.location, parameter.name, said)
        return None

    def _missing(self, table: Table, key: str, location: Location, said: str, fix: str | None = None) -> None:
        """Tell that ``key`` is missing, unless a fault or a misspelling of it is told already."""
        strange = [k for k in table.entries if k not in _TOP_KEYS and k not in ALL_PARAMETERS]
        if self._entry(table, key) is None and (self.lenient or not any(suggest(k, (key,)) for k in strange)):
            self._tell(location, key, said, fix)

    def _method(self, root: Table) -> None:
        key, there_is = "merge_method", f"there is {', '.join(METHODS)}"
        self.known = ALL_PARAMETERS
        leaf = self._text(root, key, repr(key))
        if leaf is None:
            self._missing(root, key, root.location, f"{key!r} is missing", there_is)
        elif leaf.text in METHODS:
            self.method = METHODS[leaf.text]
            if self.method.with_base and self._entry(root, "base_model"):
                self.method = self.method.with_base
            self.known = {**ALL_PARAMETERS, **self.method.parameters}
        else:
            hint = suggest(leaf.text, METHODS) or there_is
            self._tell(leaf.location, key, f"unknown {key} {clip(leaf.text)!r}", hint)

    def _dtype(self, root: Table, key: str) -> DType | None:
        leaf = self._text(root, key, repr(key))
        if leaf is None:
            return None
        name = leaf.text.removeprefix("torch.")
        if name not in RECIPE_NAMES:
            hint = suggest(name, RECIPE_NAMES) or f"write one of {', '.join(RECIPE_NAMES)}"
            self._tell(leaf.location, key, f"unknown {key} {clip(leaf.text)!r}", hint)
        return RECIPE_NAMES.get(name)

    def _reference(self, leaf: Leaf, key: str, subject: str) -> None:
        if _CONTROL.search(leaf.text):
            said = f"{subject} holds a tab, line break or control character"
            fix = "in double quotes a backslash begins an escape, so write a path in single quotes or with /"
            self._tell(leaf.location, key, said, fix)
        elif "+" in leaf.text and not self._is_there(leaf.text):
            said = f"{subject} {clip(leaf.text)!r} names a LoRA adapter (base+adapter)"
            fix = "merge the adapter into its base first (or rename the folder)"
            self._tell(leaf.location, key, f"{said}, which is not part of this version yet", fix)

    def _is_there(self, reference: str) -> bool:
        """Whether a file or folder has this name: that goes before any syntax."""
        return any(os.path.lexists(root / reference) for root in (self.folder, Path()))

    def _parameters(self, table: Table, number: int | None, *, counts: bool = True) -> dict[str, Setting]:
        node = self._entry(table, "parameters")
        of = f" of model {number}{self.of}" if number else ""
        if node is None:
            return {}
        if not isinstance(node, Table):
            said = (
                f"'parameters'{of} must be a mapping of settings such as 'density: 0.5', found {show(node)}"
            )
            self._tell(node.location, "parameters", said)
            return {}
        settings: dict[str, Setting] = {}
        misplaced: dict[str, Node] = {}
        for key, entry in node.entries.items():
            parameter = self.known.get(key)
            if parameter is None:
                if key in _TOP_KEYS and key != "parameters":
                    said = f"{key!r} belongs at the top level of the recipe, not in parameters{of}"
                    self._tell(entry.key, key, said)
                elif key == "input_norms":
                    self._tell(entry.key, key, f"{key!r} {_BESIDE}")
                elif not self._has_no_effect(key, entry.key):
                    self._unknown(node, key, f"in parameters{of}", self.known)
            elif number and parameter.scope == "shared":
                misplaced[key] = entry.node
            else:
                setting = read_setting(parameter, entry.node, f"{key!r}{of}", self.problems)
                if self.method is not None and key not in self.method.parameters:
                    if counts:
                        self.unused.setdefault(key, []).append(entry.key)
                elif setting is not None:
                    settings[key] = setting
        self._belongs(node, misplaced, "", f", not under model {number}{self.of}")
        return settings

    def _models(self, root: Table, base: str | None) -> tuple[ModelEntry, ...]:
        node = self._entry(root, "models")
        if node is None:
            location = root.entries["models"].key if "models" in root.entries else root.location
            self._missing(root, "models", location, "the recipe lists no 'models' to merge")
            return ()
        if not isinstance(node, Items) or not node.nodes:
            found = "an empty list" if isinstance(node, Items) else show(node)
            said = f"'models' must be a list of entries that begin with '- model:', found {found}"
            self._tell(node.location, "models", said)
            return ()
        read = [self._model(child, number, base) for number, child in enumerate(node.nodes, 1)]
        experts = [entry for entry in read if entry is not None]
        if self.bases == len(read):
            key = "sources" if self.is_cut else "models"
            fix = "add at least one expert to merge into it"
            self._tell(node.location, key, f"{key!r}{self.of} lists only the base model", fix)
        check_lengths(self.ranges, self._tell)
        names = identities([entry.reference for entry in experts])
        self.notes += told_twice(experts)
        return tuple(replace(entry, identity=name) for entry, name in zip(experts, names, strict=True))

    def _model(self, node: Node, number: int, base: str | None) -> ModelEntry | None:
        """One entry of ``models``; None if it is the base's own, or faulty."""
        owner = f"model {number}{self.of}"
        if not isinstance(node, Table):
            example = f"write '- model: {clip(node.text)}'" if isinstance(node, Leaf) and node.value else None
            said = f"{owner} must be a mapping that begins with 'model:', found {show(node)}"
            self._tell(node.location, "models", said, example)
            return None
        keys = (*_MODEL_KEYS, "layer_range") if self.is_cut else _MODEL_KEYS
        self._refuse_strange_keys(node, keys, f"in {owner}", owner)
        leaf = self._named(node, "model", f"'model' of {owner}")
        is_base = base is not None and leaf is not None and same(leaf.text, base)
        is_base = is_base and self.method is not None and self.method.needs_base
        parameters = self._parameters(node, number, counts=not is_base)
        norms = self._text(node, "input_norms", f"'input_norms' of {owner}")
        if leaf is None:
            said = f"{owner} does not say which model it is"
            self._missing(node, "model", node.location, said, "add 'model: NAME'")
            return None
        self._reference(leaf, "model", f"'model' of {owner}")
        layers = self._layers(node, owner) if self.is_cut else None
        if is_base:
            self.bases += 1
            self.base_layers = layers
            if self.is_cut and self.bases > 1:
                said = f"{owner} is the base model a second time"
                self._tell(leaf.location, "model", said, "name another model, or use merge_method: linear")
            for key, of in (("parameters", "parameters have"), ("input_norms", "input norms have")):
                if self._entry(node, key):
                    said = f"{owner} is the base model itself, so its {of} no effect"
                    self.notes.append(f"{node.entries[key].key}: {said}")
            return None
        file, at = (norms.text, norms.location) if norms else (None, None)
        return ModelEntry(leaf.text, "", parameters, file, node.location, at, layers)

    def _layers(self, node: Table, owner: str) -> tuple[int, int] | None:
        """Which layers a source of a slice gives."""
        self.ranges.append((owner, *layer_range(node, owner, self._tell)))
        return self.ranges[-1][1]
