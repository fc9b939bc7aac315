"""Autocast: its copies of weights take the memory of one block, and gradients add up as ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import superpipeline
from superpipeline import BackwardError
from training import models
from training.cases import CASES, cross_entropy
from training.reference import Tensors, assert_same_tensors, stream_within
from training.side_by_side import (
    everything,
    gradients,
    inputs,
    is_streamed,
    sgd,
    side_by_side,
)
from training.test_what_moves import NUM_LAYERS, Watching, deep, known, streaming
from zoo.case import BUILD_SEED, seeded

BFLOAT16 = torch.bfloat16
MATRIX = models.WIDTH * models.HIDDEN * 2
BOUNDS = pytest.mark.parametrize("bound", ["k2", "50%"])


def autocast() -> Any:
    return torch.autocast("cpu", BFLOAT16)


def loss_of(model: nn.Module, index: int = 0) -> torch.Tensor:
    given = inputs(index)
    return cross_entropy(model(*given.args), given)


def trained(forward: Callable[[nn.Module, int], torch.Tensor]) -> Callable[[nn.Module], Tensors]:
    """Three steps on what `forward` gives; losses, gradients and weights."""

    def script(model: nn.Module) -> Tensors:
        optimizer, seen = sgd(model), {}
        for index in range(3):
            loss = forward(model, index)
            loss.backward()
            seen |= {f"loss {index}": loss.detach()}
            seen |= {f"{index}: {name}": grad for name, grad in gradients(model).items()}
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, seen)

    return script


# ---- bits: uses of a weight share one copy -------------------------------------------------------


def twice_in_one_context(model: nn.Module, index: int) -> torch.Tensor:
    with autocast():
        return loss_of(model, index) + loss_of(model, index + 1)


def with_an_evaluation_between(model: nn.Module, index: int) -> torch.Tensor:
    with autocast():
        first = loss_of(model, index)
        with torch.no_grad():
            target = loss_of(model, index + 2)
        return first + loss_of(model, index + 1) * target


def in_two_contexts(model: nn.Module, index: int) -> torch.Tensor:
    with autocast():
        first = loss_of(model, index)
    with autocast():
        return first + loss_of(model, index + 1)


def without_a_cache(model: nn.Module, index: int) -> torch.Tensor:
    with torch.autocast("cpu", BFLOAT16, cache_enabled=False):
        return loss_of(model, index) + loss_of(model, index + 1)


@BOUNDS
@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
@pytest.mark.parametrize(
    "forward",
    [twice_in_one_context, with_an_evaluation_between, in_two_contexts, without_a_cache],
)
def test_gradients_add_up_in_the_copys_dtype(
    forward: Callable[[nn.Module, int], torch.Tensor], activations: str, bound: str
) -> None:
    """Where uses share a copy, their gradients are added in bfloat16, and else in float32: with a
    copy of its own for each visit, the last bits drift."""
    side_by_side(trained(forward), CASES["revisited"].build, bound=bound, activations=activations)


def test_the_two_sums_differ() -> None:
    """What the test above tells apart."""
    found = []
    for forward in (twice_in_one_context, in_two_contexts):
        model = CASES["revisited"].build()
        forward(model, 0).backward()
        found.append(model.layers[3].up.weight.grad)
    assert not torch.equal(*found)


def test_other_models_keep_their_copies() -> None:
    """The cache is everybody's: a discriminator's copy must outlive a streamed generator's pass."""
    build = seeded(lambda: nn.Linear(models.NUM_CLASSES, 4), BUILD_SEED)

    def script(model: nn.Module) -> Tensors:
        judge = build()
        with autocast():
            seen = judge(torch.ones(3, models.NUM_CLASSES)).square().sum()
            with torch.no_grad():
                fake = model(*inputs(0).args)
            loss = seen + judge(fake).sum() + judge(model(*inputs(1).args)).sum()
        loss.backward()
        return gradients(model) | {"judge": judge.weight.grad}

    side_by_side(script)


class Frozen(models.Stack):
    """Adapters on frozen layers in float32."""

    def __init__(self) -> None:
        super().__init__([models.layer() for _ in range(NUM_LAYERS)])
        self.requires_grad_(False)
        self.scales = nn.ParameterList(torch.ones(models.WIDTH) for _ in self.layers)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for part, scale in zip(self.layers, self.scales, strict=True):
            x = self.call(part, x * scale)
        return x


