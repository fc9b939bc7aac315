"""Device memory for weights: the window, and beside it the residents. Allocated once for a plan.

Nothing moves while the plan lives: a block's place keeps its address, so views that autograd saved
and weights that custom functions keep are right again once the block is fetched again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from superpipeline.advice import can_bring
from superpipeline.disk import DiskFile, Piece, joined_pieces
from superpipeline.host import HostBuffer
from superpipeline.ondisk import Keeper, OnDisk, with_progress
from superpipeline.paged import Pages
from superpipeline.pagemap import CAN_SEE_EDITS
from superpipeline.plan import Plan
from superpipeline.streams import COMPUTE, FETCH, Run, Streams
from superpipeline.weights import Alias, Weight

# Of a file, between weights of a block: a call costs as much as bringing in 2 MiB does.
_GAP = 2**17
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # others need not have an address


def maps_files(streams: Streams) -> bool:
    """Whether weights that lie in a file as they are computed with are not copied from there."""
    return streams.maps_files and can_bring() and CAN_SEE_EDITS


class Window:
    """The device bytes of one plan.

    Costs `plan.device_bytes` of device memory; on the CPU residents stay where they are on the
    host, so it costs `plan.window_bytes`.
    """

    def __init__(self, plan: Plan, streams: Streams) -> None:
        self.plan = plan
        self.bytes = streams.allocate(plan.window_bytes)
        # Protects whoever gets the memory next, should the model be forgotten during a fetch.
        streams.keep_for_copies(self.bytes)
        self._begin = self.bytes.data_ptr()
        self._end = self._begin + plan.window_bytes
        self._maps_files = maps_files(streams)
        self._mappings: dict[DiskFile, torch.Tensor] = {}
        held = Counter(weight for block in plan.workload.blocks for weight in block.weights)
        self._alone = {weight for weight, count in held.items() if count == 1}
        self._begins: dict[DiskFile, list[int]] | None = None  # found at the first need

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the window."""
        if tensor.device != self.bytes.device or type(tensor) not in _PLAIN:
            return False
        address = tensor.data_ptr()
        if self._begin <= address < self._end:
            return True
        mappings = self._mappings.values()
        return any(0 <= address - mapped.data_ptr() < mapped.numel() for mapped in mappings)

    def check_unchanged(self) -> None:
        """Costs 2 µs for each file: what was computed with its pages since they came is right.

        Raises:
            DiskError: a file was changed in place.
        """
        for file in self._mappings:
            file.check_unchanged(0)

    def view(self, alias: Alias, weight: Weight, block: int, keeper: Keeper) -> torch.Tensor:
        """`alias` where it is during a visit of `block`."""
        piece = self._mappable(weight, keeper)
        if piece is not None:
            return alias.view(self._mapping(piece.file), piece.offset)
        return alias.view(self.bytes, self._start(block, weight))

    def _start(self, block: int, weight: Weight) -> int:
        return self.plan.slots[block][weight.index] + weight.phase

    def _mappable(self, weight: Weight, keeper: Keeper) -> Piece | None:
        """Where in a file the weight lies as it is computed with, if it is mapped there.

        One of several blocks has a place in each: mapped, it would have one for all of them, and
        what one block lets go the next still needs.
        """
        if weight.index not in self._alone:
            return None
        piece = keeper.whole_piece() if self._maps_files and isinstance(keeper, OnDisk) else None
        return piece if weight.lies_as_computed else None

    def _mapping(self, file: DiskFile) -> torch.Tensor:
        if file not in self._mappings:
            self._mappings[file] = file.map()
        return self._mappings[file]

    def runs(
        self, block: int, weights: Sequence[Weight], home: Mapping[Weight, Keeper]
    ) -> list[Run]:
        """The copies that bring `block` in: as few as the packing allows, usually one."""
        spans: list[_Span] = []
        read: list[Run] = []
        pieces: list[Piece] = []
        for weight in weights:
            keeper, target = home[weight], self._start(block, weight)
            if (piece := self._mappable(weight, keeper)) is not None:
                pieces.append(piece)
                continue
            if isinstance(keeper, OnDisk):
                read.append(Run(self.bytes[target : target + weight.num_bytes], keeper))
                continue
            span = _Span(keeper, keeper.starts[weight], target, weight.num_bytes)
            joined = spans[-1].joined(span) if spans else None
            spans[-1:] = [span] if not spans else [joined] if joined else [spans[-1], span]
        read += [
            self._mapped_run(piece)
            for piece in joined_pieces(pieces, gap=_GAP, others=self._beginnings(home))
        ]
        return read + [
            Run(self.bytes[to : to + length], buffer.slice(begin, begin + length))
            for buffer, begin, to, length in spans
        ]

    def _beginnings(self, home: Mapping[Weight, Keeper]) -> Mapping[DiskFile, Sequence[int]]:
        """Where in files weights begin that are mapped: no other's bytes may be in a run."""
        if self._begins is None:
            self._begins = {}
            for weight, keeper in home.items():
                piece = self._mappable(weight, keeper)
                if piece is not None and weight.index not in self.plan.resident:
                    self._begins.setdefault(piece.file, []).append(piece.offset)
            for begins in self._begins.values():
                begins.sort()
        return self._begins

    def _mapped_run(self, piece: Piece) -> Run:
        mapping = self._mapping(piece.file)
        return Run(mapping[piece.offset : piece.offset + piece.num_bytes], Pages(piece))


