"""How long blocks compute: some passes are timed, so that the plan can follow.

Moments are events of the compute stream, read when the device has long passed them: nothing waits.
A pass of few kernels takes as long as the host needs to launch them; that is what counts as well.
"""

from typing import Any

from superpipeline.streams import Streams


class Stopwatch:
    """One pass: when each turn's bytes were there, and when its work was done."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._turns: list[tuple[int, Any, Any]] = []
        self._open: tuple[int, Any] | None = None
        self.is_over = False

    def begin_turn(self, block: int) -> None:
        self._open = block, self._streams.mark()

    def end_turn(self) -> None:
        """Work between two turns belongs to the first."""
        if self._open is not None:
            self._turns.append((*self._open, self._streams.mark()))
            self._open = None

    def end_pass(self) -> None:
        self.is_over = True

    def read(self) -> dict[int, float] | None:
        """Seconds of one visit of each block; None while the device is not done."""
        total: dict[int, list[float]] = {}
        for block, begin, end in reversed(self._turns):
            seconds = self._streams.seconds(begin, end)
            if seconds is None:
                return None
            total.setdefault(block, []).append(seconds)
        return {block: sum(all_of_it) / len(all_of_it) for block, all_of_it in total.items()}


class Timing:
    """Which passes are timed: those without gradients, the 1st, 2nd, 4th, 8th, and so on."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._count = 0
        self._watch: Stopwatch | None = None

    def begin_pass(self) -> Stopwatch | None:
        """A watch for the pass that begins, if it is to be timed."""
        self._count += 1
        if self._count & (self._count - 1):
            return None
        self._watch = Stopwatch(self._streams)
        return self._watch

    def times(self) -> dict[int, float] | None:
        """What the latest timed pass has shown, once; None while there is nothing new."""
        watch = self._watch
        times = watch.read() if watch is not None and watch.is_over else None
        if times is not None:
            self._watch = None
        return times

    def drop(self) -> None:
        """The pass that was timed is no measure: it failed, or was watched for its order."""
        self._watch = None
