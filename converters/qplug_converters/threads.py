"""Work shared as blocks among Python threads, each with torch's own threads off.

torch's threads meet after every pass of some 30 microseconds; on an idle machine that is as fast,
but with one other busy process on two cores it was 5 to 20 times slower, and blocks stayed at
their share.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], None]
Cut = tuple[tuple[slice, slice], tuple[slice, slice]]
"""Where a block lies in the first and in the second tensor of a kernel."""


@cache
def _setter() -> Callable[[int], object]:
    """Return what sets torch's number of threads for the calling thread alone.

    `torch.set_num_threads` also sets the process's number, which every thread takes over at its
    first use of torch; threads that set and restore it at once lose it. OpenMP's own function
    does not. It may come from a preloaded library or from the one that torch was linked with.
    """
    before = torch.get_num_threads()
    for library in (None, torch._C.__file__):
        found = getattr(ctypes.CDLL(library), "omp_set_num_threads", None)
        if found is None:
            continue
        found(before + 1)
        set_here = torch.get_num_threads() == before + 1
        found(before)
        if set_here:
            return found  # type: ignore[no-any-return]
    return torch.set_num_threads  # a torch without OpenMP


@contextmanager
def alone() -> Iterator[None]:
    """Turn torch's threads off in the calling thread, and in no other."""
    set_number = _setter()
    before = torch.get_num_threads()  # a new thread takes the process's over now, not later
    set_number(1)
    try:
        yield
    finally:
        set_number(before)


MOST_WORKERS = 6
"""Bounds the memory of what runs on `workers` on any machine; a disk is busy before that."""


def _stay_alone() -> None:
    """Turn torch's threads off in the calling thread for good: how a worker begins."""
    torch.get_num_threads()  # takes the process's number over now, not later
    _setter()(1)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as torch has, up to a bound, each with torch's own threads off.

    A linear to a thread beats all threads on one linear: small linears are mostly Python.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, MOST_WORKERS), initializer=_stay_alone)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if torch.get_num_threads() != threads:  # a torch whose number is the process's
            torch.set_num_threads(threads)


def share(
    make: Callable[[Tensor, Tensor], Kernel], first: Tensor, second: Tensor, cuts: list[Cut]
) -> None:
    """Run `kernel(first[block], second[block])` over all blocks, on as many threads as torch has.

    `make` builds the kernel for blocks of these shapes; each thread has its own, with its scratch.
    """
    todo = deque(cuts)
    failures: list[BaseException] = []

    def work() -> None:
        kernels: dict[torch.Size, Kernel] = {}
        try:
            with alone():
                while todo:
                    try:
                        one, other = todo.popleft()
                    except IndexError:  # another thread took the last one
                        return
                    a, b = first[one], second[other]
                    if b.shape not in kernels:
                        kernels[b.shape] = make(a, b)
                    kernels[b.shape](a, b)
        except BaseException as error:  # raised again below, in the calling thread
            todo.clear()
            failures.append(error)

    count = min(torch.get_num_threads(), len(cuts))
    others = [threading.Thread(target=work) for _ in range(count - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]
