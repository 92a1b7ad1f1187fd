"""Answers, greedy, and losses of any causal model that transformers loads; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from della.errors import EvaluationError, Problem, either
from della.evaluate.backends import Keep, Model, batches
from della.evaluate.options import opt
from della.evaluate.templates import Prompt


def load(model: Model, dtype: str) -> tuple[Any, Any, str]:
    """A tokenizer and a model in evaluation mode, and the device it is on; code that a model brings is never
    run.

    dtype: that of the tensors, or "auto": on a GPU the model's own, on a CPU float32.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise EvaluationError(
            Problem(
                "the hf backend needs the packages torch and transformers",
                "pip install '.[hf]' in della's checkout",
            )
        ) from error
    found, revision = model.local_or_hub
    talk: Any = transformers.utils.logging
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    plain = {"revision": revision or "main", "trust_remote_code": False}
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(found, **plain)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            found, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, **plain
        )
    except Exception as error:  # whatever its many parts raise
        raise EvaluationError(
            Problem(f"transformers cannot load it: {_first_line(error)}", subject=model.reference)
        ) from error
    return tokenizer, loaded.to(device), device


class HfModel:
    """A model and its tokenizer, loaded.

    dtype: bfloat16, float16 or float32: what is computed in.
    """

    def __init__(self, model: Model, *, dtype: str, batch: int, max_tokens: int) -> None:
        self._batch, self._name = batch, model.reference
        self._tokenizer, self._model, self._device = load(model, dtype)
        # The model's own settings for sampling must not take part.
        ends = self._model.generation_config.eos_token_id
        ends = self._tokenizer.eos_token_id if ends is None else ends
        self._pad = next(iter(ends), 0) if isinstance(ends, list) else ends or 0
        configuration: Any = type(self._model.generation_config)
        self._model.generation_config = configuration(
            do_sample=False, max_new_tokens=max_tokens, eos_token_id=ends, pad_token_id=self._pad
        )

    def answer(self, prompts: Sequence[Prompt], keep: Keep) -> None:
        """Greedy answers, a batch at a time."""
        ids = [self._encoded(prompt) for prompt in prompts]
        for chosen in batches(prompts, ids, self._batch):
            try:
                answers = self._continued([ids[at] for at in chosen], [prompts[at].stops for at in chosen])
            except (RuntimeError, IndexError, ValueError) as error:
                longest = max(len(ids[at]) for at in chosen)
                raise EvaluationError(
                    Problem(
                        f"cannot answer {len(chosen)} prompts of up to {longest} tokens: "
                        f"{_first_line(error)}",
                        f"a smaller {opt('batch')} or {opt('max_tokens')} may help",
                        self._name,
                    )
                ) from error
            keep({prompts[at].id: answer for at, answer in zip(chosen, answers, strict=True)})

    def _encoded(self, prompt: Prompt) -> list[int]:
        text = prompt.text
        if prompt.is_chat:
            if self._tokenizer.chat_template is None:
                raise EvaluationError(
                    Problem(
                        "its tokenizer has no chat template",
                        _other_template(),
                        self._name,
                    )
                )
            said = [{"role": "user", "content": text}]
            try:
                text = self._tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            except Exception as error:  # a template may raise what it likes, or be none at all
                raise EvaluationError(
                    Problem(
                        f"its chat template fails: {_first_line(error)}",
                        _other_template(),
                        self._name,
                    )
                ) from error
        ids = self._tokenizer(text, add_special_tokens=not prompt.is_chat)["input_ids"]
        return [int(token) for token in ids]

    def _continued(self, texts: Sequence[Sequence[int]], stops: Sequence[Sequence[str]]) -> list[str]:
        import torch

        longest = max(map(len, texts))
        padded = [[self._pad] * (longest - len(text)) + list(text) for text in texts]
        seen = [[0] * (longest - len(text)) + [1] * len(text) for text in texts]
        with torch.inference_mode():
            made = self._model.generate(
                torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(seen, device=self._device),
                stopping_criteria=[self._stopper(longest, stops)],
            )
        return [self._decoded(row) for row in made[:, longest:]]

    def _stopper(self, begin: int, stops: Sequence[Sequence[str]]) -> Callable[..., Any]:
        """Which rows hold one of their stops: looked for in their newest tokens after each step."""
        import torch

        newest = 8 + max((len(stop) for row in stops for stop in row), default=0)

        def is_stopped(ids: Any, _: Any, **__: Any) -> Any:
            tails = ids[:, max(begin, ids.shape[1] - newest) :]
            found = [
                bool(row) and any(stop in text for stop in row)
                for row, text in zip(stops, map(self._decoded, tails), strict=True)
            ]
            return torch.tensor(found, device=ids.device)

        return is_stopped

    def _decoded(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class HfScorer:
    """How likely texts are by a model, loaded; logits are widened to float32, sums are float64's."""

    def __init__(self, model: Model, dtype: str) -> None:
        self._name = model.reference
        self._tokenizer, self._model, self._device = load(model, dtype)
        known = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = known if isinstance(known, int) and known > 0 else None
        self.rows = int(self._model.get_input_embeddings().weight.shape[0])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with what the tokenizer adds to one."""
        return [int(token) for token in self._tokenizer(text)["input_ids"]]

    def sums(self, windows: Sequence[tuple[Sequence[int], int]]) -> list[float]:
        """The loss in nats of the last so many tokens of each window, padded on the right, where no token
        of theirs looks.
        """
        import torch

        longest = max(len(ids) for ids, _ in windows)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids, _ in windows]
        seen = [[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in windows]
        try:
            with torch.inference_mode():
                logits = self._model(
                    input_ids=torch.tensor(padded, device=self._device),
                    attention_mask=torch.tensor(seen, device=self._device), use_cache=False,
                ).logits  # fmt: skip
                return [_loss(logits[row], ids, count) for row, (ids, count) in enumerate(windows)]
        except (RuntimeError, IndexError, ValueError) as error:
            said = f"cannot read {len(windows)} texts of up to {longest} tokens: {_first_line(error)}"
            raise EvaluationError(
                Problem(said, f"a smaller {opt('batch')} or {opt('window')} may help", self._name)
            ) from error


def _loss(logits: Any, ids: Sequence[int], count: int) -> float:
    import torch

    total = 0.0
    for begin in range(len(ids) - count, len(ids), 256):  # of few at a time: as float32 they take room
        end = min(begin + 256, len(ids))
        chosen = torch.tensor(ids[begin:end], device=logits.device)
        found = torch.nn.functional.cross_entropy(
            logits[begin - 1 : end - 1].float(), chosen, reduction="none"
        )
        total += float(found.double().sum())
    return total


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def _other_template() -> str:
    return either("choose another --template", "choose other templates")
