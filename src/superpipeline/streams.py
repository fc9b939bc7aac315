"""Named streams and events: everything that the engine may ask of a device.

Two streams matter here. COMPUTE is whatever stream the model runs on at that moment; FETCH carries
host-to-device copies. The verbs never block the host, except where the device is the CPU: there the
host is the compute stream, so waiting in COMPUTE is waiting.

    record(stream)        an event that happens when everything issued so far on `stream` is done
    wait(stream, event)   nothing issued later on `stream` starts before `event` has happened
    copy(runs)            on FETCH, in order; from host memory or from disk

[Note: from disk]
    Bytes on disk have to be read before there is anything to copy, so a thread carries FETCH out
    (on CUDA from the first such copy on). Then `wait(COMPUTE, event)` blocks the host until the
    event has been recorded, since CUDA takes one that was not for done; it still does not wait
    for the event to happen. A read that failed is raised there: by the wait for the event after
    it, which is its block's.

[Note: one fetch stream]
    All fetches run on one stream, first in first out. So a wait in FETCH orders every later fetch
    too, and each `drained` event needs to be waited for only once.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch

from superpipeline.disk import Source
from superpipeline.staging import Fetcher, Ticket, ring_memory


class Stream(Enum):
    """The streams that the engine orders."""

    COMPUTE = "compute"
    FETCH = "fetch"
    OFFLOAD = "offload"


COMPUTE, FETCH, OFFLOAD = Stream.COMPUTE, Stream.FETCH, Stream.OFFLOAD


class Run(NamedTuple):
    """One contiguous copy: device bytes, and as many bytes (uint8) on the host or on disk."""

    destination: torch.Tensor
    source: torch.Tensor | Source


class Leaving(NamedTuple):
    """One copy to the host: two tensors of one shape and dtype, at the device one's strides."""

    destination: torch.Tensor
    source: torch.Tensor