class _Span(NamedTuple):
    """Bytes of a host buffer, and where in the window they go."""

    buffer: HostBuffer
    begin: int
    target: int
    num_bytes: int

    def joined(self, after: _Span) -> _Span | None:
        """One copy for both, if they lie alike here and there."""
        gap = after.begin - (self.begin + self.num_bytes)
        alike = after.target - after.begin == self.target - self.begin
        if after.buffer is not self.buffer or gap < 0 or not alike:
            return None
        return self._replace(num_bytes=self.num_bytes + gap + after.num_bytes)


def _move(tensor: torch.Tensor, to: torch.Tensor) -> None:
    """Re-points `tensor`, whose gradient goes with it: the next one is added to it, on its device.

    (A buffer that is no leaf has none, and a master's, of another dtype, stays on the host.)
    """
    gradient = tensor.grad if tensor.is_leaf else None
    if gradient is None or gradient.dtype != tensor.dtype:
        tensor.data = to
        return
    tensor.grad = None
    tensor.data = to
    tensor.grad = gradient.to(to.device)


class Residents:
    """The weights that stay on the device.

    On the CPU those in host memory are where they should be, and only those on disk get memory.
    Costs the weights' bytes of device memory, in one allocation.
    """

    def __init__(
        self, weights: Sequence[Weight], home: Mapping[Weight, Keeper], streams: Streams
    ) -> None:
        on_cpu = streams.device.type == "cpu"
        self.weights = [w for w in weights if not on_cpu or isinstance(home[w], OnDisk)]
        self._home = home
        self._pool = streams.allocate(sum(weight.padded_bytes for weight in self.weights))
        runs, views = self._lay_out()
        if not self.weights:
            return
        # The allocator may have taken the pool from kernels that still use it.
        streams.wait(FETCH, streams.record(COMPUTE))
        with with_progress(runs, "reading what stays on the device") as counted:
            streams.copy(counted)
            # Protects whatever computes with the residents from reading them too early.
            streams.wait(COMPUTE, streams.record(FETCH))
        for tensor, view in views:
            _move(tensor, view)

    def _lay_out(self) -> tuple[list[Run], list[tuple[torch.Tensor, torch.Tensor]]]:
        runs: list[Run] = []
        views: list[tuple[torch.Tensor, torch.Tensor]] = []
        offset = 0
        for weight in self.weights:
            start = offset + weight.phase
            keeper = self._home[weight]
            source = keeper if isinstance(keeper, OnDisk) else keeper.bytes_of(weight)
            runs.append(Run(self._pool[start : start + weight.num_bytes], source))
            views += [(alias.tensor, alias.view(self._pool, start)) for alias in weight.aliases]
            offset += weight.padded_bytes
        return [run for run in runs if run.destination.numel()], views

    def holds(self, weight: Weight) -> bool:
        """Whether the weight's tensors are where they were put: what the user put there is his."""
        begin, end = self._pool.data_ptr(), self._pool.data_ptr() + self._pool.numel()
        return all(begin <= alias.tensor.data_ptr() < end for alias in weight.aliases)

    def give_back(self) -> None:
        """The values back to whoever keeps them, where users see them; the device is idle."""
        for weight in self.weights:
            if not self.holds(weight):
                continue
            keeper = self._home[weight]
            for alias in weight.aliases:
                if isinstance(keeper, OnDisk):
                    keeper.keep_if_changed(weight, alias.tensor.detach())
                else:
                    keeper.view(alias, weight).copy_(alias.tensor.detach())
                _move(alias.tensor, keeper.view(alias, weight))
        self._pool = self._pool.new_empty(0)
