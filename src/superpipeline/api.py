"""The public functions: stream(), streaming(), handle()."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from superpipeline.build import lay_out
from superpipeline.calls import entry_of, refuse_compile
from superpipeline.devices import streams_for
from superpipeline.errors import InputError
from superpipeline.options import ACTIVATIONS, Activations, Options
from superpipeline.pipeline import Pipeline
from superpipeline.planner import check_k, least_bytes, least_overlapping_bytes
from superpipeline.sizes import Size, format_bytes, parse_bytes

Model = TypeVar("Model", bound=nn.Module)


def stream(  # noqa: PLR0913  (one parameter for each option)
    model: Model,
    weights: Size | None = None,
    *,
    k: int | None = None,
    k_prime: int | None = None,
    host_memory: Size | None = None,
    activations: Activations = "keep",
    param_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quiet: bool = False,
) -> Model:
    """Makes `model` compute with at most `weights` bytes of its weights on the device at a time.

    In place: the same object comes back and is used as before. Its weights move to host memory
    (pinned, where the device is a GPU) and are copied to the device while the block before them
    computes. Results are bit for bit those of the plain model.

    Args:
        weights: the bound on device bytes that weights take, residents and window together, at
            every moment: bytes, "6GiB", or "40%" of the model's weights.
        k: instead of `weights`: how many blocks may be on the device at once.
        k_prime: how many consecutive blocks move together (k >= 2 k' lets copies overlap compute).
        host_memory: for a model that `load` has read: the bound on pinned host memory that weights
            take; the others stay on disk. By default what is free less a tenth. On the CPU host
            memory is the device's, and `weights` is the bound.
        activations: what becomes of what a forward saves for its backward: "keep" leaves it on the
            device; "recompute" keeps each block's inputs and computes the rest again; "offload"
            moves it to host memory; "recompute+offload" moves the blocks' inputs there.
        param_dtype: what parameters of more bits compute in, such as torch.bfloat16. They stay what
            they are and what an optimizer steps; forward and backward see copies, of which streamed
            bytes are half. Costs the copies' bytes in host memory.
        grad_dtype: what gradients are added up in over several backwards; by default `param_dtype`.
        device: where to compute; by default the accelerator if there is one, else the CPU.
        quiet: no line on standard error.

    Costs the weights' bytes in host memory, one block more while they are packed, and about the
    time of one copy of them. Calling it again plans anew.

    Raises:
        InputError: no bound or two, a size that cannot be read, or weights without values.
        BudgetError: less than the least that works; it names that.
        HostMemoryError: host memory will not do.
        UnsupportedError: a compiled model, or tensors that are not plain.

    Example:
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
        >>> model = superpipeline.stream(model, weights="50%", quiet=True)
        >>> model(torch.ones(1, 64)).shape
        torch.Size([1, 64])

    Source of the method: arXiv 2410.08791, whose k and k' these are.
    """
    _check_model(model)
    where = _device(device)
    options = _options(model, weights, k, k_prime, where)
    _check_precision(param_dtype, grad_dtype)
    options = replace(
        options, host_memory=_host_memory(host_memory, where), quiet=quiet,
        activations=_activations(activations), param_dtype=param_dtype, grad_dtype=grad_dtype,
    )  # fmt: skip
    if entry_of(model) is None:
        Pipeline(model, options, streams_for(where))
        return model
    pipe = _pipeline_of(model)
    if _key(pipe.options) == _key(options):
        pipe.replan(options)
    else:
        streams = streams_for(where)
        pipe.close()
        Pipeline(model, options, streams)
    return model


@contextmanager
def streaming(  # noqa: PLR0913  (one parameter for each option)
    model: nn.Module,
    weights: Size | None = None,
    *,
    k: int | None = None,
    k_prime: int | None = None,
    host_memory: Size | None = None,
    activations: Activations = "keep",
    param_dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quiet: bool = False,
) -> Iterator[Pipeline]:
    """`stream` for the length of a `with` block; the model is the plain one again afterwards.

    Example:
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
        >>> with superpipeline.streaming(model, weights="50%", quiet=True) as pipe:
        ...     _ = model(torch.ones(1, 64))
        ...     pipe.stats().passes
        1
    """
    stream(
        model, weights, k=k, k_prime=k_prime, host_memory=host_memory, activations=activations,
        param_dtype=param_dtype, grad_dtype=grad_dtype, device=device, quiet=quiet,
    )  # fmt: skip
    pipe = handle(model)
    try:
        yield pipe
    finally:
        pipe.close()


def handle(model: nn.Module) -> Pipeline:
    """The handle of a streamed model: its plan, stats, explain, verify and close.

    Raises:
        InputError: `model` is not streamed.

    Example:
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
        >>> pipe = superpipeline.handle(superpipeline.stream(model, weights="50%", quiet=True))
        >>> pipe.verify(torch.ones(1, 64)).equal
        True
    """
    if entry_of(model) is None:
        raise InputError(_where_to_ask(model))
    pipe = _pipeline_of(model)
    if pipe.model is not model:
        raise InputError(
            f"this {type(model).__name__} is a part of a streamed {type(pipe.model).__name__}; "
            f"give that one here"
        )
    return pipe


def _where_to_ask(model: nn.Module) -> str:
    """What to give instead of `model`, which is not streamed: perhaps a part of it is."""
    kind = type(model).__name__
    for name, part in model.named_modules():
        if entry_of(part) is not None and _pipeline_of(part).model is part:
            return (
                f"this {kind} is not streamed, but its {name} is; write "
                f"superpipeline.handle(model.{name})"
            )
    return (
        f"this {kind} is not streamed; call superpipeline.stream(model, ...) first, and give the "
        f"same object here"
    )


def _pipeline_of(model: nn.Module) -> Pipeline:
    entry = entry_of(model)
    assert entry is not None
    return entry.passes.pipeline


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule) or _is_compiled(model):
        refuse_compile()
    if not isinstance(model, nn.Module):
        raise InputError(
            f"stream() takes a torch.nn.Module, got {type(model).__name__}; for a pipeline of "
            f"several models, stream its largest one (such as pipeline.transformer)"
        )
    for name, module in model.named_modules():
        other = None if entry_of(module) is None else _pipeline_of(module).model
        if other is not None and other is not model:
            raise InputError(
                f"{name or 'this model'} is streamed already, as (a part of) a "
                f"{type(other).__name__}; call superpipeline.handle(...).close() on that first"
            )


def _is_compiled(model: object) -> bool:
    return isinstance(model, nn.Module) and any(
        module._compiled_call_impl is not None for module in model.modules()
    )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device={device!r} is no device; write 'cuda', 'cuda:1' or 'cpu'"
        ) from error
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(
                f"device={str(where)!r}, but PyTorch sees no GPU here; use device='cpu'"
            )
        index = torch.cuda.current_device() if where.index is None else where.index
        return torch.device("cuda", index)
    return torch.device("cpu") if where.type == "cpu" else where


def check_bounds(
    weights: Size | None, k: int | None, k_prime: int | None, host_memory: Size | None,
    device: torch.device | str | None,
) -> None:  # fmt: skip
    """Raises for what is wrong whatever the model is, as `stream` does; costs nothing."""
    where = _device(device)
    _options(None, weights, k, k_prime, where)
    _host_memory(host_memory, where)
    streams_for(where)


def _options(
    model: nn.Module | None, weights: Size | None, k: int | None, k_prime: int | None,
    device: torch.device,
) -> Options:  # fmt: skip
    if weights is None and k is None and k_prime is None:
        raise InputError(_no_number(model, device))
    if weights is None:
        blocks, together = check_k(k, k_prime)
        return Options(device=device, k=blocks, k_prime=together)
    if k is not None or k_prime is not None:
        raise InputError(
            f"give weights={weights!r} or k={k}, k_prime={k_prime}, not both: either sets the bound"
        )
    parse_bytes(weights, 0)
    return Options(device=device, weights=weights)


def _host_memory(size: Size | None, device: torch.device) -> Size | None:
    if size is None:
        return None
    if device.type == "cpu":
        raise InputError(
            f"host_memory={size!r} has no meaning for device='cpu', where weights= bounds the host "
            f"memory that weights take; leave host_memory out"
        )
    parse_bytes(size, 0)
    return size


def _activations(mode: Activations) -> Activations:
    if mode not in ACTIVATIONS:
        raise InputError(f"activations={mode!r}: give one of {', '.join(map(repr, ACTIVATIONS))}")
    return mode


def _check_precision(param_dtype: torch.dtype | None, grad_dtype: torch.dtype | None) -> None:
    for name, dtype in (("param_dtype", param_dtype), ("grad_dtype", grad_dtype)):
        if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            continue
        raise InputError(f"{name}={dtype!r}: give a floating dtype, such as torch.bfloat16")
    if grad_dtype is not None and param_dtype is None:
        raise InputError(
            f"grad_dtype={grad_dtype} has no meaning without param_dtype=: gradients have their "
            f"parameters' dtype; write param_dtype=torch.bfloat16 beside it, or leave it out"
        )


def _key(options: Options) -> object:
    """What cannot be changed of a model that is streamed."""
    return options.device, options.param_dtype, options.grad_dtype


def _no_number(model: nn.Module | None, device: torch.device) -> str:
    if model is None:
        return 'how much device memory may the weights take? Write weights="6GiB" or weights="40%"'
    work = lay_out(model, device, 1, (), bound=0).workload()
    total, least = work.weight_bytes, least_bytes(work)
    overlapping = -(-100 * least_overlapping_bytes(work) // max(total, 1))
    return (
        f"how much device memory may the weights take? This {type(model).__name__} has "
        f"{format_bytes(total)} ({total} bytes) of them, and the least that works is "
        f"{format_bytes(least)} ({least} bytes); give for example "
        f'weights="{min(max(40, overlapping), 100)}%"'
    )
