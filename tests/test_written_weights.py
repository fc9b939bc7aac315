"""Forwards that write weights: their own, or those of modules whose turn it is not."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import superpipeline
from zoo import assert_bit_equal

WIDTH = 160
Write = Callable[[nn.Parameter], None]


def in_place(weight: nn.Parameter) -> None:
    weight.mul_(0.9)


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(0.9)


def new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.9


def nothing(weight: nn.Parameter) -> None:
    pass


class Layer(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.write = write

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.write(self.linear.weight)
        return x + torch.tanh(self.linear(x))


class Stack(nn.Module):
    """Odd: layers write their weights, or the parent does, as momentum encoders have it done."""

    def __init__(self, own: Write = nothing, childs: Write = nothing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(own) for _ in range(5))
        self.childs = childs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            self.childs(layer.linear.weight)
            x = layer(x)
        return x


@pytest.mark.parametrize("options", [{"weights": "50%"}, {"weights": "21%"}, {"k": 2}])
@pytest.mark.parametrize("write", [in_place, through_data, new_data])
@pytest.mark.parametrize("whose", ["own", "childs"])
def test_writes_of_a_forward_are_kept(whose: str, write: Write, options: dict[str, object]) -> None:
    plain, model = Stack(**{whose: write}), Stack(**{whose: write})
    x = torch.randn(3, WIDTH)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    with torch.no_grad():
        for _ in range(4):
            assert_bit_equal(model(x), plain(x))
        assert superpipeline.handle(model).stats().streamed_bytes > 0
        superpipeline.handle(model).close()
        assert_bit_equal(list(model.parameters()), list(plain.parameters()))
        assert_bit_equal(model(x), plain(x))


def test_a_write_survives_an_exception_after_it() -> None:
    def write_and_fail(weight: nn.Parameter) -> None:
        weight.mul_(0.9)
        raise ValueError("on purpose")

    plain, model = Stack(own=write_and_fail), Stack(own=write_and_fail)
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    for either in (plain, model):
        with torch.no_grad(), pytest.raises(ValueError, match="on purpose"):
            either(torch.ones(1, WIDTH))
    assert_bit_equal(list(model.parameters()), list(plain.parameters()))
