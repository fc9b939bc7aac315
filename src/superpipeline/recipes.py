"""How the bytes of an operation's result are made, if its operands are tensors on disk.

What is joined, or copied in the order that it has, is ranges of files: no computing. Other copies
and a few operations are computed when they are read. Only operations have a recipe whose bits do
not depend on when, by which thread and in how many parts they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from superpipeline.computed import (
    Computed,
    Gather,
    Operand,
    Shape,
    contiguous,
    is_dense,
    itself,
    same_layout,
)
from superpipeline.disk import Source

_SHORTEST_RUN = 16 * 2**10  # shorter runs are picked in memory, not read one by one

_aten = torch.ops.aten
_COPIES = {_aten.clone.default, _aten._to_copy.default}
_JOINS = {_aten.cat.default, _aten.stack.default}
# Element by element, rounded exactly: threads and vector lanes may share the work as they like.
# Not so `exp`: a vector lane gives other bits than the tail of the loop.
_EXACT = {
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default),
    *(_aten.bitwise_and.Scalar, _aten.bitwise_and.Tensor, _aten.bitwise_or.Tensor),
    *(_aten.__rshift__.Scalar, _aten.__lshift__.Scalar, _aten.where.self),
}
_PICKS = {
    *(_aten.index.Tensor, _aten.index_select.default, _aten.gather.default, _aten.flip.default),
    *(_aten.roll.default, _aten.repeat.default, _aten.tril.default, _aten.triu.default),
    *(_aten.constant_pad_nd.default,),
}
_ALL = _COPIES | _JOINS | _EXACT | _PICKS


class Call(NamedTuple):
    """An operation with its arguments.

    Attributes:
        func: an overload, as `torch.ops.aten.cat.default`.
        leaves: the arguments, flattened as `spec` says.
    """

    func: Any
    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Flattens the arguments."""
        leaves, spec = tree_flatten((args, kwargs))
        return cls(func, tuple(leaves), spec)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name, those that are given."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        names = (argument.name for argument in self.func._schema.arguments)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def on(self, change: Callable[[torch.Tensor], Any]) -> Call:
        """The same with other tensors."""
        leaves = (change(x) if isinstance(x, torch.Tensor) else x for x in self.leaves)
        return self._replace(leaves=tuple(leaves))

    def on_device(self, device: str) -> Call:
        """The same for another device, if the call names one."""
        leaves = (torch.device(device) if isinstance(x, torch.device) else x for x in self.leaves)
        return self._replace(leaves=tuple(leaves))

    def do(self) -> Any:
        """Does it."""
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return self.func(*args, **kwargs)


def result_of(call: Call) -> torch.Tensor | None:
    """A meta tensor like the result, if there is a recipe for it; its values are not computed."""
    if call.func not in _ALL or not _may_wait(call):
        return None
    like: torch.Tensor = call.on(_as_meta).on_device("meta").do()
    is_possible = like.numel() and is_dense(tuple(like.size()), tuple(like.stride()))
    return like if is_possible and not (like.is_complex() and call.func in _EXACT) else None


def sources_of(call: Call, operands: Sequence[Operand], like: torch.Tensor) -> Iterable[Source]:
    """How the bytes of the result, which is like `like`, are made.

    Args:
        operands: one for each of the call's tensors.
    """
    size, stride = tuple(like.size()), tuple(like.stride())
    is_contiguous = same_layout(size, stride, contiguous(size))
    if call.func in _COPIES:
        return _copied(operands[0], like)
    if call.func in _JOINS and is_contiguous:
        dim = call.named.get("dim", 0) % like.dim()
        if call.func is _aten.stack.default:
            operands = [_unsqueezed(operand, dim) for operand in operands]
        return _joined([o for o in operands if math.prod(o.size)], dim, like)
    make = partial(_redo, call.on(lambda _: torch.Tensor))
    if call.func in _EXACT and is_contiguous:
        return (_by_rows(make, operands, like.dtype, size),)
    return (Computed(make, tuple(operands), like.dtype, size, stride, by_rows=False),)


