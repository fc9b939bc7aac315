"""Loading without reading: what a loader makes of tensors on disk is written down, not computed.

A library that fuses, splits, permutes or casts weights as it loads would read all of them into
memory. While `reading_lazily()` lasts, such an operation returns a tensor over reserved address
space, and what is remembered is how to make its bytes:

    file      [ gate 0 ][ up 0 ][ gate 1 ][ up 1 ]
    reserved  [ gate 0 ][ up 0 ][ gate 1 ][ up 1 ]    cat([stack(gates), stack(ups)], 1): 4 Pieces
    reserved  [    ][    ][    ][    ]                .to(bfloat16): Computed of the above
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from superpipeline.computed import Computed, Gather, Held, Operand, Slice, contiguous, reach
from superpipeline.disk import Piece, Source, Stored, locate, stand_in
from superpipeline.recipes import Call, result_of, sources_of
from superpipeline.reserved import Region, Reserved, is_plain, is_wrapper

M = TypeVar("M", bound=nn.Module)

_SMALL_BYTES = 64 * 2**10  # what is smaller is read at once
_COMPARED_BYTES = 16 * 2**20  # of each side at a time
_ALIGNMENT = 64  # of the memory that torch allocates

_aten = torch.ops.aten
_SHAPES_ONLY = {
    *(_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default),
    *(_aten.full_like.default, _aten.rand_like.default, _aten.randn_like.default),
    *(_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default),
    *(_aten.new_full.default, _aten.new_empty_strided.default),
    *(_aten.is_same_size.default, _aten.is_pinned.default),
    *(_aten._unsafe_view.default,),  # shares memory, though its schema does not say so
}
_DIRECT = {  # these reach for the memory without an operation
    *(torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__dlpack__),
    *(torch.Tensor.__reduce_ex__, torch.Tensor.share_memory_),
}


@contextmanager
def reading_lazily() -> Iterator[Lazily]:
    """On this thread, what is made of the tensors of a `DiskFile` is not read until it is needed.

    Costs address space only, whatever the tensors' size. Operations that cannot wait are done at
    once: those that give numbers, write in place, or have no recipe in `recipes.py`. On leaving,
    what is still in use and was not handed over with `finish` is read into memory (not if an
    exception leaves).

    A loader may not use other threads: to them the reserved space is zeros. Those of transformers
    are switched off meanwhile, for the whole process.

    Example:
        ```python
        with reading_lazily() as lazily:
            model = AutoModelForCausalLM.from_pretrained(None, config=config, state_dict=tensors)
            lazily.finish(model)
        ```
    """
    # A mode belongs to its thread, and transformers would convert weights in a pool of threads.
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    lazily = Lazily()
    try:
        with _Direct(lazily.reserved), lazily:
            yield lazily
        _fill_the_rest(lazily.reserved)
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


class Lazily(TorchDispatchMode):
    """Writes down the operations on tensors that are on disk. Made by `reading_lazily`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.reserved = Reserved()

    def finish(self, model: M) -> M:
        """Hands the parameters of `model` over to `disk`; none of it is in reserved space after.

        A large one gets a stand-in, with its sources. A small one, a buffer, or one that a NaN
        cannot stand for is read. Tensors that overlap in memory are read as well, and go on
        sharing it.

        Returns:
            `model`.
        """
        parameters = list(model.parameters())
        buffers = list(model.buffers())
        self._fill_shared([*parameters, *buffers])
        for tensor in (*parameters, *buffers):
            if self.reserved.region_of(tensor) is None:
                continue
            operand = self._operand(tensor)
            if operand is None:
                continue
            if isinstance(tensor, nn.Parameter) and _can_stand_in(operand):
                stand_in(tensor, operand.gather.sources)
            else:
                tensor.data = _in_memory(operand, tensor.data_ptr())
        return model

    # ---- operations -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = Call.of(func, args, kwargs or {})
        if any(is_wrapper(tensor) for tensor in call.tensors):
            return NotImplemented  # what it does with the tensors that it wraps comes here again
        if not any(self._is_on_disk(tensor) for tensor in call.tensors):
            return call.do()
        if _is_composite(func):  # in inference mode these arrive whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if func.is_view or func in _SHAPES_ONLY or str(call.named.get("device")) == "meta":
            return call.do()
        if func._schema.is_mutable:
            return self._write(call)
        return self._later_or_now(call)

    def _later_or_now(self, call: Call) -> Any:
        if (
            call.func is _aten.equal.default
            and (equal := self._are_equal(*call.tensors)) is not None
        ):
            return equal
        like = result_of(call)
        if like is None:
            return call.on(self._real).do()
        operands = [self._operand(tensor) or _held(tensor) for tensor in call.tensors]
        return self.reserved.tensor(like, sources_of(call, operands, like))

    def _write(self, call: Call) -> Any:
        """Writes into real memory, after all that was made of the bytes as they were."""
        written = _written_by(call)
        for tensor in written:
            if (region := self.reserved.region_of(tensor)) is not None:
                region.fill()
            elif (operand := self._operand(tensor)) is not None:
                _fill_readers(self.reserved, operand.gather.sources)
        ids = {id(tensor) for tensor in written}
        return call.on(lambda tensor: tensor if id(tensor) in ids else self._real(tensor)).do()

    def _are_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool | None:
        """`torch.equal` of two tensors on disk, part by part; None if that is not possible."""
        left, right = self._operand(one), self._operand(other)
        if left is None or right is None or left[1:] != right[1:] or not left.is_contiguous:
            return None
        if not left.gather.is_divisible or not right.gather.is_divisible:
            return None
        for begin in range(0, left.gather.num_bytes, _COMPARED_BYTES):
            length = min(_COMPARED_BYTES, left.gather.num_bytes - begin)
            a, b = (o.gather.cut(begin, length).read().view(o.dtype) for o in (left, right))
            if not torch.equal(a, b):
                return False
        return True

    # ---- tensors --------------------------------------------------------------------------------

    def _is_on_disk(self, tensor: torch.Tensor) -> bool:
        return self.reserved.region_of(tensor) is not None or _mapped(tensor) is not None

    def _operand(self, tensor: torch.Tensor) -> Operand | None:
        """What `tensor` shows of what is on disk; None if it is in memory, or shows it changed."""
        if not tensor.numel() or tensor.is_conj() or tensor.is_neg():
            return None
        size, stride = tuple(tensor.size()), tuple(tensor.stride())
        region = self.reserved.region_of(tensor)
        if region is not None and region.gather is not None:
            begin = int(tensor.storage_offset()) * tensor.itemsize
            gather = region.gather.cut(begin, reach(size, stride) * tensor.itemsize)
            return Operand(gather, tensor.dtype, size, stride)
        stored = _mapped(tensor)
        return stored and Operand(Gather.of(stored.sources), tensor.dtype, size, stride)

    def _real(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` to compute with at once: a copy, if its memory is only reserved."""
        region = self.reserved.region_of(tensor)
        if region is None:
            return tensor  # one that is mapped is read through the mapping
        if (operand := self._operand(tensor)) is not None:
            return _in_memory(operand, tensor.data_ptr())
        region.fill()
        return tensor

    def _fill_shared(self, tensors: Iterable[torch.Tensor]) -> None:
        """Fills the regions in which tensors overlap: stand-ins would share nothing."""
        spans: dict[Region, list[tuple[int, int]]] = {}
        for tensor in tensors:
            region = self.reserved.region_of(tensor)
            if region is not None and tensor.numel():
                length = reach(tuple(tensor.size()), tuple(tensor.stride())) * tensor.itemsize
                begin = tensor.data_ptr()
                spans.setdefault(region, []).append((begin, begin + length))
        for region, found in spans.items():
            if any(left[1] > right[0] for left, right in pairwise(sorted(found))):
                region.fill()


class _Direct(TorchFunctionMode):
    """Fills what is about to be read past the dispatcher."""

    def __init__(self, reserved: Reserved) -> None:
        super().__init__()
        self._reserved = reserved

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _DIRECT and (region := self._reserved.region_of(args[0])) is not None:
            region.fill()
        return func(*args, **(kwargs or {}))


def _fill_the_rest(reserved: Reserved) -> None:
    """Nobody shall see zeros where values should be."""
    if any(region.gather for region in reserved):
        gc.collect()  # an exception that the loader caught may still hold its frames
    for region in reserved:
        region.fill()


def _fill_readers(reserved: Reserved, sources: Iterable[Source]) -> None:
    """Mapped bytes are about to be written: what was made of them gets them as they were."""
    written = list(_pieces(sources))
    for region in reserved:
        pieces = _pieces(region.gather.sources if region.gather else ())
        if any(_overlap(piece, target) for piece in pieces for target in written):
            region.fill()


def _pieces(sources: Iterable[Source]) -> Iterator[Piece]:
    """All that is read of files."""
    for source in sources:
        match source:
            case Piece():
                yield source
            case Slice():
                yield from _pieces((source.whole,))
            case Computed():
                for operand in source.operands:
                    yield from _pieces(operand.gather.sources)


def _overlap(one: Piece, other: Piece) -> bool:
    is_before = one.offset + one.num_bytes <= other.offset
    is_after = other.offset + other.num_bytes <= one.offset
    return one.file is other.file and not is_before and not is_after


def _written_by(call: Call) -> list[torch.Tensor]:
    written = {
        argument.name
        for argument in call.func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    values = [value for name, value in call.named.items() if name in written]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _is_composite(func: Any) -> bool:
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _mapped(tensor: torch.Tensor) -> Stored | None:
    """Where in a file `tensor` is, if it is a mapped one's or a part of it."""
    stored = locate(tensor) if is_plain(tensor) else None
    return stored if stored is not None and stored.is_mapped else None


def _held(tensor: torch.Tensor) -> Operand:
    """A tensor in memory, as it is now: the loader may write into it next."""
    size = tuple(tensor.size())
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return Operand(Gather.of([Held(flat.view(torch.uint8))]), tensor.dtype, size, contiguous(size))


def _can_stand_in(operand: Operand) -> bool:
    return (
        operand.gather.num_bytes >= _SMALL_BYTES
        and operand.dtype.is_floating_point
        and operand.dtype != torch.float4_e2m1fn_x2  # it has no NaN
        and operand.is_contiguous
    )


def _in_memory(operand: Operand, address: int) -> torch.Tensor:
    """The tensor, read to an address that is congruent to `address`, as plain memory's would be."""
    phase = address % _ALIGNMENT
    with torch.inference_mode(False), torch.no_grad():
        memory = torch.empty(operand.gather.num_bytes + phase, dtype=torch.uint8, device="cpu")
        operand.gather.read_into(memory[phase:])
        flat = torch.frombuffer(memory.numpy(), dtype=operand.dtype, offset=phase)
        return flat.as_strided(operand.size, operand.stride)
