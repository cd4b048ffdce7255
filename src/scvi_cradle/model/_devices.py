"""Work that is split over devices: a copy of the module and a thread for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator

Worker = TypeVar("Worker")
Item = TypeVar("Item")
Result = TypeVar("Result")
Devices = Sequence[str | torch.device] | None
WAITING_PER_DEVICE = 2


def check_devices(devices: Devices) -> list[torch.device]:
    """Return the devices of a request, none for ``None``.

    Raises
    ------
    ValueError
        If it is no list of devices, or if one of them is not there.
    """
    if devices is None:
        return []
    names = [] if isinstance(devices, str | torch.device) or not isinstance(devices, Sequence) else list(devices)
    try:
        found = [torch.empty(0, device=name).device for name in names]
    except (RuntimeError, AssertionError, TypeError) as error:
        msg = f"`devices` must name devices of this machine; received {devices!r}: {str(error).splitlines()[0]}"
        raise ValueError(msg) from error
    if not found:
        msg = f"`devices` must be a list of devices, such as ['cuda:0', 'cuda:1']; received {devices!r}."
        raise ValueError(msg)
    return found


def copies_on(module: Any, devices: list[torch.device]) -> list[Any]:
    """Return a copy of the module for every device; without devices, the module itself."""
    with torch.inference_mode(mode=False):  # torch rounds linear maps of inference tensors in another way
        return [deepcopy(module).to(device) for device in devices] or [module]


def spread(
    function: Callable[[Worker, Item], Result], workers: Sequence[Worker], items: Iterable[Item]
) -> Iterator[Result]:
    """Yield ``function(worker, item)`` in the order of the items; each worker does one at a time, in its own thread.

    Items are made in the calling thread, a few ahead of the results.
    """
    if len(workers) == 1:
        for item in items:
            yield function(workers[0], item)
        return
    idle = deque(workers)

    @torch.inference_mode()  # which every thread has its own of
    def work(item: Item) -> Result:
        worker = idle.popleft()  # as many threads as workers: one is idle
        try:
            return function(worker, item)
        finally:
            idle.append(worker)

    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(len(workers)) as threads:
        for item in items:
            if len(waiting) == WAITING_PER_DEVICE * len(workers):
                yield waiting.popleft().result()
            waiting.append(threads.submit(work, item))
        while waiting:
            yield waiting.popleft().result()


def block_generator(seed: int, number: int, device: torch.device) -> Generator:
    """Return the generator of a block: its numbers are the same whichever device makes the block, and when."""
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(state[0]))
