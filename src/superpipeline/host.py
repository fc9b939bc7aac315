"""The host tier: weights packed into shared, exactly sized mappings that are pinned in place.

Per block one mapping. An allocating pin is slower (0.7 s/GiB against 0.25 registered in place, on
one H100 host) and rounds up to powers of two; a private mapping would be copied by forked
DataLoader workers, and would break their parent's DMA.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple
from weakref import finalize

import torch

from superpipeline import cgroup
from superpipeline.disk import Source
from superpipeline.errors import HostMemoryError
from superpipeline.notices import warn
from superpipeline.reader import Reader
from superpipeline.sizes import format_bytes
from superpipeline.weights import Alias, Weight

_SMALL_BYTES = 4096  # weights up to this size are compared whole
_SAMPLES = 64  # bytes looked at in each larger one


class Packing(NamedTuple):
    """Where each weight begins in a buffer, and the buffer's length."""

    starts: dict[Weight, int]
    num_bytes: int


class HostBuffer:
    """The packed host bytes of some weights.

    Args:
        num_bytes: its length, where it is more than the weights'.
        is_shared: with forked processes, as memory that is pinned must be.

    Attributes:
        bytes: all of it, uint8, page-aligned.
        mapped: the same bytes as a device tensor (no copy), or None while not pinned.
        starts: where each weight begins.
    """

    def __init__(
        self, weights: Iterable[Weight], *, num_bytes: int = 1, is_shared: bool = True
    ) -> None:
        self.starts, self.num_bytes = self.layout(weights)
        self.mapped: torch.Tensor | None = None
        self._own: dict[Weight, torch.Tensor] = {}
        self._unpin: finalize[[torch.Tensor], HostBuffer] | None = None
        # Not in inference mode: a tensor born there poisons parameters for a later backward.
        with torch.inference_mode(False):
            length = max(self.num_bytes, num_bytes)
            self._mapping = mmap.mmap(-1, length) if is_shared else _private_mapping(length)
            self.bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._array = self.bytes.numpy()

    @staticmethod
    def layout(weights: Iterable[Weight]) -> Packing:
        """One after the other, each at its phase."""
        starts: dict[Weight, int] = {}
        offset = 0
        for weight in weights:
            starts[weight] = offset + weight.phase
            offset += weight.padded_bytes
        return Packing(starts, offset)

    def rename(self, packing: Packing) -> None:
        """The same bytes for other Weight objects, after the model was laid out anew."""
        self.starts = packing.starts
        self._own.clear()

    def fill(self, weight: Weight) -> None:
        """Copies the weight's bytes in and re-points its tensors here, which frees the old ones.

        Of a weight on disk the bytes are here already: `pack` has read them.
        """
        for alias in weight.aliases:
            view = self.view(alias, weight)
            if weight.stored is None:
                view.copy_(alias.tensor.detach())
            alias.tensor.data = view

    def reads(self, weight: Weight) -> Iterator[tuple[torch.Tensor, Source]]:
        """What to read from where, if the weight is on disk."""
        start = self.starts[weight]
        for source in weight.stored.sources if weight.stored is not None else ():
            yield self.slice(start, start + source.num_bytes), source
            start += source.num_bytes

    @property
    def is_readable(self) -> bool:
        """Whether the tensors show the values: always."""
        return True

    def span(self, weight: Weight) -> tuple[int, int]:
        """The weight's first address and its length."""
        return self.bytes.data_ptr() + self.starts[weight], weight.num_bytes

    def view(self, alias: Alias, weight: Weight) -> torch.Tensor:
        """`alias` over these host bytes.

        Each weight is a storage of its own: as views of one storage, torch.save of one would write
        all, and safetensors would take them for one tensor under several names.
        """
        if not weight.num_bytes:
            return alias.view(torch.empty(0, dtype=torch.uint8), 0)
        if weight not in self._own:
            begin, length = self.starts[weight], weight.num_bytes
            self._own[weight] = torch.frombuffer(
                self._mapping, dtype=torch.uint8, count=length, offset=begin
            )
        return alias.view(self._own[weight], 0)

    def mapped_view(self, alias: Alias, weight: Weight) -> torch.Tensor:
        """`alias` over these host bytes as the device sees them; the host's view if unpinned."""
        base = self.bytes if self.mapped is None else self.mapped
        return alias.view(base, self.starts[weight])

    def lend(self) -> torch.Tensor:
        """All of its bytes as a storage of its own."""
        with torch.inference_mode(False):
            return torch.frombuffer(self._mapping, dtype=torch.uint8)

    def slice(self, start: int, end: int) -> torch.Tensor:
        return self.bytes[start:end]

    def bytes_of(self, weight: Weight) -> torch.Tensor:
        """The weight's bytes (uint8), at its phase."""
        return self.slice(self.starts[weight], self.starts[weight] + weight.num_bytes)

    def sample(self, weight: Weight) -> bytes:
        """All bytes of a small weight, or some 64 of a larger one, spread evenly.

        Costs about 3 µs. An odd step visits high and low bytes of the elements in turn.
        """
        start = self.starts[weight]
        if weight.num_bytes <= _SMALL_BYTES:
            return self._array[start : start + weight.num_bytes].tobytes()
        step = (weight.num_bytes // _SAMPLES) | 1
        return self._array[start : start + weight.num_bytes : step].tobytes()

    def pin(self, device: torch.device) -> bool:
        """Registers the mapping with `device`, for asynchronous copies; False if refused."""
        if device.type != "cuda" or self.mapped is not None:
            return device.type == "cuda"
        if not register(self.bytes.data_ptr(), self.bytes.numel()):
            return False
        # Unregistered before the mapping can be freed: the finalizer holds it until then.
        self._unpin = finalize(self, _unregister, self.bytes)
        with torch.inference_mode(False):
            self.mapped = torch.as_tensor(_CudaView(self.bytes), device=device)
        return True

    def unpin(self) -> None:
        """Lets the device forget the mapping; the bytes stay. Idempotent."""
        self.mapped = None
        if self._unpin is not None:
            self._unpin()


def _private_mapping(num_bytes: int) -> mmap.mmap:
    """Of huge pages where the system has them: fewer faults at first, fewer misses later."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class _CudaView:
    """Registered host memory as the device addresses it: the same pointer, by unified addressing.

    (CUDA's documentation: cudaHostRegister, unified virtual addressing.)
    """

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host
        self.__cuda_array_interface__ = {
            "shape": (host.numel(),),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "version": 2,
        }


def register(pointer: int, num_bytes: int) -> bool:
    """Pins a range of host memory; on refusal clears the runtime's error and returns False."""
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(pointer, num_bytes, 0)
    if int(status) == 0:
        return True
    _clear_last_error()
    return False


def _clear_last_error() -> None:
    # A refused registration leaves its code behind, and the next kernel would report it.
    try:
        torch.cuda.synchronize()
        torch.empty(1, device="cuda").zero_()
    except RuntimeError:
        return


def _unregister(host: torch.Tensor) -> None:
    # At interpreter exit the runtime may be gone already; it has then unpinned everything.
    try:
        torch.cuda.synchronize()  # a model may be forgotten while copies still read the memory
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    except RuntimeError:
        return


def pack(
    weights: Iterable[Weight], reader: Reader | None = None, buffer: HostBuffer | None = None
) -> HostBuffer:
    """Packs `weights` into one buffer and returns the memory they had to the system.

    Peak host memory: the weights and this one buffer. Weights on disk are read by `reader`.

    Args:
        buffer: an empty one that was made for them; None makes one.
    """
    ordered = list(weights)
    buffer = HostBuffer(ordered) if buffer is None else buffer
    source = ordered[0].aliases[0].tensor.device if ordered else torch.device("cpu")
    buffer.pin(source)  # from a GPU, copies into pinned memory are many times faster
    with torch.inference_mode(False), torch.no_grad():
        if reads := [pair for weight in ordered for pair in buffer.reads(weight)]:
            assert reader is not None
            reader.read(reads)
        for weight in ordered:
            buffer.fill(weight)
    return buffer


def return_freed_memory() -> None:
    """glibc keeps freed memory for itself (1201 MiB for 600 were seen); this gives it back."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not glibc


def check_host_memory(needed_bytes: int, why: str) -> None:
    """Raises HostMemoryError when `needed_bytes` more than what is free would be needed."""
    free = free_host_memory()
    if needed_bytes > free:
        raise HostMemoryError(
            f"{why} needs {format_bytes(needed_bytes)} more of host memory and "
            f"{format_bytes(free)} are free; close other programs or load the model in a smaller "
            f"dtype"
        )


def free_host_memory() -> int:
    """Bytes that can be allocated: what the system has free, or a control group if that is less."""
    import psutil

    free: int = psutil.virtual_memory().available
    return min([free, *(group.free_bytes for group in cgroup.groups())])


def warn_unpinned(device: torch.device, num_bytes: int) -> None:
    """Says once what it costs that `num_bytes` could not be pinned."""
    warn(
        f"the system refused to pin {format_bytes(num_bytes)} of host memory for {device}; copies "
        f"will not overlap compute and run at a fraction of the link's rate. Raise the limit "
        f"(ulimit -l; on WSL the memory in .wslconfig)"
    )
