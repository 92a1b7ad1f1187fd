"""Rows follow tokens: each model's tables of the vocabulary, gathered in the order of the result's tokenizer.

The rule for a token that a model lacks is mergekit's: its only owner's row, else the base's, else the mean of
the owners'.  What a recipe says of a token (``tokens:``) goes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from della.checkpoint.rows import ZERO, RowMap, Rows
from della.checkpoint.source import Source, open_source
from della.checkpoint.view import TensorView
from della.checkpoint.vocabulary import Read, Vocabulary
from della.dtypes import Array
from della.errors import CheckpointError, Collector, Problem, RecipeError, clip, suggest
from della.planning.heads import HEAD, embeddings_of
from della.planning.retokenized import other_files, with_added
from della.planning.row_maps import placed, row_map
from della.planning.tables import Known, resized, rows_of, sideways, tables, unequal
from della.recipe.models import Recipe
from della.recipe.references import same
from della.recipe.tokens import Row, Tokenizer

CURE = (
    "put its tokenizer.json beside it: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of "
    "transformers makes one of a tokenizer.model"
)


@dataclass
class _Wanted:
    """The tokenizer of the result: its tokens by id, the new ones, and how many rows it takes.

    ``found`` has the row of each model for each number, -1 where it has none; ``owned`` says for which ids
    there is a row at all.
    """

    tokens: dict[int, str]
    rows: int
    new: list[dict[str, Any]] = field(default_factory=list)
    found: Array = field(default_factory=lambda: np.empty(0))
    owned: Array = field(default_factory=lambda: np.empty(0))


_FIXED = "new tokens have ids by model and id (mergekit: another order in each run)"
_LEFT_OUT = "ordinary tokens of other models are left out (mergekit: rows for them, as literal text)"
_PADDED = "rows without a token are kept, and merged by their number (mergekit: cut)"


def follow_tokens(
    recipe: Recipe,
    template: str,
    opened: dict[str, Source],
    check: Collector,
    read: Read,
) -> tuple[list[str], list[str]]:
    """Makes of each model in ``opened`` one whose rows follow the tokens of the recipe's tokenizer; notes,
    and what mergekit does otherwise.

    Raises RecipeError or CheckpointError with all that is in ``check``.
    """
    if template not in opened:
        return [], []
    if recipe.tokenizer is None:
        found = list(unequal(opened[template], opened.values(), read))
        check.extend(found)
        if found:
            check.raise_any()
        return [], []
    with check:
        made = _Follower(recipe, recipe.tokenizer, template, opened, read)
        return made.all(), made.departures
    check.raise_any()  # what follows would be told of rows that do not stand where they shall
    return [], []


class _Follower:
    """The row maps of one merge."""

    def __init__(
        self,
        recipe: Recipe,
        choice: Tokenizer,
        template: str,
        opened: dict[str, Source],
        read: Read,
    ) -> None:
        self.read = read
        self.recipe, self.choice, self.opened, self.template = recipe, choice, opened, template
        self.base = opened[template]
        self.names = list(opened)
        self.tables = tables(self.base)
        self.notes: list[str] = []
        self.departures: list[str] = []
        self.known: list[Known] = []
        self.anchor = next((k for k, n in enumerate(self.names) if n == recipe.base_model), None)

    def all(self) -> list[str]:
        plain = self.choice.source == "base" and not self.choice.rows and self.choice.pad == 1
        if not self.tables:
            if plain:
                return []
            raise self.refused("no model here has embeddings by which tokens could be told", "remove it")
        if not self._comparable():
            return []  # shapes differ otherwise: that is told of them
        ours = self.read(self.base.folder)
        sizes = {rows_of(source, self.tables) for source in self.opened.values()}
        if not ours.tokens:
            if plain and len(sizes) == 1:
                return []
            raise CheckpointError(Problem("has no tokenizer that can be read", CURE, self.base.reference))
        self.known = [self._known(source, ours) for source in self.opened.values()]
        folder = self._folder()
        wanted = self._wanted(folder)
        self._check_rows(wanted)
        self._gather(wanted, folder)
        return self.notes

    def refused(self, said: str, fix: str) -> RecipeError:
        about = Problem(said, fix, location=self.choice.location, parameter=self.choice.key)
        return RecipeError(about)

    # ---- the vocabularies ----

    def _comparable(self) -> bool:
        """Whether tables differ in their rows alone, of which a model has one number.

        Raises CheckpointError.
        """
        for source in self.opened.values():
            found = {name: source.tensors[name].shape for name in self.tables if name in source.tensors}
            for name, shape in found.items():
                ours, axis = self.base.tensors[name].shape, self.tables[name]
                if (
                    len(shape) != len(ours)
                    or shape[:axis] + shape[axis + 1 :] != ours[:axis] + ours[axis + 1 :]
                ):
                    return False
            counts = {shape[self.tables[name]]: name for name, shape in found.items()}
            if len(counts) > 1:
                (a, one), (b, other) = list(counts.items())[:2]
                said = f"{one} has {a} rows, and {other} has {b}: which tokens have both is not known"
                fix = "save it with as many (resize_token_embeddings of transformers)"
                raise CheckpointError(Problem(said, fix, source.reference, one))
        return True

    def _known(self, source: Source, ours: Vocabulary) -> Known:
        rows = rows_of(source, self.tables) or 0
        if source.folder == self.base.folder:
            return Known(source, ours, rows)
        theirs = self.read(source.folder)
        if not theirs.tokens:
            here = rows_of(self.base, self.tables)
            if rows != here:
                said = f"has no tokenizer that can be read, and {rows} rows against {here}"
                raise CheckpointError(Problem(said, CURE, source.reference))
            said = f"has no tokenizer that can be read; its rows are taken as those of {self.template}'s"
            self.notes.append(f"{source.reference}: {said}")
        known = Known(source, theirs if theirs.tokens else ours, rows)
        if theirs.moved:
            token, number, _ = theirs.moved[0]
            said = f"{len(theirs.moved)} added tokens of tokenizer.json follow a hole in its ids"
            self.notes.append(f"{source.reference}: {said}; row {number} is taken as {clip(token)!r}")
        beyond = sum(number >= rows for number in known.vocabulary.tokens)
        if beyond and source is not self.base:
            self.notes.append(
                f"{source.reference}: {beyond} ids of its tokenizer have no row, and are left out"
            )
        return known

    def _folder(self) -> Path:
        """Where the tokenizer of the result lies.  Raises CheckpointError."""
        reference = self.choice.source
        if reference in ("base", "union"):
            return self.base.folder
        if (k := self._index(reference)) is not None:
            return self.known[k].source.folder
        folder = self.recipe.path.parent if self.recipe.path else Path()
        for root in (folder, Path()):
            if (path := root / Path(reference).expanduser()).is_dir() and self.read(path).tokens:
                return path
        with open_source(reference, base_dir=folder, weights=False) as found:
            return found.folder

    def _index(self, reference: str) -> int | None:
        return next((k for k, name in enumerate(self.names) if same(name, reference)), None)

    # ---- the tokenizer of the result ----

    def _wanted(self, folder: Path) -> _Wanted:
        """Its tokens.  Raises RecipeError, CheckpointError."""
        source, here = self.choice.source, folder.resolve()
        k = next((k for k, each in enumerate(self.known) if each.source.folder.resolve() == here), None)
        vocabulary = self.known[k].vocabulary if k is not None else self.read(folder)
        if not vocabulary.tokens:
            raise CheckpointError(Problem("has no tokenizer that can be read", CURE, source))
        tokens = dict(vocabulary.tokens)
        made = _Wanted(tokens, self.known[k].rows if k is not None else max(tokens) + 1)
        if source == "union":
            made.new = list(self._new(tokens))
            tokens |= {row["id"]: row["content"] for row in made.new}
            self.departures += [_FIXED] if len(made.new) > 1 else []
            self._tell_left_out(tokens)
            self._tell_literal(made.new)
        self._check_named(set(tokens.values()))
        names = [tokens.get(i) for i in range(max(made.rows, 1 + max(tokens)))]
        found = np.array([each.found(names) for each in self.known])
        said = {w for w, row in self.choice.rows.items() if row.kind}
        made.owned = (found >= 0).any(axis=0) | np.array([w in said for w in names])
        if any(w is None and owned for w, owned in zip(names, made.owned.tolist())):
            self.departures.append(_PADDED)
        made.rows = max(made.rows, 1 + int(np.flatnonzero(made.owned).max(initial=-1)))
        rows = -(-made.rows // self.choice.pad) * self.choice.pad
        made.found = np.full((len(self.known), rows), -1)
        made.found[:, : made.rows], made.rows = found[:, : made.rows], rows
        return made

    def _new(self, tokens: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        """The added tokens that the base lacks, model by model and by id; as tokenizer.json has them."""
        have, number = set(tokens.values()), max(tokens) + 1
        for each in self.known:
            added, named = each.vocabulary.added, self.choice.rows
            lacked = each.ids.keys() - have
            taken = lacked if self.recipe.compat else lacked & (added.keys() | named.keys())
            for token in sorted(taken, key=each.ids.__getitem__):
                yield _entry(number, token, added.get(token, {}))
                number += 1
            have |= taken
        for token, row in self.choice.rows.items():
            if token not in have and row.kind:
                yield _entry(number, token, {})
                number += 1

    def _tell_left_out(self, tokens: Mapping[int, str]) -> None:
        have = set(tokens.values())
        for each in self.known:
            left = each.ids.keys() - have
            if left:
                first = min(left, key=each.ids.__getitem__)
                self.departures = [*dict.fromkeys((*self.departures, _LEFT_OUT))]
                said = f"{len(left)} ordinary tokens that {self.template} lacks ({clip(first)!r}, ...)"
                why = f"left out, as {self.template}'s tokenizer never makes them of text"
                self.notes.append(f"{each.source.reference}: {said} are {why}; 'tokens:' can name some")

    def _tell_literal(self, new: Sequence[Mapping[str, Any]]) -> None:
        """Of new tokens that are ordinary ones elsewhere."""
        added = {token for each in self.known for token in each.vocabulary.added}
        tokens = [row["content"] for row in new if row["content"] not in added]
        found = [token for token in tokens if any(token in each.ids for each in self.known)]
        if found:
            said = (
                f"{len(found)} of the new tokens ({clip(found[0])!r}, ...) are ordinary ones of other models"
            )
            self.notes.append(f"{said}; here no text becomes them but these characters themselves")

    def _check_named(self, have: set[str]) -> None:
        """Every token that the recipe names is in the result, and its source there.  Raises RecipeError."""
        found = []
        for token, row in self.choice.rows.items():
            said = fix = ""
            if token not in have:
                said = f"token {clip(token)!r} is not in the tokenizer of {self.choice.source}"
                fix = "write 'source: union' to have it in the result, or remove it"
                if self.choice.source == "union":
                    said, fix = f"no model has the token {clip(token)!r}", "give it a 'source', or remove it"
                    fix = suggest(token, [w for k in self.known for w in k.vocabulary.added]) or fix
            elif row.kind == "token":
                said, fix = self._no_source(row)
            if said:
                found.append(Problem(said, fix, location=row.location, parameter="tokens"))
        if found:
            raise RecipeError(*found)

    def _no_source(self, row: Row) -> tuple[str, str]:
        k = self._index(row.model)
        if k is None:
            return f"{clip(row.model)!r} is none of the models of this recipe", (
                suggest(row.model, self.names) or f"there is {', '.join(self.names)}"
            )
        known = self.known[k]
        if row.token is not None and row.token not in known.ids:
            return f"{row.model} has no token {clip(row.token)!r}", (
                suggest(row.token, known.vocabulary.added) or "name a token that it has, or use kind: zero"
            )
        if row.token_id is not None and row.token_id >= known.rows:
            return f"{row.model} has {known.rows} rows, and none for id {row.token_id}", "name a smaller id"
        return "", ""

    def _check_rows(self, wanted: _Wanted) -> None:
        """A token that no model has cannot have a row.  Raises CheckpointError."""
        tokens = sorted(wanted.tokens.items())
        own = self.choice.source in ("base", "union")
        lost = [w for i, w in tokens if (i < wanted.rows or not own) and not wanted.owned[i]]
        if lost:
            said = f"{len(lost)} tokens of the tokenizer have no row in any model: {clip(lost[0])!r}"
            row = f"tokens: {{{lost[0]!r}: {{source: {{kind: zero}}}}}}"
            example = f"'tokenizer: {{source: {self.choice.source}, {row}}}'"
            of_key = " instead of 'tokenizer_source'" if self.choice.key == "tokenizer_source" else ""
            raise self.refused(said, f"say where their rows come from, such as {example}{of_key}")
        beyond = [w for i, w in tokens if i >= wanted.rows]
        if beyond:
            said = f"{len(beyond)} ids of its tokenizer have no row ({clip(beyond[0])!r})"
            self.notes.append(f"{self.template}: {said}, nor in the result")

    # ---- the rows ----

    def _map(self, k: int, wanted: _Wanted) -> tuple[RowMap, list[int]]:
        """The map of model ``k``, and the models that it reads, itself first."""
        named = {}
        for number, token in wanted.tokens.items() if self.choice.rows else ():
            row = self.choice.rows.get(token)
            if row and row.kind and number < wanted.rows and (row.force or wanted.found[k][number] < 0):
                named[number] = self._source(row)
        which, rows = placed(k, wanted.found, self.anchor, named)
        self._tell_filled(k, which, wanted)
        return row_map(k, which, rows, wanted.found)

    def _tell_filled(self, k: int, which: Array, wanted: _Wanted) -> None:
        numbers = [i for i in np.flatnonzero(which != k).tolist() if i in wanted.tokens]
        if numbers:
            shown = clip(wanted.tokens[numbers[0]])
            said = f"{len(numbers)} tokens of the result ({shown!r}, ...) have rows that are not its own"
            self.notes.append(f"{self.known[k].source.reference}: {said}")

    def _source(self, row: Row) -> tuple[int, int]:
        """Where the recipe takes a row from."""
        if row.kind == "zero":
            return ZERO, 0
        k = self._index(row.model)
        assert k is not None, "checked"
        return k, self.known[k].ids[row.token] if row.token is not None else int(row.token_id or 0)

    def _gather(self, wanted: _Wanted, folder: Path) -> None:
        """Each model with its rows in place, and the base with the files of the tokenizer.

        Raises CheckpointError.
        """
        made: dict[str, Source] = {}
        for k, (name, source) in enumerate(self.opened.items()):
            row_map, used = self._map(k, wanted)
            if row_map.is_identity and wanted.rows == self.known[k].rows:
                continue
            if odd := sideways(source, self.tables):
                said = f"{odd} has tokens along another axis than its first, and rows would not follow them"
                raise CheckpointError(Problem(said, "give models of one tokenizer", source.reference, odd))
            tensors = dict(source.tensors)
            for table, axis in self.tables.items():
                if table in source.tensors:
                    views = [self._view(j, table) for j in used]
                    tensors[table] = Rows(table, views, row_map, axis)
            made[name] = source.changed(tensors)
        base = made.get(self.template) or self.base.changed(self.base.tensors)
        old = self.known[self._index(self.template) or 0].rows
        base.config = resized(base.config, old, wanted.rows)
        if wanted.new:
            base.instead = with_added(self.base, wanted.new)
        elif folder != self.base.folder:
            other_files(base, self.base.folder, folder)
        self._tell(wanted, old)
        self.opened |= {**made, self.template: base}

    def _tell(self, wanted: _Wanted, old: int) -> None:
        said = f"{self.choice.key} {self.choice.source}: {len(wanted.tokens)} tokens, {wanted.rows} rows"
        said += f" ({old} in {self.template})" if wanted.rows != old else ""
        shown = ", ".join(clip(row["content"]) for row in wanted.new[:3])
        said += (
            f"; {len(wanted.new)} of them new ({shown}{', ...' * (len(wanted.new) > 3)})"
            if wanted.new
            else ""
        )
        self.notes.append(said)

    def _view(self, k: int, table: str) -> TensorView:
        """A table of a model; of one that ties its head, its embeddings."""
        source = self.known[k].source
        found = source.tensors.get(table)
        if found is None and HEAD.search(table) and (name := embeddings_of(source)):
            found = source.tensors[name]
        if found is None:
            said = f"lacks {table}, of which rows are needed"
            raise CheckpointError(Problem(said, "give a model that has it", source.reference, table))
        return found


def _entry(number: int, token: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """A new token as tokenizer.json has it."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": token, **{name: bool(flags.get(name)) for name in names}}
