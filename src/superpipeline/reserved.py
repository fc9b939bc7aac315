"""Reserved address space: tensors that have an address and no memory.

Where such a tensor begins and how far it reaches says which bytes it shows, so views of it need
nothing of their own. Until it is filled it reads as zeros, and takes no memory.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from superpipeline.computed import Gather
from superpipeline.disk import Source
from superpipeline.errors import HostMemoryError

_NO_RESERVE = 0x4000  # MAP_NORESERVE of x86 and Arm; Python 3.11 has no name for it


@dataclass(eq=False, slots=True)
class Region:
    """The reserved space of one storage.

    Attributes:
        owner: gives it back when the last tensor over it is gone.
        gather: how its bytes are made; None once they are there.
    """

    owner: weakref.ref[mmap.mmap]
    gather: Gather | None

    def fill(self) -> None:
        """Makes its bytes: from now on it is memory like any other. Costs its size.

        Raises:
            DiskError: a file cannot be read.
        """
        owner, gather = self.owner(), self.gather
        if owner is None or gather is None:
            return
        self.gather = None  # before: what reads into it shall find memory like any other
        try:
            with torch.inference_mode(False):
                gather.read_into(torch.frombuffer(owner, dtype=torch.uint8))
        except BaseException:
            self.gather = gather
            raise


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is of a class that does the operations by itself, with others inside."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether `tensor` has an address in this process, and strides."""
    is_here = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return is_here and not is_wrapper(tensor)


class Reserved:
    """The regions that are in use, by address."""

    def __init__(self) -> None:
        self._regions: dict[int, Region] = {}

    def __iter__(self) -> Iterator[Region]:
        return iter(list(self._regions.values()))

    def region_of(self, tensor: torch.Tensor) -> Region | None:
        """The region that `tensor` lies in, unless it was filled."""
        if not is_plain(tensor):
            return None
        region = self._regions.get(tensor.untyped_storage().data_ptr())
        return region if region is not None and region.gather is not None else None

    def tensor(self, like: torch.Tensor, sources: Iterable[Source]) -> torch.Tensor:
        """A tensor with the dtype, size and strides of `like`, which has no gaps, in a new region.

        Raises:
            HostMemoryError: the process may not have so much address space.
        """
        owner = _reserve(like.numel() * like.itemsize)
        with torch.inference_mode(False), torch.no_grad():
            storage = torch.frombuffer(owner, dtype=torch.uint8).untyped_storage()
            empty = torch.empty(0, dtype=like.dtype, device="cpu")
            tensor = empty.set_(storage, 0, like.size(), like.stride())
        address = storage.data_ptr()
        self._regions[address] = Region(weakref.ref(owner), Gather.of(sources))
        # Runs as the space is given back, so nobody can have the address before.
        weakref.finalize(owner, _forget, self._regions, address)
        return tensor


def _reserve(num_bytes: int) -> mmap.mmap:
    """Address space, page-aligned. On Linux no size is refused for want of memory."""
    try:
        if sys.platform == "linux":
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
            return mmap.mmap(-1, num_bytes, flags=flags)
        return mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise HostMemoryError(
            f"cannot reserve {num_bytes} bytes of address space ({error.strerror}); they would "
            f"take no memory: lift the limit of the process with `ulimit -v unlimited`"
        ) from error


def _forget(regions: dict[int, Region], address: int) -> None:
    del regions[address]
