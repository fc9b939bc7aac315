"""Pages of files as places: on the CPU a weight that lies in a file as it is computed with is not
copied from the page cache, but computed with where the system has it.

    file      [ header ][ w0 ][ w1 ][ w2 ][ w3 ][ w4 ]...
    mapping   [        ][ w0 ][ w1 ][ -- ][ w3 ][ -- ]...     private, the window's own

The mapping has an address for every weight and, at any time, pages only for those whose turn it is
or comes next: a fetch brings pages in, and whoever takes the place that the plan gave to them lets
them go. So the window's rules hold for them and its bytes count them, without being used. (A weight
in the middle of a page of 2 MiB brings in the whole page.)

A write to a weight during its turn stays in private pages of the mapping until they are let go.
What users edit is another mapping (`DiskFile.tensors`); an edited weight is copied from there.

[Note: what it costs]
    On 2 cores (Linux 6.18, ext4), for each GiB, letting go included: from the page cache 3 to 6 ms
    where it has pages of 2 MiB, else 40 to 130, where copies take 90; from disk 0.4 to 0.9 s and
    0.02 s of CPU time, where reads take 1.0 and 0.8.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import torch

from superpipeline import advice
from superpipeline.disk import Piece, Source
from superpipeline.pagemap import is_private
from superpipeline.worker import Worker

# Enough for a disk to be busy while small blocks compute.
_REACH_BYTES = 32 * 2**20


class Pages(NamedTuple):
    """The source of a run whose destination is the same range of the same file, mapped."""

    piece: Piece

    @property
    def num_bytes(self) -> int:
        return self.piece.num_bytes

    @property
    def working_bytes(self) -> int:
        return 0

    def read_into(self, destination: torch.Tensor) -> None:
        self.piece.read_into(destination)

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        return self.piece.parts(most)

    @property
    def are_edited(self) -> bool:
        """Whether the values are no longer the file's: then they have to be copied."""
        return self.piece.file.private_pages(self.piece.offset, self.num_bytes) > 0

    def bring(self, destination: torch.Tensor) -> bool:
        """Waits until all pages are there, in the mapping. False if one cannot be had.

        Raises:
            DiskError: the file was changed since it was opened.
        """
        begin, end = _pages(destination, outwards=True)
        is_whole = advice.bring(begin, end)
        if is_whole:
            self._renew_ends(destination)
        # After: what was mapped of a changed file must not pass for the weights.
        self.piece.file.check_unchanged(self.piece.offset)
        return is_whole

    def _renew_ends(self, destination: torch.Tensor) -> None:
        """Pages shared with neighbours are never let go: a write to them, which belonged to an
        earlier turn, is undone here."""
        begin, length, page = destination.data_ptr(), destination.numel(), mmap.PAGESIZE
        head = min(-begin % page, length)
        tail = max(head, length - (begin + length) % page)
        for first, last in ((0, head), (tail, length)):
            if first < last and is_private(begin + first):
                self.piece.file.read_into([destination[first:last]], self.piece.offset + first)

    def let_go(self, destination: torch.Tensor) -> None:
        """Lets go of the pages. Only of whole ones: the others may be in use by a neighbour."""
        begin, end = _pages(destination, outwards=False)
        if begin < end:
            advice.let_go(begin, end)
        if not self.piece.file.keep_cached:
            self.piece.file.drop(self.piece.offset, self.num_bytes)


class ReadAhead:
    """Has the pages that are wanted soon read, further ahead than the window has room.

    A thread brings them in through mappings of its own and lets them go at once: then the system
    has them, and takes them back where memory is short. It runs only for what is not in memory,
    and waits for the disk nearly all of the time.

    Args:
        runs: of each block, by index.
    """

    def __init__(self, runs: Sequence[Sequence[tuple[torch.Tensor, object]]]) -> None:
        self._pages = [
            [source for _, source in block if isinstance(source, Pages)] for block in runs
        ]
        self._sizes = [sum(pages.num_bytes for pages in block) for block in self._pages]
        self._is_used = any(self._pages)
        self._asked: set[int] = set()
        self._queue: SimpleQueue[Pages | None] = SimpleQueue()
        self._thread: Worker | None = None
        self._stop = weakref.finalize(self, self._queue.put, None)

    def look(self, upcoming: Iterable[int]) -> None:
        """`upcoming` may be endless. Costs 1 µs for each block in reach, 3 for each new run."""
        seen: set[int] = set()
        num_bytes = 0
        for block in upcoming if self._is_used else ():
            if block in seen or num_bytes > _REACH_BYTES:
                break
            seen.add(block)
            num_bytes += self._sizes[block]
            if block not in self._asked:
                self._ask(self._pages[block])
        self._asked = seen

    def _ask(self, wanted: Sequence[Pages]) -> None:
        for pages in wanted:
            if pages.piece.file.is_cached(*pages.piece[1:]):
                continue
            if self._thread is None:
                self._thread = Worker(partial(_read_ahead, self._queue), "read-ahead", self._stop)
            self._queue.put(pages)


def _read_ahead(queue: SimpleQueue[Pages | None]) -> None:
    while (pages := queue.get()) is not None:
        file, offset, num_bytes = pages.piece
        file.cache(offset, num_bytes)


def _pages(memory: torch.Tensor, *, outwards: bool) -> tuple[int, int]:
    """The range of addresses of the pages that `memory` touches, or of those that it fills."""
    begin, end, page = memory.data_ptr(), memory.data_ptr() + memory.numel(), mmap.PAGESIZE
    if outwards:
        return begin // page * page, -(-end // page) * page
    return -(-begin // page) * page, end // page * page
