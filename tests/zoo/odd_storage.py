"""Models that are odd in what their weights are: shared, strided, mixed, written, empty."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .case import Inputs, ZooCase, args_only, case, passes_call
from .layers import WIDTH, Layer, hidden_input, layer_list


def _tied_blocks() -> nn.Module:
    """Odd: blocks 0 and 3 share one Parameter object, and so do 1 and 2."""
    layers = [Layer() for _ in range(5)]
    layers[3].up.weight = layers[0].up.weight
    layers[2].down.weight = layers[1].down.weight
    return nn.Sequential(*layers)


class OverlappingLayer(nn.Module):
    """``gate`` is a Parameter over the last rows of ``fused``'s storage."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 8)
        self.gate = nn.Parameter(self.fused.detach()[2 * WIDTH :])
        self.inner = Layer(hidden=64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = functional.linear(x, self.fused).chunk(3, dim=-1)
        mixed: torch.Tensor = self.inner(a * torch.sigmoid(b) + c)
        return x + mixed * torch.tanh(functional.linear(x, self.gate))


def _shared_storage() -> nn.Module:
    """Odd: Parameters share a storage without being one object, within and across blocks.

    Within a block they overlap; the ``inner.up.bias`` of all blocks are rows of one table.
    """
    layers = [OverlappingLayer() for _ in range(5)]
    table = torch.randn(5, 64)
    for layer, row in zip(layers, table, strict=True):
        layer.inner.up.bias = nn.Parameter(row)
    return nn.Sequential(*layers)


class StridedLayer(nn.Module):
    """``weight`` is stored transposed, ``mix`` as every second column of something wider."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(WIDTH, 192) / 8).t())
        self.mix = nn.Parameter((torch.randn(WIDTH, 2 * 192) / 16)[:, ::2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.linear(functional.gelu(functional.linear(x, self.weight)), self.mix)


def _strided_parameters() -> nn.Module:
    """Odd: Parameters that are not contiguous."""
    return nn.Sequential(*(StridedLayer() for _ in range(5)))


class ConvLayer(nn.Module):
    """A residual pair of 3 by 3 convolutions."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.relu(self.second(functional.relu(self.first(x))))


def _channels_last() -> nn.Module:
    """Odd: four-dimensional weights whose strides are channels-last."""
    layers = [ConvLayer() for _ in range(5)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _channels_last_image() -> Inputs:
    return args_only(torch.randn(2, 32, 8, 8).to(memory_format=torch.channels_last))


class MixedDtypes(nn.Module):
    """Odd: float16, bfloat16 and float32 layers alternate, and norms stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = (torch.float16, torch.bfloat16, torch.float32)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(7))
        self.layers = nn.ModuleList(Layer().to(dtypes[i % 3]) for i in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            dtype = next(layer.parameters()).dtype
            x = x + layer(norm(x).to(dtype)).to(x.dtype)
        return x


class Int8Linear(nn.Module):
    """The weight is an int8 buffer of 64 KiB, dequantized in forward; no Parameter but a bias."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        weight = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.rand(num_out, 1) / 1000)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class QuantizedLayer(Layer):
    """A layer with its two matrices quantized."""

    def __init__(self) -> None:
        super().__init__(width=128, hidden=512)
        self.up = Int8Linear(128, 512)  # type: ignore[assignment]
        self.down = Int8Linear(512, 128)  # type: ignore[assignment]


def _quantized_buffers() -> nn.Module:
    """Odd: nearly all bytes are buffers that are only read."""
    return nn.Sequential(*(QuantizedLayer() for _ in range(5)))


def _wide_input() -> Inputs:
    return args_only(torch.randn(2, 9, 128))


class CountingLayer(Layer):
    """Keeps running statistics: ``mean`` is written in place, ``num_seen`` is replaced."""

    mean: torch.Tensor
    num_seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("num_seen", torch.tensor(0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.9).add_(x.mean(dim=(0, 1)), alpha=0.1)
        self.num_seen = self.num_seen + x.shape[0]
        return super().forward(x - self.mean)


def _running_statistics() -> nn.Module:
    """Odd: a block's forward writes its buffers, in eval mode too."""
    return nn.Sequential(*(CountingLayer() for _ in range(5)))


class RememberingLayer(Layer):
    """``memory``, 64 KiB, is only read in the first two passes; later ones write a row of it."""

    memory: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(256, WIDTH))
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        if self.num_passes > 2:
            self.memory[self.num_passes] = x[0, 0]
        return super().forward(x + torch.softmax(x @ self.memory.t(), dim=-1) @ self.memory)


def _late_written_buffers() -> nn.Module:
    """Odd: a large buffer looks read-only until the third pass."""
    return nn.Sequential(*(RememberingLayer() for _ in range(4)))


class Weightless(nn.Module):
    """A module with neither Parameters nor buffers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class WeightlessParts(nn.Module):
    """Odd: members of the ModuleList, and one whole branch, have no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Identity(), Weightless())
        members = [[layer, Weightless()] for layer in layer_list(5)]
        self.layers = nn.ModuleList(module for pair in members for module in pair)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.branch(x)
        for layer in self.layers:
            x = layer(x)
        return torch.cat([x, branch], dim=-1)


class EmptyAdapterLayer(Layer):
    """An adapter of rank zero (Parameters of size 0) and a scalar Parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(0, WIDTH))
        self.b = nn.Parameter(torch.empty(WIDTH, 0))
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.gain * functional.linear(
            functional.linear(x, self.a), self.b
        )


class EmptyParameters(nn.Module):
    """Odd: Parameters of size 0, in blocks and in a child that has nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.ParameterList([torch.empty(0)])
        self.layers = nn.ModuleList(EmptyAdapterLayer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        total: torch.Tensor = x + self.empty[0].sum()
        return total


CASES: tuple[ZooCase, ...] = (
    case("tied_blocks", _tied_blocks, hidden_input),
    case("shared_storage", _shared_storage, hidden_input),
    case("strided_parameters", _strided_parameters, hidden_input),
    case("channels_last", _channels_last, _channels_last_image),
    case("mixed_dtypes", MixedDtypes, hidden_input),
    case("quantized_buffers", _quantized_buffers, _wide_input),
    case(
        "running_statistics",
        _running_statistics,
        hidden_input,
        passes_call(hidden_input),
        stateful=True,
    ),
    case(
        "late_written_buffers",
        _late_written_buffers,
        hidden_input,
        passes_call(hidden_input),
        stateful=True,
    ),
    case("weightless_parts", WeightlessParts, hidden_input),
    case("empty_parameters", EmptyParameters, hidden_input),
)
