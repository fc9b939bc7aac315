"""Empty host buffers, made ready by threads while earlier ones are filled.

To find memory for a page, to clear it, and to pin it takes longer than to copy into it. Timed by
hand on the host of an H200 (2026-12-01, 16 cores, Linux 6.18; no script is kept): 0.24 s for each
GiB by one thread and 0.15 by eight, of as many mappings; 0.06 more to pin it. stream() of Flux
(22 GiB) took 8.4 to 8.8 s before this and 7.0 to 7.6 with it; of an 8B Llama (15 GiB, one buffer of
1 GiB) 5.2 before and 4.5 to 5.5 with it, so there it gains nothing that could be measured.
"""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from superpipeline import advice
from superpipeline.host import HostBuffer
from superpipeline.weights import Weight

_NUM_THREADS = 8
# Buffers that are ready and not filled take memory beside the weights: at most so much, or one.
_MOST_READY = 2**29


def ready_ahead(
    groups: Iterable[list[Weight]], device: torch.device
) -> Generator[HostBuffer, None, None]:
    """For each group an empty buffer, pinned if `device` is an accelerator that lets it be.

    Costs at most 512 MiB beside the buffer handed out last, or one buffer if that is larger.
    """
    waiting = deque((group, HostBuffer.layout(group).num_bytes) for group in groups)
    if device.type == "cpu":
        yield from (HostBuffer(group) for group, _ in waiting)
        return
    coming: deque[tuple[Future[HostBuffer], int]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS, "superpipeline-ready") as pool:
        while waiting or coming:
            ahead = sum(num_bytes for _, num_bytes in coming)
            while waiting and (not coming or ahead + waiting[0][1] <= _MOST_READY):
                group, num_bytes = waiting.popleft()
                coming.append((pool.submit(_ready, group, device), num_bytes))
                ahead += num_bytes
            yield coming.popleft()[0].result()


def _ready(group: list[Weight], device: torch.device) -> HostBuffer:
    buffer = HostBuffer(group)
    begin = buffer.bytes.data_ptr()
    advice.make_real(begin, begin + buffer.bytes.numel())
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        buffer.pin(device)  # if it is refused, who asks for it again at the end says so
    return buffer
