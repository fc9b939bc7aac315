"""Which weights become resident first, or move up another tier. Pure."""

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping

from superpipeline.plan import Workload

_GOLDEN = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly, however many

# Every weight of a block outside the given ones, in the order in which it should move up a tier.
Promotions = Callable[[Workload, frozenset[int]], list[int]]


def promotions(work: Workload, forced: frozenset[int]) -> list[int]:
    """By bytes: always from the block with the most left to stream, weighted by its visits.

    So the largest streamed block shrinks, and the window with it. Where fetches copy next to
    nothing, whole blocks instead: that makes the fetches few.
    """
    left = _left(work, forced)
    return _block_by_block(work, left) if work.in_place else _evenly(work, left)


def paced(work: Workload, forced: frozenset[int]) -> list[int]:
    """By time: always from the stretch of a pass in which the most bytes have to be copied.

    A block's bytes are copied while the block before it computes. Stretches take equally long, so
    what is left to stream keeps in step with compute. Needs `Workload.busy`.
    """
    stretches = _Stretches(work, _left(work, forced))
    picked: dict[int, None] = {}
    while (weight := stretches.pop()) is not None:
        picked[weight] = None
    never = (w for weights in stretches.left.values() for w in weights)  # no pass visits them
    return list(picked | dict.fromkeys(never))


def _left(work: Workload, forced: frozenset[int]) -> dict[int, list[int]]:
    """For each block its weights outside `forced`, the largest first."""
    return {
        index: by_size(work, set(block.weights) - forced - work.trained)
        for index, block in enumerate(work.blocks)
    }


class _Stretches:
    """A pass in as many stretches of equal time as it has visits.

    Attributes:
        left: for each block its weights that stream, the largest first.
    """

    def __init__(self, work: Workload, left: dict[int, list[int]]) -> None:
        self._work, self.left = work, left
        self._level = [0.0] * len(work.order)
        self._parts: list[dict[int, float]] = [{} for _ in work.order]  # of a block's bytes
        self._spans: dict[int, list[list[int]]] = {}  # block -> the stretches of each visit
        for block, span in zip(work.order, _spans(work), strict=True):
            self._spans.setdefault(block, []).append(span)
            for stretch in span:
                self._parts[stretch][block] = 1 / len(span)
            self._raise(span, work.bytes_of(left[block]))
        heap = [(-level, i * _GOLDEN % 1, i) for i, level in enumerate(self._level)]
        heapq.heapify(heap)
        self._heap = heap

    def _raise(self, span: list[int], num_bytes: int) -> None:
        for stretch in span:
            self._level[stretch] += num_bytes / len(span)

    def pop(self) -> int | None:
        """The largest weight of the block with most bytes in the fullest stretch; None: no more."""
        while self._heap:
            level, rank, stretch = heapq.heappop(self._heap)
            here = {b: part for b, part in self._parts[stretch].items() if self.left[b]}
            if not here:
                continue
            now = -self._level[stretch]
            if now > level * (1 - 1e-9):  # it was lowered from a stretch beside it
                heapq.heappush(self._heap, (now, rank, stretch))
                continue
            block = max(here, key=lambda b: self._work.bytes_of(self.left[b]) * here[b])
            weight = self.left[block].pop(0)
            for span in self._spans[block]:
                self._raise(span, -self._work.weights[weight].num_bytes)
            heapq.heappush(self._heap, (-self._level[stretch], rank, stretch))
            return weight
        return None


def _spans(work: Workload) -> list[list[int]]:
    """For each visit, the stretches in which its bytes are copied: while the one before computes,
    and for at least as long as one stretch."""
    times = [work.busy[block] for block in work.order]
    width = sum(times) / len(times) if times else 0.0
    if not width:
        return [[position] for position in range(len(times))]
    spans: list[list[int]] = []
    begin = 0.0
    for position, seconds in enumerate(times):
        first = int((begin - max(times[position - 1], width)) // width)
        last = max(first, -int(-begin // width) - 1)
        spans.append([stretch % len(times) for stretch in range(first, last + 1)])
        begin += seconds
    return spans


def _block_by_block(work: Workload, left: dict[int, list[int]]) -> list[int]:
    """Whole blocks: the most visited, then the largest; of alike ones not neighbours, so that what
    is read of a disk is spread over the pass."""
    kinds = {i: (-work.visits.get(i, 0), -work.bytes_of(weights)) for i, weights in left.items()}
    rank = _spread(kinds)
    order = sorted(left, key=lambda index: (kinds[index], rank[index]))
    return list(dict.fromkeys(weight for index in order for weight in left[index]))


def _evenly(work: Workload, left: dict[int, list[int]]) -> list[int]:
    """Always from the block that has the most left to stream; alike ones in spread order."""
    level = {i: work.bytes_of(weights) * work.visits.get(i, 0) for i, weights in left.items()}
    rank = _spread(level)
    heap = [(-level[index], rank[index], index) for index in left if left[index]]
    heapq.heapify(heap)
    picked: dict[int, None] = {}
    while heap:
        _, _, index = heapq.heappop(heap)
        weight = left[index].pop(0)
        picked[weight] = None
        level[index] -= work.weights[weight].num_bytes * work.visits.get(index, 0)
        if left[index]:
            heapq.heappush(heap, (-level[index], rank[index], index))
    return list(picked)


def _spread(kinds: Mapping[int, Hashable]) -> dict[int, float]:
    """A rank for each block: the first ranks of a kind are spread evenly over its blocks."""
    counts: Counter[Hashable] = Counter()
    ranks: dict[int, float] = {}
    for index, kind in kinds.items():
        ranks[index] = counts[kind] * _GOLDEN % 1
        counts[kind] += 1
    return ranks


def by_size(work: Workload, weights: Iterable[int]) -> list[int]:
    """The largest first."""
    return sorted(weights, key=lambda weight: (-work.weights[weight].num_bytes, weight))
