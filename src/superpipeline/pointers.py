"""Re-pointing: where a tensor's data is while its block has the turn, and while it has not.

Only `tensor.data` changes; the object, its name and its optimizer state stay. Whoever re-points a
tensor meanwhile (`p.data = x` inside a forward) is not overruled: theirs stays, and the next pass
packs it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from superpipeline.ondisk import Keeper, OnDisk
from superpipeline.weights import Alias, Weight


@dataclass(eq=False, slots=True)
class Pointer:
    """A streamed tensor with the places its data may be.

    Attributes:
        here: its view in the window.
        keeper: where its truth is.
        idle: its host bytes as the device sees them.
        host: its host bytes as the host sees them, which is what users see between passes.
    """

    alias: Alias
    weight: Weight
    here: torch.Tensor
    keeper: Keeper
    idle: torch.Tensor = field(init=False)
    host: torch.Tensor = field(init=False)
    tensor: torch.Tensor = field(init=False)
    _here_address: int = field(init=False)
    _idle_address: int = field(init=False)
    _version: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.tensor = self.alias.tensor
        self._here_address = self.here.data_ptr()
        self._find_idle()

    def _find_idle(self) -> None:
        keeper = self.keeper
        self.host = self.idle = keeper.view(self.alias, self.weight)
        if not isinstance(keeper, OnDisk) and keeper.mapped is not None:
            self.idle = keeper.mapped_view(self.alias, self.weight)
        self._idle_address = self.idle.data_ptr()

    def bring(self) -> None:
        """The turn begins: the data is in the window."""
        if self.tensor.data_ptr() == self._idle_address:
            self.tensor.data = self.here
        self._version = self.tensor._version

    def put_back(self, *, is_written: bool) -> bool:
        """The turn ends: the data is idle. True if the forward wrote it; that is kept.

        `is_written` says that it did though no version was counted (`p.data.mul_()`).
        """
        if not self.is_here:
            return False
        is_written |= self.tensor._version != self._version
        if is_written:
            self.keep(self.here)
        self.tensor.data = self.idle
        return is_written

    def keep(self, written: torch.Tensor) -> None:
        """What a forward wrote becomes the truth."""
        if isinstance(self.keeper, OnDisk):
            self.keeper.keep(self.weight, written)
            self._find_idle()
        else:
            self.host.copy_(written)

    @property
    def is_here(self) -> bool:
        """Whether the data is in the window."""
        return self.tensor.data_ptr() == self._here_address

    @property
    def is_idle(self) -> bool:
        """Whether the data is the idle bytes."""
        return self.tensor.data_ptr() == self._idle_address

    def holds(self, address: int) -> bool:
        """Whether `address` lies in its weight's bytes in the window."""
        begin = self._here_address - self.alias.offset
        return begin <= address < begin + self.weight.num_bytes


class Idle:
    """The idle tensors of a model whose host bytes the device sees at another address or device."""

    def __init__(self, home: Mapping[Weight, Keeper], resident: frozenset[int]) -> None:
        self._views = list(_views(home, resident))

    def show(self) -> None:
        """To the device: a read outside a turn costs time, not a result."""
        for tensor, idle, host in self._views:
            if tensor.data_ptr() == host.data_ptr():
                tensor.data = idle

    def hide(self) -> None:
        """Back to the host's view, for users between passes."""
        for tensor, idle, host in self._views:
            if tensor.data_ptr() == idle.data_ptr():
                tensor.data = host


def _views(
    home: Mapping[Weight, Keeper], resident: frozenset[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for weight, buffer in home.items():
        if weight.index in resident or isinstance(buffer, OnDisk) or buffer.mapped is None:
            continue
        for alias in weight.aliases:
            yield alias.tensor, buffer.mapped_view(alias, weight), buffer.view(alias, weight)
