"""The same script on a plain model and on a streamed one, and what both must come to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from superpipeline import InputError
from training.cases import CASES, cross_entropy
from training.reference import (
    Tensors,
    assert_same_tensors,
    stream_within,
    streamed_bytes,
    weights_of,
)
from zoo.case import Inputs

Script = Callable[[nn.Module], Tensors]
SEED = 21


def inputs(index: int = 0, name: str = "dropout") -> Inputs:
    return CASES[name].inputs(index)


def loss_of(model: nn.Module, index: int = 0) -> torch.Tensor:
    """The loss of a model that takes hidden states, for the micro-batch `index`."""
    given = inputs(index)
    return cross_entropy(model(*given.args), given)


def side_by_side(
    script: Script,
    build: Callable[[], nn.Module] = CASES["dropout"].build,
    *,
    bound: str = "50%",
    **options: Any,
) -> Any:
    """Runs `script` on both, with the same random state, and compares what it returns.

    Returns the handle of the streamed model, whose backward did fetch, still open.
    """
    model = stream_within(build(), bound, **options)
    handle = superpipeline.handle(model)
    torch.manual_seed(SEED)
    expected = script(build())
    torch.manual_seed(SEED)
    actual = script(model)
    assert_same_tensors("result", actual, expected)
    assert all(streamed_bytes(handle)), "nothing was streamed in forward, or in backward"
    return handle


def real_weights(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, a model's parameters hold their values, whatever a lazy optimizer has pending."""
    try:
        return superpipeline.handle(model).weights()
    except InputError:
        return nullcontext()


def is_streamed(model: nn.Module) -> bool:
    return not isinstance(real_weights(model), nullcontext)


def gradients(model: nn.Module) -> Tensors:
    """Copies of all gradients, by name."""
    return {
        f"grad of {name}": None if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
    }


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model: nn.Module, optimizer: Optimizer, indices: range) -> Tensors:
    """One plain step for each index; the losses by name."""
    losses: Tensors = {}
    for index in indices:
        loss = loss_of(model, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[f"loss {index}"] = loss.detach().clone()
    return losses


def everything(model: nn.Module, losses: Tensors) -> Tensors:
    """Losses, and the weights as they are now."""
    with real_weights(model):
        return losses | weights_of(model)
