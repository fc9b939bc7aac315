"""Scenarios for the adversary in which weights are reached by other ways than a block's call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import superpipeline
from scenarios import WIDTH, Layer, Scenario
from simulator import AdversarialStreams


class Row(nn.Module):
    """Layers of a kind, one after the other."""

    def __init__(self, kind: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def side_by_side(
    kind: Callable[[], nn.Module], use: Callable[[nn.Module, torch.Tensor], Any], **options: Any
) -> Scenario:
    """`use`, twice, of a row of layers of this kind, or of another model; the gradients agree."""

    def run(model: nn.Module, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
        settings = {"k": superpipeline.handle(model).options.k, "quiet": True} | options
        found = []
        for streamed in (False, True):
            torch.manual_seed(0)
            each = kind() if kind in WHOLE else Row(kind)
            if streamed:
                superpipeline.stream(each, device="cpu", **settings)
            with torch.enable_grad():
                results = [use(each, x) for _ in range(2)]
            found.append([*results, *(p.grad for p in each.parameters())])
        for theirs, mine in zip(*found, strict=True):
            assert torch.equal(mine, theirs), "not what the plain model gives"
        return []

    run.__name__ = f"run_{use.__name__}"
    return run


# ---- saved out of sight, or reached by another door ---------------------------------------------


class Stash(torch.autograd.Function):
    """Keeps a view of its weight on ctx instead of saving it, as 4-bit matmuls do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight.t()
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad @ ctx.weight, torch.ones_like(ctx.weight)


class Stashing(nn.Module):
    """Its nodes save nothing that lies in the window."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Stash.apply(x + 1, self.weight)


def a_weight_on_ctx(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


class Keeping(Layer):
    """Keeps a loss on an attribute, which no hook on its outputs sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        self.kept = self.down(hidden).square().mean()
        return x.detach() + hidden.detach()


def losses_on_attributes(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    model(x)
    loss = torch.stack([layer.kept for layer in model.layers]).sum()
    loss.backward()
    return loss.detach()


class Chain(nn.Module):
    """Each layer calls the next from inside itself, then uses its own weights again."""

    def __init__(self) -> None:
        super().__init__()
        chain: nn.Module = nn.Identity()
        for _ in range(5):
            chain = Link(chain)
        self.chain = chain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x)


class Link(nn.Module):
    """A layer around the rest of the chain."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(x @ self.weight) @ self.weight


def nested_calls(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    y.square().sum().backward()
    return y.detach()


# ---- a backward within a forward, and none at all -----------------------------------------------


class Forces(Row):
    """Takes the gradient of what its first layers give, as force fields do, in a block of its own.

    After that gradient it uses its own weight again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outer = Around(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x)


class Around(nn.Module):
    """A block with blocks inside."""

    def __init__(self, inside: nn.ModuleList) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.inside = inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x = (x @ self.weight).requires_grad_()
        for layer in self.inside:
            y = layer(y)
        (force,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return y @ self.weight + force


def a_backward_within_a_forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    y.square().sum().backward()
    return y.detach()


def a_look_at_what_was_saved(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outside of any backward, where one is expected, after the weight was changed unseen."""
    seen: list[torch.Tensor] = []
    model(x).square().sum().backward()
    for index in (4, 1):
        kept: list[torch.Tensor] = []
        hook = model.layers[index].up.register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
        y = model(x)
        hook.remove()
        with torch.no_grad():
            model.layers[index].up.weight.data.mul_(0.5)
        seen.append(kept[0].grad_fn._saved_mat2.clone())
        assert torch.equal(seen[-1].t(), model.layers[index].up.weight), "weights are hidden"
        del kept, y
    model(x).square().sum().backward()
    return torch.stack(seen)


class Viewed(Row):
    """Takes a view of a weight between two calls, and uses it when others have had their turns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        views = []
        for layer in self.layers:
            x = layer(x)
            views.append(layer.up.weight[:2])
        return x + torch.cat(views).sum()


def a_view_that_outlives_the_turn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model(x)
    model(x).square().sum().backward()
    return y


WHOLE = {Chain, Forces, Viewed}
ODD: list[Scenario] = [
    side_by_side(Stashing, a_weight_on_ctx),
    side_by_side(Keeping, losses_on_attributes),
    side_by_side(Chain, nested_calls),
    side_by_side(Forces, a_backward_within_a_forward),
]
# Weights between turns are real here: they are read there.
ODD_READS: list[Scenario] = [
    side_by_side(Layer, a_look_at_what_was_saved),
    side_by_side(Viewed, a_view_that_outlives_the_turn),
]
