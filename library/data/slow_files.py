"""Calls that wait for files: one after the other, or in threads where files answer slowly, as over a network.

From memory or a fast disk one thread is faster than many, which would take turns at the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SLOW_SECONDS = 0.0005  # of waiting per call, not of work: more means a slow disk
SLOW_DISK_THREADS = 32
BETWEEN_LOOKS = 256  # calls between two looks at how slow the files are


class FileCalls(ThreadPoolExecutor):
    """Makes calls, in threads from the first time on that they waited long."""

    def __init__(self) -> None:
        super().__init__(SLOW_DISK_THREADS)  # none is started before it is used
        self.is_slow = False

    def results(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """The function's results, in the order of the items."""
        results: list[Result] = []
        while not self.is_slow and len(results) < len(items):
            chunk = items[len(results) : len(results) + BETWEEN_LOOKS]
            before = time.perf_counter() - time.thread_time()
            results += map(function, chunk)
            self.is_slow = time.perf_counter() - time.thread_time() - before > SLOW_SECONDS * len(chunk)
        return [*results, *self.map(function, items[len(results) :])]