class Streams(Protocol):
    """What an implementation provides; events are its own and opaque.

    Attributes:
        maps_files: whether a run may bring pages of a file in (`paged.py`) instead of copying.
        keeps_time: whether it pays to know how long blocks compute (`stopwatch.py`).
    """

    device: torch.device
    maps_files: bool
    keeps_time: bool

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Device memory (uint8), aligned, allocated on the compute stream."""

    def give_back(self) -> None:
        """Returns what was allocated and forgotten, for memory of other sizes to take its place."""

    def keep_for_copies(self, memory: torch.Tensor) -> None:
        """Whenever `memory`, which `allocate` gave, is forgotten: copies into it come first."""

    def copy(self, runs: Sequence[Run]) -> None:
        """Issues the copies on FETCH."""

    def vacate(self, runs: Sequence[Run]) -> None:
        """Gives back what the runs' destinations hold beside the window, in order with FETCH."""

    def copy_out(self, leaving: Sequence[Leaving]) -> None:
        """Issues copies to the host on OFFLOAD."""

    def synchronize_event(self, event: Any) -> None:
        """Blocks the host until `event` has happened: the host reads what was copied out."""

    def record(self, stream: Stream) -> Any:
        """An event at the present end of `stream`."""

    def wait(self, stream: Stream, event: Any) -> None:
        """Orders what is issued later on `stream` after `event`.

        Raises:
            DiskError: a copy before `event` could not be read.
        """

    def mark(self) -> Any:
        """The moment at which COMPUTE is done with what was issued so far. Orders nothing."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """From one mark to another; None while they have not both happened."""

    def compute_stream(self) -> Any:
        """Which stream COMPUTE is now, to be compared and given to `join`."""

    def join(self, other: Any) -> None:
        """Orders the present compute stream after everything issued on `other`."""

    def synchronize(self) -> None:
        """Blocks the host until both streams are idle. Raises no error of a copy."""

    def close(self) -> None:
        """Ends threads; reads that have not begun are abandoned. Idempotent."""


class CudaStreams:
    """CUDA (and ROCm, under the same names)."""

    maps_files = False
    keeps_time = True

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._fetch = torch.cuda.Stream(self.device)
        self._offload = torch.cuda.Stream(self.device)
        self._known: dict[int, torch.cuda.Stream] = {}
        self._fetcher: Fetcher | None = None  # from the first copy from disk on

    def allocate(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def give_back(self) -> None:
        # The allocator would keep the old window and residents beside the new: twice the bound.
        torch.cuda.empty_cache()

    def keep_for_copies(self, memory: torch.Tensor) -> None:
        # The allocator then waits for what is on FETCH when the last reference goes. Copies from
        # disk that are not there yet have a reference each.
        memory.record_stream(self._fetch)

    def copy(self, runs: Sequence[Run]) -> None:
        if self._fetcher is None and any(not _in_memory(run) for run in runs):
            ring = ring_memory(self.device)
            self._fetcher = Fetcher(_CudaFetch(self._fetch), ring)
        if self._fetcher is not None:
            self._fetcher.copy(runs)
            return
        # set_stream rather than `with torch.cuda.stream`: 10 µs for one copy instead of 35.
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(self._fetch)
        try:
            for destination, source in runs:
                assert isinstance(source, torch.Tensor)
                destination.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(before)

    def vacate(self, runs: Sequence[Run]) -> None:
        pass  # all of it is in the window

    def copy_out(self, leaving: Sequence[Leaving]) -> None:
        before = torch.cuda.current_stream()
        torch.cuda.set_stream(self._offload)
        try:
            for destination, source in leaving:
                destination.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(before)

    def synchronize_event(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def record(self, stream: Stream) -> torch.cuda.Event | Ticket:
        if stream is FETCH and self._fetcher is not None:
            return self._fetcher.record()
        # The host waits for what leaves: asleep, as other threads need the core.
        event = torch.cuda.Event(blocking=stream is OFFLOAD)
        event.record(self._stream(stream))
        return event

    def wait(self, stream: Stream, event: torch.cuda.Event | Ticket) -> None:
        if stream is not FETCH:
            event = event.event() if isinstance(event, Ticket) else event
            self._stream(stream).wait_event(event)
        elif isinstance(event, Ticket):
            return  # of FETCH itself, which is in order
        elif self._fetcher is not None:
            # In order with the copies. The event was recorded before, on the thread that calls.
            self._fetcher.wait(event)
        else:
            self._fetch.wait_event(event)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.compute_stream())
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1e3 if begin.query() and end.query() else None

    def compute_stream(self) -> torch.cuda.Stream:
        # What torch.cuda.current_stream does, without building a new object (8 µs) each time.
        identity = torch._C._cuda_getCurrentStream(self.device.index)
        stream = self._known.get(identity[0])
        if stream is None:
            stream = self._known[identity[0]] = torch.cuda.current_stream(self.device)
        return stream

    def join(self, other: torch.cuda.Stream) -> None:
        self.compute_stream().wait_stream(other)

    def synchronize(self) -> None:
        if self._fetcher is not None:
            self._fetcher.synchronize()
        self._fetch.synchronize()
        self._offload.synchronize()
        self.compute_stream().synchronize()

    def _stream(self, stream: Stream) -> torch.cuda.Stream:
        if stream is COMPUTE:
            return self.compute_stream()
        return self._fetch if stream is FETCH else self._offload

    def close(self) -> None:
        fetcher, self._fetcher = self._fetcher, None
        if fetcher is not None:
            fetcher.close()
        self._known.clear()


class _CudaFetch:
    """The fetch stream, as the thread of a Fetcher uses it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def enter(self) -> None:
        torch.cuda.set_device(self._stream.device)
        torch.cuda.set_stream(self._stream)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        # From memory that is not pinned the driver copies before it returns: slower, still right.
        destination.copy_(source, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # its `synchronize` sleeps, and leaves a core free
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        self._stream.wait_event(event)


def _in_memory(run: Run) -> bool:
    return isinstance(run.source, torch.Tensor)
