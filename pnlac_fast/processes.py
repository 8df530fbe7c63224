"""Processes of one machine that share a list of tasks, and end with whoever started them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any

from pnlac_fast.errors import Interrupted


@contextmanager
def pool(
    jobs: int, begin: Callable[..., Any], given: tuple[Any, ...]
) -> Iterator[Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]]:
    """A pool of processes that are started afresh and call ``begin(*given)`` first.

    What the block gets is called as ``map`` is, and gives the results in the order of the tasks.

    Where the block is left by an exception, Ctrl-C and SIGTERM among them, its processes are ended at once instead of
    finishing what they do, which may take hours. Ctrl-C reaches them only by way of the process that started them.

    Raises
    ------
    Interrupted
        One of the processes has ended by itself, as it does where memory is short.
    """
    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")  # a copy of a process with threads of torch could lock up
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(begin, given)) as made:
        try:
            yield partial(_map, made)
        except BaseException as error:
            for child in set(multiprocessing.active_children()) - before:
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise Interrupted(
                    f"One of {jobs} processes was ended from outside, as where memory is short: run the same command "
                    f"again, with fewer --jobs if it was that."
                ) from error
            raise


def _map(made: ProcessPoolExecutor, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    # That of the executor cancels what is left when it is interrupted, over which its own thread then stumbles.
    waiting = list(tasks)
    # Submitting starts the processes, which inherit this: one that still imports would answer Ctrl-C with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        futures = [made.submit(function, task) for task in waiting]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return (future.result() for future in futures)


def _begin(begin: Callable[..., Any], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin(*given)
