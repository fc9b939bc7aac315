"""One workload on one model: the time of a step, the memory it took, the bits of what it gave."""

from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers import gauge
from benchmarks.peers.workloads import Workload


class How(NamedTuple):
    """How long to measure: `repeats` runs, fewer where they take longer than about `seconds`."""

    device: torch.device
    size: str
    repeats: int
    seconds: float
    warm_ups: int = 2


def measure(model: nn.Module, workload: Workload, how: How) -> dict[str, Any]:
    """Milliseconds of each step, the peaks with and without the warm-up, and the results' bits.

    What is so slow that a whole run takes longer than `how.seconds` does fewer steps.
    """
    device = how.device
    gauge.begin_peaks(device)
    slowest = 0.0
    for _ in range(how.warm_ups):
        warm = workload.run(model, device, how.size, min(2, workload.steps))
        gauge.settle(device)
        slowest = max(gauge.between_ms(warm.marks))
    steps = max(2, min(workload.steps, int(how.seconds * 1e3 / max(slowest, 1e-3))))
    # All steps once: libraries choose a kernel for each length of a cache when they first see it.
    workload.run(model, device, how.size, steps)
    gauge.settle(device)
    whole = gauge.peaks(device)
    gauge.forget_peaks(device)  # emptying the stock would make the first step allocate it again
    samples: list[float] = []
    digests: list[list[str]] = []
    while len(digests) < how.repeats and sum(samples) / 1e3 <= how.seconds / 2:
        out = workload.run(model, device, how.size, min(steps, workload.steps))
        gauge.settle(device)
        samples += gauge.between_ms(out.marks)
        digests.append([gauge.digest(result) for result in out.results])
    steady = gauge.peaks(device)
    return {
        "ms": median(samples), "samples ms": [round(ms, 4) for ms in samples],
        "steps": len(digests[0]),
        "peak allocated": steady.allocated, "peak reserved": steady.reserved,
        "peak allocated, warm-up": whole.allocated, "peak reserved, warm-up": whole.reserved,
        "digests": digests[0], "runs agree": all(run == digests[0] for run in digests),
    }  # fmt: skip


def is_equal(row: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Whether every run gave the plain run's bits, as far as both went."""
    pairs = zip(row["digests"], plain["digests"], strict=False)
    return row["runs agree"] and all(own == other for own, other in pairs)
