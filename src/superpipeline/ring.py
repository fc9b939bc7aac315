"""A ring of memory: regions are taken and given back in the same order.

    [ free │ being copied: c0 c1 │ read: c2 │ being read: c3 │ free ]
             oldest                           newest

A region is used again only after the event behind the copy from it.
"""

from collections import deque
from typing import Any

import torch

_ALIGNMENT = 512


class Region:
    """A part of the ring.

    Attributes:
        copied: happens when it may be used again; None as long as it has not been recorded.
    """

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.copied: Any = None


class Ring:
    """The regions of `memory`. Used by one thread."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._taken: deque[Region] = deque()  # the oldest first

    def take(self, num_bytes: int) -> Region | None:
        """A region behind the newest, once the oldest ones' copies are done; blocks until then.

        None: the oldest one is in the way, and its copy has not been issued.
        """
        size = -(-max(num_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        assert size <= self.memory.numel()
        while (begin := self._room(size)) is None:
            oldest = self._taken[0]
            if oldest.copied is None:
                return None
            oldest.copied.synchronize()
            self._taken.popleft()
        self._taken.append(Region(begin, begin + size))
        return self._taken[-1]

    def untake(self) -> None:
        """Gives the newest region back; nothing was written to it."""
        self._taken.pop()

    def _room(self, size: int) -> int | None:
        if not self._taken:
            return 0
        head, tail = self._taken[-1].end, self._taken[0].begin
        if head <= tail:  # wrapped around: what is taken ends where the free part begins
            return head if head + size <= tail else None
        if head + size <= self.memory.numel():
            return head
        return 0 if size <= tail else None
