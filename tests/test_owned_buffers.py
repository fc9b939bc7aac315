"""Buffers that forwards write in ways that nothing announces: they reside, and are right.

BatchNorm's statistics are written without a version or a schema saying so; a cache that a parent
gives to its layers row by row is written through views.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from zoo import assert_bit_equal

WIDE = 20_000  # 80 kB of statistics: as large as a weight worth streaming


class Cached(nn.Module):
    """Odd: one cache for all layers, handed to each as a view, written at a position."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(6, 200, 160))
        self.gain = nn.Parameter(torch.ones(160))
        self.layers = nn.ModuleList(CachingLayer() for _ in range(6))

    def forward(self, x: torch.Tensor, position: int) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x, self.cache[index], position) * self.gain
        return x


class CachingLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(160, 160)

    def forward(self, x: torch.Tensor, cache: torch.Tensor, position: int) -> torch.Tensor:
        cache[position] = self.linear(x)
        return x + cache[: position + 1].sum(0)


@pytest.mark.parametrize("options", [{"weights": "95%"}, {"weights": "85%"}, {"k": 2}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_cache_written_by_children(options: Any, mode: Any) -> None:
    model = Cached()
    plain = copy.deepcopy(model)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    x = torch.randn(160)
    with mode():
        for position in range(4):
            assert_bit_equal(model(x, position), plain(x, position))
    assert_bit_equal(model.cache, plain.cache)
    assert superpipeline.handle(model).stats().streamed_bytes > 0


@pytest.mark.parametrize("options", [{"weights": "70%"}, {"k": 2}])
def test_wide_batch_norm_keeps_its_statistics(options: Any) -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(WIDE) for _ in range(6)])
    plain = copy.deepcopy(model)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(4, WIDE)
            assert_bit_equal(model(x), plain(x))
        assert_bit_equal(model.state_dict(), plain.state_dict())
        assert_bit_equal(model.eval()(x), plain.eval()(x))


def test_an_expanded_buffer_is_left_alone() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    model.register_buffer("mask", torch.ones(1, 1).expand(5, 5))
    superpipeline.stream(model, weights="60%", device="cpu", quiet=True)
    model(torch.ones(1, 64))
    assert model.mask.stride() == (0, 0)


class Cropping(nn.Module):
    """Odd: crops its own table in its forward, once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(300, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.table) == 300:
            self.table.data = self.table.data[3:]
        return x + self.table.sum(0)


@pytest.mark.parametrize("options", [{"weights": "60%"}, {"k": 2}])
def test_a_weight_cropped_by_its_forward_outlives_the_window(options: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Cropping() for _ in range(5)])
    plain = copy.deepcopy(model)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    x = torch.randn(64)
    with torch.no_grad():
        for _ in range(3):
            assert_bit_equal(model(x), plain(x))
    superpipeline.handle(model).close()
    assert_bit_equal(list(model.parameters()), list(plain.parameters()))


def test_verify_refuses_a_call_without_tensors() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    with torch.no_grad(), pytest.raises(superpipeline.VerificationError, match="no tensors"):
        superpipeline.handle(model).verify_call(lambda: model(torch.ones(1, 64)).tolist())
