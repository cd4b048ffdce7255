"""Where tasks run: in this process, in several of this machine, or on a Dask cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Any

from scvi_cradle.benchmark._screen import first_line

KILLED = (
    "A process that did nothing else was killed on this task, perhaps for lack of memory: run it where there is more."
)
Tasks = dict[Any, tuple[Callable[..., Any], Sequence[Any]]]
Runner = Callable[[Tasks], Iterator[tuple[Any, Any]]]  # yields the key and the result of every task as it ends


@contextmanager
def runner(jobs: int, scheduler: str | None) -> Iterator[Runner]:
    """Yield what runs tasks; the tasks of a process of its own must be functions that can be imported there.

    Parameters
    ----------
    jobs
        Number of processes of this machine; 1: this process.
    scheduler
        Address of a Dask scheduler, instead of ``jobs``.

    Raises
    ------
    ValueError
        If there is no cluster, or its package is not installed.
    """
    if scheduler is not None:
        with _cluster(scheduler) as client, client.get_executor(pure=False) as executor:
            yield partial(_on_cluster, executor)
    elif jobs == 1:
        yield _here
    else:
        processes = Processes(jobs)
        try:
            yield processes.run
        finally:
            processes.close()


def _here(tasks: Tasks) -> Iterator[tuple[Any, Any]]:
    for key, (function, arguments) in tasks.items():
        yield key, function(*arguments)


class Processes:
    """Processes of this machine.

    When one is killed, the tasks that are left go on with one process less; a task that kills a lone process is given up.

    Parameters
    ----------
    jobs
        Number of processes.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None

    def run(self, tasks: Tasks) -> Iterator[tuple[Any, Any]]:
        """Yield the key and the result of every task as it ends."""
        left = dict(tasks)
        while left:
            broken = False
            self.pool = self.pool or ProcessPoolExecutor(self.jobs, get_context("spawn"), _end_with_parent)
            futures: dict[Future[Any], Any] = {}
            try:
                for key, (function, arguments) in left.items():
                    futures[self.pool.submit(function, *arguments)] = key
            except BrokenProcessPool:
                broken = True
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    broken = True
                    continue
                del left[futures[future]]
                yield futures[future], result
            if broken:
                self.close()
                if self.jobs == 1:  # tasks are begun in their order
                    key = next(iter(left))
                    del left[key]
                    yield key, KILLED
                self.jobs = max(1, self.jobs - 1)

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


@contextmanager
def _cluster(scheduler: str) -> Iterator[Any]:
    try:
        from distributed import Client
    except ImportError as error:
        msg = f"`scheduler` needs the package distributed, which is not installed; received {scheduler!r}: `pip install 'scvi-cradle[cluster]'`, or use `jobs`."
        raise ValueError(msg) from error
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        msg = f"`scheduler` must be the address of a Dask scheduler; received {scheduler!r}: {first_line(error)}."
        raise ValueError(msg) from error
    with client:
        yield client


def _on_cluster(executor: Executor, tasks: Tasks) -> Iterator[tuple[Any, Any]]:
    futures = {executor.submit(function, *arguments): key for key, (function, arguments) in tasks.items()}
    for future in as_completed(futures):
        try:
            yield futures[future], future.result()
        except Exception as error:  # noqa: BLE001 - a worker may be lost in many ways
            yield futures[future], f"{type(error).__name__}: {first_line(error)}."


def _end_with_parent() -> None:
    """End this worker when its parent is gone: a killed parent cannot say so, and the worker would wait for ever."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
