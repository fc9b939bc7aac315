"""Outputs as a flat list of tensors, and equality of tensors bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

_CACHES = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)
_NOT_TENSORS = (bool, int, float, complex, str, bytes, type, type(None), torch.dtype, torch.device)


def flatten(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in nested containers, dataclasses, ModelOutputs and key-value caches."""
    return list(_tensors(outputs))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif not isinstance(value, _NOT_TENSORS):
        for child in _children(value):
            yield from _tensors(child)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):  # a ModelOutput is one, though a dataclass too
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, _CACHES):
        return list(vars(value).values())
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    raise TypeError(f"flatten() does not know what tensors a {type(value).__name__} holds")


def assert_bit_equal(actual: Any, expected: Any) -> None:
    """Dtypes, shapes and raw bytes agree; NaNs compare by their bits, as does the sign of zero."""
    actual_tensors, expected_tensors = flatten(actual), flatten(expected)
    num_actual, num_expected = len(actual_tensors), len(expected_tensors)
    assert num_actual == num_expected, f"{num_actual} tensors, expected {num_expected}"
    for index, (a, b) in enumerate(zip(actual_tensors, expected_tensors, strict=True)):
        difference = _difference(a, b)
        assert difference is None, f"tensor {index} of {num_actual}: {difference}"


def _difference(a: torch.Tensor, b: torch.Tensor) -> str | None:
    if a.dtype != b.dtype:
        return f"dtype {a.dtype}, expected {b.dtype}"
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
    if a.numel() == 0:
        return None
    unequal = (raw_bytes(a) != raw_bytes(b)).any(dim=1)
    if not unequal.any():
        return None
    first = int(unequal.nonzero()[0])
    pair = a.detach().cpu().flatten()[first].item(), b.detach().cpu().flatten()[first].item()
    return (
        f"{int(unequal.sum())} of {a.numel()} elements differ in shape {tuple(a.shape)},"
        f" the first at flat index {first}: {pair[0]!r}, expected {pair[1]!r}"
    )


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A uint8 matrix on the CPU, one row for each element in logical order."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.reshape(-1).view(torch.uint8).reshape(tensor.numel(), -1)
