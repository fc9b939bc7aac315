"""What does a visit cost in Python, and what does stream() cost beyond copying bytes?

Copies and events are replaced by nothing, so what is left is ours. The targets: 60 µs a visit of a
block of 12 tensors; 1 s for stream() on 10,000 parameters.

    python -m benchmarks.visit_cost
"""

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

import superpipeline
from benchmarks.record import save, table
from superpipeline.cpu_streams import CpuStreams
from superpipeline.streams import Run, Stream


class NoStreams(CpuStreams):
    """Nothing is copied and nothing waits."""

    def copy(self, runs: Sequence[Run]) -> None:
        pass

    def record(self, stream: Stream) -> Any:
        del stream

    def wait(self, stream: Stream, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Block(nn.Module):
    """12 tensors and no arithmetic."""

    def __init__(self, num_tensors: int = 12) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(256) for _ in range(num_tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, num_blocks: int, num_tensors: int = 12) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(num_tensors) for _ in range(num_blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def per_pass_us(model: nn.Module, x: torch.Tensor, num_passes: int = 50) -> float:
    best = float("inf")
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(num_passes):
            model(x)
        best = min(best, (time.perf_counter() - begin) / num_passes)
    return best * 1e6


def visit_us(num_blocks: int = 100) -> dict[str, float]:
    """Microseconds of one visit with its fetch, the plain call of the module taken off."""
    model, x = Stack(num_blocks), torch.zeros(1)
    with torch.no_grad(), mock.patch("superpipeline.build.LEAST_TRANSFER", {"cpu": 0}):
        plain = per_pass_us(model, x)
        with mock.patch("superpipeline.api.streams_for", return_value=NoStreams()):
            superpipeline.stream(model, k=2, device="cpu", quiet=True)
        model(x)
        streamed = per_pass_us(model, x)
        visits = superpipeline.handle(model).stats()
    assert visits.fetches >= visits.visits - 4, "every visit should have had its fetch"
    return {"plain us": plain / num_blocks, "visit us": (streamed - plain) / num_blocks}


def setup_s(num_parameters: int = 10_000) -> dict[str, float]:
    """Seconds of stream() on many small parameters, and of copying their bytes once."""
    model = Stack(num_parameters // 20, 20)
    begin = time.perf_counter()
    copies = [parameter.detach().clone() for parameter in model.parameters()]
    copy_s = time.perf_counter() - begin
    begin = time.perf_counter()
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    return {"parameters": len(copies), "copy s": copy_s, "stream() s": time.perf_counter() - begin}


def main() -> None:
    torch.set_num_threads(1)
    superpipeline.profile.link_rate(torch.device("cpu"))
    figures = [visit_us(), setup_s()]
    for row in figures:
        print(table([row]))
    print(save("visit-cost", figures))


if __name__ == "__main__":
    main()
