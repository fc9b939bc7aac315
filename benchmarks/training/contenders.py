"""Who trains: the same model from the host, in a few lines each, and the pieces of its step.

The plain contenders keep masters where a weight is stepped in another dtype, or on another device,
than it computes in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.training.parts import Part


class Job(NamedTuple):
    """What a contender gets.

    Attributes:
        model: in host memory.
        weights: the bound on device bytes of weights.
    """

    model: nn.Module
    part: Part
    device: torch.device
    weights: str


def _nothing() -> None:
    pass


class Ready(NamedTuple):
    """A model that trains.

    Attributes:
        stepped: what the optimizer steps, and clipping clips.
        finish: waits for what is pending.
        clip: as torch.nn.utils.clip_grad_norm_, which it is where it is not named in `settings`.
        handle: Superpipeline's, if it streams.
    """

    model: nn.Module
    stepped: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: str
    after_backward: Callable[[], None] = _nothing
    after_step: Callable[[], None] = _nothing
    finish: Callable[[], None] = _nothing
    handle: Any = None
    clip: Callable[..., Any] = nn.utils.clip_grad_norm_


def adamw(stepped: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(stepped, lr=1e-4, fused=True)


def plain(job: Job) -> Ready:
    """Everything on the device."""
    return _with_masters(job, job.device)


def reference(job: Job) -> Ready:
    """The plain model on the device, stepped on the host: whose bits a streamed run must give."""
    return _with_masters(job, torch.device("cpu"))


def _with_masters(job: Job, where: torch.device) -> Ready:
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    stepped: list[nn.Parameter] = []
    for parameter in job.model.parameters():
        stored = parameter.data
        parameter.data = stored.to(job.device, job.part.computes)
        master = parameter
        if parameter.dtype != stored.dtype or parameter.device.type != where.type:
            master = nn.Parameter(stored.to(where))
            pairs.append((master, parameter))
        stepped.append(master)
    for buffer in job.model.buffers():
        buffer.data = buffer.data.to(job.device)

    def hand_over() -> None:
        for master, parameter in pairs:
            assert parameter.grad is not None
            new = parameter.grad.to(master.device, master.dtype)
            master.grad = new if master.grad is None else master.grad.add_(new)
            parameter.grad = None

    def refresh() -> None:
        for master, parameter in pairs:
            parameter.data.copy_(master.data)

    settings = f"AdamW(fused=True) on {where}, {len(pairs)} masters in {job.part.stored}"
    return Ready(job.model, stepped, adamw(stepped), settings, hand_over, refresh)


def streamed(job: Job) -> Ready:
    return _streamed(job, is_lazy=False)


def lazy(job: Job) -> Ready:
    return _streamed(job, is_lazy=True)


def _streamed(job: Job, *, is_lazy: bool) -> Ready:
    import superpipeline

    options: dict[str, Any] = {"weights": job.weights, "activations": job.part.activations}
    if "recompute" in job.part.activations:
        job.model.gradient_checkpointing_disable()
    if job.part.computes != job.part.stored:
        options |= {"param_dtype": job.part.computes, "grad_dtype": job.part.stored}
    superpipeline.stream(job.model, **options, device=job.device, quiet=True)
    handle = superpipeline.handle(job.model)
    stepped = list(job.model.parameters())
    optimizer = adamw(stepped)
    if is_lazy:
        optimizer = handle.optimizer(optimizer)

    def finish() -> None:
        with handle.weights():
            pass

    written = ", ".join(f"{name}={value!r}" for name, value in options.items())
    optimized = "handle.optimizer(AdamW(fused=True))" if is_lazy else "AdamW(fused=True)"
    clip = superpipeline.clip_grad_norm_
    settings = f"stream({written}), {optimized}, superpipeline.clip_grad_norm_"
    return Ready(job.model, stepped, optimizer, settings, finish=finish, handle=handle, clip=clip)


def fsdp2(job: Job) -> Ready:
    """PyTorch's own on one rank: each layer and the rest, from pinned memory; gradients reduced in
    the parameters' dtype."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    on_gpu = job.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, rank=0, world_size=1, store=distributed.HashStore())
    mesh = init_device_mesh(job.device.type, (1,))
    options = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=job.part.computes, reduce_dtype=job.part.stored
        ),
    }
    for layer in job.model.model.layers:
        fully_shard(layer, **options)
    fully_shard(job.model, **options)
    stepped = list(job.model.parameters())
    settings = (
        f"fully_shard(layer), fully_shard(model), CPUOffloadPolicy(pin_memory={on_gpu}), "
        f"MixedPrecisionPolicy({job.part.computes}, {job.part.stored}), AdamW(fused=True)"
    )
    return Ready(job.model, stepped, adamw(stepped), settings)


CONTENDERS: dict[str, Callable[[Job], Ready]] = {
    "plain": plain,
    "reference": reference,
    "streamed": streamed,
    "lazy": lazy,
    "fsdp2": fsdp2,
}
