"""A lazy step: it takes what the update reads and returns; who needs a result waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from training.cases import CASES
from training.gates import Gated, Strict, after_one_step, closed_gate, streamed
from training.recipes import OPTIMIZERS, trained
from training.reference import Tensors, assert_same_tensors, weights_of
from training.side_by_side import everything, loss_of, side_by_side, train

# ---- errors of workers --------------------------------------------------------------------------


NEXT_CALLS: dict[str, Callable[[nn.Module, Any, Optimizer], Any]] = {
    "forward": lambda model, handle, opt: loss_of(model),
    "step": lambda model, handle, opt: opt.step(),
    "weights": lambda model, handle, opt: handle.weights().__enter__(),
    "state_dict": lambda model, handle, opt: opt.state_dict(),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_a_workers_error_surfaces_at_the_next_call(call: str) -> None:
    """It names the block; the original is its cause or in its text."""
    model, handle = streamed()
    optimizer = handle.optimizer(Strict(model.parameters(), lr=0.1), per_parameter=True)
    train(model, optimizer, range(2))
    loss_of(model, 2).backward()
    model.layers[3].up.weight.grad.fill_(float("inf"))
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"layers\.3") as found:
        NEXT_CALLS[call](model, handle, optimizer)
    chain, error = [], found.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert "infinite" in " ".join(chain)


# ---- laziness -----------------------------------------------------------------------------------


def change_the_rate(optimizer: Optimizer, model: nn.Module) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 1e6
        group["momentum"] = 0.0


def change_the_gradients(optimizer: Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))


def replace_the_gradients(optimizer: Optimizer, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize(
    "meanwhile",
    [change_the_rate, change_the_gradients, replace_the_gradients],
    ids=lambda change: change.__name__,
)
def test_a_step_reads_what_there_was_when_it_was_called(
    meanwhile: Callable[[Optimizer, nn.Module], None],
) -> None:
    """A scheduler's step right after the optimizer's gave half of the blocks the next rate."""
    expected = after_one_step(torch.optim.SGD, meanwhile)
    model, handle = streamed()
    with closed_gate():
        base = Gated(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = handle.optimizer(base, per_parameter=True)
        torch.manual_seed(1)
        loss_of(model).backward()
        optimizer.step()
        meanwhile(optimizer, model)
    with handle.weights():
        assert_same_tensors("weight", weights_of(model), expected)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(*, to_none: bool) -> None:
    """Straight after `step()`, while workers still need the gradients."""
    model, handle = streamed()
    expected = after_one_step(torch.optim.SGD)
    with closed_gate():
        base = Gated(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = handle.optimizer(base, per_parameter=True)
        torch.manual_seed(1)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        for parameter in model.parameters():
            gradient = parameter.grad
            assert gradient is None if to_none else gradient is not None and not gradient.any()
    with handle.weights():
        assert_same_tensors("weight", weights_of(model), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_a_learning_rate_that_is_a_tensor(*, fused: bool) -> None:
    """It is changed in place: to remember the object would be to remember nothing."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(
            model.parameters(), lr=torch.tensor(1e-3), fused=fused, foreach=False
        )
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        losses: Tensors = {}
        for index in range(4):
            losses |= train(model, optimizer, range(index, index + 1))
            for group in optimizer.param_groups:
                group["lr"].mul_(0.3)
        lazily.append(True)
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


WAITERS: dict[str, Callable[[nn.Module, Any, Optimizer], Tensors]] = {
    "optimizer.state_dict": lambda model, handle, opt: {
        f"momentum of {name}": opt.state_dict()["state"][number]["momentum_buffer"].clone()
        for number, (name, _) in enumerate(model.named_parameters())
    },
    "model.state_dict": lambda model, handle, opt: {
        name: tensor.clone() for name, tensor in model.state_dict().items()
    },
    "weights": lambda model, handle, opt: read_within(model, handle),
    "close": lambda model, handle, opt: (handle.close(), weights_of(model))[1],
    "forward": lambda model, handle, opt: {"loss": loss_of(model, 1).detach()},
    "evaluation": lambda model, handle, opt: {"loss": evaluated(model)},
}


def read_within(model: nn.Module, handle: Any) -> Tensors:
    with handle.weights():
        return weights_of(model)


def evaluated(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return loss_of(model, 1)


def plain_waiter(name: str, model: nn.Module, optimizer: Optimizer) -> Tensors:
    class Plain:
        """A handle with nothing to do."""

        def close(self) -> None:
            pass

        @contextmanager
        def weights(self) -> Iterator[None]:
            yield

    return WAITERS[name](model, Plain(), optimizer)


@pytest.mark.parametrize("name", WAITERS)
def test_pending_updates_are_finished_first(name: str) -> None:
    """Each of these is called while every update waits for the gate; it opens a little later."""
    plain = CASES["dropout"].build()
    optimizer: Optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    loss_of(plain).backward()
    optimizer.step()
    expected = plain_waiter(name, plain, optimizer)

    model, handle = streamed()
    with closed_gate() as gate:
        base = Gated(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = handle.optimizer(base, per_parameter=True)
        torch.manual_seed(1)
        loss_of(model).backward()
        optimizer.step()
        timer = threading.Timer(0.3, gate.set)
        timer.start()
        try:
            actual = WAITERS[name](model, handle, optimizer)
        finally:
            timer.join()
    assert_same_tensors(name, actual, expected)


def test_weights_may_be_edited_inside_weights() -> None:
    """And a body that raises leaves a model that trains on."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = superpipeline.handle(model) if lazily else None
        if handle is not None:
            optimizer = handle.optimizer(optimizer)
        losses = train(model, optimizer, range(2))
        inside = handle.weights() if handle is not None else torch.no_grad()

        def edit_and_fail() -> None:
            with inside:
                model.layers[2].up.weight.data.mul_(0.5)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            edit_and_fail()
        losses |= train(model, optimizer, range(2, 4))
        lazily.append(True)
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach", "adamw_fused", "sgd", "muon"])
@pytest.mark.parametrize("unscales", [False, True])
def test_grad_scaler(kind: str, *, unscales: bool) -> None:
    """Without `unscale_`, fused optimizers get the scale, and whether to step at all, as
    attributes: they are overwritten for the next step before a worker reads them."""

    def script(model: nn.Module) -> Tensors:
        optimizers = OPTIMIZERS[kind](trained(model))
        if lazily:
            optimizers = [superpipeline.handle(model).optimizer(o) for o in optimizers]
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
        losses: Tensors = {}
        for index in range(6):
            loss = loss_of(model, index)
            scaled = loss * float("inf") if index in (1, 4) else loss
            scaler.scale(scaled).backward()
            for optimizer in optimizers:
                if unscales:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses[f"loss {index}"] = loss.detach()
            losses[f"scale {index}"] = torch.tensor(scaler.get_scale())
        lazily.append(True)
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)
