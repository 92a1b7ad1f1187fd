"""Jobs in threads: results in order, the first failure, nothing begun after it, and interrupts."""

from __future__ import annotations

import _thread
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from della.running.workers import Stopped, each


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(), max_size=40), st.integers(1, 5), st.booleans())
def test_results_come_in_the_order_of_the_jobs(jobs: list[int], threads: int, apart: bool) -> None:
    assert each(lambda n: 3 * n, jobs, threads, apart=apart) == [3 * n for n in jobs]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_several_are_at_work_at_a_time(threads: int) -> None:
    meeting = threading.Barrier(threads)
    each(lambda n: meeting.wait(30), range(3 * threads), threads, apart=True)
    assert not meeting.broken


@pytest.mark.parametrize(("threads", "apart"), [(1, False), (1, True), (3, False)])
def test_nothing_is_begun_after_a_failure(threads: int, apart: bool) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number >= 3:
            raise ValueError(number)

    with pytest.raises(ValueError, match=r"^[345]$"):
        each(work, range(100), threads, apart=apart)
    assert 4 <= len(begun) <= 3 + threads


def test_those_at_work_hear_of_a_failure_and_it_is_the_failure_that_is_told() -> None:
    stop, waiting = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            waiting.set()
            assert stop.wait(30)
            raise Stopped
        assert waiting.wait(30)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        each(work, range(2), 2, stop=stop)
    with pytest.raises(Stopped):
        each(work, range(2), 2, stop=stop)


@pytest.mark.parametrize("count", [1, 2, 9, 500])
def test_an_interrupt_waits_for_what_is_at_work(count: int) -> None:
    """A real one, which may come while jobs are still handed out."""
    stop, ended = threading.Event(), []

    def work(number: int) -> None:
        if not number:
            _thread.interrupt_main()
        while not stop.is_set():
            time.sleep(0.001)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        each(work, range(count), 2, stop=stop)
    assert len(ended) <= 2


def test_nothing_to_do_ends_at_once() -> None:
    assert each(str, range(0), 2) == []
