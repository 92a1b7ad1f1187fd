"""The store of answers: what survives, what is dropped, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from della.errors import EvaluationError, OutputError
from della.evaluate.generations import Store

SETTINGS = {"model": "m", "stops": ("a", "b"), "limit": None}
HEADER = (
    '{"della": "generations", "format": 1, "settings": {"model": "m", "stops": ["a", "b"], "limit": null}}\n'
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A store with the answers 1 and 2."""
    with Store(tmp_path / "of/answers.jsonl", SETTINGS) as store:
        store.add({"id": "1", "answer": "Café\n\ud800"}, {"id": "2", "answer": ""})
    return store.path


LINES = '{"id": "1", "answer": "Café\\n?"}\n{"id": "2", "answer": ""}\n'


def test_answers_are_lines_and_are_read_again(file: Path) -> None:
    assert file.read_text(encoding="utf-8") == HEADER + LINES
    with Store(file, SETTINGS) as store:
        assert store.records == {"1": {"id": "1", "answer": "Café\n?"}, "2": {"id": "2", "answer": ""}}
        store.add({"id": "3"})
    with Store(file, None) as store:
        assert list(store.records) == ["1", "2", "3"]


def test_wherever_the_end_was_cut_off_whole_lines_stay_and_it_can_be_resumed(file: Path) -> None:
    whole = file.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with Store(file, SETTINGS) as store:
            kept = sum(end <= size for end in ends[1:])
            assert list(store.records) == ["1", "2"][:kept]
            store.add({"id": "9"})
        assert file.read_text(encoding="utf-8") == (
            HEADER + "".join(LINES.splitlines(keepends=True)[:kept]) + '{"id": "9"}\n'
        )


def test_a_damaged_end_is_dropped(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0" * 40 + b"\n" + b"\0" * 40)
    with Store(file, SETTINGS) as store:
        assert list(store.records) == ["1", "2"]
    assert file.read_text(encoding="utf-8") == HEADER + LINES


def test_damage_before_a_good_line_is_told(file: Path) -> None:
    file.write_text(HEADER + "{}\n" + LINES, encoding="utf-8")
    with pytest.raises(EvaluationError) as error:
        Store(file, SETTINGS)
    assert str(error.value) == (
        f"{file}:2: expected a JSON object with a text as 'id'; delete this line, and its answer is "
        "asked for again"
    )
    assert file.read_text(encoding="utf-8") == HEADER + "{}\n" + LINES
    file.write_text(HEADER + LINES + LINES, encoding="utf-8")
    with Store(file, SETTINGS) as store:
        assert list(store.records) == ["1", "2"]


def test_other_settings_are_refused_by_name_unless_it_is_begun_anew(file: Path) -> None:
    with pytest.raises(EvaluationError) as error:
        Store(file, {"model": "n", "stops": ["a", "b"], "limit": None, "seed": 1})
    assert str(error.value) == (
        f'{file}: its answers are of other settings: model "m", now "n"; seed null, now 1; choose another '
        "out, or begin anew with fresh=True"
    )
    assert file.read_text(encoding="utf-8") == HEADER + LINES
    with Store(file, {"model": "n"}, fresh=True) as store:
        assert store.records == {}
    assert file.read_text() == '{"della": "generations", "format": 1, "settings": {"model": "n"}}\n'


def test_a_file_without_answers_takes_new_settings(tmp_path: Path) -> None:
    Store(tmp_path / "a.jsonl", {"model": "n"}).close()
    with Store(tmp_path / "a.jsonl", SETTINGS) as store:
        store.add({"id": "1"})
    assert (tmp_path / "a.jsonl").read_text() == HEADER + '{"id": "1"}\n'


@pytest.mark.parametrize("content", [b"notes of mine", b"[]\n", b'{"settings": {}}\n', b"\0" * 100, b"\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(EvaluationError) as error:
        Store(file, SETTINGS)
    assert str(error.value) == f"{file}: not a file of answers that della has written; choose another out"
    assert file.read_bytes() == content


def test_no_file_at_all_is_told(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EvaluationError, match=r"pipe: not a plain file; choose another out$"):
        Store(tmp_path / "pipe", SETTINGS)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvaluationError, match="link: not a plain file"):
        Store(tmp_path / "link", SETTINGS)
    assert not (tmp_path / "elsewhere").exists()


def test_one_evaluation_at_a_time(file: Path) -> None:
    program = (
        "from della.evaluate.generations import Store; from pathlib import Path; "
        f"Store(Path({str(file)!r}), None)"
    )
    command = [sys.executable, "-c", program]
    with Store(file, SETTINGS):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.stderr.strip().endswith(
            f"{file}: another evaluation is writing it; wait for its end, or choose another out"
        )
    subprocess.run(command, check=True)


def test_a_full_disk_leaves_whole_lines(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from della.output import disk

    def full(fd: int, content: memoryview, at: int) -> None:
        os.pwrite(fd, content[:5], at)
        raise OSError(errno.ENOSPC, "no space")

    with Store(file, SETTINGS) as store:
        with monkeypatch.context() as patch:
            patch.setattr(disk, "write_at", full)
            with pytest.raises(OutputError, match=r"answers\.jsonl: the disk is full; free some space"):
                store.add({"id": "3", "answer": "long"})
        assert file.read_text(encoding="utf-8") == HEADER + LINES
        assert "3" not in store.records
        store.add({"id": "4"})
    assert [json.loads(line).get("id") for line in file.read_text().splitlines()] == [None, "1", "2", "4"]
