"""Device memory for weights: the window, and beside it the residents. Allocated once for a plan.

Nothing moves while the plan lives: a block's place keeps its address, so views that autograd saved
and weights that custom functions keep are right again once the block is fetched again.
"""

from collections.abc import Sequence

import torch

from superpipeline.host import HostBuffer
from superpipeline.plan import Plan
from superpipeline.streams import Run, Streams
from superpipeline.weights import Weight

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # others need not have an address


class Window:
    """The device bytes of one plan.

    Costs `plan.device_bytes` of device memory; on the CPU residents stay where they are on the
    host, so it costs `plan.window_bytes`.
    """

    def __init__(self, plan: Plan, streams: Streams) -> None:
        self.plan = plan
        self.bytes = streams.allocate(plan.window_bytes)
        self._begin = self.bytes.data_ptr()
        self._end = self._begin + plan.window_bytes

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the window."""
        if tensor.device != self.bytes.device or type(tensor) not in _PLAIN:
            return False
        return self._begin <= tensor.data_ptr() < self._end

    def start(self, block: int, weight: Weight) -> int:
        """Where `weight` begins in the window during a visit of `block`."""
        return self.plan.slots[block][weight.index] + weight.phase

    def runs(
        self, block: int, weights: Sequence[Weight], home: dict[Weight, HostBuffer]
    ) -> list[Run]:
        """The copies that bring `block` in: as few as the packing allows, usually one."""
        spans: list[tuple[HostBuffer, int, int, int]] = []  # buffer, source, destination, bytes
        for weight in weights:
            buffer, target = home[weight], self.start(block, weight)
            source = buffer.starts[weight]
            if spans:
                last, begin, destination, length = spans[-1]
                gap = source - (begin + length)
                if last is buffer and 0 <= gap and target - source == destination - begin:
                    spans[-1] = (buffer, begin, destination, length + gap + weight.num_bytes)
                    continue
            spans.append((buffer, source, target, weight.num_bytes))
        return [
            Run(self.bytes[to : to + length], buffer.slice(begin, begin + length))
            for buffer, begin, to, length in spans
        ]


def place_residents(
    weights: Sequence[Weight], home: dict[Weight, HostBuffer], streams: Streams
) -> torch.Tensor | None:
    """Moves `weights` to the device for good, into one allocation; re-points their tensors.

    On the CPU the host bytes are the device's bytes already, at the right alignment.
    """
    if streams.device.type == "cpu":
        return None
    pool = streams.allocate(sum(weight.padded_bytes for weight in weights))
    offset = 0
    for weight in weights:
        start = offset + weight.phase
        source = home[weight].slice(
            home[weight].starts[weight], home[weight].starts[weight] + weight.num_bytes
        )
        pool[start : start + weight.num_bytes].copy_(source, non_blocking=True)
        for alias in weight.aliases:
            alias.tensor.data = alias.view(pool, start)
        offset += weight.padded_bytes
    streams.synchronize()
    return pool


def return_residents(weights: Sequence[Weight], home: dict[Weight, HostBuffer]) -> None:
    """The residents' values back to the host, which is their truth again."""
    for weight in weights:
        for alias in weight.aliases:
            host = home[weight].view(alias, weight)
            if alias.tensor.data_ptr() != host.data_ptr():
                host.copy_(alias.tensor.detach())
                alias.tensor.data = host
