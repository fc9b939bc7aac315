"""What happened: counters, and labels that make a profiler's trace read like the plan."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(slots=True)
class Counters:
    """Counts since streaming began."""

    passes: int = 0
    visits: int = 0
    fetches: int = 0
    late_fetches: int = 0
    streamed_bytes: int = 0
    disk_bytes: int = 0
    backward_streamed_bytes: int = 0
    gradient_bytes_peak: int = 0


class Stats(NamedTuple):
    """What a handle reports.

    Attributes:
        passes: top-level calls.
        visits: turns of blocks.
        fetches: fetches issued.
        streamed_bytes: bytes fetched, all passes together.
        late_fetches: visits whose block had not been fetched ahead; each cost a wait.
        peak_device_bytes: the most that weights took on the device at any moment since `stream`
            was last called.
        disk_bytes: of the streamed bytes, those read from disk.
        backward_streamed_bytes: of the streamed bytes, those fetched in backwards.
        gradient_bytes_peak: the most that gradients on their way to the host took on the device.
    """

    passes: int
    visits: int
    fetches: int
    streamed_bytes: int
    late_fetches: int
    peak_device_bytes: int
    disk_bytes: int
    backward_streamed_bytes: int
    gradient_bytes_peak: int


_SILENT: AbstractContextManager[None] = nullcontext()


def label(phase: str, block: str) -> AbstractContextManager[object]:
    """A profiler range `superpipeline::fetch (model.layers.3)`; free when nobody profiles."""
    if torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(f"superpipeline::{phase} ({block})")
    return _SILENT
