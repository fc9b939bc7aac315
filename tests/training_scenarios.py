"""Scenarios for the adversary in which a model trains; see scenarios.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import superpipeline
from scenarios import WIDTH, Scenario, Stack
from simulator import AdversarialStreams


def plain_twin(model: Stack) -> Stack:
    """The plain model, with the weights that `model` had before it was streamed."""
    torch.manual_seed(0)
    return type(model)()


def streamed_again(model: Stack, **options: Any) -> Any:
    """`model` with other options, and as many blocks in the window; its handle."""
    handle = superpipeline.handle(model)
    options = {"k": handle.options.k} | options
    return superpipeline.handle(superpipeline.stream(model, device="cpu", quiet=True, **options))


def assert_same_gradients(model: Stack, plain: Stack) -> None:
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), "other gradients than the plain model's"


def trained(activations: str) -> Scenario:
    """Backwards, one after the other, whose gradients add up; some of them on other streams."""

    def run(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
        plain = plain_twin(model)
        streamed_again(model, activations=activations)
        results, out = [model(x)], streams.num_copies_out
        before = streams.allocated_bytes
        with torch.enable_grad():
            for others in (None, streams, None):
                plain(x).sum().backward()
                results.append(model(x, streams=others))
                results[-1].sum().backward()
                assert streams.allocated_bytes == before, "activations stay on the device"
        assert streams.num_copies_out >= out + 3 * len(list(model.parameters()))
        assert_same_gradients(model, plain)
        return results

    run.__name__ = f"run_training_{activations}"
    return run


def run_training_a_copy(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    """A copy in bfloat16 computes; with everything resident nothing has to be brought back."""
    plain = plain_twin(model).bfloat16()
    streamed_again(model, k=None, weights="100%", param_dtype=torch.bfloat16)
    with torch.enable_grad():
        for scale in (1.0, 0.3, 0.7):  # a sum of two of the same would be exact in any dtype
            results = [each((x * scale).bfloat16()) for each in (plain, model)]
            for result in results:
                result.square().sum().backward()
            assert torch.equal(*results)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.dtype is torch.float32
        assert torch.equal(mine.grad, theirs.grad.float()), "other gradients"
    return []


def run_backward_on_another_stream(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    """On a stream that waits for what it is given, and for nothing else of the model's."""
    plain, results = plain_twin(model), []
    with torch.enable_grad():
        for _ in range(2):
            plain(x).sum().backward()
            streams.present = "compute"
            results.append(model(x))
            loss = results[-1].sum()
            streams.switch("side")
            loss.backward()
    assert_same_gradients(model, plain)
    return results


def run_backward_that_fails(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    """Half of the gradients are on their way when a node raises; the next backward is whole."""

    def fail(_: Any) -> None:
        raise ValueError("on purpose")

    plain, results = plain_twin(model), []
    streamed_again(model, activations="offload")
    with torch.enable_grad():
        for _ in range(2):
            hook = model.layers[1].up.weight.register_hook(fail)
            loss = model(x).sum()
            with pytest.raises(ValueError, match="on purpose"):
                loss.backward()
            del loss
            hook.remove()
            assert all(p.grad is None for p in model.parameters())
            results.append(model(x))
            results[-1].sum().backward()
            plain.zero_grad()
            plain(x).sum().backward()
            assert_same_gradients(model, plain)
            model.zero_grad()
    return results


# ---- lazy optimizers ----------------------------------------------------------------------------


def optimizers_of(model: Stack, plain: Stack) -> list[torch.optim.Optimizer]:
    """The lazy one of `model`, and the plain one's."""
    ours, theirs = (
        torch.optim.SGD(each.parameters(), lr=1e-3, momentum=0.9) for each in (model, plain)
    )
    return [superpipeline.handle(model).optimizer(ours), theirs]


def step_both(
    models: list[Stack], optimizers: list[torch.optim.Optimizer], x: torch.Tensor
) -> None:
    """One step of each; those of the first stay pending. The losses agree."""
    losses = []
    for model, optimizer in zip(models, optimizers, strict=True):
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert torch.equal(*losses), "another loss than the plain model's"


def assert_same_weights(model: Stack, plain: Stack) -> None:
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs), "other weights than the plain model's"


def wait_for_nothing(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return []


def zero_in_place(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The next step's gradients, which the update reads where they are, become zeros."""
    for parameter in model.parameters():
        parameter.grad = torch.from_numpy(torch.ones_like(parameter).numpy())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return [p.grad.clone() for p in model.parameters()]


def look_at_state(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state
    return [state[p].get("momentum_buffer", torch.empty(0)).clone() for p in model.parameters()]


def look_at_state_dict(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [entry["momentum_buffer"].clone() for entry in state.values()]


def load_state(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """A hook of the user's looks at the weights while a state is loaded."""
    seen: list[torch.Tensor] = []
    hook = optimizer.register_load_state_dict_pre_hook(
        lambda *_: seen.extend(p.detach().clone() for p in model.parameters())
    )
    base = getattr(optimizer, "_base", optimizer)
    optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1, 0.9).state_dict())
    hook.remove()
    assert base.param_groups[0]["lr"] == 0.1
    return seen


def look_at_weights(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def step_with_another(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    return [p.detach().clone() for p in model.parameters()]


def pass_in_inference_mode(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Twice: of the first one it is known that it is of another kind."""
    results = []
    for _ in range(2):
        with torch.inference_mode():
            results.append(model(torch.ones(2, WIDTH), stray=True).clone())
        model(torch.ones(2, WIDTH)).square().sum().backward()
        optimizer.step()
    return results


def pass_of_another_kind(model: Stack, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.ones(2, WIDTH), stray=True).clone()]


MEANWHILE = [
    wait_for_nothing, zero_in_place, look_at_state, look_at_state_dict, load_state,
    look_at_weights, step_with_another, pass_in_inference_mode, pass_of_another_kind,
]  # fmt: skip


def lazily(meanwhile: Callable[..., list[torch.Tensor]]) -> Scenario:
    """What is done while updates are pending."""

    def run(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
        plain = plain_twin(model)
        models, optimizers = [model, plain], optimizers_of(model, plain)
        with torch.enable_grad():
            step_both(models, optimizers, x)
            ours, theirs = (meanwhile(*pair) for pair in zip(models, optimizers, strict=True))
        assert len(ours) == len(theirs)
        assert all(map(torch.equal, ours, theirs)), "not what the plain model shows"
        superpipeline.handle(model).close()
        assert_same_weights(model, plain)
        return []

    run.__name__ = f"run_lazily_{meanwhile.__name__}"
    return run


def run_lazily(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    """Steps, with some weights resident and all streamed; then a step that is waited for."""
    plain = plain_twin(model)
    optimizers = optimizers_of(model, plain)
    handle = superpipeline.handle(model)
    with torch.enable_grad():
        for options in ({}, {"k": None, "weights": "60%"}):
            streamed_again(model, **options)
            for _ in range(3):
                step_both([model, plain], optimizers, x)
        with handle.weights():
            assert_same_weights(model, plain)
            step_both([model, plain], optimizers, x)
            assert_same_weights(model, plain)
    return []


BACKWARDS: list[Scenario] = [
    *(trained(mode) for mode in ("keep", "recompute", "offload", "recompute+offload")),
    run_training_a_copy,
    run_backward_on_another_stream,
    run_backward_that_fails,
]
# Weights between turns are real here: optimizers read them.
WITH_OPTIMIZERS: list[Scenario] = [run_lazily, *(lazily(each) for each in MEANWHILE)]
