"""What a backward must get right, one rule a test; each opens with what went wrong somewhere."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import BackwardError
from training import models
from training.cases import CASES
from training.reference import Tensors, stream_within
from training.side_by_side import (
    everything,
    gradients,
    inputs,
    is_streamed,
    loss_of,
    real_weights,
    sgd,
    side_by_side,
    train,
)
from zoo.case import BUILD_SEED, seeded

REVISITED = CASES["revisited"].build
ACTIVATIONS = pytest.mark.parametrize(
    "activations", ["keep", "recompute", "offload", "recompute+offload"]
)


# ---- how gradients add up -----------------------------------------------------------------------


def test_gradients_add_up_in_pytorchs_order() -> None:
    """Sums of floats depend on their order, and a trainer that adds gradients as they arrive on
    the host may choose another than AccumulateGrad does: the last bits drift."""

    def micro_batch(model: nn.Module, index: int) -> None:
        given = inputs(index).args[0] * 10.0**index
        model(given).square().mean().backward()

    def script(model: nn.Module) -> Tensors:
        for index in range(3):
            micro_batch(model, index)
        return gradients(model)

    side_by_side(script, REVISITED)
    alone = []
    for index in range(3):
        model = REVISITED()
        micro_batch(model, index)
        alone.append(model.layers[2].up.weight.grad)
    one, two, three = alone
    assert not torch.equal(one + two + three, one + (two + three)), "the order shows here"


@ACTIVATIONS
def test_every_micro_batch_adds_its_gradient(activations: str) -> None:
    """Gradients of all micro-batches but the first were dropped for months in one trainer, and
    training went on, a little worse."""

    def script(model: nn.Module) -> Tensors:
        seen: Tensors = {}
        for index in range(4):
            loss_of(model, index).backward()
            seen |= {f"{index}: {name}": grad for name, grad in gradients(model).items()}
        return seen

    side_by_side(script, activations=activations)


def test_unused_parameters_keep_no_gradient() -> None:
    """Zeros in place of None make an optimizer decay weights, and give them state, for nothing."""

    def script(model: nn.Module) -> Tensors:
        optimizer = torch.optim.AdamW(model.parameters())
        losses = train(model, optimizer, range(3))
        loss_of(model, 5).backward()
        assert model.never.grad is None
        assert all(p.grad is None for p in model.spare.parameters())
        assert model.never not in optimizer.state
        return everything(model, losses) | gradients(model)

    side_by_side(script, CASES["unused"].build)


def test_gradients_keep_their_strides() -> None:
    """A gradient that comes back contiguous where PyTorch gives channels_last costs an optimizer
    a copy at every step, and fused ones another order of elements."""

    def build() -> nn.Module:
        return CASES["unet"].build().to(memory_format=torch.channels_last)

    def script(model: nn.Module) -> Tensors:
        given = CASES["unet"].inputs(0).args[0].to(memory_format=torch.channels_last)
        model(given).square().mean().backward()
        strides = {
            f"strides of {name}": torch.tensor(p.grad.stride())
            for name, p in model.named_parameters()
        }
        assert not model.downs[0].weight.grad.is_contiguous()
        return strides | gradients(model)

    side_by_side(script, build)


def test_only_the_named_inputs_get_gradients() -> None:
    """`backward(inputs=[...])` must leave every other gradient alone, here old ones."""

    def script(model: nn.Module) -> Tensors:
        loss_of(model, 0).backward()
        chosen = [model.layers[1].up.weight, model.layers[4].down.bias]
        loss_of(model, 1).backward(inputs=chosen)
        return gradients(model)

    side_by_side(script)


def test_several_roots_in_one_backward() -> None:
    def script(model: nn.Module) -> Tensors:
        losses = [loss_of(model, index) for index in range(3)]
        torch.autograd.backward(losses, [torch.tensor(0.5), None, torch.tensor(2.0)])
        return gradients(model)

    side_by_side(script)


# ---- hooks --------------------------------------------------------------------------------------


@ACTIVATIONS
def test_hooks_run_once_in_a_backward(activations: str) -> None:
    """Re-pointing a parameter to another device between its uses gave it a second AccumulateGrad:
    its hooks ran twice. A layer that is visited several times shows it."""

    def script(model: nn.Module) -> Tensors:
        counts: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda g, name=name: counts.update([f"tensor {name}"]))
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: counts.update([f"accumulated {name}"])
            )
        for index in range(2):
            loss_of(model, index).backward()
        never = {name for name, p in model.named_parameters() if p.grad is None}
        assert all(count == 2 for count in counts.values())
        assert len(counts) == 2 * (sum(1 for _ in model.parameters()) - len(never))
        return {name: torch.tensor(count) for name, count in counts.items()} | gradients(model)

    side_by_side(script, REVISITED, activations=activations)


def test_a_hook_sees_the_accumulated_gradient() -> None:
    """A user's post-accumulate hook reads `param.grad`: all of it, in PyTorch's order."""

    def script(model: nn.Module) -> Tensors:
        seen: Tensors = {}

        def look(parameter: nn.Parameter, name: str) -> None:
            assert parameter.grad is not None
            seen[f"{len(seen)}: {name}"] = parameter.grad.clone()

        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: look(p, name))
        for index in range(2):
            loss_of(model, index).backward()
        return dict(sorted(seen.items()))

    side_by_side(script)


def test_an_optimizer_that_steps_inside_the_backward() -> None:
    """Steps from post-accumulate hooks, gradients freed at once: PyTorch's own recipe for saving
    memory. It writes a weight's host bytes while other blocks' backwards still run."""

    def script(model: nn.Module) -> Tensors:
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

        def update(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        losses: Tensors = {}
        for index in range(4):
            loss = loss_of(model, index)
            loss.backward()
            losses[f"loss {index}"] = loss.detach()
        assert all(p.grad is None for p in model.parameters())
        return everything(model, losses)

    side_by_side(script)


# ---- between a forward and its backward ---------------------------------------------------------


@ACTIVATIONS
def test_an_evaluation_between_forward_and_backward(activations: str) -> None:
    """The places that a graph saved weights in hold other blocks' bytes by the time it goes back:
    gradients came out finite and wrong. Here a whole pass of another kind lies between."""

    def script(model: nn.Module) -> Tensors:
        losses: Tensors = {}
        optimizer = sgd(model)
        for index in range(3):
            loss = loss_of(model, index)
            model.eval()
            with torch.no_grad():
                losses[f"evaluation {index}"] = loss_of(model, index + 1)
            model.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, losses)

    side_by_side(script, activations=activations)


@ACTIVATIONS
def test_graphs_that_go_back_in_another_order(activations: str) -> None:
    """Three graphs alive at once, and the first is the last to go back; one is never used."""

    def script(model: nn.Module) -> Tensors:
        losses = [loss_of(model, index) for index in range(4)]
        for index in (3, 1, 0):
            losses[index].backward()
        return gradients(model)

    side_by_side(script, activations=activations)


def test_a_graph_that_is_dropped_costs_nothing_later() -> None:
    """A forward with gradients whose loss is only looked at."""

    def script(model: nn.Module) -> Tensors:
        looked_at = [loss_of(model, index).detach() for index in range(3)]
        losses = {f"looked at {index}": loss for index, loss in enumerate(looked_at)}
        return everything(model, losses | train(model, sgd(model), range(3)))

    side_by_side(script)


class PartlyFrozen(models.Stack):
    """Half of the layers run without gradients in the middle of a forward."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for index, part in enumerate(self.layers):
            with torch.set_grad_enabled(index >= 3 and torch.is_grad_enabled()):
                x = part(x)
        return x


