"""An adversary in place of a device: copies run as late as events permit, and races are errors.

A third implementation of `streams.py`. Compute runs at once on the CPU, but is treated as if it ran
asynchronously: every operation that reads device memory is noted with the logical time of its
stream, and vector clocks say what has happened before what. So a missing wait fails every time, on
any machine:

    a copy is issued     its destination turns to NaN; the copy itself is carried out only when
                         some stream waits for an event recorded after it
    a copy overwrites    bytes that an operation read, unless FETCH knows that operation is done
    an operation reads   bytes that a copy wrote, unless its stream knows that copy is done
    memory is allocated  still in use by whoever had it: a copy into it must know that it is not

Between turns the weights of blocks are NaN too, so a read outside a turn shows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from superpipeline import pack, pipeline
from superpipeline.disk import Source
from superpipeline.streams import FETCH, CpuStreams, Run, Stream

POISON = 0xFF  # in every float type, all ones is NaN


class RaceError(AssertionError):
    """Two accesses of the same bytes that nothing orders."""


class Access(NamedTuple):
    """Bytes [begin, end) touched on `stream` at its logical time `time`."""

    begin: int
    end: int
    stream: object
    time: int


Clock = dict[object, int]


class AdversarialStreams:
    """Implements `superpipeline.streams.Streams`; `present` is the current compute stream."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.present: object = "compute"
        self.num_copies = 0
        self._is_reading = False
        self._clocks: dict[object, Clock] = {}
        self._reads: list[Access] = []
        self._writes: list[Access] = []
        self.idle: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        self._pending: list[tuple[int, torch.Tensor, torch.Tensor | Source]] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        memory = CpuStreams().allocate(num_bytes).fill_(POISON)
        self._memory.append(memory)
        begin = memory.data_ptr()
        # Whoever had these bytes before may still be reading them.
        self._reads.append(Access(begin, begin + num_bytes, self.present, self._tick(self.present)))
        return memory

    def copy(self, runs: Sequence[Run]) -> None:
        time = self._tick(FETCH)
        for destination, source in runs:
            access = _access(destination, FETCH, time)
            self._check("overwrites bytes that may still be read", access, self._reads)
            self._writes.append(access)
            # memset and memmove, as operations would be taken for the model's.
            ctypes.memset(destination.data_ptr(), POISON, destination.numel())
            self._pending.append((time, destination, source))
        self.num_copies += 1

    def record(self, stream: Stream) -> Clock:
        name = self._name(stream)
        self._tick(name)
        return dict(self._clocks[name])

    def past_event(self) -> Clock:
        """An event that happened before anything else: what a misplaced record comes to."""
        return {}

    def wait(self, stream: Stream, event: Clock) -> None:
        assert event is not None, "waits for an event that was never recorded"
        self._learn(self._name(stream), event)
        if stream is not FETCH:
            self._carry_out(event.get(FETCH, 0))

    def compute_stream(self) -> object:
        return self.present

    def join(self, other: object) -> None:
        self._learn(self.present, self._clocks.get(other, {}))

    def switch(self, name: object) -> None:
        """The caller goes on in stream `name`, ordered after its present one by its data."""
        before, self.present = self.present, name
        self.join(before)

    def synchronize(self) -> None:
        self._carry_out(self._tick(FETCH))
        # As CUDA's: the host waits for FETCH and the present stream, not for others. What it issues
        # from then on, on any stream, comes after.
        reached = _later(self._clocks.get(FETCH, {}), self._clocks.get(self.present, {}))
        for name in list(self._clocks):
            self._learn(name, reached)

    def close(self) -> None:
        self._pending.clear()

    # ---- what the model's operations do -------------------------------------------------------

    def note_operation(self, operands: list[torch.Tensor]) -> None:
        if self._is_reading:
            return  # the fetch's own work
        time = self._tick(self.present)
        for tensor in operands:
            access = _access(tensor, self.present, time)
            if any(_overlap(access, _access(idle, None, 0)) for idle in self.idle):
                raise RaceError(f"{self.present} reads a weight outside its turn")
            if any(_overlap(access, _access(memory, None, 0)) for memory in self._memory):
                self._check("reads bytes before their copy has landed", access, self._writes)
                self._reads.append(access)

    def _check(self, what: str, access: Access, earlier: list[Access]) -> None:
        known = self._clocks.get(access.stream, {})
        for other in earlier:
            if _overlap(access, other) and known.get(other.stream, 0) < other.time:
                size = other.end - other.begin
                raise RaceError(f"{access.stream} {what} ({other.stream}, {size} B)")

    def _carry_out(self, until: int) -> None:
        while self._pending and self._pending[0][0] <= until:
            _, destination, source = self._pending.pop(0)
            if isinstance(source, torch.Tensor):
                ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.numel())
            else:
                self._is_reading = True
                source.read_into(destination)
                self._is_reading = False

    def _name(self, stream: Stream) -> object:
        return FETCH if stream is FETCH else self.present

    def _tick(self, name: object) -> int:
        clock = self._clocks.setdefault(name, {})
        clock[name] = clock.get(name, 0) + 1
        return clock[name]

    def _learn(self, name: object, event: Clock) -> None:
        self._clocks[name] = _later(self._clocks.setdefault(name, {}), event)


class Watch(TorchDispatchMode):
    """Shows every operation's operands to the streams."""

    def __init__(self, streams: AdversarialStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self._streams.note_operation([t for t in leaves if type(t) in _PLAIN and t.numel()])
        return func(*args, **(kwargs or {}))


_PLAIN = (torch.Tensor, torch.nn.Parameter)


@contextmanager
def simulated(monkeypatch: Any, *, poison_idle: bool = True) -> Iterator[AdversarialStreams]:
    """Models streamed inside run on the adversary; every operation inside is watched."""
    streams = AdversarialStreams()
    monkeypatch.setattr("superpipeline.api.streams_for", lambda _: streams)
    if poison_idle:
        make = pack.Pack.__init__

        def make_poisoned(made: Any, layout: Any, *rest: Any) -> None:
            make(made, layout, *rest)
            rows = {layout.weights[index] for index in layout.rows}
            in_blocks = {weight for block in layout.blocks for weight in block.weights}
            for buffer in made.buffers:
                weights = {weight for weight, home in made.home.items() if home is buffer}
                if weights <= in_blocks - rows:
                    buffer.mapped = torch.full_like(buffer.bytes, POISON)
                    streams.idle.append(buffer.mapped)

        monkeypatch.setattr(pack.Pack, "__init__", make_poisoned)
    assert pipeline.Pack is pack.Pack
    with Watch(streams):
        yield streams


def _access(tensor: torch.Tensor, stream: object, time: int) -> Access:
    begin = tensor.data_ptr()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Access(begin, begin + (reach + 1) * tensor.itemsize, stream, time)


def _overlap(a: Access, b: Access) -> bool:
    return a.begin < b.end and b.begin < a.end


def _later(a: Clock, b: Clock) -> Clock:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in {*a, *b}}
