"""What one call of a block saved for its backward, as bytes: which storages, and where they lie.

Tensors over the same storage are one span of it, so a tensor that is saved several times, whole or
in parts, moves once. A stash is the spans of one call; one that other calls save as well (a mask,
an encoder's output) is in several stashes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from superpipeline.host import HostBuffer, warn_unpinned
from superpipeline.streams import Leaving, Run, Streams

_ALIGNMENT = 512  # of kernels on accelerators; on the CPU bits depend on the address modulo 64
_GRANULE = 64 * 1024


class Place(NamedTuple):
    """Where a span's first byte lies in some memory (uint8)."""

    memory: torch.Tensor
    offset: int

    def bytes(self, num_bytes: int) -> torch.Tensor:
        return self.memory[self.offset : self.offset + num_bytes]


class Span:
    """A range of one storage's bytes, on the device, on the host, or both.

    Attributes:
        storage: the one that was saved, until the host has a copy and the device's may go.
        version: of the tensor that was saved last; a write in between shows by it.
        host, device: the copies.
        num_here: how many stashes with it are on the device, or on their way there.
        num_stashes: how many have it. What several have gets memory of its own on the device.
    """

    def __init__(self, storage: torch.UntypedStorage, begin: int, end: int) -> None:
        self.storage: torch.UntypedStorage | None = storage
        self.begin, self.end = begin, end
        self.version = -1
        self.host: Place | None = None
        self.device: Place | None = None
        self.num_here = 0
        self.num_stashes = 0
        self._identity = StorageWeakRef(storage)  # while it lives, its address is no other's
        self._address = storage.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin

    def can_hold(self, begin: int, end: int, version: int) -> bool:
        """Whether [begin, end) is in it, or now made so, with the values of `version`."""
        if self.host is None:
            self.begin, self.end = min(self.begin, begin), max(self.end, end)
            return True
        return self.begin <= begin and end <= self.end and self.version == version

    def after(self, offset: int) -> int:
        """The first offset from `offset` on, in aligned memory, at which it lies as it lay."""
        return offset + (self._address + self.begin - offset) % _ALIGNMENT

    def saved(self) -> torch.Tensor:
        """The bytes that were saved."""
        assert self.storage is not None
        view = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return view.set_(self.storage, self.begin, (self.num_bytes,), (1,))

    def view(self, begin: int, like: Layout) -> torch.Tensor:
        """A tensor over its bytes that began at `begin` in the storage."""
        storage = self.storage
        if storage is None:
            assert self.device is not None, "what was saved is not on the device"
            memory, offset = self.device
            storage = memory.untyped_storage()
            begin += int(memory.storage_offset()) + offset - self.begin
        view = torch.empty(0, dtype=like.dtype, device=storage.device)
        return view.set_(storage, begin // like.dtype.itemsize, like.size, like.stride)


class Layout(NamedTuple):
    """What of a tensor is not its bytes."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]


class Stash:
    """The spans of one call.

    Attributes:
        is_open: whether the call still runs.
        held: keeps the spans while they leave.
        stream: which was computed on.
        copied: happens when they have left.
        filled: happens when they have come back; None once that was waited for.
        is_here: whether they are on the device, or on their way there, for a backward.
        memory: what they come back into.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_open = True
        self.held: list[Span] = []
        self.stream: Any = None
        self.copied: Any = None
        self.filled: Any = None
        self.is_here = False
        self.memory: list[torch.Tensor] = []
        self._spans: dict[weakref.ref[Span], None] = {}

    def add(self, span: Span) -> None:
        """One more, or one that it has."""
        reference = weakref.ref(span)
        if reference not in self._spans:
            self._spans[reference] = None
            span.num_stashes += 1

    def spans(self) -> list[Span]:
        """Those that something in the graph still stands for, in the order of their saving."""
        return [span for reference in self._spans if (span := reference()) is not None]


# ---- where spans lie ----------------------------------------------------------------------------


def lay_out(spans: Iterable[Span]) -> tuple[list[int], int]:
    """One after the other: the offset of each, and the length of all."""
    offsets: list[int] = []
    end = 0
    for span in spans:
        offsets.append(span.after(end))
        end = offsets[-1] + span.num_bytes
    return offsets, end


def give_host_places(spans: Sequence[Span], memory: HostMemory) -> list[Leaving]:
    """Finds memory on the host for `spans`; returns the copies that bring them there."""
    offsets, num_bytes = lay_out(spans)
    taken = memory.take(num_bytes)
    for span, offset in zip(spans, offsets, strict=True):
        span.host = Place(taken, offset)
    return [Leaving(span.host.bytes(span.num_bytes), span.saved()) for span in spans if span.host]


def give_device_places(spans: Sequence[Span], streams: Streams) -> list[Run]:
    """Allocates memory on the device for `spans`; returns the copies that fill it."""
    offsets, num_bytes = lay_out(spans)
    memory = streams.allocate(num_bytes)
    runs: list[tuple[Place, Place, int]] = []  # device, host, length
    for span, offset in zip(spans, offsets, strict=True):
        assert span.host is not None
        span.device = Place(memory, offset)
        run = (span.device, span.host, span.num_bytes)
        joined = _joined(runs[-1], run) if runs else None
        runs[-1:] = [joined] if joined else [*runs[-1:], run]
    return [Run(device.bytes(length), host.bytes(length)) for device, host, length in runs]


def _joined(
    one: tuple[Place, Place, int], other: tuple[Place, Place, int]
) -> tuple[Place, Place, int] | None:
    """One copy for both and what lies between, if they lie alike here and there."""
    shift = one[0].offset - one[1].offset
    if one[1].memory is not other[1].memory or other[0].offset - other[1].offset != shift:
        return None
    return one[0], one[1], other[0].offset + other[2] - one[0].offset


class HostMemory:
    """Host memory for stashes, pinned where the device is a GPU, and lent again when it is free.

    Attributes:
        num_bytes: all of it.
        lent_bytes: what of it holds stashes now.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._buffers: list[tuple[HostBuffer, StorageWeakRef | None]] = []

    @property
    def num_bytes(self) -> int:
        return sum(buffer.bytes.numel() for buffer, _ in self._buffers)

    @property
    def lent_bytes(self) -> int:
        return sum(
            buffer.bytes.numel()
            for buffer, user in self._buffers
            if user is not None and not user.expired()
        )

    def take(self, num_bytes: int) -> torch.Tensor:
        """Memory that is free again as soon as nobody has this tensor, or a view of it.

        The smallest that is free and large enough. Else a new one, in place of the largest that is
        too small: the number of buffers stays the most stashes that were away at a time.
        """
        free = [i for i, (_, user) in enumerate(self._buffers) if user is None or user.expired()]
        fitting = [i for i in free if self._buffers[i][0].bytes.numel() >= num_bytes]
        if fitting:
            buffer = self._buffers.pop(min(fitting, key=self._size))[0]
        else:
            if free:
                self._streams.synchronize()  # a copy may still read what is given up
                self._buffers.pop(max(free, key=self._size))
            buffer = self._make(-(-num_bytes // _GRANULE) * _GRANULE)
        taken = buffer.lend()
        self._buffers.append((buffer, StorageWeakRef(taken.untyped_storage())))
        return taken

    def _size(self, index: int) -> int:
        return self._buffers[index][0].bytes.numel()

    def _make(self, num_bytes: int) -> HostBuffer:
        buffer = HostBuffer([], num_bytes=num_bytes)
        device = self._streams.device
        if not buffer.pin(device) and device.type != "cpu":
            warn_unpinned(device, num_bytes)
        return buffer

    def close(self) -> None:
        """Gives up what is not lent. Nothing may be on its way."""
        self._buffers = [
            (buffer, user)
            for buffer, user in self._buffers
            if user is not None and not user.expired()
        ]
