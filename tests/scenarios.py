"""Scenarios for the adversary: what users do, chosen so that every ordering call is needed once.

Each plays on a streamed model inside `simulated`, and gives outputs of the plain model, or compares
for itself. Those that train are in training_scenarios.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from on_disk import map_parameters
from simulator import AdversarialStreams

WIDTH = 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        x = x + self.down(torch.relu(self.up(x)))
        if fail:
            raise ValueError("on purpose")
        return x


class Stack(nn.Module):
    """Layers; `streams` puts every second one on another stream, `fail` raises in the third.

    With `stray` it reads a layer's weight by itself, before it is that layer's turn.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))

    def forward(
        self,
        x: torch.Tensor,
        fail: bool = False,
        streams: AdversarialStreams | None = None,
        depth: int = 5,
        apart: AdversarialStreams | None = None,
        stray: bool = False,
    ) -> torch.Tensor:
        if apart is not None:
            here, apart.present = apart.present, "apart"
            apart.join(here)
            self.layers[0](x)
            apart.present = here
            if fail:
                raise ValueError("on purpose")
            for layer in self.layers[1:]:
                x = layer(x)
            apart.join("apart")
            return x
        if stray:
            x = x @ self.layers[3].down.weight
        for index, layer in enumerate(self.layers[:depth]):
            if streams is not None:
                streams.switch(f"stream {index % 2}")
            x = layer(x, fail=fail and index == 2)
        return x


def run_repeatedly(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    return [model(x) for _ in range(3)]


def run_on_other_streams(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    """Each pass on a stream that its caller has not ordered after the last pass's."""
    results = []
    for name in ("compute", "side", "compute", "other"):
        streams.present = name
        results.append(model(x))
    return results


def run_deeper_on_another_stream(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    """Two blocks stay in place over passes on two streams, and then are overwritten."""
    for name in ("compute", "compute", "side"):
        streams.present = name
        model(x, depth=2)
    return [model(x)]


def run_beginning_elsewhere(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    """The first block of a pass on a stream of its own, which the next blocks do not wait for."""
    model(x, apart=streams)
    model(x, apart=streams)
    return []


def run_replanned_after_another_stream(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    streams.present = "side"
    model(x)
    streams.present = "compute"
    superpipeline.stream(model, k=3, device="cpu", quiet=True)
    return [model(x)]


def run_across_streams(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    return [model(x, streams=streams) for _ in range(2)]


def run_after_failure(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    results = []
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(x, fail=True)
        results.append(model(x))
    return results


def run_after_failure_elsewhere(
    model: Stack, x: torch.Tensor, streams: AdversarialStreams
) -> list[Any]:
    """It fails on another stream than its blocks ran on, and that does not wait for theirs."""
    results = []
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(x, fail=True, apart=streams)
        results.append(model(x))
    return results


def run_replanned(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    results = [model(x)]
    superpipeline.stream(model, k=3, device="cpu", quiet=True)
    return [*results, model(x), model(x)]


def run_edited(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    results = [model(x)]
    with torch.no_grad():
        model.layers[0].up.weight.mul_(1.0)
    return [*results, model(x)]


def run_from_disk(model: Stack, x: torch.Tensor, streams: AdversarialStreams) -> list[Any]:
    """Residents and streamed weights come from a file, over memory that others used before."""
    with tempfile.TemporaryDirectory() as folder:
        map_parameters(model, Path(folder))
    superpipeline.stream(model, "70%", device="cpu", quiet=True)
    results = [model(x), model(x)]
    streams.present = "side"
    superpipeline.stream(model, "60%", device="cpu", quiet=True)
    assert superpipeline.handle(model).stats().disk_bytes
    return [*results, model(x)]


Scenario = Callable[[Stack, torch.Tensor, AdversarialStreams], list[Any]]
FORWARDS: list[Scenario] = [
    run_repeatedly,
    run_on_other_streams,
    run_deeper_on_another_stream,
    run_across_streams,
    run_after_failure,
    run_after_failure_elsewhere,
    run_replanned,
    run_beginning_elsewhere,
    run_replanned_after_another_stream,
    run_edited,
    run_from_disk,
]
