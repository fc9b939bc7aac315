"""Faults that trainers have had, each with its story: none of them may come back here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import superpipeline
from superpipeline import BudgetError
from superpipeline import gradients as gradients_module
from training import models
from training.cases import CASES
from training.reference import Tensors, assert_same_tensors, streamed_bytes
from training.side_by_side import (
    everything,
    gradients,
    inputs,
    is_streamed,
    loss_of,
    sgd,
    side_by_side,
    train,
)
from zoo.case import BUILD_SEED, seeded

ACTIVATIONS = pytest.mark.parametrize(
    "activations", ["keep", "recompute", "offload", "recompute+offload"]
)


# ---- failures -----------------------------------------------------------------------------------


class AskedToFailError(Exception):
    pass


def fail(*_: Any) -> None:
    raise AskedToFailError


@ACTIVATIONS
def test_a_backward_that_fails_midway(activations: str) -> None:
    """Callbacks at the end of a backward do not run when it raises: the next one found the first
    one's gradients half added."""
    whole: Tensors = {}

    def script(model: nn.Module) -> Tensors:
        optimizer = sgd(model)
        losses = train(model, optimizer, range(2))
        loss_of(model, 2).backward()
        old = gradients(model)
        new = {}
        probe = loss_of(model, 3)
        if not is_streamed(model):
            found = torch.autograd.grad(probe, list(model.parameters()), retain_graph=True)
            new = {
                f"grad of {name}": g
                for (name, _), g in zip(model.named_parameters(), found, strict=True)
            }
            whole.update({name: old[name] + new[name] for name in old})
        hook = model.layers[2].up.weight.register_hook(fail)
        with pytest.raises(AskedToFailError):
            probe.backward()
        hook.remove()
        for name, gradient in gradients(model).items():
            is_old = torch.equal(gradient, old[name])
            assert is_old or torch.equal(gradient, whole[name]), f"{name} is half added"
        optimizer.zero_grad()
        return everything(model, losses | train(model, optimizer, range(4, 7)))

    side_by_side(script, activations=activations)


def test_a_gradient_from_before_outlives_a_backward_that_fails(monkeypatch: Any) -> None:
    """Where gradients leave the device, one that had landed when the backward failed was lost."""
    monkeypatch.setattr(gradients_module, "leave", lambda _: True)
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]), torch.ones(4, 64)
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    model(x).sum().backward()
    old = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(old) == 16
    hook = model[1].weight.register_hook(fail)
    with pytest.raises(AskedToFailError):
        model(x).sum().backward()
    hook.remove()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} lost its gradient"
        is_old = torch.equal(parameter.grad, old[name])
        assert is_old or torch.equal(parameter.grad, 2 * old[name]), f"{name} is half added"


def test_a_forward_that_fails_after_a_backward_was_put_off() -> None:
    """A failure brings the engine back to idle; a graph of before must still go back, or refuse."""

    def script(model: nn.Module) -> Tensors:
        loss = loss_of(model, 0)
        model.layers[3].fails = True
        with pytest.raises(models.AskedToFailError):
            loss_of(model, 1)
        model.layers[3].fails = False
        loss.backward()
        return gradients(model)

    side_by_side(script, CASES["failing_forward"].build)


# ---- beside other users of the same machinery ---------------------------------------------------


def test_saved_tensor_hooks_of_the_user() -> None:
    """An inner pair of hooks that hands everything on switches an outer one off: checkpointing,
    and saving on the host, silently stop."""

    def script(model: nn.Module) -> Tensors:
        packed: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            packed.append(tensor.numel())
            return tensor.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, 0)
        assert len(packed) > 20, "the user's pair no longer sees what is saved"
        loss.backward()
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, 1)
        loss.backward()
        return gradients(model)

    side_by_side(script)


class Halves(models.Stack):
    """Two checkpoints, each around three layers with dropout."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__([models.Dropped(models.WIDTH, models.HIDDEN) for _ in range(6)])
        self.reentrant = reentrant

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for start in (0, 3):
            x = checkpoint(self.half, x, start, use_reentrant=self.reentrant)
        return x

    def half(self, x: torch.Tensor, start: int) -> torch.Tensor:
        for part in self.layers[start : start + 3]:
            x = part(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True], ids=["ordinary", "reentrant"])
@ACTIVATIONS
def test_a_checkpoint_around_several_blocks(activations: str, *, reentrant: bool) -> None:
    """One checkpoint holds many blocks: its backward runs a forward of them inside. Its reentrant
    form runs a backward inside the backward, and callbacks fire at the inner one's end."""

    def script(model: nn.Module) -> Tensors:
        optimizer, losses = sgd(model), {}
        for index in range(3):
            for micro in range(2):
                loss = loss_of(model, 2 * index + micro)
                loss.backward()
                losses |= {f"{index} {micro} {n}": g for n, g in gradients(model).items()}
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, losses)

    build = seeded(lambda: Halves(reentrant=reentrant), BUILD_SEED)
    side_by_side(script, build, activations=activations)


