"""A backward through a streamed block raises, whatever the loss reaches it through; others work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from superpipeline import (
    BackwardError,
)
from tiny import (
    BOUND,
    build,
    expect_plain,
    ids,
    same_weights,
    stream,
    streamed,
)
from zoo import assert_bit_equal
from zoo.layers import WIDTH, Layer


class Blocks(nn.Module):
    """Streamed blocks with every way for a loss to be reached beside the output."""

    class Keeping(Layer):
        kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.up(self.norm(x))
            self.kept = hidden.square()  # leaves by another door than the output
            return x + self.down(functional.gelu(hidden))

    def __init__(self, layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList((layer or self.Keeping)() for _ in range(5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return {"last": states[-1], "states": states}


class StashingLinear(torch.autograd.Function):
    """Keeps a view of its weight on ctx instead of saving it, as 4-bit matmuls do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight.t()
        return x @ ctx.weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.weight.t(), None


class Stashing(nn.Module):
    """A block whose only node with weights is a StashingLinear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return StashingLinear.apply(x, self.weight)[..., :WIDTH]


class Biased(nn.Module):
    """A block in which only a bias is trained: nothing that lies in the window is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(192, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.detach(), self.weight) + self.bias.sum(0)


def backward_of(make: Callable[[], nn.Module], loss: Callable[[nn.Module], torch.Tensor]) -> None:
    """The plain model's backward works; the streamed one's raises; the next call is right."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    pipe = stream(model, "45%")
    loss(plain).backward()
    for _ in range(2):
        value = loss(model)
        with pytest.raises(BackwardError, match="streamed"):
            value.backward()
        assert not any(
            alias.tensor.grad is not None
            for weight in pipe._layout.weights
            if weight.index not in pipe.plan.resident
            for alias in weight.aliases
        )
        model.zero_grad()
    assert_bit_equal(loss(model), loss(plain))
    x = torch.ones(1, 2, WIDTH)
    with torch.no_grad():
        assert_bit_equal(model(x), plain(x))
    pipe.close()
    loss(model).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert_bit_equal(ours.grad, theirs.grad)


def given(*, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, WIDTH, generator=generator).requires_grad_(requires_grad)


def frozen() -> nn.Module:
    return Blocks().requires_grad_(False)


def checkpointed(*, reentrant: bool) -> Callable[[], nn.Module]:
    class Checkpointed(Blocks):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return {"last": x}

    return Checkpointed


LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]] = {
    "output": (Blocks, lambda m: m(given())["last"].sum()),
    "hidden_state": (Blocks, lambda m: m(given())["states"][2].square().sum()),
    "attribute": (Blocks, lambda m: (m(given()), m.layers[1].kept.sum())[1]),
    "input_grads_of_frozen": (frozen, lambda m: m(given(requires_grad=True))["last"].sum()),
    "frozen_attribute": (
        frozen,
        lambda m: (m(given(requires_grad=True)), m.layers[2].kept.sum())[1],
    ),
    "ctx": (lambda: Blocks(Stashing), lambda m: m(given(requires_grad=True))["last"].sum()),
    "bias_only": (lambda: Blocks(Biased), lambda m: m(given())["last"].sum()),
    "checkpointed": (checkpointed(reentrant=False), lambda m: m(given())["last"].sum()),
    "checkpointed_reentrant": (
        checkpointed(reentrant=True),
        lambda m: m(given(requires_grad=True))["last"].sum(),
    ),
    "around_a_call": (
        Blocks,
        lambda m: checkpoint(lambda x: m(x)["last"], given(), use_reentrant=False).sum(),
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_a_backward_through_streamed_blocks_raises(name: str) -> None:
    backward_of(*LOSSES[name])


def test_a_backward_outside_streamed_blocks_is_the_plain_models() -> None:
    plain, model, inputs = build(), build(), ids()
    stream(model)
    grads = []
    for backbone in (plain, model):
        torch.manual_seed(1)
        head = nn.Linear(1024, 4)
        with torch.no_grad():
            features = backbone(inputs)
        head(features).logsumexp(-1).sum().backward()
        head(backbone(inputs).detach()).square().sum().backward()
        grads.append([p.grad for p in head.parameters()])
        assert all(p.grad is None for p in backbone.parameters())
    assert_bit_equal(grads[1], grads[0])


def test_what_a_block_passes_on_untouched_keeps_its_backward() -> None:
    """The guard on a block's outputs was once put on the node of the input that it handed on."""

    class Passing(Layer):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return pair[0], super().forward(pair[1])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Passing() for _ in range(4))

        def forward(self, pair: Any) -> Any:
            for layer in self.layers:
                pair = layer(pair)
            return pair

    torch.manual_seed(0)
    model = Model()
    stream(model, "60%")
    scale = torch.ones(WIDTH, requires_grad=True)
    x = given() * scale
    untouched, result = model((x, x))
    untouched.sum().backward(retain_graph=True)
    assert_bit_equal(scale.grad, given().sum((0, 1)))
    with pytest.raises(BackwardError):
        result.sum().backward()


def test_a_model_that_fits_trains_as_the_plain_one() -> None:
    plain, model, inputs = build(), build(), ids()
    stream(model, "100%")
    for target in (plain, model):
        optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3)
        for _ in range(3):
            target(inputs).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_weights(model, plain)
    expect = plain(inputs)
    assert_bit_equal(model(inputs), expect)


def test_a_weight_decay_on_host_weights_is_no_backward_through_blocks() -> None:
    plain, (model, _, inputs) = build(), streamed()
    for target in (plain, model):
        sum(p.square().sum() for p in target.parameters()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(ours.grad, theirs.grad)
    expect_plain(model, inputs)


def test_the_bound_used_here_streams() -> None:
    model, pipe, _ = streamed()
    assert pipe.stats().streamed_bytes > 0 and pipe.plan.bound_bytes is not None
    assert BOUND.endswith("%") and model.training is False
