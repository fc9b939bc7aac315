"""What a call takes and gives: tensors in any container."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

TensorMap = Callable[[torch.Tensor], torch.Tensor]


def tensors(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor in `value`: tuples, dicts, dataclasses, model outputs, and caches' attributes.

    Example:
        >>> [t.item() for t in tensors({"a": [torch.tensor(1)], "b": (torch.tensor(2), "x")})]
        [1, 2]
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth < 6:
            yield from tensors(_fields(leaf), depth + 1)


def map_tensors(function: TensorMap, value: Any) -> Any:
    """`value` with every tensor replaced by `function(tensor)`.

    Where that changes nothing, `value` itself: a module may write into a dict it is given, and its
    caller looks there. Dataclasses that PyTorch does not know as containers are copied shallowly.
    """
    if isinstance(value, torch.Tensor):
        return function(value)
    leaves, structure = tree_flatten(value)
    mapped = [_map_leaf(function, leaf) for leaf in leaves]
    if all(new is old for new, old in zip(mapped, leaves, strict=True)):
        return value
    return tree_unflatten(mapped, structure)


def _map_leaf(function: TensorMap, leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return function(leaf)
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if f.init}
    mapped = {name: map_tensors(function, old) for name, old in fields.items()}
    if all(mapped[name] is fields[name] for name in fields):
        return leaf
    return dataclasses.replace(leaf, **mapped)


def same_layout_copy(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in new memory with the same strides, at the same address modulo 512.

    A clone would be dense and aligned, and kernels may then round differently.
    """
    reach = sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True)) + 1
    spare = 512 // tensor.itemsize
    memory = torch.empty(reach + spare, dtype=tensor.dtype, device=tensor.device)
    skip = (tensor.data_ptr() - memory.data_ptr()) % 512 // tensor.itemsize
    flat = memory[skip : skip + reach]
    flat = flat.copy_(tensor.as_strided((reach,), (1,)))
    return flat.as_strided(tensor.size(), tensor.stride())


def _fields(leaf: Any) -> list[Any]:
    """The attributes of an object that may hold tensors: a dataclass, a cache and its layers."""
    if leaf is None or isinstance(leaf, str | bytes | int | float | type | torch.nn.Module):
        return []
    return list(getattr(leaf, "__dict__", {}).values())
