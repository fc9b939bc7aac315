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
    memory is given up   that a copy still reads or writes, unless the stream knows it is done
    a copy leaves        for the host: OFFLOAD must know that what it reads has been computed, and
                         that no copy from the host still reads what it overwrites
    an update is due     it is made only when somebody waits for it

Between turns the weights of blocks are NaN too, so a read outside a turn shows. Gradients leave, as
they leave a device that is not the CPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from superpipeline import assembly, edits, gradients, pack, updates
from superpipeline.cpu_streams import CpuStreams
from superpipeline.disk import Source
from superpipeline.streams import COMPUTE, FETCH, OFFLOAD, Leaving, Run, Stream

POISON = 0xFF  # in every float type, all ones is NaN


class RaceError(AssertionError):
    """Two accesses of the same bytes that nothing orders."""


class Access(NamedTuple):
    """Bytes [begin, end) touched on `stream` at its logical time `time`."""

    begin: int
    end: int
    stream: object
    time: int


class Accesses:
    """Of those of the same bytes on the same stream the latest: who knows it, knows all."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int, object], Access] = {}

    def add(self, access: Access) -> None:
        self._latest[access[:3]] = access

    def overlapping(self, access: Access) -> Iterator[Access]:
        return (other for other in self._latest.values() if _overlap(access, other))


Clock = dict[object, int]


class Pending(NamedTuple):
    """A copy on `stream` that was issued at its `time` and has not been carried out.

    Attributes:
        memory: of the device, which must not be given up before.
        kept: the same, if whoever forgets it need not wait for copies.
    """

    stream: Stream
    time: int
    destination: int
    source: int | Source
    num_bytes: int
    memory: StorageWeakRef
    kept: torch.Tensor | None

    def carry_out(self) -> None:
        """Carries it out. (memmove, as an operation would be taken for the model's.)"""
        assert not self.memory.expired(), "the device's memory is gone"
        if isinstance(self.source, int):
            ctypes.memmove(self.destination, self.source, self.num_bytes)
            return
        array = (ctypes.c_uint8 * self.num_bytes).from_address(self.destination)
        self.source.read_into(torch.frombuffer(array, dtype=torch.uint8))


class AdversarialStreams:
    """Implements `superpipeline.streams.Streams`; `present` is the current compute stream."""

    maps_files = keeps_time = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.present: object = "compute"
        self.num_copies = self.num_copies_out = 0
        self._is_reading = False
        self._clocks: dict[object, Clock] = {}
        self._reads = Accesses()
        self._writes = Accesses()
        self._host_reads = Accesses()
        self._host_writes = Accesses()
        self._computed: dict[int, tuple[object, int]] = {}  # storages, by their addresses
        self.idle: list[torch.Tensor] = []  # memory that no operation may read
        self._memory: list[tuple[Access, StorageWeakRef]] = []
        self._pending: list[Pending] = []
        self._kept: list[StorageWeakRef] = []

    def allocate(self, num_bytes: int) -> torch.Tensor:
        memory = CpuStreams().allocate(num_bytes).fill_(POISON)
        # Whoever had these bytes before may still be reading them.
        access = _access(memory, self.present, self._tick(self.present))
        self._memory.append((access, StorageWeakRef(memory.untyped_storage())))
        self._reads.add(access)
        return memory

    @property
    def allocated_bytes(self) -> int:
        """Device memory that is in use."""
        alive = [access for access, memory in self._memory if not memory.expired()]
        return sum(access.end - access.begin for access in alive)

    def vacate(self, runs: Sequence[Run]) -> None:
        pass  # all of it is in the window

    def give_back(self) -> None:
        pass

    def keep_for_copies(self, memory: torch.Tensor) -> None:
        self._kept.append(StorageWeakRef(memory.untyped_storage()))

    @property
    def num_pending(self) -> int:
        """Copies that were issued and not carried out."""
        return len(self._pending)

    def copy(self, runs: Sequence[Run]) -> None:
        time = self._tick(FETCH)
        for destination, source in runs:
            access = _access(destination, FETCH, time)
            self._check("overwrites bytes that may still be read", access, self._reads)
            self._writes.add(access)
            if isinstance(source, torch.Tensor):
                read = _access(source, FETCH, time)
                self._check("reads host bytes before they have arrived", read, self._host_writes)
                self._host_reads.add(read)
            self._issue(FETCH, time, destination, source)
        self.num_copies += 1

    def copy_out(self, leaving: Sequence[Leaving]) -> None:
        time = self._tick(OFFLOAD)
        for destination, source in leaving:
            by, when = self._computed.get(source.untyped_storage().data_ptr(), (OFFLOAD, 0))
            if self._clocks[OFFLOAD].get(by, 0) < when:
                raise RaceError(f"OFFLOAD reads what {by} may still be computing")
            access = _access(destination, OFFLOAD, time)
            self._check("overwrites host bytes that may still be read", access, self._host_reads)
            self._host_writes.add(access)
            self._issue(OFFLOAD, time, destination, source)
        self.num_copies_out += 1

    def _issue(
        self, stream: Stream, time: int, destination: torch.Tensor, source: torch.Tensor | Source
    ) -> None:
        on_device = destination if stream is FETCH else source
        assert isinstance(on_device, torch.Tensor)
        memory = StorageWeakRef(on_device.untyped_storage())
        ctypes.memset(destination.data_ptr(), POISON, destination.nbytes)
        begin = source.data_ptr() if isinstance(source, torch.Tensor) else source
        self._kept = [reference for reference in self._kept if not reference.expired()]
        kept = on_device if memory.cdata in {known.cdata for known in self._kept} else None
        where = destination.data_ptr()
        pending = Pending(stream, time, where, begin, destination.nbytes, memory, kept)
        self._pending.append(pending)

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
        self._carry_out(OFFLOAD, event)
        if stream is not FETCH:
            self._carry_out(FETCH, event)

    def synchronize_event(self, event: Clock) -> None:
        self._carry_out(OFFLOAD, event)
        self._learn(self.present, event)

    def compute_stream(self) -> object:
        return self.present

    def join(self, other: object) -> None:
        self._learn(self.present, self._clocks.get(other, {}))

    def switch(self, name: object) -> None:
        """The caller goes on in stream `name`, ordered after its present one by its data."""
        before, self.present = self.present, name
        self.join(before)

    def synchronize(self) -> None:
        for stream in (OFFLOAD, FETCH):
            self._carry_out(stream, {stream: self._tick(stream)})
        # As CUDA's: the host waits for its own and the present stream, not for others. What it
        # issues from then on, on any stream, comes after.
        own = [self._clocks.get(name, {}) for name in (FETCH, OFFLOAD, self.present)]
        reached = _later(_later(own[0], own[1]), own[2])
        for name in list(self._clocks):
            self._learn(name, reached)

    def close(self) -> None:
        self._pending.clear()

    # ---- what the model's operations do -------------------------------------------------------

    def note_operation(self, operands: list[torch.Tensor]) -> None:
        if self._is_reading:
            return  # the fetch's own work
        time = self._tick(self.present)
        self._check_alive()
        idle = [_access(memory, None, 0) for memory in self.idle]
        for tensor in operands:
            access = _access(tensor, self.present, time)
            if any(_overlap(access, other) for other in idle):
                raise RaceError(f"{self.present} reads a weight outside its turn")
            if any(_overlap(access, memory) for memory, _ in self._memory):
                self._check("reads bytes before their copy has landed", access, self._writes)
                self._reads.add(access)

    def note_results(self, results: list[torch.Tensor]) -> None:
        time = self._clocks.get(self.present, {}).get(self.present, 0)
        for tensor in results:
            self._computed[tensor.untyped_storage().data_ptr()] = self.present, time

    def _check_alive(self) -> None:
        """What is given up, the present stream may get next."""
        self._memory = [(access, memory) for access, memory in self._memory if not memory.expired()]
        known = self._clocks[self.present]
        for copy in self._pending:
            if copy.memory.expired() and known.get(copy.stream, 0) < copy.time:
                raise RaceError(f"memory was given up that {copy.stream} still copies")

    def _check(self, what: str, access: Access, earlier: Accesses) -> None:
        known = self._clocks.get(access.stream, {})
        for other in earlier.overlapping(access):
            if known.get(other.stream, 0) < other.time:
                size = other.end - other.begin
                raise RaceError(f"{access.stream} {what} ({other.stream}, {size} B)")

    def _carry_out(self, stream: Stream, event: Clock) -> None:
        until = event.get(stream, 0)
        due = [copy for copy in self._pending if copy.stream is stream and copy.time <= until]
        self._pending = [copy for copy in self._pending if copy not in due]
        self._is_reading = True
        for copy in due:
            copy.carry_out()
        self._is_reading = False

    def _name(self, stream: Stream) -> object:
        return self.present if stream is COMPUTE else stream

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
        if not _only_views(func):
            leaves = tree_leaves((args, kwargs or {}))
            self._streams.note_operation([t for t in leaves if type(t) in _PLAIN and t.numel()])
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if type(t) in _PLAIN and t.numel()]
        self._streams.note_results(made)
        return result


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _only_views(func: Any) -> bool:
    """Whether it reads no bytes: what it gives are its operands' own."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info and not r.alias_info.is_write for r in returns)


class Asked(threading.Event):
    """In place of an update's `done`: whoever waits has it made, on a thread of its own."""

    def __init__(self, update: updates.Update) -> None:
        super().__init__()
        self._update = update

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            thread = threading.Thread(target=self._update.run)
            thread.start()
            thread.join(timeout)
        return self.is_set()


