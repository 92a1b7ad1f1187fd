"""The command `della paper`: the experiment of the DELLA paper at three scales."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from della.cli.console import print_json, tell
from della.errors import EvaluationError, unknown
from della.evaluate.options import words

if TYPE_CHECKING:
    from della.experiments.full import FullOptions
    from della.experiments.small import SmallOptions

_Text = Optional[str]  # noqa: UP045  (typer evaluates annotations on Python 3.10)
_Texts = Optional[list[str]]  # noqa: UP045
_Count = Optional[int]  # noqa: UP045
_Number = Optional[float]  # noqa: UP045
_Folder = Optional[Path]  # noqa: UP045


def _option(help_: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help_, show_default=False, **more)


Scale = Annotated[str, _option("mini, 135m or 13b.", metavar="SCALE")]
Out = Annotated[_Folder, _option("Where everything goes. [default: paper-SCALE]", metavar="DIR")]
Plan = Annotated[bool, _option("13b: say what it would take, and do nothing.", "--plan")]
Limit = Annotated[_Count, _option("Problems of each task.", min=1, metavar="N")]
Seeds = Annotated[_Count, _option("Seeds of what is random. [default: 10, 5, 3]", min=1, metavar="N")]
Seed = Annotated[_Count, _option("mini: the first of them. [default: 42]", min=0, metavar="N")]
Threads = Annotated[_Count, _option("Threads.", min=1)]
Data = Annotated[
    _Texts, _option("135m: a folder of TASK.SPLIT.jsonl.  13b: a file of problems.", metavar="[NAME=]PATH")
]
Models = Annotated[
    _Texts, _option("135m, 13b: where a model is; of 135m only base.", metavar="ROLE=FOLDER_OR_ID")
]
ModelsDir = Annotated[_Folder, _option("13b: models as OWNER/NAME below it.", metavar="DIR")]
Experts = Annotated[
    _Folder, _option("135m: the experts, already trained. [default: OUT/experts]", metavar="DIR")
]
Tables = Annotated[str, _option("13b: only these tables.", metavar="1,3,...")]
Importance = Annotated[
    str, _option("mini, 13b: wanda, or magnitude to leave out table 5. [default: wanda]", metavar="NAME")
]
DropRates = Annotated[str, _option("13b: p to choose among.", metavar="P,...")]
Lambdas = Annotated[str, _option("13b: lambda to choose among.", metavar="L,...")]
Pruned = Annotated[str, _option("13b: p of tables 3 and 6.", metavar="P,...")]
Window = Annotated[_Number, _option("13b: the range of drop probabilities. [default: 0.14]", metavar="W")]
Backend = Annotated[str, _option("13b: who answers. [default: vllm]", metavar="NAME")]
Prompt = Annotated[str, _option("13b: prompt of gsm8k, fixed or published. [default: fixed]", metavar="NAME")]
MaxTokens = Annotated[int, _option("13b: most new tokens of an answer. [default: 512]", min=1)]
Batch = Annotated[int, _option("13b: prompts at a time of hf and numpy. [default: 8]", min=1)]
Dtype = Annotated[str, _option("13b: in which the models answer. [default: bfloat16]", metavar="NAME")]
VllmCommand = Annotated[str, _option("13b: vLLM's program, of any environment.", metavar="PROGRAM")]
VllmArgs = Annotated[str, _option("13b: further arguments of `vllm serve`, quoted.", metavar="TEXT")]
Judge = Annotated[_Text, _option("13b: a model that judges GSM8K.", metavar="MODEL")]
Annotator = Annotated[_Text, _option("13b: who compares AlpacaEval's answers.", metavar="NAME|FOLDER")]
AlpacaCommand = Annotated[str, _option("13b: alpaca_eval's command.", metavar="PROGRAM")]
JudgeUrl = Annotated[_Text, _option("13b: server of judge and annotator.", metavar="URL")]
JudgeKeyEnv = Annotated[str, _option("13b: environment variable of its key.", metavar="NAME")]
AllowPickle = Annotated[bool, _option("13b: read .bin models, as weights only.", "--allow-pickle")]
KeepMerges = Annotated[bool, _option("13b: keep merges after their answers.", "--keep-merges")]
TokensPerSecond = Annotated[_Number, _option("13b, --plan: of one GPU.", metavar="N")]
JudgePrice = Annotated[
    str, _option("13b, --plan: dollars a million tokens of the judge.", metavar="READ,WRITTEN")
]
Quiet = Annotated[bool, _option("Say nothing but errors.", "--quiet", "-q")]
AsJson = Annotated[bool, _option("The plan, or where the result is, as JSON.", "--json")]
Debug = Annotated[bool, _option("Show the traceback of an error.", "--debug")]

SCALES = ("mini", "135m", "13b")
_COMMON = {"scale", "out", "limit", "seeds", "threads", "quiet", "as_json", "debug"}
_OWN: dict[str, set[str]] = {
    "mini": {"seed", "importance"},
    "135m": {"data", "models", "experts"},
}  # 13b takes all others
# What of the options goes into the Settings of scoring, and what to `full_options`, under the same names.
_SCORING = (
    "out", "limit", "backend", "prompt", "max_tokens", "batch", "dtype", "judge", "annotator",
    "alpaca_command", "judge_url", "judge_key_env",
)  # fmt: skip
_GRID = (
    "tables", "drop_rates", "lambdas", "pruned", "window", "seeds", "models_dir", "allow_pickle",
    "keep_merges", "threads", "tokens_per_second", "judge_price",
)  # fmt: skip


def paper(
    context: typer.Context, scale: Scale, out: Out = None, plan: Plan = False, limit: Limit = None,
    seeds: Seeds = None, seed: Seed = None, threads: Threads = None, data: Data = None, models: Models = None,
    models_dir: ModelsDir = None, experts: Experts = None, tables: Tables = "",
    importance: Importance = "wanda", drop_rates: DropRates = "", lambdas: Lambdas = "",
    pruned: Pruned = "", window: Window = None, backend: Backend = "vllm", prompt: Prompt = "fixed",
    max_tokens: MaxTokens = 512, batch: Batch = 8, dtype: Dtype = "bfloat16",
    vllm_command: VllmCommand = "vllm", vllm_args: VllmArgs = "", judge: Judge = None,
    annotator: Annotator = None, alpaca_command: AlpacaCommand = "alpaca_eval", judge_url: JudgeUrl = None,
    judge_key_env: JudgeKeyEnv = "OPENAI_API_KEY", allow_pickle: AllowPickle = False,
    keep_merges: KeepMerges = False, tokens_per_second: TokensPerSecond = None, judge_price: JudgePrice = "",
    quiet: Quiet = False, as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Run the experiment of the DELLA paper: mini (the demo's models, minutes), 135m (a real small model,
    hours) or 13b (the paper's models, days of a GPU).  The same command goes on where it was cut short.
    """
    _check(context, scale)
    given = {name: value for name, value in context.params.items() if name not in ("scale", "plan", "quiet")}
    given["out"] = place = out or Path(f"paper-{scale}")
    try:
        _run(scale, given, plan, quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{place} keeps what is done; the same command goes on from there") from None


def _run(scale: str, given: dict[str, Any], plan: bool, quiet: bool) -> None:
    def say(line: str) -> None:
        if not quiet:
            tell(line)

    out, as_json = given["out"], given["as_json"]
    if scale == "mini":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded: the threads are our own
        from della.experiments.mini import MiniOptions, run_mini

        named = {"items": given["limit"], **{name: given[name] for name in ("seeds", "seed", "threads")}}
        numbers = {name: value for name, value in named.items() if value is not None}
        run_mini(MiniOptions(out, importance=given["importance"], command=_command(), **numbers), say)
    elif scale == "135m":
        from della.experiments.small import run_small

        run_small(_small(given), say)
    else:
        from della.experiments.full import plan_full, run_full
        from della.experiments.full_plan import plan_text

        options = _full(given)
        if plan:
            found = plan_full(options)
            print_json(event="plan", **found) if as_json else print(plan_text(found), flush=True)
            return
        run_full(options, say)
    if as_json:
        print_json(event="finished", scale=scale, results=str(out / "results.json"))
    else:
        say(f"{out}: index.html, tables.md, results.json")


def _check(context: typer.Context, scale: str) -> None:
    """Refuse what a scale does not take, rather than ignore it."""
    if scale not in SCALES:
        raise EvaluationError(unknown("--scale", scale, SCALES))
    known = {*_COMMON, *_OWN.get(scale, context.params)} - ({"experts", "seed"} if scale == "13b" else set())
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        if parameter.name not in known and source is not None and source.name == "COMMANDLINE":
            raise EvaluationError(f"{parameter.opts[0]} is not an option of --scale {scale}")


def _small(given: dict[str, Any]) -> SmallOptions:
    """The options of 135m."""
    from della.experiments.small import SmallOptions

    data, models = given["data"] or [], dict(_pair(text) for text in given["models"] or ())
    if len(data) != 1:
        raise EvaluationError(
            "--scale 135m needs --data FOLDER, a folder of TASK.SPLIT.jsonl (docs/paper.md)"
        )
    if models.keys() - {"base"}:
        raise EvaluationError(
            "--models of --scale 135m: expected base=FOLDER_OR_ID; experts: --experts FOLDER"
        )
    numbers = {"items": given["limit"], "seeds": given["seeds"], "threads": given["threads"]}
    return SmallOptions(
        data=Path(data[0]), out=given["out"], model=models.get("base"), experts=given["experts"],
        **{name: value for name, value in numbers.items() if value is not None},
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise EvaluationError(f"--models {text}: expected ROLE=MODEL")
    return name, value


def _full(given: dict[str, Any]) -> FullOptions:
    """The options of 13b."""
    from della.evaluate.settings import Settings
    from della.experiments.full_options import full_options

    if given["importance"] not in ("wanda", "magnitude"):
        raise EvaluationError(f"--importance {given['importance']}: expected wanda or magnitude")
    if given["importance"] == "magnitude" and not given["tables"]:
        given["tables"] = "1,2,3,4,6,7"
    scoring = Settings(
        tasks=(), vllm_command=words(given["vllm_command"], "--vllm-command"),
        vllm_arguments=words(given["vllm_args"], "--vllm-args"), **{name: given[name] for name in _SCORING},
    )  # fmt: skip
    options = full_options(
        scoring, models=given["models"] or (), data=given["data"] or (),
        **{name: given[name] for name in _GRID},
    )  # fmt: skip
    return replace(options, command=_command())


def _command() -> str:
    """What makes the results again, for the results."""
    return shlex.join(["della", *sys.argv[1:]])
