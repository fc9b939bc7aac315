"""What stands in autograd's graph for a tensor that a block saved.

Saved-tensor hooks switch PyTorch's own check off, that a saved tensor was not written since; so
each stand-in remembers the version that it saw, and compares.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from superpipeline.errors import BackwardError


class Way(Protocol):
    """What a stand-in needs of a backward."""

    def begin(self, thread: int) -> None:
        """A node of the graph that `thread` made needs what was saved."""

    def read(self, saved: Any) -> torch.Tensor:
        """What `saved` stands for in the window, in place again."""


class Packed:
    """Base of all stand-ins."""

    __slots__ = ()

    def unpack(self, way: Way) -> torch.Tensor:
        """The tensor that was saved, bit for bit and at its strides."""
        raise NotImplementedError


class Kept(Packed):
    """For a tensor that stays where it is.

    Costs no memory. It is detached, as a node that held its own output would never be freed.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version

    def unpack(self, way: Way) -> torch.Tensor:  # noqa: ARG002
        check_version(self.tensor, self.version)
        return self.tensor


class Witness:
    """Knows whether a tensor was written, without keeping its memory.

    Two tensors over the same bytes share a version counter, and go on sharing it when one of them
    is pointed elsewhere.
    """

    __slots__ = ("_alias", "_size", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._version = tensor._version
        self._size = tuple(tensor.shape)
        self._alias = tensor.detach()
        self._alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def check(self) -> None:
        """Raises BackwardError if the tensor was written since."""
        check_version(self._alias, self._version, self._size)


def check_version(tensor: torch.Tensor, version: int, size: tuple[int, ...] | None = None) -> None:
    """Raises what PyTorch would raise for a tensor that was written after it was saved."""
    if tensor._version == version:
        return
    raise BackwardError(
        f"one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: a {str(tensor.dtype)[6:]} {list(size or tensor.shape)} that a streamed block "
        f"saved is at version {tensor._version}, expected version {version}. Do not write to what "
        f"a forward saved before its backward"
    )
