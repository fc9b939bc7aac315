"""Models written in odd ways give the plain model's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from superpipeline import (
    BudgetError,
)
from tiny import (
    same_weights,
    stream,
)
from zoo import assert_bit_equal
from zoo.layers import Layer, layer_list


class Recursive(nn.Module):
    """Calls itself, with other blocks between."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(64, 64) / 8)
        self.layers = layer_list(3)

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = self.layers[depth](x @ self.own)
        if depth:
            x = self(x, depth - 1)
        return x @ self.own


class PassesItself(nn.Module):
    """Layers that are called with a module, themselves included, as an argument."""

    class Caller(Layer):
        def forward(self, x: torch.Tensor, other: nn.Module | None = None) -> torch.Tensor:
            x = super().forward(x)
            return x if other is None else other(x) + self.up.weight.sum()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Caller() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, other in zip(self.layers, [*self.layers[1:], self.layers[0]], strict=True):
            x = layer(layer(x, other), layer)
        return x


class Properties(nn.Module):
    """Weights and children behind properties and __getattr__."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(64, 64))

        @property
        def weight(self) -> torch.Tensor:
            return self.raw / 8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Scaled() for _ in range(5))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("layer_"):
            return self.layers[int(name.removeprefix("layer_"))]
        return super().__getattr__(name)

    @property
    def first(self) -> nn.Module:
        return self.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for index in range(1, 5):
            x = getattr(self, f"layer_{index}")(x)
        return x @ self.first.weight


class Lists(nn.Module):
    """Parameters in a ParameterList and a ParameterDict."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(3))
            self.named = nn.ParameterDict({"a": torch.randn(64), "b": torch.randn(64)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = x @ weight
            return x * self.named["a"] + self.named["b"]

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ParameterList(torch.randn(64, 64) / 8 for _ in range(3))
        self.layers = nn.ModuleList(self.Inner() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, layer in zip(self.outer, self.layers, strict=False):
            x = layer(x) @ weight
        return self.layers[3](x)


class Mutating(nn.Module):
    """Its forward rotates its ModuleList, and adds a layer in the third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        self.layers = nn.ModuleList([*self.layers[1:], self.layers[0]])
        if self.num_passes == 3:
            torch.manual_seed(3)
            self.layers.append(Layer())
        for layer in self.layers:
            x = layer(x)
        return x


class Generators(nn.Module):
    """Forwards that are generators, consumed late."""

    class Steps(Layer):
        def forward(self, x: torch.Tensor) -> Any:
            for scale in (1, 2):
                yield super().forward(x * scale)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Steps() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        running = [layer(x) for layer in self.layers]
        for pair in zip(*running, strict=True):
            for y in pair:
                x = x + y
        return x


class Shared(nn.Module):
    """One layer at several paths, and one weight in several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)
        self.layers.append(self.layers[0])
        self.alias = self.layers[2]
        self.nested = nn.ModuleDict({"again": self.layers[1], "own": Layer()})
        self.layers[3].up.weight = self.layers[1].up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.layers, self.alias, *self.nested.values()):
            x = layer(x)
        return x


class Closures(nn.Module):
    """Returns functions and odd containers that hold weights and results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        late = []
        for layer in self.layers:
            x = layer(x)
            late.append(lambda y, layer=layer: layer.down(layer.up(y)))
        for function in late:
            x = x + function(x)
        return x


class Slotted(nn.Module):
    """A model with a class-level __call__ and a metaclass of its own."""

    class Meta(type):
        pass

    class Called(Layer, metaclass=Meta):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Called() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def graph_module() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(*layer_list(4)))


ODD: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Recursive,
        PassesItself,
        Properties,
        Lists,
        Mutating,
        Generators,
        Shared,
        Closures,
        Slotted,
    )
} | {"graph_module": graph_module}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weights", ["40%", "60%", "85%"])
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str, weights: str, grad: bool) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return ODD[name]().eval()

    plain, model, x = make(), make(), torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        try:
            pipe = stream(model, weights)
        except BudgetError as error:
            pipe = stream(model, error.least_bytes)
        expected, actual = [], []
        for _ in range(4):
            expected.append(plain(x))
            actual.append(model(x))
    for ours, theirs in zip(actual, expected, strict=True):
        assert_bit_equal(ours, theirs)
    assert pipe.stats().streamed_bytes > 0
    pipe.close()
    assert same_weights(model, plain)
