"""AlpacaEval: the format of the package, its command and its results; and the package itself where it is.

The last tests need alpaca_eval 0.6.6 in an environment of its own, named by DELLA_ALPACA_PYTHON, and are
skipped without; scripts/alpaca-venv --test makes one.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from stand_ins import ANNOTATIONS, RESULTS, TABLE, stand_in
from stub_server import REFUSAL, Request, Status, StubServer

from della.errors import EvaluationError, OutputError
from della.evaluate.alpaca import WinRate, check_judge, win_rate, write_outputs
from della.evaluate.problems import Item

COUNT = 12
PROBLEMS = [Item(str(n), "alpaca_eval", f"Say {n}, “{n}”.", "") for n in range(COUNT)]
ANSWERS = {str(n): f"{'good' if n % 3 else 'bad'} {n}" for n in range(COUNT)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Our outputs and the reference's."""
    reference = [
        {"instruction": problem.instruction, "output": f"reference {problem.id}", "dataset": "x"}
        for problem in reversed(PROBLEMS)
    ]
    reference = [{**row, "generator": "old"} for row in reference]
    write_outputs(tmp_path / "outputs.json", PROBLEMS, ANSWERS, "mine")
    (tmp_path / "reference.json").write_text(json.dumps(reference))
    return tmp_path / "outputs.json", tmp_path / "reference.json"


def test_the_format(files: tuple[Path, Path]) -> None:
    written = json.loads(files[0].read_text(encoding="utf-8"))
    assert written[0] == {"instruction": "Say 0, “0”.", "output": "bad 0", "generator": "mine"}
    assert [row["instruction"] for row in written] == [problem.instruction for problem in PROBLEMS]


# ---- the command, with a stand-in for it ------------------------------------------------------------------


