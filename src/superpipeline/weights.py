"""A model's bytes: one Weight for each range of bytes that moves as one.

Usually a weight is one tensor. Tensors that share bytes (ties through views, flattened RNN weights)
are one weight with several aliases; a parameter with several names is one alias with several homes.

[Note: alignment is part of the result]
    On the CPU the bits of a GEMM depend on the address of its operands: one-row fp32 Linear gave
    other bits at 8 mod 16 than at 0 mod 16. So on the CPU a weight keeps the address that the plain
    tensor had, modulo 64 (its `phase`), in host buffers and in the window. On accelerators the
    allocator gives the plain tensor a 512-byte aligned address, so every weight gets one too.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from superpipeline.disk import Piece, Stored, locate
from superpipeline.errors import InputError, UnsupportedError

CPU_ALIGNMENT = 64
ACCELERATOR_ALIGNMENT = 512

Registry = dict[str, torch.Tensor | None]  # a module's `_parameters` or `_buffers`


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """For allocating and re-pointing: a parameter pointed at a tensor that was born in inference
    mode becomes one itself, takes other code paths (other bits), and cannot train any more."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Home(NamedTuple):
    """One name of a tensor: the registry that holds it, its key there, and the full name."""

    registry: Registry
    key: str
    name: str


@dataclass(eq=False, slots=True)
class Alias:
    """A tensor that users can name, over some of a weight's bytes. Its identity is kept for good.

    Attributes:
        offset: where its first element lies, in bytes from the weight's first byte.
    """

    tensor: torch.Tensor
    homes: list[Home]
    is_buffer: bool
    offset: int = 0
    dtype: torch.dtype = torch.float32
    size: torch.Size = torch.Size()
    stride: tuple[int, ...] = ()

    def view(self, base: torch.Tensor, weight_start: int) -> torch.Tensor:
        """This tensor over the bytes of `base` (uint8) when its weight begins at `weight_start`."""
        start = base.storage_offset() + weight_start + self.offset
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        itemsize = self.dtype.itemsize
        return view.set_(base.untyped_storage(), start // itemsize, self.size, self.stride)


@dataclass(eq=False)
class Weight:
    """A byte range that moves as one.

    Attributes:
        num_bytes: its exact length.
        phase: its required address, modulo the alignment.
        padded_bytes: what it may take with its alignment, wherever it is put.
        stored: where its bytes are on disk, if they are there.
    """

    index: int
    name: str
    num_bytes: int
    phase: int
    alignment: int
    aliases: list[Alias] = field(default_factory=list)
    stored: Stored | None = None

    @property
    def lies_as_computed(self) -> bool:
        """Whether it is one range of a file, mapped, at the address modulo 64 that it needs."""
        stored = self.stored
        if stored is None or not stored.is_mapped or not isinstance(stored.sources[0], Piece):
            return False
        return len(stored.sources) == 1 and stored.sources[0].offset % self.alignment == self.phase

    @property
    def padded_bytes(self) -> int:
        whole = -(-self.num_bytes // self.alignment) * self.alignment
        return whole + (self.alignment if self.phase else 0)

    @property
    def is_buffer(self) -> bool:
        return all(alias.is_buffer for alias in self.aliases)


Locate = Callable[[torch.Tensor], Stored | None]


def find_weights(model: nn.Module, device: torch.device, where: Locate = locate) -> list[Weight]:
    """Every parameter and buffer of `model` as weights, in registration order.

    Args:
        where: says where a tensor is on disk, if it is there.

    Raises:
        InputError: a parameter on the meta device or not yet initialised.
        UnsupportedError: a tensor that is not a plain strided one.
    """
    aliases = _find_aliases(model)
    stored = {id(alias): at for alias in aliases if (at := where(alias.tensor)) is not None}
    for alias in aliases:
        if id(alias) in stored:
            alias.stride = stored[id(alias)].stride
    if device.type == "cpu":
        # An expanded tensor cannot be written as it is; it is small, and stays where it is.
        aliases = [alias for alias in aliases if not _repeats_elements(alias)]
    _refuse_inference_tensors(aliases)
    alignment = CPU_ALIGNMENT if device.type == "cpu" else ACCELERATOR_ALIGNMENT
    by_storage: dict[tuple[torch.device, int], list[tuple[int, int, Alias]]] = {}
    for alias in aliases:
        if device.type != "cpu" and id(alias) not in stored:
            # As `model.to(device)` does: strides with gaps or repeats become dense there.
            alias.stride = torch.empty_like(alias.tensor, device="meta").stride()
        is_own = alias.stride != alias.tensor.stride() or not alias.tensor.numel()
        start, end = _byte_range(alias)
        storage = id(alias) if is_own else alias.tensor.untyped_storage().data_ptr()
        key = (alias.tensor.device, storage)
        by_storage.setdefault(key, []).append((start, end, alias))
    return [
        _as_weight(index, group, alignment, stored)
        for index, group in enumerate(
            group for ranges in by_storage.values() for group in _merge(ranges)
        )
    ]


def named_tensors(model: nn.Module) -> Iterator[tuple[Home, bool]]:
    """Every place in `model` that holds a tensor, and whether it is a buffer; duplicates too."""
    for prefix, module in model.named_modules(remove_duplicate=True):
        for registry, is_buffer in ((module._parameters, False), (module._buffers, True)):
            for key, tensor in registry.items():
                if tensor is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    yield Home(registry, key, name), is_buffer


def _find_aliases(model: nn.Module) -> list[Alias]:
    found: dict[int, Alias] = {}
    for home, is_buffer in named_tensors(model):
        tensor = home.registry[home.key]
        assert tensor is not None
        if id(tensor) in found:
            found[id(tensor)].homes.append(home)
            continue
        _check_plain(home.name, tensor)
        found[id(tensor)] = Alias(
            tensor, [home], is_buffer,
            dtype=tensor.dtype, size=tensor.size(), stride=tensor.stride(),
        )  # fmt: skip
    return list(found.values())


def _check_plain(name: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise InputError(f"{name} is not initialised yet; run the model once, then stream it")
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device and has no values; load the weights first")
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    is_plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not is_plain or is_traceable_wrapper_subclass(tensor):
        raise UnsupportedError(
            f"{name} is a {type(tensor).__name__} with layout {tensor.layout}, whose bytes cannot "
            f"be moved as one plain tensor; convert it to a plain tensor before streaming"
        )


def _refuse_inference_tensors(aliases: Iterable[Alias]) -> None:
    for alias in aliases:
        if alias.tensor.is_inference():
            raise UnsupportedError(
                f"{alias.homes[0].name} was created in inference mode and cannot be re-pointed; "
                f"build or load the model outside torch.inference_mode()"
            )


def _repeats_elements(alias: Alias) -> bool:
    return any(step == 0 and n > 1 for n, step in zip(alias.size, alias.stride, strict=True))


def _byte_range(alias: Alias) -> tuple[int, int]:
    """The first byte in its storage and the one after its last; (0, 0) when empty."""
    tensor = alias.tensor
    if tensor.numel() == 0:
        return 0, 0
    reach = sum((n - 1) * stride for n, stride in zip(tensor.size(), alias.stride, strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + (int(reach) + 1) * tensor.itemsize


def _merge(ranges: list[tuple[int, int, Alias]]) -> Iterator[list[tuple[int, int, Alias]]]:
    """Ranges of one storage put together where they overlap."""
    group: list[tuple[int, int, Alias]] = []
    reach = 0
    for item in sorted(ranges, key=lambda item: (item[0], item[1])):
        if group and item[0] >= reach:
            yield group
            group = []
        reach = max(reach, item[1]) if group else item[1]
        group.append(item)
    yield group


def _as_weight(
    index: int, group: list[tuple[int, int, Alias]], alignment: int, stored: dict[int, Stored]
) -> Weight:
    start, end = group[0][0], max(end for _, end, _ in group)
    first = group[0][2]
    at = stored.get(id(first)) if len(group) == 1 else None
    phase = 0
    if alignment == CPU_ALIGNMENT and first.tensor.device.type == "cpu" and end:
        # What stands in for bytes on disk has no address of its own; the plain tensor was aligned.
        phase = 0 if at is not None and not at.is_mapped else first.tensor.data_ptr() % alignment
        widest = max(alias.dtype.itemsize for _, _, alias in group)
        phase = phase if phase % widest == 0 else 0
    weight = Weight(index, first.homes[0].name, end - start, phase, alignment, stored=at)
    for begin, _, alias in group:
        alias.offset = begin - start
        weight.aliases.append(alias)
    return weight
