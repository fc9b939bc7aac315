"""What bounds a step, each term measured by itself: forward, backward, optimizer, link."""

from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.peers import gauge
from benchmarks.training.contenders import adamw
from benchmarks.training.parts import Part, batches

_REPEATS = 4
_PROBE_BYTES = 256 * 2**20


def compute_ms(
    model: nn.Module, part: Part, size: str, tokens: int, device: torch.device
) -> tuple[float, float]:
    """Milliseconds of forward and backward of one micro-batch; `model` computes on `device`."""
    ids = next(batches(part, size, tokens, 0)).to(device)
    found: list[list[float]] = []
    for _ in range(_REPEATS + 1):
        marks = [gauge.mark(device)]
        loss = model(input_ids=ids, labels=ids).loss
        marks.append(gauge.mark(device))
        loss.backward()
        marks.append(gauge.mark(device))
        gauge.settle(device)
        found.append(gauge.between_ms(marks))
        for parameter in model.parameters():
            parameter.grad = None
    forward, backward = zip(*found[1:], strict=True)
    return median(forward), median(backward)


def optimizer_ms(weights: list[nn.Parameter]) -> dict[str, float]:
    """Milliseconds of a step on the host, and of clipping there; `weights` are stepped."""
    host = torch.device("cpu")
    optimizer = adamw(weights)
    steps, clips = [], []
    for parameter in weights:
        parameter.grad = torch.full_like(parameter, 1e-3)
    for _ in range(_REPEATS):
        marks = [gauge.mark(host)]
        nn.utils.clip_grad_norm_(weights, 1.0)
        marks.append(gauge.mark(host))
        optimizer.step()
        marks.append(gauge.mark(host))
        clip, step = gauge.between_ms(marks)
        clips.append(clip)
        steps.append(step)
    for parameter in weights:
        parameter.grad = None
    return {"optimizer ms": median(steps[1:]), "clip ms": median(clips[1:])}


def rates(device: torch.device) -> dict[str, Any]:
    """Bytes a second to the device and back."""
    host = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.ones(_PROBE_BYTES, dtype=torch.uint8, device=device)
    back = []
    for _ in range(_REPEATS):
        marks = [gauge.mark(device)]
        host.copy_(there, non_blocking=True)
        marks.append(gauge.mark(device))
        gauge.settle(device)
        back += gauge.between_ms(marks)
    return {"to device": gauge.link_rate(device), "to host": _PROBE_BYTES / min(back) * 1e3}


def link_s(weight_bytes: int, bound_bytes: int, micro_batches: int, rate: dict[str, Any]) -> float:
    """Seconds of a step's copies, at the least: what is beyond the bound crosses in each forward
    and each backward, and each backward's gradients come back."""
    there = 2 * micro_batches * max(0, weight_bytes - bound_bytes) / rate["to device"]
    back = micro_batches * weight_bytes / rate["to host"]
    return max(there, back)