def test_a_part_that_runs_without_gradients() -> None:
    """Nothing is saved there, and the modes change in the middle of a pass."""

    def script(model: nn.Module) -> Tensors:
        losses = train(model, sgd(model), range(3))
        loss_of(model, 3).backward()
        assert model.stem.weight.grad is None and model.layers[2].up.weight.grad is None
        return everything(model, losses) | gradients(model)

    side_by_side(script, seeded(PartlyFrozen, BUILD_SEED))


@ACTIVATIONS
def test_blocks_called_one_by_one(activations: str) -> None:
    """No forward of the whole model: each call is a pass of its own, and one graph spans all."""

    def script(model: nn.Module) -> Tensors:
        optimizer, losses = sgd(model), {}
        for index in range(4):
            x = model.stem(inputs(index).args[0])
            for part in model.layers:
                x = part(x)
            loss = model.head(x).square().mean()
            loss.backward()
            losses |= gradients(model) | {f"loss {index}": loss.detach()}
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, losses)

    side_by_side(script, activations=activations)


def test_a_backward_on_another_thread() -> None:
    """On an accelerator every backward runs on autograd's own thread: who owns a pass cannot be
    told from the thread."""

    def script(model: nn.Module) -> Tensors:
        optimizer, losses = sgd(model), {}
        for index in range(3):
            loss = loss_of(model, index)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            optimizer.step()
            optimizer.zero_grad()
            losses[f"loss {index}"] = loss.detach()
        return everything(model, losses)

    side_by_side(script)


