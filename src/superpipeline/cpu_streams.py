"""The CPU as a device: the host is the compute stream.

The fetch stream is a thread that copies, first in first out, or nobody at all:

[Note: a fetch without a thread]
    Where all but little of a block is pages of files (see `paged.py`), there is next to nothing to
    do for its fetch, and whoever waits for it does that. A thread would take a core from the
    compute: on 2 cores, 30 blocks of 4.6 MB took 111 ms a token with one and 68 without, where the
    plain model takes 50.

    It is left to the thread all the same while that has work: a copy to the same place may be among
    it, of a fetch that nobody wants any more. What is left of an unwanted fetch is never done.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any
from weakref import finalize

import torch

from superpipeline.disk import Source
from superpipeline.errors import ClosedError
from superpipeline.paged import Pages
from superpipeline.reader import Reader
from superpipeline.streams import FETCH, Leaving, Run, Stream
from superpipeline.worker import Worker

# What whoever waits for a fetch may have to copy: 0.1 ms.
_LITTLE = 2**20

_Pending = list[Callable[[], object]]


class CpuEvent:
    """Set by the copying thread; carries the error of a copy that failed.

    Args:
        pending: what is left to do before it; done by whoever waits first.
    """

    __slots__ = ("_happened", "_pending", "error")

    def __init__(self, pending: _Pending | None = None) -> None:
        self._happened = threading.Event()
        self._pending = pending or []
        self.error: BaseException | None = None

    def happen(self, error: BaseException | None) -> None:
        self.error = error
        self._happened.set()

    def wait(self) -> None:
        self._happened.wait()
        if self.error is not None:
            raise self.error
        while self._pending:
            self._pending[0]()
            self._pending.pop(0)


class CpuStreams:
    """The streams of the CPU."""

    maps_files = True
    keeps_time = False  # copies are made by the cores that compute: there is little to overlap

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: Worker | None = None
        self._reader: Reader | None = None
        self._done = CpuEvent()
        self._done.happen(None)
        self._is_idle = threading.Event()  # the thread has done all that it was given
        self._is_idle.set()
        self._is_recorded = True  # whether an event is behind all that it was given
        self._pending: _Pending = []  # what was issued without it, since the last record
        self._is_over = threading.Event()
        self._stop = finalize(self, _end, self._queue, self._is_over)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            raw = torch.empty(num_bytes + mmap.PAGESIZE, dtype=torch.uint8)
            skip = -raw.data_ptr() % mmap.PAGESIZE
            return raw[skip : skip + num_bytes]

    def give_back(self) -> None:
        pass  # large memory goes back to the system at once

    def keep_for_copies(self, memory: torch.Tensor) -> None:
        pass  # each copy has a reference

    def copy(self, runs: Sequence[Run]) -> None:
        self._check_open()
        if self._reader is None:
            self._reader = Reader()
        mapped, left = _apart(runs)
        carry_out = partial(_land, mapped, left, self._reader)
        if mapped and self._is_idle.is_set() and _are_little(left):
            self._pending += [self._check_open, carry_out]
            return
        self._give(carry_out)
        self._is_recorded = False

    def vacate(self, runs: Sequence[Run]) -> None:
        mapped = [run for run in runs if isinstance(run.source, Pages)]
        if mapped and self._is_idle.is_set():
            _let_go(mapped)
        elif mapped:
            self._give(partial(_let_go, mapped))

    def _give(self, task: Callable[[], object]) -> None:
        """To the thread."""
        if self._thread is None:
            work = partial(_carry_out, self._queue, self._is_over)
            self._thread = Worker(work, "fetch", self._stop)
        self._is_idle = threading.Event()
        self._queue.put(task)
        self._queue.put(self._is_idle.set)

    def _check_open(self) -> None:
        if not self._stop.alive:
            raise ClosedError("the streams were closed")

    def copy_out(self, leaving: Sequence[Leaving]) -> None:
        for destination, source in leaving:
            destination.copy_(source)

    def synchronize_event(self, event: CpuEvent) -> None:
        event.wait()

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def record(self, stream: Stream) -> CpuEvent:
        # The host has carried out what it issued: its events have happened.
        if stream is not FETCH:
            return self._done
        event, self._pending = CpuEvent(self._pending), []
        if self._is_running and not (self._is_recorded and self._is_idle.is_set()):
            self._queue.put(event)
        else:
            event.happen(None)
        self._is_recorded = True
        return event

    def wait(self, stream: Stream, event: CpuEvent) -> None:
        if stream is FETCH:
            assert event is self._done, "only events of the host are waited for in FETCH"
        else:
            event.wait()

    def compute_stream(self) -> None:
        return None

    def join(self, other: None) -> None:
        pass

    def synchronize(self) -> None:
        if self._is_running:
            reached = threading.Event()
            self._queue.put(reached.set)  # no CpuEvent: the error before it is not its own
            reached.wait()

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._stop()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @property
    def _is_running(self) -> bool:
        return self._thread is not None and self._stop.alive


_Task = CpuEvent | Callable[[], Any]


def _end(queue: SimpleQueue[_Task | None], is_over: threading.Event) -> None:
    """Copies that have not begun are not made: nobody will read what they bring."""
    is_over.set()
    queue.put(None)


def _carry_out(queue: SimpleQueue[_Task | None], is_over: threading.Event) -> None:
    """The copying thread: a failed copy is reported by the event after it."""
    error: BaseException | None = None
    while (item := queue.get()) is not None:
        if isinstance(item, CpuEvent):
            item.happen(error)
            error = None
            continue
        if is_over.is_set():
            error = error or ClosedError("the streams were closed")
            continue
        try:
            item()
        except BaseException as caught:  # noqa: BLE001  (handed to the thread that waits)
            error = error or caught
        del item  # it has memory of the window


_Mapped = tuple[torch.Tensor, Pages]


def _apart(runs: Sequence[Run]) -> tuple[list[_Mapped], list[Run]]:
    """What has to be brought in where it is, and what has to be copied."""
    mapped: list[_Mapped] = []
    left: list[Run] = []
    for run in runs:
        if isinstance(run.source, Pages) and not run.source.are_edited:
            mapped.append((run.destination, run.source))
        else:
            left.append(run)
    return mapped, left


def _are_little(runs: Sequence[Run]) -> bool:
    return sum(run.destination.numel() for run in runs) <= _LITTLE


def _land(mapped: Sequence[_Mapped], left: Sequence[Run], reader: Reader) -> None:
    """Copies what is to be copied, then waits for the pages of the rest."""
    on_disk: list[tuple[torch.Tensor, Source]] = []
    for destination, source in left:
        if isinstance(source, torch.Tensor):
            # Lets go of the interpreter lock and takes no thread of the compute.
            ctypes.memmove(destination.data_ptr(), source.data_ptr(), destination.numel())
        else:
            on_disk.append((destination, source))
    reader.read(on_disk)
    # What could not be brought in is read: that says what is wrong.
    reader.read([(place, pages) for place, pages in mapped if not pages.bring(place)])


def _let_go(mapped: Sequence[Run]) -> None:
    for destination, source in mapped:
        assert isinstance(source, Pages)
        source.let_go(destination)
