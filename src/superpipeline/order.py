"""The learned order: which block comes next.

The first pass discovers; later ones predict from a table keyed on the last two visits and the phase
(so `generate`, which calls the encoder outside the model's forward, is learned too). A backward is
guessed to visit the blocks in reverse. A wrong guess costs a wait, never a result.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import pairwise

# A pass longer than this is remembered by its beginning only; the successor table goes on learning.
_LONGEST_TRACE = 100_000


class Phase(Enum):
    """What is running: forwards with and without a graph differ, and a backward from both."""

    NO_GRAD = "forward"
    GRAD = "forward with gradients"
    BACKWARD = "backward"


class Order:
    """The successor table and the trace of the pass that is running.

    Attributes:
        trace: the blocks visited in this pass, resident ones too.
        changes: grows with whatever changes the guess.
    """

    def __init__(self, circle: Sequence[int]) -> None:
        self.trace: list[int] = []
        self.changes = 0
        self._next: dict[tuple[int, int, Phase], int] = {}
        self._phase = Phase.NO_GRAD
        self._before = self._last = -1
        self._has_turned = False
        self.follow(circle)

    def follow(self, circle: Sequence[int]) -> None:
        """Takes `circle` as the guess wherever nothing was learned."""
        self.changes += 1
        closed = [*circle, *circle[:1]]
        self._guess: dict[int, int] = {}
        self._guess_back: dict[int, int] = {}
        for block, successor in pairwise(closed):
            self._guess.setdefault(block, successor)
            self._guess_back[successor] = block
        self._first = circle[0] if circle else None

    def begin_pass(self, phase: Phase) -> None:
        self.trace = []
        self.changes += 1
        self._phase, self._has_turned = phase, False

    def turn_back(self) -> None:
        """A backward begins, or is expected next; most likely where the forward has ended."""
        self.changes += 1
        self._phase = Phase.BACKWARD
        self._has_turned = True

    def go_on(self) -> None:
        """A backward within a forward has ended."""
        self.changes += 1
        self._phase, self._has_turned = Phase.GRAD, False

    def visit(self, block: int, *, placed: bool) -> None:
        """Notes a visit; blocks without a place are noted in the trace only."""
        if self._phase is not Phase.BACKWARD and len(self.trace) < _LONGEST_TRACE:
            self.trace.append(block)
        self._has_turned &= not placed
        self.changes += placed
        if placed and block != self._last:
            self._next[self._before, self._last, self._phase] = block
            self._before, self._last = self._last, block

    def upcoming(self) -> Iterator[int]:
        """The blocks expected next, without end (or until nothing is known)."""
        before, last = self._before, self._last
        if self._has_turned and last != -1:
            yield last
        while True:
            block = self._next.get((before, last, self._phase))
            if block is None:
                guess = self._guess_back if self._phase is Phase.BACKWARD else self._guess
                block = guess.get(last, self._first)
            if block is None:
                return
            yield block
            before, last = last, block
