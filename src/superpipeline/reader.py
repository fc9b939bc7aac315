"""Reads from disk with several threads, within a budget of memory.

A source is cut into chunks, neighbours in a file are put together to one, and the threads take one
chunk after the other; what is little is read by whoever wants it. What reading a chunk takes beside
its destination (`working_bytes`: a conversion needs some) is bounded by one budget for all threads;
a chunk that is larger than the budget waits until it is alone.

    sources   [ s0: c0 | c1 | c2 ] [ s1: c3 ] ...
    threads   c0 ────── c2 ──────
              c1 ──────── c3 ──
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch

from superpipeline.disk import Piece, Source
from superpipeline.errors import ClosedError
from superpipeline.worker import Worker

_CORES = os.cpu_count() or 1
# Beside compute on the same cores. On 2 cores, streaming 1 GiB in blocks of 64 MiB from the page
# cache took 0.30 s with one thread, 0.22 with two, 0.27 with four; from disk 0.66, 0.82, 1.06.
NUM_THREADS = min(4, max(2, _CORES // 4))
# Where compute is elsewhere.
MANY_THREADS = min(8, max(2, _CORES // 2))
# In the same measurement, 4 MiB took as long; with blocks of 7 MiB it took a fifth longer.
CHUNK_BYTES = 16 * 2**20
BUDGET_BYTES = 256 * 2**20
_LONGEST = 1000  # pieces in a chunk; systems take 1024 at a time
# From the page cache a block of 5 MB in three pieces took 0.65 ms of CPU time by the thread that
# wants it, 0.8 to 0.96 by others; from disk it took no longer either way.
_LITTLE = 8 * 2**20


class _Chunk(NamedTuple):
    """What one thread reads at a time; as it is in a file, or computed."""

    num_bytes: int
    working_bytes: int
    read: Callable[[], object]
    is_in_file: bool = False

    @classmethod
    def of(cls, destination: torch.Tensor, source: Source) -> _Chunk:
        read = partial(source.read_into, destination)
        return cls(source.num_bytes, source.working_bytes, read)


def _chunks(pairs: Iterable[tuple[torch.Tensor, Source]], most: int) -> Iterator[_Chunk]:
    """In parts of at most `most` bytes, where that can be; neighbours in a file are one chunk."""
    pieces: list[tuple[torch.Tensor, Piece]] = []
    for destination, source in pairs:
        for begin, part in source.parts(most):
            memory = destination[begin : begin + part.num_bytes]
            if isinstance(part, Piece):
                pieces.append((memory, part))
            else:
                yield _Chunk.of(memory, part)
    for row in _rows(pieces, most):
        (_, first), memories = row[0], [memory for memory, _ in row]
        num_bytes = sum(piece.num_bytes for _, piece in row)
        read = partial(first.file.read_into, memories, first.offset)
        yield _Chunk(num_bytes, 0, read, is_in_file=True)


def _rows(
    pieces: list[tuple[torch.Tensor, Piece]], most: int
) -> Iterator[list[tuple[torch.Tensor, Piece]]]:
    """Neighbours put together: each call costs, and a disk likes long reads."""
    row: list[tuple[torch.Tensor, Piece]] = []
    num_bytes = 0
    for memory, piece in sorted(pieces, key=lambda pair: (id(pair[1].file), pair[1].offset)):
        last = row[-1][1] if row else piece
        adjoins = last.file is piece.file and last.offset + last.num_bytes == piece.offset
        if row and not (adjoins and num_bytes + piece.num_bytes <= most and len(row) < _LONGEST):
            yield row
            row, num_bytes = [], 0
        row.append((memory, piece))
        num_bytes += piece.num_bytes
    if row:
        yield row


def _is_little(chunks: list[_Chunk]) -> bool:
    """Whether threads would cost more than they save: to wake one takes some 100 µs."""
    in_file = sum(chunk.num_bytes for chunk in chunks if chunk.is_in_file)
    return len(chunks) == 1 or (in_file <= _LITTLE and all(chunk.is_in_file for chunk in chunks))


class Reading:
    """A chunk that is being read."""

    def __init__(self, chunk: _Chunk, on_end: Callable[[], object] | None) -> None:
        self._chunk, self._on_end = chunk, on_end
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Blocks until it has ended.

        Raises:
            DiskError: it failed.
            ClosedError: it was abandoned before it began.
        """
        self._ended.wait()
        if self._error is not None:
            raise self._error

    @property
    def has_ended(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._ended.is_set()

    def wait_for_end(self) -> None:
        """Blocks until nobody writes to the destination any more."""
        self._ended.wait()

    def abandon(self) -> None:
        """Does not begin it; one that has begun goes on."""
        self._error = self._error or ClosedError("the reader was closed")

    def carry_out(self, budget: _Budget) -> None:
        """Reads, on the thread that calls."""
        try:
            with budget.room_for(self._chunk.working_bytes):
                if self._error is None:
                    self._chunk.read()
        except BaseException as error:  # noqa: BLE001  (handed to the thread that waits)
            self._error = error
        self._ended.set()
        if self._on_end is not None:
            self._on_end()


class _Budget:
    """Bytes that several threads share."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes, self._used = num_bytes, 0
        self._changed = threading.Condition()
        # Held while waiting for room, so that a large chunk is not overtaken for ever.
        self._turn = threading.Lock()

    @contextmanager
    def room_for(self, num_bytes: int) -> Iterator[None]:
        """Waits until `num_bytes` are free, or nobody else has any."""
        if not num_bytes:
            yield
            return
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._used or self._fits(num_bytes))
            self._used += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= num_bytes
                self._changed.notify()

    def _fits(self, num_bytes: int) -> bool:
        return self._used + num_bytes <= self._num_bytes


class _Work:
    """What the threads know. They do not know the Reader, which can so be forgotten."""

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        self.queue: SimpleQueue[Reading | None] = SimpleQueue()
        self.is_closed = False
        self._lock = threading.Lock()

    def put(self, reading: Reading) -> None:
        with self._lock:  # behind the None of `close` nobody would ever read it
            if self.is_closed:
                raise ClosedError("the reader was closed")
            self.queue.put(reading)

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            self.queue.put(None)


class Reader:
    """Threads that read; they begin with the first reading and end with `close` or with the Reader.

    Args:
        num_threads: how many chunks are read at a time.
        chunk_bytes: how much is read at a time, where a source can be cut.
        budget_bytes: how much memory all readings may take beside their destinations.
        advance: called by `read` with the bytes of each chunk that has ended, by any thread.

    Example:
        >>> reader = Reader(num_threads=4)
        >>> reader.read([])  # pairs of a destination and a source
        >>> reader.close()
    """

    def __init__(
        self,
        *,
        num_threads: int = NUM_THREADS,
        chunk_bytes: int = CHUNK_BYTES,
        budget_bytes: int = BUDGET_BYTES,
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self._num_threads, self._chunk_bytes = num_threads, chunk_bytes
        self._advance = advance
        self._threads: list[Worker] = []
        self._work = _Work(_Budget(budget_bytes))
        self._stop = weakref.finalize(self, self._work.close)

    def read(self, pairs: Iterable[tuple[torch.Tensor, Source]]) -> None:
        """Fills each destination (uint8) from its source; returns when all are filled.

        What is little is read by the caller.

        Raises:
            DiskError: the first error. Then the rest is not read, and nobody writes to any
                destination any more.
        """
        readings: list[Reading] = []
        try:
            chunks = list(_chunks(pairs, self._chunk_bytes))
            begin = self._read_here if _is_little(chunks) else self._submit
            for chunk in chunks:
                on_end = self._advance and partial(self._advance, chunk.num_bytes)
                readings.append(begin(chunk, on_end))
            for reading in readings:
                reading.wait()
        except BaseException:  # Ctrl-C as well
            for reading in readings:
                reading.abandon()
            raise
        finally:
            for reading in readings:
                reading.wait_for_end()

    def submit(
        self,
        destination: torch.Tensor,
        source: Source,
        *,
        on_end: Callable[[], object] | None = None,
    ) -> Reading:
        """Begins to read `source`, as one chunk, as soon as a thread is free.

        Args:
            on_end: called once it has ended, well or not, by the thread that read.

        Raises:
            ClosedError: the reader was closed.
        """
        return self._submit(_Chunk.of(destination, source), on_end)

    def _read_here(self, chunk: _Chunk, on_end: Callable[[], object] | None) -> Reading:
        if self._work.is_closed:
            raise ClosedError("the reader was closed")
        reading = Reading(chunk, on_end)
        reading.carry_out(self._work.budget)
        return reading

    def _submit(self, chunk: _Chunk, on_end: Callable[[], object] | None) -> Reading:
        reading = Reading(chunk, on_end)
        self._work.put(reading)
        if len(self._threads) < self._num_threads:
            self._threads.append(Worker(partial(_carry_out, self._work), "read", self._stop))
        return reading

    def close(self) -> None:
        """Abandons what has not begun, waits for its threads to end; idempotent."""
        self._stop()
        threads, self._threads = self._threads, []
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()


def _carry_out(work: _Work) -> None:
    while (reading := work.queue.get()) is not None:
        if work.is_closed:
            reading.abandon()
        reading.carry_out(work.budget)
        del reading  # it has the memory that was read into
    work.queue.put(None)  # for the next thread
