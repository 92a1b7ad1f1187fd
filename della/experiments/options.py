"""What `della paper` is told: its options, declared once for the command line and for a file of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from della.errors import Collector, EvaluationError, Problem, suggest, unknown
from della.options import Spec, build, declared, option

if TYPE_CHECKING:
    from della.experiments.tables import Scale
    from della.recipe.tree import Node

Number = TypeVar("Number", int, float)
SCALES = ("mini", "135m", "13b")
IMPORTANCES = ("wanda", "magnitude")


def _numbers(flag: str, kind: Callable[[str], Number]) -> Callable[[str], tuple[Number, ...]]:
    def read(text: str) -> tuple[Number, ...]:
        try:
            return tuple(dict.fromkeys(kind(word) for word in text.split(","))) if text else ()
        except ValueError:
            raise EvaluationError(f"{flag} {text}: expected numbers with commas between them") from None

    return read


def _list(help_: str, flag: str, kind: Callable[[str], Number], metavar: str) -> Any:
    return option(help_, (), flag, metavar=metavar, read=_numbers(flag, kind), text="", shown=False)


def _one(help_: str, default: Any, *flags: str, metavar: str | None = None, **more: Any) -> Any:
    return option(help_, default, *flags, metavar=metavar, shown=False, **more)


@dataclass(frozen=True)
class ExperimentOptions:
    """The options of all scales; what a scale does not take is refused (`check`).

    >>> ExperimentOptions(scale="mini", seeds=3).seeds
    3
    """

    scale: str | None = _one("mini, 135m or 13b.", None, metavar="SCALE")
    out: Path | None = option("Where everything goes. [default: paper-SCALE]", None, metavar="DIR")
    limit: int | None = _one("Problems of each task.", None, least=1, metavar="N")
    seeds: int | None = _one(
        "Seeds of what is random. [default: 10, 5, 3]", None, least=1, metavar="N"
    )  # fmt: skip
    seed: int | None = _one("mini: the first of them. [default: 42]", None, least=0, metavar="N")
    threads: int | None = _one("Threads.", None, least=1)
    data: tuple[str, ...] = _one(
        "135m: a folder of TASK.SPLIT.jsonl.  13b: a file of problems.", (), metavar="[NAME=]PATH", many=True
    )
    models: tuple[str, ...] = _one(
        "135m, 13b: where a model is; of 135m only base.", (), metavar="ROLE=FOLDER_OR_ID", many=True
    )
    models_dir: Path | None = option("13b: models as OWNER/NAME below it.", None, metavar="DIR")
    experts: Path | None = option(
        "135m: the experts, already trained. [default: OUT/experts]", None, metavar="DIR"
    )
    tables: tuple[int, ...] = _list("13b: only these tables.", "--tables", int, "1,3,...")
    importance: str = _one(
        "mini, 13b: wanda, or magnitude to leave out table 5. [default: wanda]", "wanda", metavar="NAME"
    )
    drop_rates: tuple[float, ...] = _list("13b: p to choose among.", "--drop-rates", float, "P,...")
    lambdas: tuple[float, ...] = _list("13b: lambda to choose among.", "--lambdas", float, "L,...")
    pruned: tuple[float, ...] = _list("13b: p of tables 3 and 6.", "--pruned", float, "P,...")
    window: float | None = _one("13b: the range of drop probabilities. [default: 0.14]", None, metavar="W")
    backend: str = _one("13b: who answers. [default: vllm]", "vllm", metavar="NAME")
    prompt: str = _one("13b: prompt of gsm8k, fixed or published. [default: fixed]", "fixed", metavar="NAME")
    max_tokens: int = _one("13b: most new tokens of an answer. [default: 512]", 512, least=1)
    batch: int = _one("13b: prompts at a time of hf and numpy. [default: 8]", 8, least=1)
    dtype: str = _one("13b: in which the models answer. [default: bfloat16]", "bfloat16", metavar="NAME")
    vllm_command: str = _one("13b: vLLM's program, of any environment.", "vllm", metavar="PROGRAM")
    vllm_args: str = _one("13b: further arguments of `vllm serve`, quoted.", "", metavar="TEXT")
    judge: str | None = _one("13b: a model that judges GSM8K.", None, metavar="MODEL")
    annotator: str | None = _one("13b: who compares AlpacaEval's answers.", None, metavar="NAME|FOLDER")
    alpaca_command: str = _one("13b: alpaca_eval's command.", "alpaca_eval", metavar="PROGRAM")
    judge_url: str | None = _one("13b: server of judge and annotator.", None, metavar="URL")
    judge_key_env: str = _one("13b: environment variable of its key.", "OPENAI_API_KEY", metavar="NAME")
    allow_pickle: bool = _one("13b: read .bin models, as weights only.", False)
    keep_merges: bool = _one("13b: keep merges after their answers.", False)
    tokens_per_second: float | None = _one("13b, --plan: of one GPU.", None, metavar="N")
    judge_price: tuple[float, ...] = _list(
        "13b, --plan: dollars a million tokens of the judge.", "--judge-price", float, "READ,WRITTEN"
    )

    @property
    def place(self) -> Path:
        """Where everything goes."""
        return self.out or Path(f"paper-{self.scale}")

    def of(self, scale: Scale) -> Scale:
        """A scale with what was said in the place of what it has."""
        return replace(scale, **stated(seeds=self.seeds, seed=self.seed, items=self.limit))


# What a scale takes beside what all of them do; 13b takes all others.
_COMMON = {"scale", "out", "limit", "seeds", "threads"}
_OWN = {"mini": {"seed", "importance"}, "135m": {"data", "models", "experts"}}


def check(options: ExperimentOptions, given: Mapping[str, str]) -> None:
    """Refuse what a scale does not take, rather than ignore it.

    Args:
        options: What was said.
        given: The fields that were said, each as it was written.

    Raises:
        EvaluationError: no scale, an option of another one, or a value that none can be.
    """
    scale = options.scale
    if scale is None:
        raise EvaluationError(Problem("no scale: give --scale mini, 135m or 13b", parameter="scale"))
    if scale not in SCALES:
        raise EvaluationError(unknown("--scale", scale, SCALES))
    known = _COMMON | _OWN.get(scale, set(declared(ExperimentOptions)) - {"experts", "seed"})
    for name, written in given.items():
        if name not in known:
            raise EvaluationError(Problem(f"{written} is not an option of --scale {scale}", parameter=name))
    if scale == "13b":
        pairs("--data", options.data, "NAME=FILE")
    speed, price = options.tokens_per_second, options.judge_price
    if speed is not None and speed <= 0:
        raise EvaluationError(
            Problem(
                f"--tokens-per-second {speed:g}: expected a number above 0", parameter="tokens_per_second"
            )
        )
    if price and len(price) != 2:
        told = ",".join(f"{one:g}" for one in price)
        raise EvaluationError(
            Problem(f"--judge-price {told}: expected READ,WRITTEN, such as 30,60", parameter="judge_price")
        )
    if options.importance not in IMPORTANCES:
        raise EvaluationError(unknown("--importance", options.importance, IMPORTANCES))


def read_file(path: Path) -> dict[str, Any]:
    """The options in a YAML file, whose keys are the fields of `ExperimentOptions`, for `build`.

    Lists stand where the command line has numbers with commas, mappings where it has NAME=VALUE.  Paths start
    in the working directory.

    Raises:
        EvaluationError: all that is wrong, each with its line.
        RecipeError: the file is no YAML.
    """
    from della.recipe.text import load_text, parse
    from della.recipe.tree import Table

    problems = Collector(EvaluationError)
    _, name, text = load_text(path)
    root = parse(text, name, problems)
    problems.raise_any()
    if not isinstance(root, Table):
        raise EvaluationError(f"{name}: expected a mapping such as 'scale: mini'")
    specs, hints, found = declared(ExperimentOptions), get_type_hints(ExperimentOptions), {}
    for key, entry in root.entries.items():
        if key not in specs:
            fix = suggest(key, specs) or f"options are {', '.join(specs)}"
            problems.add(f"no option {key!r}", fix, location=entry.key, parameter=key)
            continue
        value = _value(entry.node, specs[key], hints[key])
        if value is None:
            said = f"{key!r}: expected {_expected(specs[key], hints[key])}"
            problems.add(said, location=entry.node.location, parameter=key)
        found[key] = value
    problems.raise_any()
    build(ExperimentOptions, found)
    return found


def _value(node: Node, spec: Spec, hint: Any) -> Any:
    """What a node means as the command line would have given it; None where it means nothing."""
    from della.recipe.tree import Items, Leaf, Table

    if isinstance(node, Table):
        leaves = {key: entry.node for key, entry in node.entries.items()}
        plain = {key: leaf.text for key, leaf in leaves.items() if isinstance(leaf, Leaf)}
        return [f"{k}={v}" for k, v in plain.items()] if spec.many and len(plain) == len(leaves) else None
    if isinstance(node, Items):
        texts = [leaf.text for leaf in node.nodes if isinstance(leaf, Leaf)]
        if len(texts) < len(node.nodes) or not (spec.many or spec.read):
            return None
        return texts if spec.many else ",".join(texts)
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        return node.value if isinstance(node.value, bool) else None
    if spec.many:
        return [node.text]
    if spec.read or str in kinds:
        return None if node.value is None else node.text
    if Path in kinds:
        return None if node.value is None else Path(node.text)
    number = node.value
    if isinstance(number, bool) or not isinstance(number, (int, float) if float in kinds else int):
        return None
    return None if spec.least is not None and number < spec.least else number


def _expected(spec: Spec, hint: Any) -> str:
    kinds = get_args(hint) or (hint,)
    if spec.many:
        return "a text, a list of texts, or a mapping"
    if spec.read:
        return "a number, or a list of numbers"
    if bool in kinds:
        return "true or false"
    if float in kinds or int in kinds:
        whole = "a number" if float in kinds else "a whole number"
        return whole if spec.least is None else f"{whole} from {spec.least} up"
    return "a text"


def pairs(flag: str, texts: Iterable[str], form: str) -> dict[str, str]:
    """A mapping from texts NAME=VALUE; EvaluationError for one that is none."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise EvaluationError(f"{flag} {text}: expected {form}")
        found[name] = value
    return found


def stated(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}