class Square(torch.autograd.Function):
    """Saves a parameter itself, as convolutions and norms do, and says where it reads it."""

    addresses: ClassVar[list[int]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        Square.addresses.append(weight.data_ptr())
        return grad * weight, None


class Squaring(models.Dropped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(
            Square.apply(x, self.up.weight[0]) + Square.apply(x, self.norm.weight)
        )


def test_a_parameter_that_is_saved_itself_is_read_in_the_window() -> None:
    """A parameter shows the host's bytes between turns, and so did what autograd had saved of it:
    right, but on a GPU each kernel of a convolution's backward read its weight across the link."""
    make = seeded(lambda: models.Stack([Squaring(128, 256) for _ in range(5)]).train(), BUILD_SEED)
    model = stream_within(make(), "k2")
    Square.addresses.clear()
    loss_of(model).backward()
    window = superpipeline.handle(model).engine.window.bytes
    begin = window.data_ptr()
    assert len(Square.addresses) == 10
    assert all(begin <= address < begin + window.numel() for address in Square.addresses)


# ---- what is refused ----------------------------------------------------------------------------


HIGHER: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "backward": lambda _, loss: loss.backward(create_graph=True),
    "grad": lambda m, loss: torch.autograd.grad(loss, list(m.parameters()), create_graph=True),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("how", HIGHER)
def test_higher_order_gradients_are_refused(how: str) -> None:
    """A second backward would go through nodes that never saved a streamed weight."""

    def script(model: nn.Module) -> Tensors:
        optimizer = sgd(model)
        losses = train(model, optimizer, range(2))
        if is_streamed(model):
            with pytest.raises(BackwardError, match="create_graph"):
                HIGHER[how](model, loss_of(model, 2))
        else:
            loss_of(model, 2)  # the same random numbers
        optimizer.zero_grad()
        return everything(model, losses | train(model, optimizer, range(3, 5)))

    side_by_side(script).close()


@pytest.mark.parametrize("inside", [False, True], ids=["directly", "inside_weights"])
@pytest.mark.parametrize("activations", ["keep", "offload"])
def test_a_weight_changed_in_place_before_its_backward(activations: str, *, inside: bool) -> None:
    """PyTorch refuses to go back over a saved tensor that was changed; saved-tensor hooks switch
    that check off, and the gradient would be taken at the new weight. (A recompute saves no
    weight; there PyTorch's own checkpoint goes on too.)"""

    def script(model: nn.Module) -> Tensors:
        optimizer = sgd(model)
        losses = train(model, optimizer, range(2))
        weight = model.layers[2].down.weight
        before = weight.detach().clone()

        def change() -> None:
            loss = loss_of(model, 2)
            with torch.no_grad():
                weight.mul_(2)
            loss.backward()

        with pytest.raises(RuntimeError):  # the write itself, or the backward
            change()
        with torch.no_grad():
            weight.copy_(before)
        optimizer.zero_grad()
        return everything(model, losses | train(model, optimizer, range(3, 5)))

    def script_inside(model: nn.Module) -> Tensors:
        loss = loss_of(model, 0)
        with real_weights(model), torch.no_grad():
            model.layers[2].down.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        return everything(model, train(model, sgd(model), range(1, 4)))

    side_by_side(script_inside if inside else script, activations=activations)