class OddUses(nn.Module):
    """Casts of views and of slices, a cast by hand, one that is kept, and one that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(models.WIDTH, models.HIDDEN) / 8)
        self.down = nn.Parameter(torch.randn(2, models.HIDDEN, models.WIDTH) / 8)
        self.narrow: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("bsd,dh->bsh", x, self.up)
        hidden = functional.gelu(hidden) + x @ self.up[:, :1]
        y = hidden @ self.down[0] + torch.matmul(hidden, self.down[1])
        scaled = self.up.to(BFLOAT16)
        scaled.data.mul_(2)
        self.narrow = self.up.to(BFLOAT16)
        return x + y + functional.linear(x.to(BFLOAT16) @ scaled, self.narrow)


class Odd(models.Stack):
    """Also reads, far from its block, the cast that a block made by hand and keeps."""

    def __init__(self) -> None:
        super().__init__([OddUses() for _ in range(5)])

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = super().body(x)
        for part in self.layers:
            x = x + (x.to(BFLOAT16) @ part.narrow) @ part.narrow.t() / 100
        return x


@BOUNDS
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("build", [Frozen, Odd])
def test_odd_uses(build: type[nn.Module], activations: str, bound: str) -> None:
    """What the model casts by itself, and holds, stays as it is."""

    def forward(model: nn.Module, index: int) -> torch.Tensor:
        with autocast():
            return loss_of(model, index)

    made = seeded(lambda: build().train(), BUILD_SEED)
    side_by_side(trained(forward), made, bound=bound, activations=activations)


def test_a_backward_within_autocast() -> None:
    def script(model: nn.Module) -> Tensors:
        with autocast():
            loss_of(model, 0).backward()
            loss_of(model, 1).backward()
        return gradients(model)

    for activations in ("keep", "recompute"):
        side_by_side(script, CASES["revisited"].build, activations=activations)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "another_plan": lambda m: superpipeline.stream(m, k=3, device="cpu", quiet=True),
    "all_resident": lambda m: superpipeline.stream(m, "100%", device="cpu", quiet=True),
    "closed": lambda m: superpipeline.handle(m).close(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_within_autocast(change: str) -> None:
    """The cache outlives a plan: what is hidden in it must be found by the next, or be shown."""

    def script(model: nn.Module) -> Tensors:
        seen: Tensors = {}
        with autocast():
            for index in range(4):
                loss = loss_of(model, index)
                loss.backward()
                seen[f"loss {index}"] = loss.detach()
                if index == 1 and is_streamed(model):
                    CHANGES[change](model)
        return seen | {f"last {name}": grad for name, grad in gradients(model).items()}

    model = stream_within(CASES["revisited"].build(), "k2")
    assert_same_tensors("result", script(model), script(CASES["revisited"].build()))


def test_a_weight_that_was_written_before_its_cast_is_made_again() -> None:
    """The plain model has the old cast; here it cannot be made any more, and that is said."""
    model, _ = streaming(deep())
    known(model)
    with autocast():
        loss = loss_of(model)
    with torch.no_grad():
        model.layers[2].up.weight.mul_(2)
    with pytest.raises(BackwardError, match="modified by an inplace operation"):
        loss.backward()


# ---- memory -------------------------------------------------------------------------------------


def alive_in_the_forward(model: nn.Module, *, grad: bool = True) -> int:
    """Bytes of whole matrices in bfloat16 when a forward has ended and autocast has not."""
    known(model)
    with Watching() as watching, autocast(), torch.set_grad_enabled(grad):
        loss = loss_of(model, 3)
        alive = watching.alive(BFLOAT16, MATRIX)
    del loss
    return alive


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("grad", [True, False])
def test_copies_of_one_block_at_a_time(activations: str, *, grad: bool) -> None:
    """Also before autocast ends: its cache would hold every weight of the model."""
    assert alive_in_the_forward(deep(), grad=grad) >= NUM_LAYERS * 2 * MATRIX
    model, _ = streaming(deep(), activations=activations)
    assert alive_in_the_forward(model, grad=grad) <= 2 * 2 * MATRIX


def test_no_copies_of_frozen_weights_are_saved() -> None:
    """Autocast does not cache these, but autograd saves each."""
    build = seeded(lambda: Frozen().train(), BUILD_SEED)
    assert alive_in_the_forward(build()) >= NUM_LAYERS * 2 * MATRIX
    model, _ = streaming(build())
    assert alive_in_the_forward(model) <= 2 * 2 * MATRIX


def test_no_copies_of_residents_are_saved() -> None:
    model, handle = streaming(deep(), "50%")
    known(model)
    assert handle.plan.resident
    with Watching() as watching:
        with autocast():
            loss = loss_of(model, 3)
        alive = watching.alive(BFLOAT16, MATRIX)
    del loss
    assert alive <= 2 * 2 * MATRIX
    superpipeline.handle(model).close()
