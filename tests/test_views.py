"""Views of weights that other code takes between calls, and keeps beyond them.

A user's model took `layer.weight.T` after the layer's call and used it after the next layer's, when
the place held other bytes: finite, wrong results.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from zoo import assert_bit_equal, flatten

WIDTH = 64
Take = Callable[[nn.Linear], torch.Tensor]

TAKES: dict[str, Take] = {
    "transpose": lambda layer: layer.weight.T,
    "detach": lambda layer: layer.weight.detach(),
    "slice": lambda layer: layer.weight[:],
    "view": lambda layer: layer.weight.view(WIDTH, WIDTH),
    "data": lambda layer: layer.weight.data,
    "state_dict": lambda layer: layer.state_dict()["weight"],
    "itself": lambda layer: layer.weight,
}


class Peeking(nn.Module):
    """Odd: takes a view of the third layer's weight after its call, uses and returns it later."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.take = take

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        view = x
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == 3:
                view = self.take(layer)
        return x + x @ view, self.take(self.layers[7])


@pytest.mark.parametrize("options", [{"weights": "30%"}, {"weights": "60%"}, {"k": 2}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
def test_views_taken_between_calls_stay_right(take: Take, mode: Any, options: Any) -> None:
    plain, model = Peeking(take), Peeking(take)
    x = torch.randn(4, WIDTH)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    results = []
    with mode():
        expected = flatten(plain(x))
        for _ in range(4):
            results.append(model(x))
            assert_bit_equal(flatten(results[-1]), expected)
        for result in results:  # still right when other passes have run
            assert_bit_equal(flatten(result), expected)
    assert superpipeline.handle(model).stats().streamed_bytes > 0
