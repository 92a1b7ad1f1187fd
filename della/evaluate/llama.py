"""A Llama forward pass in NumPy float32: enough to score the demo trio without torch.

RMSNorm, rotary positions (rotate-half layout), grouped-query attention, SwiGLU, tied or untied head, as in
the ``LlamaForCausalLM`` of transformers. Ragged batches are padded on the left, so that every row's newest
token stands in the last column and one key-value cache serves them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Complexes = NDArray[np.complex64]
Ints = NDArray[np.int64]

PLAIN_ROPE = (None, "default")


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a config.json that the forward pass needs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    epsilon: float
    theta: float
    tied: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> Shape:
        """Read a Llama config; ValueError for variants that the forward pass does not compute."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        unsupported = [
            name
            for name, met in (
                ("model_type", config.get("model_type", "llama") != "llama"),
                ("hidden_act", config.get("hidden_act", "silu") != "silu"),
                ("attention_bias", bool(config.get("attention_bias"))),
                ("mlp_bias", bool(config.get("mlp_bias"))),
                ("rope type", rope.get("rope_type", rope.get("type")) not in PLAIN_ROPE),
            )
            if met
        ]
        if unsupported:
            raise ValueError(f"the demo's NumPy Llama does not compute this {', '.join(unsupported)}")
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return Shape(
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or hidden // heads),
            epsilon=float(config["rms_norm_eps"]),
            theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


@dataclass(slots=True)
class Cache:
    """Keys and values of all columns so far, one array a layer: (rows, kv heads, capacity, head).

    ``pad`` is the number of padded columns of each row, ``length`` the number of columns filled.
    """

    pad: Ints
    keys: list[Floats]
    values: list[Floats]
    length: int = field(default=0)


@dataclass(frozen=True, slots=True)
class _Going:
    """An answer that has not ended: its row in a cache, ``length`` columns of which are its own."""

    answer: list[int]
    cache: Cache
    row: int
    length: int


class Llama:
    """A Llama for inference, from its config and its tensors (Hugging Face's names; any float dtype).

    ``watch``, if set, is called with the weight's name and the input (..., in) of every linear layer; padded
    columns of ragged batches are among its rows.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        self.shape = Shape.of(config)
        self._tensors = {name: np.asarray(array).astype(np.float32) for name, array in tensors.items()}
        for name in self._tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                self._tensors[name] = _paired(self._tensors[name], self.shape.head)
        self._embedding = self._tensors["model.embed_tokens.weight"]
        self._head = self._embedding if self.shape.tied else self._tensors["lm_head.weight"]
        self.watch: Callable[[str, Floats], None] | None = None
        half = self.shape.head // 2
        self._frequencies = self.shape.theta ** (-np.arange(half, dtype=np.float64) / half)

    @property
    def vocabulary(self) -> int:
        """How many token ids have a row of embeddings."""
        return len(self._embedding)

    @staticmethod
    def from_folder(path: str | Path) -> Llama:
        """Load an ordinary Hugging Face folder: config.json and safetensors."""
        from della.checkpoint.source import open_source

        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        with open_source(str(path)) as source:
            return Llama(config, {name: view.read() for name, view in source.tensors.items()})

    def logits(self, ids: Sequence[int]) -> Floats:
        """Next-token logits at every position of one text: (len(ids), vocabulary)."""
        cache = self._cache([len(ids)], len(ids))
        return self._predicted(self._forward(np.array([ids], dtype=np.int64), cache)[0])

    def losses(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int = 40) -> list[Floats]:
        """The loss in nats of every answer token, given (prompt ids, answer ids); one array a pair."""
        found: list[Floats] = []
        for chunk in (pairs[i : i + rows] for i in range(0, len(pairs), rows)):
            texts = [[*prompt, *answer] for prompt, answer in chunk]
            wanted = max(len(answer) for _, answer in chunk) + 1
            hidden = self._forward(*self._padded(texts), wanted)
            for row, (_, answer) in zip(hidden, chunk, strict=True):
                found.append(_losses(self._predicted(row[-len(answer) - 1 : -1]), answer))
        return found

    def answers(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], most: int, end: int, rows: int = 40
    ) -> tuple[list[Floats], list[list[int]]]:
        """What ``losses`` and ``greedy`` find, in one pass as far as greedy answers are those of the pairs.

        A pair is (prompt ids, reference ids without the end token).
        """
        losses: list[Floats] = []
        answers: list[list[int]] = []
        going: list[_Going] = []
        for chunk in (pairs[i : i + rows] for i in range(0, len(pairs), rows)):
            ids, cache = self._padded([[*prompt, *reference] for prompt, reference in chunk])
            hidden = self._forward(ids, cache, max(len(reference) for _, reference in chunk) + 1)
            for row, (prompt, reference) in enumerate(chunk):
                logits = self._predicted(hidden[row, -len(reference) - 1 :])
                losses.append(_losses(logits[:-1], reference))
                chosen = logits.argmax(axis=-1)
                same = int(np.argmin(np.append(chosen[:-1] == reference, False)))
                answer = [*reference[:same], *chosen[same : same + 1].tolist()][:most]
                answers.append(answer)
                if answer[-1] == end:
                    answer.pop()
                elif len(answer) < most:
                    going.append(_Going(answer, cache, row, len(prompt) + len(answer) - 1))
        if going:
            self._go_on([one.answer for one in going], _gathered(going, most), most, end)
        return losses, answers

    def greedy(self, prompts: Sequence[Sequence[int]], most: int, end: int) -> list[list[int]]:
        """Greedy continuations of at most ``most`` tokens, without the end token, decoded as one batch."""
        ids, cache = self._padded(prompts, spare=most)
        answers: list[list[int]] = [[] for _ in prompts]
        if most > 0:
            self._go_on(answers, cache, most, end, ids)
        return answers

    def _go_on(
        self, answers: list[list[int]], cache: Cache, most: int, end: int, ids: Ints | None = None
    ) -> None:
        """Greedy tokens to each answer, until its end token or ``most``; ``ids`` are the columns that the
        cache does not have yet, the last token of each answer by default.
        """
        alive = np.arange(len(answers))
        ids = np.array([answer[-1:] for answer in answers]) if ids is None else ids
        while alive.size:
            chosen = self._predicted(self._forward(ids, cache, 1)[:, -1]).argmax(axis=-1)
            for row, token in zip(alive, chosen, strict=True):
                if token != end:
                    answers[row].append(int(token))
            going = (chosen != end) & (np.array([len(answers[row]) for row in alive]) < most)
            if not going.all():
                alive, chosen, cache = alive[going], chosen[going], _rows(cache, going)
            ids = chosen[:, None]

    def _padded(self, texts: Sequence[Sequence[int]], spare: int = 0) -> tuple[Ints, Cache]:
        longest = max(len(text) for text in texts)
        ids = np.array([[0] * (longest - len(text)) + list(text) for text in texts], dtype=np.int64)
        return ids, self._cache([len(text) for text in texts], longest, spare)

    def _cache(self, lengths: Sequence[int], longest: int, spare: int = 0) -> Cache:
        size = (len(lengths), self.shape.kv_heads, longest + spare, self.shape.head)
        empty = [np.zeros(size, np.float32) for _ in range(2 * self.shape.layers)]
        pad = longest - np.asarray(lengths, dtype=np.int64)
        return Cache(pad, empty[::2], empty[1::2])

    def _forward(self, ids: Ints, cache: Cache, wanted: int | None = None) -> Floats:
        """Normed hidden states (rows, columns, hidden) of the new columns ``ids``, now part of the cache.

        With ``wanted``, of the last so many columns alone, and the last layer does not compute the others.
        """
        begin, end = cache.length, cache.length + ids.shape[1]
        columns = np.arange(begin, end)
        positions = np.maximum(columns - cache.pad[:, None], 0)
        angles = np.arange(end)[:, None] * self._frequencies
        turn = np.exp(1j * angles).astype(np.complex64)[positions][:, :, None]
        known = np.arange(end)
        # A padded column sees itself, which keeps its softmax finite; nothing real ever sees it.
        seen = (known <= columns[:, None]) & (known >= cache.pad[:, None, None]) | (known == columns[:, None])
        x = self._embedding[ids]
        for layer in range(self.shape.layers):
            skipped = max(0, x.shape[1] - wanted) if wanted and layer == self.shape.layers - 1 else 0
            x = x[:, skipped:] + self._attention(layer, x, turn, seen, cache, skipped)
            x = x + self._feed_forward(layer, x)
        cache.length = end
        return self._norm(x, "model.norm.weight")

    def _attention(
        self, layer: int, x: Floats, turn: Complexes, seen: NDArray[np.bool_], cache: Cache, skipped: int
    ) -> Floats:  # fmt: skip
        """Keys and values of all columns go into the cache; the first ``skipped`` columns ask for none."""
        shape, name = self.shape, f"model.layers.{layer}.self_attn"
        normed = self._norm(x, f"model.layers.{layer}.input_layernorm.weight")
        rows, columns = x.shape[:2]

        def heads(part: str, count: int, x: Floats, turn: Complexes | None = None) -> Floats:
            flat = self._linear(x, f"{name}.{part}_proj.weight")
            flat = flat.reshape(rows, x.shape[1], count, shape.head)
            if turn is not None:
                pairs = flat.view(np.complex64)
                pairs *= turn
            split: Floats = flat.transpose(0, 2, 1, 3)
            return split

        begin, end = cache.length, cache.length + columns
        cache.keys[layer][:, :, begin:end] = heads("k", shape.kv_heads, normed, turn)
        cache.values[layer][:, :, begin:end] = heads("v", shape.kv_heads, normed)
        keys, values = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        # The query heads that share one key head are stacked as further columns of it.
        turn = turn[:, skipped:] * np.float32(shape.head**-0.5)
        query = heads("q", shape.heads, normed[:, skipped:], turn)
        query = query.reshape(rows, shape.kv_heads, -1, shape.head)
        scores = (query @ keys.swapaxes(-1, -2)).reshape(rows, shape.kv_heads, -1, columns - skipped, end)
        np.copyto(scores, np.float32(-np.inf), where=~seen[:, None, None, skipped:])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores.reshape(rows, shape.kv_heads, -1, end) @ values
        flat = mixed.reshape(rows, shape.heads, columns - skipped, shape.head).transpose(0, 2, 1, 3)
        return self._linear(flat.reshape(rows, columns - skipped, -1), f"{name}.o_proj.weight")

    def _feed_forward(self, layer: int, x: Floats) -> Floats:
        name = f"model.layers.{layer}"
        normed = self._norm(x, f"{name}.post_attention_layernorm.weight")
        gate = self._linear(normed, f"{name}.mlp.gate_proj.weight")
        up = self._linear(normed, f"{name}.mlp.up_proj.weight")
        up *= gate
        np.negative(gate, out=gate)  # in place: what is allocated anew costs more than it takes to compute
        with np.errstate(over="ignore"):  # infinity is right there: the gate is shut
            np.exp(gate, out=gate)
        gate += 1
        up /= gate
        return self._linear(up, f"{name}.mlp.down_proj.weight")

    def _norm(self, x: Floats, name: str) -> Floats:
        square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
        normed: Floats = x / np.sqrt(square + np.float32(self.shape.epsilon))
        normed *= self._tensors[name]
        return normed

    def _predicted(self, hidden: Floats) -> Floats:
        if self.watch is not None and not self.shape.tied:
            self.watch("lm_head.weight", hidden)
        logits: Floats = hidden @ self._head.T
        return logits

    def _linear(self, x: Floats, name: str) -> Floats:
        if self.watch is not None:
            self.watch(name, x)
        weight = self._tensors[name]
        # One flat product: NumPy would otherwise call BLAS once a row of the batch.
        product: Floats = x.reshape(-1, x.shape[-1]) @ weight.T
        return product.reshape(*x.shape[:-1], weight.shape[0])


def _paired(weight: Floats, head: int) -> Floats:
    """The rows of a query or key projection in another order: the two that a rotation turns, half a head
    apart in the file, stand side by side, as the parts of a complex number.  Products of heads stay as they
    are.
    """
    halves = weight.reshape(-1, 2, head // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _losses(logits: Floats, tokens: Sequence[int]) -> Floats:
    """The loss in nats of each token, given the logits before it."""
    top = logits.max(axis=-1)
    chosen = logits[np.arange(len(tokens)), np.asarray(tokens)]
    found: Floats = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1)) - chosen
    return found


def _gathered(going: Sequence[_Going], spare: int) -> Cache:
    """One cache of the rows that are not finished, moved to the right of it."""
    longest = max(one.length for one in going)

    def moved(layers: Iterable[list[Floats]]) -> list[Floats]:
        made = []
        for arrays in zip(*layers, strict=True):
            _, heads, _, head = arrays[0].shape
            new = np.zeros((len(going), heads, longest + spare, head), np.float32)
            for i, (one, array) in enumerate(zip(going, arrays, strict=True)):
                begin = one.cache.pad[one.row]
                new[i, :, longest - one.length : longest] = array[one.row, :, begin : begin + one.length]
            made.append(new)
        return made

    pad = longest - np.array([one.length for one in going])
    return Cache(
        pad, moved(one.cache.keys for one in going), moved(one.cache.values for one in going), longest
    )


def _rows(cache: Cache, kept: NDArray[np.bool_]) -> Cache:
    def pick(arrays: Iterable[Floats]) -> list[Floats]:
        return [array[kept] for array in arrays]

    return Cache(cache.pad[kept], pick(cache.keys), pick(cache.values), cache.length)
