"""A zoo case: a tiny seeded model, the inputs it takes, and the calls that tests compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

BUILD_SEED = 1234
INPUT_SEED = 99
CALL_SEED = 7
VOCAB = 1024

T = TypeVar("T")


class Inputs(NamedTuple):
    """What a forward is called with: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> Inputs:
        return Inputs(*tree_map_only(torch.Tensor, lambda t: t.to(device), tuple(self)))


class Call(NamedTuple):
    """One way to use a model. ``run(model)`` seeds the global generator, then returns a pytree.

    ``run(model, device)`` does the same with the inputs on another device. The grad mode is the
    caller's.
    """

    name: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class ZooCase:
    """One row of the table.

    A ``stateful`` model changes when it is called (statistics, counters), so a comparison needs
    a fresh ``build()`` for every run of a call.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    calls: tuple[Call, ...]
    stateful: bool = False


def case(
    name: str,
    factory: Callable[[], nn.Module],
    inputs: Callable[[], Inputs],
    *more_calls: Call,
    train: bool = False,
    stateful: bool = False,
) -> ZooCase:
    """A case whose build and inputs are seeded, with "forward" as its first call."""
    seeded_inputs = seeded(inputs, INPUT_SEED)
    return ZooCase(
        name=name,
        build=seeded(lambda: _finished(factory(), train=train), BUILD_SEED),
        inputs=seeded_inputs,
        calls=(forward_call(seeded_inputs, stateful=stateful), *more_calls),
        stateful=stateful,
    )


def seeded(make: Callable[[], T], seed: int) -> Callable[[], T]:
    """The same function with a generator of its own: the caller's is left as it was."""

    def run() -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make()

    return run


def _finished(model: nn.Module, *, train: bool) -> nn.Module:
    scatter_weights(model)
    return model.train(train)


def scatter_weights(model: nn.Module) -> None:
    """Add noise to every weight, so that no two are equal: zero biases would hide a mix-up."""
    with torch.no_grad():
        for param in model.parameters():
            if param.is_floating_point():
                param.add_(torch.randn(param.shape).to(param.dtype), alpha=0.02)


def forward_call(inputs: Callable[[], Inputs], *, stateful: bool = False) -> Call:
    """``model(*args, **kwargs)``; of a stateful model also the buffers as the call left them."""

    def run(model: nn.Module, device: torch.device | str = "cpu") -> Any:
        args, kwargs = inputs().to(device)
        torch.manual_seed(CALL_SEED)
        output = model(*args, **kwargs)
        return {"output": output, "buffers": buffers_of(model)} if stateful else output

    return Call("forward", run)


def passes_call(inputs: Callable[[], Inputs], num_passes: int = 5) -> Call:
    """Several forwards in a row: for models that are different from pass to pass."""
    seeded_inputs = seeded(inputs, INPUT_SEED)

    def run(model: nn.Module, device: torch.device | str = "cpu") -> Any:
        args, kwargs = seeded_inputs().to(device)
        torch.manual_seed(CALL_SEED)
        outputs = [model(*args, **kwargs) for _ in range(num_passes)]
        return {"outputs": outputs, "buffers": buffers_of(model)}

    return Call("passes", run)


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def generate_call(name: str, inputs: Callable[[], Inputs], **options: Any) -> Call:
    """``model.generate`` with every token's logits kept, so that bits show, not only choices."""
    seeded_inputs = seeded(inputs, INPUT_SEED)
    common: dict[str, Any] = {
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }

    def run(model: Any, device: torch.device | str = "cpu") -> Any:
        kwargs = seeded_inputs().to(device).kwargs
        torch.manual_seed(CALL_SEED)
        return model.generate(**kwargs, **common, **options)

    return Call(name, run)


def generate_calls(inputs: Callable[[], Inputs], **options: Any) -> tuple[Call, ...]:
    """Greedy, sampled and beam search."""
    return (
        generate_call("greedy", inputs, do_sample=False, **options),
        generate_call("sample", inputs, do_sample=True, top_k=50, temperature=0.8, **options),
        generate_call("beam", inputs, do_sample=False, num_beams=3, **options),
    )


def kwargs_only(**kwargs: Any) -> Inputs:
    return Inputs((), kwargs)


def args_only(*args: Any) -> Inputs:
    return Inputs(args, {})


def token_ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids; 0 to 9 are left free for padding, end and image tokens."""
    return torch.randint(10, VOCAB, (batch, length))