def _may_wait(call: Call) -> bool:
    named, tensors = call.named, call.tensors
    if named.get("pin_memory") or str(named.get("device") or "cpu") != "cpu":
        return False
    if named.get("alpha", 1) != 1:
        return False  # the product may be rounded before the sum, or not
    if call.func is _aten.index.Tensor and any(t.dtype == torch.bool for t in tensors[1:]):
        return False  # the size depends on values
    return all(
        t.device.type == "cpu" and t.layout == torch.strided and not (t.is_conj() or t.is_neg())
        for t in tensors
    )


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _redo(call: Call, *tensors: torch.Tensor) -> torch.Tensor:
    given = iter(tensors)
    leaves = (next(given) if leaf is torch.Tensor else leaf for leaf in call.leaves)
    return call._replace(leaves=tuple(leaves)).do()


# ---- copies -------------------------------------------------------------------------------------


def _copied(operand: Operand, like: torch.Tensor) -> Iterable[Source]:
    """A copy of `operand` with the dtype, size and strides of `like`."""
    size, stride = tuple(like.size()), tuple(like.stride())
    if same_layout(size, operand.stride, stride):
        return _converted(operand.gather, operand.dtype, like.dtype)
    if same_layout(size, stride, contiguous(size)):
        return _in_order(operand, like.dtype)
    return (Computed(itself, (operand,), like.dtype, size, stride, by_rows=False),)


def _in_order(operand: Operand, dtype: torch.dtype) -> Iterable[Source]:
    """The elements one after the other, as `dtype`."""
    operand = _packed(operand)
    if operand.is_contiguous:
        return _converted(operand.gather, operand.dtype, dtype)
    return (_by_rows(itself, (operand,), dtype, operand.size),)


def _converted(gather: Gather, stored: torch.dtype, dtype: torch.dtype) -> tuple[Source, ...]:
    """In whatever order the elements lie, they stay in it."""
    if stored == dtype:
        return gather.sources
    flat = (gather.num_bytes // stored.itemsize,)
    return (_by_rows(itself, (Operand(gather, stored, flat, (1,)),), dtype, flat),)


def _packed(operand: Operand) -> Operand:
    """The same tensor without its gaps, if what lies between them is worth reading by itself."""
    size, stride, itemsize = operand.size, operand.stride, operand.dtype.itemsize
    if is_dense(size, stride):
        return operand
    dim = len(size)
    while dim and same_layout(size[dim - 1 :], stride[dim - 1 :], contiguous(size[dim - 1 :])):
        dim -= 1
    run = math.prod(size[dim:]) * itemsize
    if run < _SHORTEST_RUN:
        return operand
    indices = product(*map(range, size[:dim]))
    starts = (sum(i * step for i, step in zip(at, stride, strict=False)) for at in indices)
    runs = (operand.gather.cut(start * itemsize, run).sources for start in starts)
    return operand._replace(gather=Gather.of(chain.from_iterable(runs)), stride=contiguous(size))


# ---- joins, and what is computed row by row -----------------------------------------------------


def _joined(operands: Sequence[Operand], dim: int, like: torch.Tensor) -> Iterable[Source]:
    """`operands` side by side along `dim`, one after the other in memory."""
    size = tuple(like.size())
    outer = math.prod(size[:dim])
    gathers = [Gather.of(_in_order(operand, like.dtype)) for operand in operands]
    if outer == 1:
        return chain.from_iterable(gather.sources for gather in gathers)
    lengths = [gather.num_bytes // outer for gather in gathers]
    if sum(lengths) < _SHORTEST_RUN * len(lengths) or not all(g.is_divisible for g in gathers):
        return (_by_rows(partial(_cat, dim - len(size)), operands, like.dtype, size),)
    return chain.from_iterable(
        gather.cut(index * length, length).sources
        for index in range(outer)
        for gather, length in zip(gathers, lengths, strict=True)
    )


def _cat(dim: int, *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, dim)


def _unsqueezed(operand: Operand, dim: int) -> Operand:
    size, stride = operand.size, operand.stride
    return operand._replace(
        size=(*size[:dim], 1, *size[dim:]), stride=(*stride[:dim], 1, *stride[dim:])
    )


def _by_rows(
    make: Callable[..., torch.Tensor], operands: Sequence[Operand], dtype: torch.dtype, size: Shape
) -> Computed:
    """A contiguous result, each row of which needs only that row of the operands."""
    operands = [_packed(operand) for operand in operands]
    size = size or (1,)
    while len(size) > 1 and size[0] == 1:  # one row: what are rows in it?
        operands = [o.row() if len(o.size) == len(size) else o for o in operands]
        size = size[1:]
    return Computed(make, tuple(operands), dtype, size, contiguous(size), by_rows=True)
