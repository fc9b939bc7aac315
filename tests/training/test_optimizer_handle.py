"""`handle.optimizer(opt)` is a torch optimizer in every respect, and exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

import superpipeline
from superpipeline import UnsupportedError
from training.cases import CASES
from training.gates import Strict, streamed
from training.recipes import OPTIMIZERS, trained, two_groups
from training.reference import (
    Tensors,
    assert_same_states,
    assert_same_tensors,
    stream_within,
    weights_of,
)
from training.side_by_side import everything, loss_of, side_by_side, train

# ---- it is an optimizer -------------------------------------------------------------------------


def test_it_is_a_torch_optimizer_over_the_same_groups() -> None:
    model, handle = streamed()
    base = torch.optim.AdamW(two_groups(list(model.parameters())), lr=1e-3, betas=(0.8, 0.9))
    optimizer = handle.optimizer(base)
    assert isinstance(optimizer, Optimizer)
    assert [g["params"] for g in optimizer.param_groups] == [g["params"] for g in base.param_groups]
    named = {id(p) for p in model.parameters()}
    assert all(id(p) in named for g in optimizer.param_groups for p in g["params"])
    assert optimizer.defaults == base.defaults
    optimizer.param_groups[1]["lr"] = 0.5
    assert base.param_groups[1]["lr"] == 0.5, "a scheduler that was made for either sets both"


KINDS: dict[str, Callable[[list[nn.Parameter]], list[Optimizer]]] = OPTIMIZERS | {
    kind.__name__.lower(): lambda ps, kind=kind: [kind(ps, lr=1e-3)]
    for kind in (
        torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam,
        torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
        torch.optim.Rprop,
    )
} | {
    "adam_maximizing": lambda ps: [torch.optim.Adam(ps, lr=1e-3, maximize=True, amsgrad=True)],
    "sgd_nesterov": lambda ps: [
        torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, foreach=True)
    ],
    "sgd_fused": lambda ps: [torch.optim.SGD(ps, lr=1e-2, momentum=0.9, fused=True)],
    "adagrad_fused": lambda ps: [torch.optim.Adagrad(ps, lr=1e-2, fused=True)],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_listed_optimizer_is_exact(kind: str) -> None:
    """State, and the `step` in it, as the whole optimizer would have left it."""
    states: list[list[Any]] = []

    def script(model: nn.Module) -> Tensors:
        optimizers = KINDS[kind](trained(model))
        if states:
            optimizers = [superpipeline.handle(model).optimizer(o) for o in optimizers]
        losses: Tensors = {}
        for index in range(4):
            loss = loss_of(model, index)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses[f"loss {index}"] = loss.detach()
        states.append([copy.deepcopy(o.state_dict()) for o in optimizers])
        return everything(model, losses)

    side_by_side(script)
    for expected, actual in zip(*states, strict=True):
        assert_same_states(kind, actual, expected)


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "one_cycle": lambda opt: OneCycleLR(opt, max_lr=1e-2, total_steps=8),
    "cosine": lambda opt: CosineAnnealingLR(opt, 4),
    "lambda": lambda opt: LambdaLR(opt, [lambda n: 0.5**n, lambda n: 0.9**n]),
    "sequential": lambda opt: SequentialLR(
        opt, [LambdaLR(opt, lambda n: 0.1 * (n + 1)), ExponentialLR(opt, 0.5)], [2]
    ),
    "plateau": lambda opt: ReduceLROnPlateau(opt, factor=0.5, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """A scheduler wraps `step`, and writes hyperparameters while updates are pending."""

    def script(model: nn.Module) -> Tensors:
        optimizer: Optimizer = torch.optim.AdamW(two_groups(trained(model)), lr=1e-3)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        scheduler = SCHEDULERS[name](optimizer)
        losses: Tensors = {}
        for index in range(5):
            losses |= train(model, optimizer, range(index, index + 1))
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(1.0)
            else:
                scheduler.step()
            rates = [group["lr"] for group in optimizer.param_groups]
            losses[f"rates {index}"] = torch.tensor(rates, dtype=torch.float64)
        lazily.append(True)
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


def test_hooks_on_steps_run_once_a_step() -> None:
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.AdamW(model.parameters()))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, range(3))
    handle.close()
    assert seen == ["before", "after"] * 3


def test_a_group_added_later_trains() -> None:
    def script(model: nn.Module) -> Tensors:
        first, rest = list(model.parameters())[:8], list(model.parameters())[8:]
        optimizer: Optimizer = torch.optim.AdamW(first, lr=1e-3)
        if lazily:
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        losses = train(model, optimizer, range(2))
        optimizer.add_param_group({"params": rest, "lr": 1e-2, "weight_decay": 0.5})
        assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
        losses |= train(model, optimizer, range(2, 5))
        lazily.append(True)
        return everything(model, losses)

    lazily: list[bool] = []
    side_by_side(script)


def test_state_dict_goes_both_ways() -> None:
    """A lazy optimizer's state is a plain one's: either can go on from the other's."""

    def run(kinds: str) -> Tensors:
        """Four steps; after two, another model and optimizer go on from what was saved."""
        saved: Any = None
        losses: Tensors = {}
        for part, kind in enumerate(kinds):
            torch.manual_seed(part)
            model = CASES["dropout"].build()
            optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            if kind == "l":
                model = stream_within(model, "50%")
                optimizer = superpipeline.handle(model).optimizer(optimizer)
            if saved is not None:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            losses |= train(model, optimizer, range(2 * part, 2 * part + 2))
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
        flat = {
            f"{number}.{key}": value
            for number, entry in saved[1]["state"].items()
            for key, value in entry.items()
        }
        return losses | saved[0] | flat

    expected = run("pp")
    for kinds in ("ll", "lp", "pl"):
        assert_same_tensors(kinds, run(kinds), expected)


# ---- what it refuses ----------------------------------------------------------------------------


def test_closures_are_refused() -> None:
    model, handle = streamed()
    optimizer = handle.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights_of(model)
    with pytest.raises(UnsupportedError, match="closure"):
        optimizer.step(lambda: loss_of(model))
    assert_same_tensors("weight", weights_of(model), before)


@pytest.mark.parametrize("vouched", [False, True])
def test_lbfgs_is_refused(*, vouched: bool) -> None:
    """It needs closures, and one vector of all parameters."""
    model, handle = streamed()
    with pytest.raises(UnsupportedError, match="LBFGS"):
        handle.optimizer(torch.optim.LBFGS(model.parameters()), per_parameter=vouched)


def test_what_is_not_listed_needs_the_users_word() -> None:
    """Also a subclass of a listed one: its step may look at all parameters together."""
    model, handle = streamed()
    base = Strict(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedError, match="per_parameter=True"):
        handle.optimizer(base)
    optimizer = handle.optimizer(base, per_parameter=True)
    plain = CASES["dropout"].build()
    results = []
    for target, opt in ((model, optimizer), (plain, Strict(plain.parameters(), lr=0.1))):
        torch.manual_seed(2)
        results.append(everything(target, train(target, opt, range(3))))
    assert_same_tensors("result", *results)
