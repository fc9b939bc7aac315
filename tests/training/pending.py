"""A model whose updates are pending, for as long as a test wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from training.gates import Gated, streamed
from training.reference import Tensors
from training.side_by_side import loss_of


def pending(bound: str = "50%") -> tuple[nn.Module, Any, Optimizer]:
    """A model after one step of a Gated optimizer; to be called within `closed_gate`.

    With "k2" everything streams, and no update is waited for at the beginning of a pass.
    """
    model, handle = streamed(bound)
    base = Gated(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = handle.optimizer(base, per_parameter=True)
    torch.manual_seed(1)
    loss_of(model).backward()
    optimizer.step()
    return model, handle, optimizer


def open_soon(gate: threading.Event, seconds: float = 0.2) -> threading.Timer:
    """Lets the updates go on while the test waits for one of them."""
    timer = threading.Timer(seconds, gate.set)
    timer.start()
    return timer


def evaluate(model: nn.Module, mode: Callable[[], Any] = torch.no_grad) -> Tensors:
    """The loss in eval mode."""
    model.eval()
    with mode():
        loss = loss_of(model)
    model.train()
    return {"": loss.clone()}