def test_what_the_package_is_asked_for(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = win_rate(
        *files,
        tmp_path / "out",
        command=stand_in(tmp_path),
        judge_url="http://ann:pw@judge/v1",
        key_env="JUDGE_KEY",
    )
    assert found == WinRate(50.0, 28.9, 3, COUNT, None, {"a": 1.0, "b": 0.0, "c": 0.5})
    assert (found.interval.low, found.interval.high) == (0.0, 100.0)
    word, options, environment, client = json.loads((tmp_path / "told.json").read_text())
    assert word == "evaluate"
    assert options["model_outputs"] == repr(str(files[0]))
    assert options["reference_outputs"] == repr(str(files[1]))
    assert options["annotators_config"] == "'alpaca_eval_gpt4'"
    assert options["fn_metric"] == "'get_winrate'"
    assert options["precomputed_leaderboard"] == "None"
    assert json.loads(client) == {
        "default": [{"base_url": "http://ann:pw@judge/v1", "timeout": 120, "max_retries": 5}]
    }
    assert environment == {"OPENAI_API_KEY": "sk-secret", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for path in (tmp_path / "out").rglob("*.*"):
        assert not re.search("sk-secret|ann:pw", path.read_text()), "no file holds the key"


def test_length_control_is_the_package_s_and_only_where_asked_for(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    table = TABLE.replace("n_total", "n_total,length_controlled_winrate,lc_standard_error").replace(
        ",3\n", ",3,47.5,9.5\n"
    )
    found = win_rate(
        *files, tmp_path / "out", command=stand_in(tmp_path, table=table), length_controlled=True
    )
    assert found.length_controlled == (47.5, 9.5)
    _, options, environment, client = json.loads((tmp_path / "told.json").read_text())
    assert options["fn_metric"] == "'get_length_controlled_winrate'"
    assert "HF_HUB_OFFLINE" not in environment
    assert client == "", "the package's own judge"


def test_an_annotator_of_one_s_own_is_a_path(files: tuple[Path, Path], tmp_path: Path) -> None:
    body = RESULTS.format(table=TABLE, annotations=ANNOTATIONS).replace(' / "alpaca_eval_gpt4"', "")
    command = stand_in(tmp_path, body.replace("site.mkdir()", ""))
    win_rate(*files, tmp_path / "out", command=command, annotator=f"{tmp_path}/mine")
    _, options, *_ = json.loads((tmp_path / "told.json").read_text())
    assert options["annotators_config"] == repr(f"{tmp_path}/mine")


def refused(files: tuple[Path, Path], tmp_path: Path, command: str) -> str:
    with pytest.raises(EvaluationError) as error:
        win_rate(*files, tmp_path / "out", command=command)
    return str(error.value)


def test_a_command_that_is_not_there(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert refused(files, tmp_path, str(tmp_path / "none")) == (
        f"{tmp_path}/none: cannot be run (No such file or directory); AlpacaEval needs the package "
        "alpaca_eval, in an environment of its own: scripts/alpaca-venv makes it, and "
        ".venv-alpaca/bin/alpaca_eval is the command to name"
    )


def test_a_command_that_fails(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    command = stand_in(tmp_path, "sys.exit('no\\nbad key ' + os.environ['OPENAI_API_KEY'])")
    assert refused(files, tmp_path, command) == (
        f"{command}: failed with exit code 1 (bad key ***); see {tmp_path}/out/alpaca_eval.log, then run "
        "again: most of what the judge has said is kept"
    )
    assert (tmp_path / "out/alpaca_eval.log").read_text() == "no\nbad key ***\n"


def test_what_one_judge_has_said_is_not_taken_for_another_s(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The package tells judges apart by a name alone, so each gets a file of its own."""
    own = tmp_path / "own"
    own.mkdir()
    body = RESULTS.format(table=TABLE, annotations=ANNOTATIONS).replace("mkdir()", "mkdir(exist_ok=True)")
    command = stand_in(tmp_path, body)

    def kept(**judge: Any) -> str:
        win_rate(*files, tmp_path / "out", command=command, **judge)
        return str(json.loads((tmp_path / "told.json").read_text())[1]["caching_path"])

    names = [kept(), kept(judge_url="http://a/v1"), kept(judge_url="http://b/v1")]
    assert kept(judge_url="http://ann:pw@a/v1") == names[1]
    stand_in(tmp_path, body.replace(' / "alpaca_eval_gpt4"', ""))
    for prompt in ("Who is better?", "Who is worse?"):
        (own / "prompt.txt").write_text(prompt)
        names += [kept(annotator=str(own)), kept(annotator=str(own))]
    assert len(set(names)) == 5
    assert names[3] == names[4]


def test_what_is_missing_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"^none: cannot be run \(no such command\); AlpacaEval needs"):
        check_judge("none", "alpaca_eval_gpt4")
    check_judge(stand_in(tmp_path), "alpaca_eval_gpt4")
    with pytest.raises(EvaluationError) as error:
        check_judge(stand_in(tmp_path), f"{tmp_path}/mine")
    assert str(error.value) == f"{tmp_path}/mine: expected a folder of an annotator, with configs.yaml"


def test_a_place_that_cannot_be_written_is_told(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match=f"^{tmp_path}/out: "):
        win_rate(*files, tmp_path / "out", command="unused")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=f"^{tmp_path}/folder: cannot be written "):
        write_outputs(tmp_path / "folder", PROBLEMS, ANSWERS, "mine")


@pytest.mark.parametrize("table", ["", "win_rate\n5\n", TABLE + "other,1,1,c,1,1\n"])
def test_results_of_another_kind(table: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    told = refused(files, tmp_path, stand_in(tmp_path, table=table))
    assert told.startswith(
        f"{tmp_path}/out/alpaca_eval_gpt4: not the results that alpaca_eval 0.6.6 writes ("
    )


def test_results_of_an_earlier_run_are_not_read_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    win_rate(*files, tmp_path / "out", command=stand_in(tmp_path))
    assert "not the results" in refused(files, tmp_path, stand_in(tmp_path, "pass"))


def test_a_judge_without_any_preference(files: tuple[Path, Path], tmp_path: Path) -> None:
    table = TABLE.replace("50.0,28.9", ",").replace(",3\n", ",0\n")
    assert refused(files, tmp_path, stand_in(tmp_path, table=table)).startswith(
        f"{tmp_path}/out/alpaca_eval_gpt4: the judge gave no preference that alpaca_eval could read"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "[1]", '[{"instruction": "a"}]', '[{"instruction": 1, "output": ""}]']
)
def test_a_file_of_another_kind(text: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    files[1].write_text(text)
    assert re.match(
        re.escape(f"{files[1]}: ") + r"(cannot be read as JSON \(|expected what alpaca_eval reads)",
        refused(files, tmp_path, "unused"),
    )


def test_a_reference_that_lacks_instructions(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[1].write_text(json.dumps(json.loads(files[1].read_text())[2:]))
    assert refused(files, tmp_path, "unused") == (
        f"{files[1]}: lacks 2 of the 12 instructions of {files[0]}, such as 'Say 10, “10”.'; "
        "give the reference outputs of the same instructions"
    )


# ---- the package itself -----------------------------------------------------------------------------------

needs_package = pytest.mark.skipif(
    "DELLA_ALPACA_PYTHON" not in os.environ,
    reason="DELLA_ALPACA_PYTHON names no environment with alpaca_eval",
)


def ours_first(request: Request) -> bool:
    return "reference" not in request.prompt.split('"model_1"')[1].split('"model_2"')[0]


def ranking(request: Request) -> str:
    """What a judge says who likes what is good; of one comparison it will not speak."""
    if "Say 5," in request.prompt:
        return REFUSAL
    first = ours_first(request) == ("good" in request.prompt)
    ranks = (1, 2) if first else (2, 1)
    return str([{"model": f"model_{n}", "rank": rank} for n, rank in enumerate(ranks, 1)])


@needs_package
def test_the_package_scores_and_goes_on_after_a_stop(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = str(Path(os.environ["DELLA_ALPACA_PYTHON"]).absolute().parent / "alpaca_eval")
    with StubServer(ranking) as server:
        found = win_rate(*files, tmp_path / "out", command=command, judge_url=server.url)
        assert found.win_rate == pytest.approx(100 * 7 / 11), (
            "4 of 12 are bad, and one good one was not judged"
        )
        assert found.standard_error == pytest.approx(15.2120, abs=1e-4)
        assert (found.judged, found.total, found.length_controlled) == (11, 12, None)
        assert found.preferences == {
            problem.instruction: float(int(problem.id) % 3 > 0) for problem in PROBLEMS if problem.id != "5"
        }
        assert len(server.requests) == COUNT
        assert {ours_first(request) for request in server.requests} == {True, False}, "the order is shuffled"
        assert server.requests[0].body["model"] == "gpt-4"
        assert server.requests[0].body["temperature"] == 0
        assert win_rate(*files, tmp_path / "out", command=command, judge_url=server.url) == found
        assert len(server.requests) == COUNT, "what the judge has said is not asked for again"


@needs_package
def test_the_package_fails_with_its_judge(files: tuple[Path, Path], tmp_path: Path) -> None:
    command = str(Path(os.environ["DELLA_ALPACA_PYTHON"]).absolute().parent / "alpaca_eval")
    with (
        StubServer(lambda request: Status(401, "no such key")) as server,
        pytest.raises(EvaluationError, match=r"failed with exit code 1 \(.*no such key"),
    ):
        win_rate(*files, tmp_path / "out", command=command, judge_url=server.url)
