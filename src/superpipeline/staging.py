"""From disk to an accelerator: through a ring of pinned memory, by a thread that reads ahead.

Once weights come from disk, a fetch is more than something to issue: its bytes have to be read
first. So everything on the fetch stream, in order, is left to one thread. It waits for nothing but
the disk and the ring. Readers fill the ring ahead of the copies, over the ends of blocks too.

    issued by the engine   copy b1 ─── record ─── wait ─── copy b2 ─── record
    reading ahead          c0 c1 c2 ────────────────────── c3 c4
    the fetch stream       copy c0, copy c1, copy c2, record, wait, copy c3 ...

An error belongs to the record after it: whoever waits for that event gets it, and what follows is
carried out.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from superpipeline.disk import Source
from superpipeline.errors import ClosedError
from superpipeline.notices import warn
from superpipeline.reader import CHUNK_BYTES, MANY_THREADS, Reader, Reading
from superpipeline.ring import Region, Ring
from superpipeline.sizes import format_bytes
from superpipeline.worker import Worker

RING_BYTES = 128 * 2**20  # of pinned memory, for each model that streams from disk

StagedRun = tuple[torch.Tensor, torch.Tensor | Source]


class FetchStream(Protocol):
    """A device's stream for copies, as one thread uses it."""

    def enter(self) -> None:
        """Called once, on that thread."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Issues a copy from host memory."""

    def record(self) -> Any:
        """An event behind everything issued; has `synchronize()`."""

    def wait(self, event: Any) -> None:
        """Orders what is issued later after `event`."""


class Ticket:
    """An event that the thread is going to record."""

    def __init__(self) -> None:
        self._issued = threading.Event()
        self._event: Any = None
        self._error: BaseException | None = None

    def issue(self, event: Any, error: BaseException | None) -> None:
        """Called once, by the thread."""
        self._event, self._error = event, error
        self._issued.set()

    def event(self) -> Any:
        """The device's event. Blocks the host until it is recorded, not until it happens.

        Raises:
            DiskError: of the copies before it one could not be read.
        """
        self._issued.wait()
        if self._error is not None:
            raise self._error
        return self._event

    def wait(self) -> None:
        """Blocks the host until it is recorded; raises nothing."""
        self._issued.wait()


class _Call:
    """A step that is carried out in its turn and needs nothing before."""

    def __init__(self, carry_out: Callable[[], None]) -> None:
        self.finish = carry_out

    def start(self) -> bool:
        return True

    def is_ready(self) -> bool:
        return True


class _Chunk:
    """Reads into the ring ahead of its turn; copies from there in its turn."""

    def __init__(self, line: _Line, run: StagedRun, begin: int, source: Source) -> None:
        self._line, self._source = line, source
        self._destination, self._begin = run[0], begin
        self._region: Region | None = None
        self._reading: Reading | None = None

    def start(self) -> bool:
        """Begins to read, if the ring has room."""
        ring = self._line.ring
        self._region = ring.take(self._source.num_bytes)
        if self._region is None:
            return False
        try:
            self._reading = self._line.reader.submit(
                self._staged(), self._source, on_end=self._line.wake
            )
        except BaseException:
            ring.untake()
            raise
        return True

    def is_ready(self) -> bool:
        assert self._reading is not None
        return self._reading.has_ended

    def finish(self) -> None:
        assert self._reading is not None and self._region is not None
        try:
            self._reading.wait()
            end = self._begin + self._source.num_bytes
            self._line.stream.copy(self._destination[self._begin : end], self._staged())
        finally:
            # Protects the region from the next read into it.
            self._region.copied = self._line.record()

    def _staged(self) -> torch.Tensor:
        assert self._region is not None
        begin = self._region.begin
        return self._line.ring.memory[begin : begin + self._source.num_bytes]


class _Large:
    """What is too large for the ring and cannot be cut: memory of its own, one at a time."""

    def __init__(self, line: _Line, run: StagedRun, begin: int, source: Source) -> None:
        self._line, self._source = line, source
        self._destination, self._begin = run[0], begin

    def start(self) -> bool:
        return True

    def is_ready(self) -> bool:
        return True

    def finish(self) -> None:
        stream, num_bytes = self._line.stream, self._source.num_bytes
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._line.reader.submit(memory, self._source).wait()
        stream.copy(self._destination[self._begin : self._begin + num_bytes], memory)
        stream.record().synchronize()  # protects `memory`, which goes now


class _Woken(NamedTuple):
    """In the queue: a read has ended."""


_Step = _Call | _Chunk | _Large


