"""Which weights wait in host memory and which on disk. Pure.

A weight in host memory saves a read at every visit, so they are chosen as residents are: always
from the block with the most bytes left on disk, weighted by its visits. So what has to be read is
spread evenly over a pass, and reading keeps its pace.
"""

from collections.abc import Set as AbstractSet

from superpipeline.plan import Workload
from superpipeline.residency import promotions


def weights_on_disk(
    work: Workload, resident: frozenset[int], stored: AbstractSet[int], host_bytes: int
) -> frozenset[int]:
    """The weights that stay on disk when host memory may hold `host_bytes` of weights.

    Args:
        resident: resident weights, which need no host copy if they are stored.
        stored: the weights whose bytes are on disk; all others are in host memory already.

    Tables that are looked up by rows come first: a row read from disk has its latency.
    """
    needed = {weight for block in work.blocks for weight in block.weights} | work.rows
    free = host_bytes - sum(
        weight.num_bytes for index, weight in enumerate(work.weights) if index not in stored
    )
    on_disk = set(stored)
    rows = sorted(work.rows - resident, key=lambda weight: work.weights[weight].num_bytes)
    for index in [*rows, *promotions(work, resident)]:
        num_bytes = work.weights[index].num_bytes
        if index in on_disk and index in needed and num_bytes <= free:
            on_disk.discard(index)
            free -= num_bytes
    return frozenset(on_disk)
