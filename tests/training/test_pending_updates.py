"""While updates are pending: who waits for them, and who sees NaN."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from superpipeline import UpdateError
from training.cases import CASES
from training.gates import Gated, after_one_step, closed_gate, streamed
from training.pending import evaluate, open_soon, pending
from training.reference import Tensors, assert_same_tensors, stream_within, weights_of
from training.side_by_side import everything, loss_of, side_by_side, train

# ---- who waits for what -------------------------------------------------------------------------


class LastWaits(torch.optim.SGD):
    """The update of the last layer's matrices waits until a later layer's forward has begun."""

    reached = threading.Event()
    last: int = 0

    def step(self, closure: Any = None) -> Any:
        addresses = {p.data_ptr() for group in self.param_groups for p in group["params"]}
        if self.last in addresses and not self.reached.wait(30):
            raise TimeoutError("the forward waited for an update that it does not need yet")
        return super().step(closure)


def test_the_forward_runs_ahead_of_the_updates() -> None:
    """Block 1 computes while block 5's update is pending: that is what being lazy is for."""
    model, handle = streamed("k2")
    LastWaits.reached.clear()
    LastWaits.last = model.layers[5].up.weight.data_ptr()
    base = LastWaits(model.parameters(), lr=0.1)
    LastWaits.reached.set()
    optimizer = handle.optimizer(base, per_parameter=True)
    train(model, optimizer, range(2))
    LastWaits.reached.clear()
    hook = model.layers[1].register_forward_pre_hook(lambda *_: LastWaits.reached.set())
    try:
        loss_of(model, 2).backward()
        LastWaits.reached.clear()
        optimizer.step()
        loss_of(model, 3)
    finally:
        hook.remove()
        LastWaits.reached.set()


def test_a_weight_shows_nan_until_its_update_is_made() -> None:
    with closed_gate() as gate:
        model, handle, _ = pending()
        assert all(p.isnan().all() for p in model.parameters())
        with pytest.raises(RuntimeError, match="single memory location"):
            model.layers[0].up.weight.data.mul_(0.5)
        timer = open_soon(gate)
        with handle.weights():
            assert not any(p.isnan().any() for p in model.parameters())
        timer.join()
    assert_same_tensors("weight", weights_of(model), after_one_step(torch.optim.SGD))


@pytest.mark.parametrize("write", [nn.init.zeros_, nn.init.ones_])
def test_what_is_written_over_a_nan_is_not_lost_unseen(
    write: Callable[[torch.Tensor], Any],
) -> None:
    """Not every operation refuses a tensor that repeats one element."""
    with closed_gate() as gate:
        model, handle, _ = pending()
        write(model.layers[3].up.weight)
        gate.set()
        with pytest.raises(UpdateError, match=r"layers\.3.*is lost"):
            loss_of(model)
    with handle.weights():
        assert_same_tensors("weight", weights_of(model), after_one_step(torch.optim.SGD))


@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_waits(*, fused: bool) -> None:
    """Also a plain one; a fused one would write past the NaN that it sees."""
    plain = CASES["dropout"].build()
    first = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    loss_of(plain).backward()
    first.step()
    torch.optim.AdamW(plain.parameters(), fused=fused).step()
    with closed_gate() as gate:
        model, _, _ = pending()
        other = torch.optim.AdamW(model.parameters(), fused=fused)
        timer = open_soon(gate)
        other.step()
        timer.join()
    assert_same_tensors("weight", weights_of(model), weights_of(plain))


def test_two_lazy_optimizers_in_every_block() -> None:
    """Muon for the matrices, AdamW for the rest, and a third for some of either again."""

    def script(model: nn.Module) -> Tensors:
        everyone = list(model.parameters())
        optimizers: list[Optimizer] = [
            torch.optim.Muon([p for p in everyone if p.ndim == 2], lr=1e-3),
            torch.optim.AdamW([p for p in everyone if p.ndim != 2], lr=1e-3),
            torch.optim.SGD(everyone[3:20], lr=1e-2, momentum=0.9),
        ]
        if lazily:
            optimizers = [superpipeline.handle(model).optimizer(o) for o in optimizers]
        lazily.append(True)
        losses: Tensors = {}
        for index in range(4):
            loss = loss_of(model, index)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            losses[f"loss {index}"] = loss.detach()
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


MEANWHILE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "a plan of residents": lambda model, handle: superpipeline.stream(model, "100%", quiet=True),
    "a new plan": lambda model, handle: superpipeline.stream(model, "60%", quiet=True),
    "a plan of another kind": lambda model, handle: superpipeline.stream(
        model, k=4, k_prime=2, quiet=True
    ),
    "verify": lambda model, handle: handle.verify(*CASES["dropout"].inputs(0).args),
    "a replaced weight": lambda model, handle: setattr(
        model.layers[2], "up", copy.deepcopy(CASES["dropout"].build().layers[2].up)
    ),
    "a replaced data": lambda model, handle: setattr(
        model.layers[2].up.weight, "data", torch.full((256, 128), 0.01)
    ),
    "an inference": lambda model, handle: torch.inference_mode()(model.eval())(
        *CASES["dropout"].inputs(0).args
    ),
    "nothing": lambda model, handle: None,
}


