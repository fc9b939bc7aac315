"""Whether two models are the same in all that a user can see, one of them perhaps on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from superpipeline.disk import locate
from zoo import assert_bit_equal


def assert_same_model(actual: nn.Module, plain: nn.Module) -> None:
    """Classes, flags, keys, values, dtypes, addresses, ties and configurations."""
    modules, expected = dict(actual.named_modules()), dict(plain.named_modules())
    assert list(modules) == list(expected)
    for name, module in expected.items():
        assert type(modules[name]) is type(module)
        for attribute in ("training", "name_or_path"):
            assert getattr(modules[name], attribute, None) == getattr(module, attribute, None)
    assert_same_tensors(parameters(actual), parameters(plain))
    assert_same_tensors(buffers(actual), buffers(plain))
    assert list(actual.state_dict()) == list(plain.state_dict())
    for name in ("config", "generation_config"):
        assert as_dict(getattr(actual, name, None)) == as_dict(getattr(plain, name, None))


def assert_same_tensors(actual: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(plain)
    assert ties(actual) == ties(plain)
    for name, tensor in plain.items():
        assert type(actual[name]) is type(tensor), name
        assert actual[name].requires_grad == tensor.requires_grad, name
        assert_bit_equal(value_of(actual[name]), tensor)
        stored = locate(actual[name].data)
        assert (stored.stride if stored else actual[name].stride()) == tensor.stride(), name
        if stored is not None and stored.is_mapped:
            # On the CPU the address is part of the result (see weights.py).
            assert actual[name].data_ptr() % 64 == tensor.data_ptr() % 64, name


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def as_dict(config: Any) -> Any:
    """A configuration of transformers, diffusers, or none."""
    return config.to_dict() if hasattr(config, "to_dict") else config and dict(config)


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor stands for: read from its files if it is there."""
    stored = locate(tensor.data)
    if stored is None:
        return tensor.detach()
    read = torch.empty(sum(source.num_bytes for source in stored.sources), dtype=torch.uint8)
    start = 0
    for source in stored.sources:
        source.read_into(read[start : start + source.num_bytes])
        start += source.num_bytes
    return read.view(tensor.dtype).as_strided(tensor.size(), stored.stride)


def ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """Which names go by one object."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(groups.values())
