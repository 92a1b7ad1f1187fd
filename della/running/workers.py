"""Workers: one function over independent jobs, several at a time; what comes out is the same however many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# A signal that comes just before a wait without a time limit is heard when the wait is over, by Python.
HEARS = 0.2  # seconds
Job = TypeVar("Job")
Found = TypeVar("Found")


class Stopped(Exception):
    """Another job failed, or the user interrupted."""


def each(
    work: Callable[[Job], Found], jobs: Iterable[Job], threads: int, *, stop: threading.Event | None = None,
    apart: bool = False,
) -> list[Found]:  # fmt: skip
    """``work`` done for every job; when one fails, no other is begun.

    Args:
        work: called with a job, in one of the threads.
        jobs: in the order in which they are begun.
        threads: how many are worked on at a time.
        stop: is set when a job fails or the user interrupts, so that others may end early, with Stopped.
        apart: also a single thread is one of its own; an interrupt then waits for the job that it is at.

    Returns:
        What ``work`` returned, in the order of ``jobs``.

    Raises:
        Exception: the failure of the first job that failed; Stopped only if none failed otherwise.
    """
    if threads == 1 and not apart:
        return [work(job) for job in jobs]
    ended, over, given = stop or threading.Event(), threading.Event(), list(jobs)
    lock, left = threading.Lock(), len(given)

    def one(job: Job) -> Found:
        nonlocal left
        try:
            if ended.is_set():
                raise Stopped
            return work(job)
        except BaseException:
            ended.set()
            over.set()
            raise
        finally:
            with lock:
                left -= 1
                if not left:
                    over.set()

    with ThreadPoolExecutor(threads, thread_name_prefix="della") as pool:
        try:  # around the first submit too: an interrupt may come while jobs are still handed out
            futures = [pool.submit(one, job) for job in given]
            # concurrent.futures.wait takes the lock of every future in turn, and an interrupt meanwhile would
            # leave some of them taken: no worker could end any more.
            while given and not over.wait(HEARS):
                pass
        except BaseException:
            ended.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    failures = [error for each in futures if not each.cancelled() and (error := each.exception())]
    for failure in sorted(failures, key=lambda error: isinstance(error, Stopped)):
        raise failure
    return [each.result() for each in futures]
