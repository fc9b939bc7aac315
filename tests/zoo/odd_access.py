"""Models that are odd in how a weight is reached: not by calling the module that owns it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .case import VOCAB, ZooCase, case, passes_call
from .layers import NUM_POSITIONS, WIDTH, Layer, hidden_input, layer_list, token_input


class RootPositionalTable(nn.Module):
    """Odd: the root's own forward slices a positional Parameter, ``self.pos[:, :n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, NUM_POSITIONS, WIDTH))
        self.layers = layer_list()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pos[:, : x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x


class UncalledEmbedding(nn.Module):
    """Odd: a positional nn.Embedding is never called; its ``.weight`` is read by the root."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(NUM_POSITIONS, WIDTH)
        self.layers = layer_list(4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x


class RootAttention(nn.Module):
    """Odd: nn.MultiheadAttention reads its ``out_proj.weight`` without calling ``out_proj``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layers = layer_list()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = layer(x)
        pooled, weights = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return torch.cat([pooled.flatten(1), weights.flatten(1)], dim=1)


class HelpfulLayer(Layer):
    """A layer whose work is in methods of its own."""

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.up.forward(self.norm.forward(x))
        return hidden

    def narrow(self, hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(hidden), self.down.weight, self.down.bias)


class CalledByMethod(nn.Module):
    """Odd: children are never ``__call__``-ed, so no hook fires: ``.forward`` and helpers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HelpfulLayer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, HelpfulLayer)
            x = layer.forward(x) if index % 2 == 0 else x + layer.narrow(layer.widen(x))
        return x


class DictOfBlocks(nn.Module):
    """Odd: blocks live in a ModuleDict and run in another order than they were added."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({name: Layer() for name in ("c", "a", "e", "b", "d")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in sorted(self.blocks):
            x = self.blocks[name](x)
        return x


class NumberedAttributes(nn.Module):
    """Odd: the repeated layers are attributes ``layer0`` to ``layer4``, in no container."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(5):
            self.add_module(f"layer{index}", Layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(5):
            x = getattr(self, f"layer{index}")(x)
        return x


class Bare(nn.Module):
    """A container without a forward: somewhere to keep children and a Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 192)
        self.down = nn.Linear(192, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))


class BareContainers(nn.Module):
    """Odd: the members of the ModuleList have no forward; the root calls their children."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Bare() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for bare in self.layers:
            assert isinstance(bare, Bare)
            x = x + bare.scale * bare.down(functional.gelu(bare.up(bare.norm(x))))
        return x


class FunctionalHead(nn.Module):
    """Odd: the head is ``linear(h, self.embed.weight)``, long after ``embed`` was called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = layer_list(4)
        self.out_bias = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return functional.linear(x, self.embed.weight, self.out_bias)


class ScaledByWeight(torch.autograd.Function):
    """Keeps the weight on ``ctx`` as an attribute, out of sight of saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (x,), (grad,) = ctx.saved_tensors, grads
        return grad @ ctx.weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class ContextLayer(nn.Module):
    """A residual layer whose matmul is ``ScaledByWeight``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.inner = Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = ScaledByWeight.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return x + torch.tanh(self.inner(y))


def _weight_on_ctx() -> nn.Module:
    """Odd: a custom autograd function keeps the weight on ``ctx``."""
    return nn.Sequential(*(ContextLayer() for _ in range(4)))


def _weight_norm_hook() -> nn.Module:
    """Odd: the old ``weight_norm``; a pre-hook computes ``weight``, which is no Parameter."""
    layers = [Layer() for _ in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in use
        for layer in layers:
            nn.utils.weight_norm(layer.up)
            nn.utils.weight_norm(layer.down)
    return nn.Sequential(*layers)


def _weight_norm_parametrized() -> nn.Module:
    """Odd: ``weight`` is a property of a swapped class, computed where it is read."""
    layers = [Layer() for _ in range(5)]
    for layer in layers:
        nn.utils.parametrizations.weight_norm(layer.up)
        nn.utils.parametrizations.weight_norm(layer.down)
    return nn.Sequential(*layers)


def _scripted_children() -> nn.Module:
    """Odd: every other layer is a ScriptModule, whose inside runs no Python."""
    layers: list[nn.Module] = list(layer_list(5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # deprecated, and still in use
        layers[1::2] = [torch.jit.script(layer) for layer in layers[1::2]]
    return nn.Sequential(*layers)


CASES: tuple[ZooCase, ...] = (
    case("root_positional_table", RootPositionalTable, hidden_input),
    case("uncalled_embedding", UncalledEmbedding, token_input),
    case("root_attention", RootAttention, hidden_input),
    case("called_by_method", CalledByMethod, hidden_input),
    case("dict_of_blocks", DictOfBlocks, hidden_input),
    case("numbered_attributes", NumberedAttributes, hidden_input),
    case("bare_containers", BareContainers, hidden_input),
    case("functional_head", FunctionalHead, token_input),
    case("weight_on_ctx", _weight_on_ctx, hidden_input),
    case("weight_norm_hook", _weight_norm_hook, hidden_input),
    case("weight_norm_parametrized", _weight_norm_parametrized, hidden_input),
    case("scripted_children", _scripted_children, hidden_input, passes_call(hidden_input)),
)
