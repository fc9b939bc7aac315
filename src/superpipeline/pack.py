"""Where a layout's weights are kept: packed on the host, pinned for an accelerator, or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing

import torch

from superpipeline.build import Layout
from superpipeline.disk import locate
from superpipeline.host import (
    HostBuffer,
    check_host_memory,
    free_host_memory,
    pack,
    return_freed_memory,
    warn_unpinned,
)
from superpipeline.ondisk import Keeper, OnDisk
from superpipeline.plan import Plan
from superpipeline.progress import progress
from superpipeline.reader import Reader
from superpipeline.ready import ready_ahead
from superpipeline.sizes import Size, parse_bytes
from superpipeline.staging import RING_BYTES
from superpipeline.tiers import weights_on_disk
from superpipeline.weights import Locate, Weight, outside_inference_mode
from superpipeline.window import Residents

# Of the host memory that is free, what is left alone where `host_memory=` does not say.
HOST_MARGIN = 0.1


def on_disk(
    layout: Layout, plan: Plan, device: torch.device, host_memory: Size | None
) -> frozenset[int]:
    """The weights that stay on disk: on the CPU all that can, else those beyond `host_memory`.

    Without a word from the user, host memory may hold what is free now less a tenth. What is read
    from disk goes through a pinned ring of `RING_BYTES`, which takes its part of the bound.
    """
    stored = layout.stored()
    if not stored or device.type == "cpu":
        return stored
    work = layout.workload()
    if host_memory is None:
        num_bytes = int(free_host_memory() * (1 - HOST_MARGIN))
    else:
        num_bytes = parse_bytes(host_memory, work.weight_bytes)
    if not weights_on_disk(work, plan.resident, stored, num_bytes):
        return frozenset()
    return weights_on_disk(work, plan.resident, stored, num_bytes - RING_BYTES)


class Pack:
    """All weights of a layout in host buffers, pinned where the device is an accelerator.

    Costs the bytes of the weights that do not stay on disk; while it is made, one block more.

    Attributes:
        home: what keeps each weight.
        buffers: of those in host memory.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        previous: Pack | None,
        on_disk: frozenset[int] = frozenset(),
    ) -> None:
        self.home: dict[Weight, Keeper] = {}
        self.buffers: list[HostBuffer] = []
        self._device = device
        self._check_memory(layout, previous, on_disk)
        groups = self._groups(layout, on_disk)
        there = [_reusable(group, previous) for group in groups]
        new = [group for group, old in zip(groups, there, strict=True) if old is None]
        with (
            progress(self._from_disk(layout, on_disk), "reading into host memory") as advance,
            closing(Reader(advance=advance)) as reader,
            closing(ready_ahead(new, device)) as ready,
        ):
            for group, old in zip(groups, there, strict=True):
                buffer = old or pack(group, reader, next(ready))
                self.home |= dict.fromkeys(group, buffer)
                self.buffers.append(buffer)
                if buffer.num_bytes >= 2**26:
                    return_freed_memory()
        self.home |= {layout.weights[i]: OnDisk(layout.weights[i]) for i in sorted(on_disk)}
        if previous is not None:
            previous.unpin(keep=self.buffers)
        self.pinned = self._pin(device)

    @property
    def num_bytes(self) -> int:
        """Host memory that the weights take."""
        return sum(buffer.num_bytes for buffer in self.buffers)

    @property
    def disk_bytes(self) -> int:
        """The weights that stay on disk."""
        return sum(keeper.num_bytes for keeper in self.home.values() if isinstance(keeper, OnDisk))

    @property
    def unreadable(self) -> frozenset[int]:
        """The weights whose idle bytes the device cannot read by itself."""
        on_cpu = self._device.type == "cpu"
        return frozenset(
            weight.index
            for weight, keeper in self.home.items()
            if not (keeper.is_readable if on_cpu else keeper.mapped is not None)
        )

    def stood_in(self) -> list[tuple[Weight, OnDisk]]:
        """The weights that a NaN stands in for."""
        return [
            (weight, keeper)
            for weight, keeper in self.home.items()
            if isinstance(keeper, OnDisk) and not keeper.is_readable
        ]

    @outside_inference_mode()
    def make_real(self) -> None:
        """Reads the values of stand-ins into host memory, for a model that streams no more."""
        for weight, keeper in self.stood_in():
            (alias,) = weight.aliases
            if alias.tensor.data_ptr() == keeper.view(alias, weight).data_ptr():
                alias.tensor.data = alias.view(keeper.bytes_of(weight), 0)

    def where(self, residents: Residents) -> Locate:
        """Says where tensors are on disk, also while they reside on the device."""
        stored = {
            id(alias.tensor): weight.stored
            for weight in residents.weights
            if isinstance(self.home[weight], OnDisk) and residents.holds(weight)
            for alias in weight.aliases
        }
        return lambda tensor: stored.get(id(tensor)) or locate(tensor)

    def unpin(self, keep: Sequence[HostBuffer] = ()) -> None:
        kept = {id(buffer) for buffer in keep}
        for buffer in self.buffers:
            if id(buffer) not in kept:
                buffer.unpin()

    def _pin(self, device: torch.device) -> bool:
        if device.type == "cpu":
            return True
        if all(buffer.pin(device) for buffer in self.buffers):
            return True
        self.unpin()
        warn_unpinned(device, self.num_bytes)
        return False

    @staticmethod
    def _groups(layout: Layout, on_disk: frozenset[int]) -> list[list[Weight]]:
        packed = {layout.weights[index] for index in on_disk}
        groups: list[list[Weight]] = []
        for block in layout.blocks:
            groups.append([weight for weight in block.weights if weight not in packed])
            packed.update(block.weights)
        rows = [layout.weights[index] for index in sorted(layout.rows)]
        groups += [[weight] for weight in rows if weight.index not in on_disk]
        packed.update(rows)
        groups.append([weight for weight in layout.weights if weight not in packed])
        return [group for group in _without_repeats(groups) if group]

    @staticmethod
    def _from_disk(layout: Layout, on_disk: frozenset[int]) -> int:
        """What has to be read."""
        return sum(
            weight.num_bytes
            for weight in layout.weights
            if weight.index not in on_disk and weight.stored is not None
        )

    @staticmethod
    def _check_memory(layout: Layout, previous: Pack | None, on_disk: frozenset[int]) -> None:
        if previous is not None:
            return
        arriving = sum(
            weight.padded_bytes
            for weight in layout.weights
            if weight.index not in on_disk
            and (weight.stored is not None or weight.aliases[0].tensor.device.type != "cpu")
        )
        largest = max((sum(w.padded_bytes for w in b.weights) for b in layout.blocks), default=0)
        check_host_memory(arriving + largest, "packing the weights")


def _without_repeats(groups: Iterable[list[Weight]]) -> list[list[Weight]]:
    seen: set[Weight] = set()
    result = []
    for group in groups:
        result.append([weight for weight in group if weight not in seen])
        seen.update(group)
    return result


def _reusable(group: list[Weight], previous: Pack | None) -> HostBuffer | None:
    """A buffer of the previous pack that already holds exactly these weights in this order."""
    if previous is None:
        return None
    wanted = HostBuffer.layout(group)
    for buffer in previous.buffers:
        if buffer.num_bytes == wanted.num_bytes and all(
            alias.tensor.data_ptr() == buffer.bytes.data_ptr() + start + alias.offset
            for weight, start in wanted.starts.items()
            for alias in weight.aliases
        ):
            buffer.rename(wanted)
            return buffer
    return None