def make_updates_late(monkeypatch: Any) -> None:
    """Lazy optimizers make each update as late as those who wait permit."""
    make = updates.Update.__init__

    def make_late(update: updates.Update, *args: Any, **kwargs: Any) -> None:
        make(update, *args, **kwargs)
        update.done = Asked(update)

    monkeypatch.setattr(updates.Update, "__init__", make_late)
    monkeypatch.setattr(updates.Updates, "_start", lambda _: None)


class Seen:
    """Addresses that tensors have while updates are pending, and those of the poisoned idle ones.

    (On a GPU pinned memory has one address for host and device.)
    """

    def __init__(self, stand_ins: Container[int], idle: list[torch.Tensor]) -> None:
        self._stand_ins, self._idle = stand_ins, idle

    def __contains__(self, address: object) -> bool:
        assert isinstance(address, int)
        return address in self._stand_ins or any(
            0 <= address - memory.data_ptr() < memory.numel() for memory in self._idle
        )


def poison_idle_weights(streams: AdversarialStreams, monkeypatch: Any) -> None:
    """What a device reads of weights outside their turns is NaN, and an error."""
    make, watch = pack.Pack.__init__, edits.Watch.__init__

    def make_poisoned(made: Any, layout: Any, *rest: Any) -> None:
        make(made, layout, *rest)
        rows = {layout.weights[index] for index in layout.rows}
        in_blocks = {weight for block in layout.blocks for weight in block.weights}
        for buffer in made.buffers:
            weights = {weight for weight, home in made.home.items() if home is buffer}
            if weights <= in_blocks - rows:
                buffer.mapped = torch.full_like(buffer.bytes, POISON)
                streams.idle.append(buffer.mapped)

    def watch_poisoned(made: Any, *args: Any) -> None:
        *others, stand_ins = args
        watch(made, *others, Seen(stand_ins, streams.idle))

    monkeypatch.setattr(pack.Pack, "__init__", make_poisoned)
    monkeypatch.setattr(edits.Watch, "__init__", watch_poisoned)
    assert assembly.Pack is pack.Pack
    assert assembly.Watch is edits.Watch


@contextmanager
def simulated(monkeypatch: Any, *, poison_idle: bool = True) -> Iterator[AdversarialStreams]:
    """Models streamed inside run on the adversary; every operation inside is watched.

    With `poison_idle`, weights are NaN between turns, also for optimizers.
    """
    streams = AdversarialStreams()
    monkeypatch.setattr("superpipeline.api.streams_for", lambda _: streams)
    monkeypatch.setattr(gradients, "leave", lambda _: True)
    make_updates_late(monkeypatch)
    if poison_idle:
        poison_idle_weights(streams, monkeypatch)
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