@pytest.mark.parametrize("name", MEANWHILE)
def test_what_happens_before_the_next_pass(name: str) -> None:
    plain = CASES["dropout"].build()
    optimizer: Optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    loss_of(plain).backward()
    optimizer.step()
    if name.startswith("a replaced"):
        MEANWHILE[name](plain, None)
    expected = everything(plain, train(plain.train(), optimizer, range(1, 4)))
    with closed_gate() as gate:
        model, handle, optimizer = pending("k2")
        timer = open_soon(gate)
        state = torch.get_rng_state()
        MEANWHILE[name](model, handle)
        torch.set_rng_state(state)
        if name == "a replaced weight":
            evaluate(model)
            assert handle.plan.streamed_bytes > bytes_of(model) // 2, "NaNs were packed"
        actual = everything(model, train(model.train(), optimizer, range(1, 4)))
        timer.join()
    assert_same_tensors(name, actual, expected)


class Peeking(nn.Module):
    """In eval mode it reads a weight of a block outside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = CASES["dropout"].build()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            hidden = hidden * self.body.layers[3].up.weight.mean()
        return self.body(hidden)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_weight_read_outside_its_block(mode: Callable[[], Any], *, known: bool) -> None:
    """Where that was not seen yet, or cannot be: all updates are waited for."""
    found = []
    for streams in (False, True):
        torch.manual_seed(4)
        model: nn.Module = Peeking().train()
        base = Gated(model.parameters(), lr=0.1, momentum=0.9)
        optimizer: Optimizer = base
        if streams:
            model = stream_within(model, "k2")
            optimizer = superpipeline.handle(model).optimizer(base, per_parameter=True)
        if known:
            evaluate(model, mode)
        torch.manual_seed(1)
        loss_of(model).backward()
        with closed_gate() if streams else nullcontext(Gated.gate) as gate:
            optimizer.step()
            timer = open_soon(gate)
            found.append(evaluate(model, mode))
            timer.join()
    assert_same_tensors("loss", found[1], found[0])


def bytes_of(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_a_step_hook_sees_the_weights_of_its_step() -> None:
    """So an average of the weights, or a constraint on them, can be kept in one."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        lazily.append(True)
        average = [torch.zeros_like(p) for p in model.parameters()]

        def constrain(*_: Any) -> None:
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 0.1)
                parameter.data.clamp_(-0.05, 0.05)

        optimizer.register_step_post_hook(constrain)
        losses = train(model, optimizer, range(4))
        return everything(model, losses) | {str(i): m for i, m in enumerate(average)}

    lazily: list[bool] = []
    side_by_side(script)


def test_steps_within_the_backward() -> None:
    """One optimizer for each parameter, which steps as soon as the gradient is there."""

    def script(model: nn.Module) -> Tensors:
        for parameter in model.parameters():
            optimizer: Optimizer = torch.optim.AdamW([parameter], lr=1e-3)
            if lazily:
                optimizer = superpipeline.handle(model).optimizer(optimizer)

            def step(_: Any, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        lazily.append(True)
        losses: Tensors = {}
        for index in range(3):
            loss = loss_of(model, index)
            loss.backward()
            losses[f"loss {index}"] = loss.detach()
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


def test_a_graph_of_before_the_step_is_refused() -> None:
    """As PyTorch does: the weights that it saved have changed."""
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    train(model, optimizer, range(2))
    loss = loss_of(model, 2)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    train(model, optimizer, range(3, 5))


# ---- what is stepped at once --------------------------------------------------------------------


def test_a_scalar_is_clamped_right_after_the_step() -> None:
    """CLIP's loop: a NaN of one element would swallow the write."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = CASES["dropout"].build()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.body(hidden) * self.scale.exp()

    def script(model: nn.Module) -> Tensors:
        outside = nn.Parameter(torch.linspace(-1, 1, 5))
        trains = [*model.parameters(), outside]
        optimizer: Optimizer = torch.optim.SGD(trains, lr=0.5, momentum=0.9)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        lazily.append(True)
        losses: Tensors = {}
        for index in range(4):
            weight = outside.square().sum()
            loss = loss_of(model, index) + weight
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.scale.data.clamp_(0, 1.01)
            losses |= {f"loss {index}": loss.detach(), f"{index}": outside.detach().clone()}
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script, Scaled)


def test_after_close_it_is_a_plain_optimizer() -> None:
    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        losses = train(model, optimizer, range(2))
        if lazily:
            superpipeline.handle(model).close()
        lazily.append(True)
        losses |= train(model, optimizer, range(2, 4))
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)
