"""Whatever way a loss reaches a streamed block, its gradients are the plain model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import superpipeline
from tiny import build, expect_plain, ids, same_weights, stream, streamed
from training.reference import Tensors, assert_same_tensors, streamed_bytes
from training.side_by_side import gradients
from zoo import assert_bit_equal
from zoo.layers import WIDTH, Layer


class Keeping(Layer):
    """Keeps a tensor that leaves by another door than the output."""

    kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.norm(x))
        self.kept = hidden.square()
        return x + self.down(functional.gelu(hidden))


class Blocks(nn.Module):
    """Streamed blocks; gives all hidden states."""

    def __init__(self, layer: Callable[[], nn.Module] = Keeping) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(5))

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


class Passing(Layer):
    """Hands one of its inputs on."""

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> Any:  # type: ignore[override]
        return pair[0], super().forward(pair[1])


class Passed(Blocks):
    """A pair goes through all blocks, one half of it untouched."""

    def __init__(self) -> None:
        super().__init__(Passing)

    def forward(self, x: torch.Tensor) -> Any:
        pair: Any = x * 1, x
        for layer in self.layers:
            pair = layer(pair)
        return pair


def checkpointed(*, reentrant: bool) -> Callable[[], nn.Module]:
    class Checkpointed(Blocks):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return {"last": x}

    return Checkpointed


def frozen() -> nn.Module:
    return Blocks().requires_grad_(False)


Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
LOSSES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "output": (Blocks, lambda m, x: m(x)["last"].sum()),
    "hidden_state": (Blocks, lambda m, x: m(x)["states"][2].square().sum()),
    "attribute": (Blocks, lambda m, x: (m(x), m.layers[1].kept.sum())[1]),
    "input_of_a_frozen_model": (frozen, lambda m, x: m(x)["last"].sum()),
    "attribute_of_a_frozen_model": (frozen, lambda m, x: (m(x), m.layers[2].kept.sum())[1]),
    "ctx": (lambda: Blocks(Stashing), lambda m, x: m(x)["last"].sum()),
    "bias_only": (lambda: Blocks(Biased), lambda m, x: m(x)["last"].sum()),
    "checkpointed": (checkpointed(reentrant=False), lambda m, x: m(x)["last"].sum()),
    "checkpointed_reentrant": (checkpointed(reentrant=True), lambda m, x: m(x)["last"].sum()),
    "around_a_call": (
        Blocks,
        lambda m, x: checkpoint(lambda x: m(x)["last"], x, use_reentrant=False).sum(),
    ),
    "passed_on": (Passed, lambda m, x: m(x)[1].sum()),
    "passed_on_untouched": (Passed, lambda m, x: m(x)[0].sum()),
    "both_halves": (Passed, lambda m, x: torch.stack(m(x)).square().sum()),
    "a_penalty_on_weights": (
        Blocks,
        lambda m, x: m(x)["last"].sum() + sum(p.square().sum() for p in m.parameters()),
    ),
}


def seen_by(model: nn.Module, loss: Loss) -> Tensors:
    """Of three losses the values, and their gradients, which add up."""
    seen: Tensors = {}
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(2, 3, WIDTH, generator=generator).requires_grad_()
        value = loss(model, x)
        value.backward()
        seen |= {f"{index}: loss": value.detach(), f"{index}: grad of x": x.grad}
        seen |= {f"{index}: {name}": grad for name, grad in gradients(model).items()}
    return seen


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_plain_models(name: str) -> None:
    make, loss = LOSSES[name]
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    handle = stream(model, "45%")
    assert_same_tensors("result", seen_by(model, loss), seen_by(plain, loss))
    forward, backward = streamed_bytes(handle)
    assert forward > 0
    assert backward > 0 or name in {"bias_only", "passed_on_untouched"}
    with torch.no_grad():
        x = torch.ones(1, 2, WIDTH)
        assert_bit_equal(model(x), plain(x))
    handle.close()
    assert same_weights(model, plain)
    model.zero_grad()
    plain.zero_grad()
    assert_same_tensors("result", seen_by(model, loss), seen_by(plain, loss))


def test_a_backward_outside_streamed_blocks() -> None:
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
    assert_bit_equal(model(inputs), plain(inputs))
    assert superpipeline.handle(model).stats().streamed_bytes == 0


def test_a_weight_decay_on_host_weights_is_no_backward_through_blocks() -> None:
    plain, (model, _, inputs) = build(), streamed()
    for target in (plain, model):
        sum(p.square().sum() for p in target.parameters()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(ours.grad, theirs.grad)
    expect_plain(model, inputs)
