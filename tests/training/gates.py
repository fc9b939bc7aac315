"""A user's own optimizers: one whose updates wait for a gate, one that refuses a gradient.

A worker updates at a moment of its own. With the gate closed no update happens, so that a test can
do something between `step()` and the update, and know that it was in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

import superpipeline
from training.cases import CASES
from training.reference import Tensors, stream_within, weights_of
from training.side_by_side import loss_of

PATIENCE_S = 30.0  # how long a worker waits for the gate before the test fails


class Gated(torch.optim.SGD):
    """An optimizer of the user's whose updates wait until `gate` is open."""

    gate: ClassVar[threading.Event] = threading.Event()
    gate.set()

    def step(self, closure: Any = None) -> Any:
        if not self.gate.wait(PATIENCE_S):
            raise TimeoutError("step() waited for its own update: it is not lazy")
        return super().step(closure)


class Strict(torch.optim.SGD):
    """An optimizer of the user's that refuses infinite gradients."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.isinf().any() for p in group["params"]):
                raise FloatingPointError("infinite")
        return super().step(closure)


def streamed(bound: str = "50%") -> tuple[nn.Module, Any]:
    """A fresh streamed model and its handle."""
    model = stream_within(CASES["dropout"].build(), bound)
    return model, superpipeline.handle(model)


@contextmanager
def closed_gate() -> Iterator[threading.Event]:
    """Updates wait; they go on when the block ends, whatever happened."""
    Gated.gate.clear()
    try:
        yield Gated.gate
    finally:
        Gated.gate.set()


def after_one_step(
    kind: Callable[..., Optimizer],
    meanwhile: Callable[[Optimizer, nn.Module], Any] = lambda *_: None,
) -> Tensors:
    """The plain weights after one step; `meanwhile` happens after it, before the gate opens."""
    model = CASES["dropout"].build()
    optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    loss_of(model).backward()
    optimizer.step()
    meanwhile(optimizer, model)
    return weights_of(model)
