"""The learned order: which block comes next.

The first pass discovers; later ones predict from a table keyed on the last two visits and whether
gradients are on (so `generate`, which calls the encoder outside the model's forward, is learned
too). A wrong guess costs a wait, never a result.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

# A pass longer than this is remembered by its beginning only; the successor table goes on learning.
_LONGEST_TRACE = 100_000


class Order:
    """The successor table and the trace of the pass that is running.

    Attributes:
        trace: the blocks visited in this pass, resident ones too.
    """

    def __init__(self, circle: Sequence[int]) -> None:
        self.trace: list[int] = []
        self._next: dict[tuple[int, int, bool], int] = {}
        self._mode = False
        self._before = self._last = -1
        self.follow(circle)

    def follow(self, circle: Sequence[int]) -> None:
        """Takes `circle` as the guess wherever nothing was learned."""
        closed = [*circle, *circle[:1]]
        self._guess: dict[int, int] = {}
        for block, successor in pairwise(closed):
            self._guess.setdefault(block, successor)
        self._first = circle[0] if circle else None

    def begin_pass(self, *, mode: bool) -> None:
        self.trace = []
        self._mode = mode

    def visit(self, block: int, *, placed: bool) -> None:
        """Notes a visit; blocks without a place are noted in the trace only."""
        if len(self.trace) < _LONGEST_TRACE:
            self.trace.append(block)
        if placed and block != self._last:
            self._next[self._before, self._last, self._mode] = block
            self._before, self._last = self._last, block

    def upcoming(self) -> Iterator[int]:
        """The blocks expected next, without end (or until nothing is known)."""
        before, last = self._before, self._last
        while True:
            block = self._next.get((before, last, self._mode))
            if block is None:
                block = self._guess.get(last, self._first)
            if block is None:
                return
            yield block
            before, last = last, block