@pytest.mark.parametrize("reentrant", [False, True], ids=["ordinary", "reentrant"])
def test_a_checkpoint_around_the_whole_model(*, reentrant: bool) -> None:
    """The recompute is a forward of the streamed model inside its own backward."""

    def script(model: nn.Module) -> Tensors:
        optimizer, losses = sgd(model), {}
        for index in range(3):
            x = inputs(index).args[0].requires_grad_()
            loss = checkpoint(model, x, use_reentrant=reentrant).square().mean()
            loss.backward()
            losses |= gradients(model) | {f"loss {index}": loss.detach()}
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, losses)

    side_by_side(script)


def test_one_block_in_place_at_a_time() -> None:
    """Buffers that are used again while a kernel still reads them, or read before their copy has
    landed: the most frequent fault of all. With one place for all blocks, every fetch is one."""
    build = CASES["mlp"].build
    with pytest.raises(BudgetError) as found:
        superpipeline.stream(build(), weights=1, device="cpu", quiet=True, activations="keep")
    model = superpipeline.stream(
        build(), weights=found.value.least_bytes, device="cpu", quiet=True, activations="keep"
    )
    plain = build()
    results = []
    for target in (model, plain):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(target.parameters())
        losses = {}
        for index in range(5):
            loss = CASES["mlp"].loss(target, CASES["mlp"].inputs(index))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[f"loss {index}"] = loss.detach()
        results.append(everything(target, losses))
    assert_same_tensors("result", *results)
    handle = superpipeline.handle(model)
    assert all(streamed_bytes(handle))
    assert handle.stats().peak_device_bytes <= found.value.least_bytes


def test_a_frozen_weight_on_ctx() -> None:
    """A frozen base whose matmul keeps its weight on ctx, unseen by saved-tensor hooks, with
    something that trains below it: its gradient is taken with whatever lies in the place by then.
    Forward was right, and training went nowhere."""

    def build() -> nn.Module:
        model = CASES["weight_on_ctx"].build()
        for part in model.layers:
            part.requires_grad_(False)
        return model

    def script(model: nn.Module) -> Tensors:
        losses = train(model, sgd(model), range(3))
        loss_of(model, 4).backward()
        assert model.stem.weight.grad is not None
        return everything(model, losses) | gradients(model)

    side_by_side(script, build)


@ACTIVATIONS
def test_a_loss_that_leaves_by_another_door(activations: str) -> None:
    """A block's output that is a view of its weight, or a loss kept on an attribute, reaches a
    backward past every hook on module outputs: finite, wrong gradients."""

    class Layer(models.Keeping):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), self.down.bias, self.up.weight[:4]

    class Model(models.Stack):
        def __init__(self) -> None:
            super().__init__([Layer(models.WIDTH, models.HIDDEN) for _ in range(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x, extra = self.stem(x), torch.zeros(())
            for part in self.layers:
                x, bias, rows = part(x)
                extra = extra + bias.square().sum() + rows.sum()
            kept = torch.stack([part.kept for part in self.layers])
            return self.head(x).square().mean() + 0.1 * kept.sum() + 0.01 * extra

    def build() -> nn.Module:
        torch.manual_seed(5)
        return Model()

    def script(model: nn.Module) -> Tensors:
        optimizer, losses = sgd(model), {}
        for index in range(3):
            loss = model(inputs(index).args[0])
            loss.backward()
            losses |= gradients(model) | {f"loss {index}": loss.detach()}
            optimizer.step()
            optimizer.zero_grad()
        return everything(model, losses)

    side_by_side(script, build, activations=activations)


@ACTIVATIONS
def test_dropout_is_the_same_when_it_is_computed_again(activations: str) -> None:
    """Dropout that is drawn anew in a recompute belongs to another network than the loss. The
    state of the generator afterwards is the plain model's too."""

    def script(model: nn.Module) -> Tensors:
        losses = train(model, sgd(model), range(3))
        losses["next random number"] = functional.dropout(torch.ones(64), 0.5)
        return everything(model, losses)

    side_by_side(script, activations=activations)


@ACTIVATIONS
def test_statistics_written_in_forward(activations: str) -> None:
    """BatchNorm's statistics were written to a copy that was thrown away; and a recompute that
    runs the forward twice would move them twice."""
    case = CASES["resnet"]

    def script(model: nn.Module) -> Tensors:
        optimizer, seen = sgd(model), {}
        for index in range(3):
            loss = case.loss(model, case.inputs(index))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen |= {f"{index}: {name}": b.clone() for name, b in model.named_buffers()}
        return everything(model, seen)

    side_by_side(script, case.build, activations=activations)