class _Line:
    """What the thread knows. It does not know the Fetcher, which can so be forgotten."""

    def __init__(self, stream: FetchStream, memory: torch.Tensor, reader: Reader) -> None:
        self.stream, self.ring, self.reader = stream, Ring(memory), reader
        self.queue: SimpleQueue[_Step | _Woken | None] = SimpleQueue()
        self._ahead: deque[_Step] = deque()  # started, the oldest first
        self._is_over = threading.Event()
        self._error: BaseException | None = None

    def serve(self) -> None:
        """Starts steps as far ahead as there is room, and finishes them in order."""
        self._finish(_Call(self.stream.enter))
        while (step := self._next()) is not None:
            try:
                self._refuse_if_over(step)
                while not step.start():
                    self._finish(self._ahead.popleft())
            except BaseException as error:  # noqa: BLE001  (raised again in the step's turn)
                step = _Call(partial(_raise, error))
            self._ahead.append(step)
            del step  # it has memory of the window
        while self._ahead:
            self._finish(self._ahead.popleft())
        # Protects the ring, which goes now, from being freed while it is copied from.
        self._finish(_Call(lambda: self.stream.record().synchronize()))

    def end(self) -> None:
        """What was read is copied; reads that have not begun are not made: nobody will use them."""
        self._is_over.set()
        self.queue.put(None)

    def _refuse_if_over(self, step: _Step) -> None:
        if self._is_over.is_set() and not isinstance(step, _Call):
            raise ClosedError("the fetch thread was closed")

    def wake(self) -> None:
        """Called when a read has ended: the oldest step may now be ready."""
        self.queue.put(_Woken())

    def _next(self) -> _Step | None:
        while True:
            while self._ahead and self._ahead[0].is_ready():
                self._finish(self._ahead.popleft())
            step = self.queue.get()
            if not isinstance(step, _Woken):
                return step

    def _finish(self, step: _Step) -> None:
        try:
            step.finish()
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
            self._error = self._error or error

    def record(self) -> Any:
        """An event of the stream; if the device is dead, one that cannot be waited for."""
        try:
            return self.stream.record()
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
            self._error = self._error or error
            return _Never(error)

    def issue(self, ticket: Ticket) -> None:
        """Records an event for whoever holds `ticket`, with the error of what is before it."""
        event = self.record()
        error, self._error = self._error, None
        ticket.issue(event, error)


class _Never(NamedTuple):
    """The event that a dead device did not record."""

    error: BaseException

    def synchronize(self) -> None:
        raise self.error


def _raise(error: BaseException) -> None:
    raise error


class Fetcher:
    """The thread; it ends with `close` or with the Fetcher. To be used from one thread at a time.

    Costs `memory` (the ring; pinned, or copies are slow) and one chunk that cannot be cut.

    Raises:
        ClosedError: from `copy`, `record` and `wait` after `close`.
    """

    def __init__(
        self,
        stream: FetchStream,
        memory: torch.Tensor,
        *,
        num_threads: int = MANY_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._chunk_bytes = min(chunk_bytes, memory.numel() // 2)
        self._reader = Reader(num_threads=num_threads)
        self._line = _Line(stream, memory, self._reader)
        self._stop = weakref.finalize(self, self._line.end)
        self._thread = Worker(self._line.serve, "fetch", self._stop)

    def copy(self, runs: Sequence[StagedRun]) -> None:
        """Copies in order; what is on disk goes through the ring."""
        for run in runs:
            destination, source = run
            if isinstance(source, torch.Tensor):
                self._put(_Call(partial(self._line.stream.copy, destination, source)))
                continue
            for begin, part in source.parts(self._chunk_bytes):
                fits = part.num_bytes <= self._chunk_bytes
                self._put((_Chunk if fits else _Large)(self._line, run, begin, part))

    def record(self) -> Ticket:
        """An event behind everything so far."""
        ticket = Ticket()
        self._put(_Call(partial(self._line.issue, ticket)))
        return ticket

    def wait(self, event: Any) -> None:
        """Orders what follows after `event`, of another stream, which has been recorded."""
        self._put(_Call(partial(self._line.stream.wait, event)))

    def synchronize(self) -> None:
        """Blocks until everything was issued. Raises no read's error: that is its event's."""
        if self._stop.alive:
            ticket = Ticket()
            self._put(_Call(partial(ticket.issue, None, None)))
            ticket.wait()

    def close(self) -> None:
        """Abandons reads that have not begun, ends the threads; idempotent."""
        self._reader.close()
        self._stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _put(self, step: _Step) -> None:
        if not self._stop.alive:
            raise ClosedError("the fetch thread was closed")
        self._line.queue.put(step)


def ring_memory(device: torch.device) -> torch.Tensor:
    """What reads for `device` land in: pinned, or ordinary memory if that is refused (it warns).

    From the allocator that pins: slower than to register a mapping (0.7 s/GiB), and it keeps the
    memory for whoever streams next, but it is one call, and this is small and a power of two.
    """
    with torch.inference_mode(False), torch.cuda.device(device):
        try:
            return torch.empty(RING_BYTES, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            warn(
                f"the system refused to pin {format_bytes(RING_BYTES)} of host memory for reads "
                f"from disk; copies to {device} will be slower. Raise the limit (ulimit -l; on WSL "
                f"the memory in .wslconfig)"
            )
            return torch.empty(RING_BYTES, dtype=torch.uint8)
