"""Measured, once per device: how fast weights reach it."""

import functools
import time

import torch

from superpipeline.devices import streams_for
from superpipeline.host import HostBuffer
from superpipeline.streams import Run

_PROBE_BYTES = 64 * 2**20
_NUM_COPIES = 8  # in one go, so that waiting for the end weighs little


@functools.cache
def link_rate(device: torch.device) -> float:
    """Host-to-device bytes a second: the best of five times eight copies, by the way weights go.

    Costs some 60 ms and 128 MiB once; the result is kept.
    """
    streams = streams_for(device)
    source = _probe_bytes(streams.device)
    target = streams.allocate(_PROBE_BYTES)
    best = float("inf")
    try:
        for _ in range(5):
            streams.synchronize()
            begin = time.perf_counter()
            streams.copy([Run(target, source.bytes[:_PROBE_BYTES])] * _NUM_COPIES)
            streams.synchronize()
            best = min(best, time.perf_counter() - begin)
    finally:
        streams.close()
        source.unpin()
    return _NUM_COPIES * _PROBE_BYTES / best


def _probe_bytes(device: torch.device) -> HostBuffer:
    source = HostBuffer([], num_bytes=_PROBE_BYTES)
    source.bytes.fill_(1)
    source.pin(device)
    return source
