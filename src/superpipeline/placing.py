"""Where the blocks of a plan lie in the window. Pure.

Each way gives every block a fixed place, and the bytes that the window needs for them all.
"""

from collections.abc import Callable, Iterable

from superpipeline.plan import Place, Workload, neighbours, turns

Sizes = dict[int, int]
Placing = Callable[[Workload, Sizes], tuple[dict[int, Place], int]]


def place_two_ended(work: Workload, sizes: Sizes) -> tuple[dict[int, Place], int]:
    """Neighbours at opposite ends of the window, as far as two colours go.

    The window is as large as the largest two neighbours together. An odd circle leaves one pair at
    the same end: `Plan.collisions`.
    """
    pairs = neighbours(turns(work.order, sizes))
    right = _two_colours(sizes, pairs)
    window = max(sizes.values(), default=0)
    for a, b in pairs:
        if right[a] != right[b]:
            window = max(window, sizes[a] + sizes[b])
    places = {
        block: Place(window - size if right[block] else 0, size) for block, size in sizes.items()
    }
    return places, window


def place_one_at_a_time(_: Workload, sizes: Sizes) -> tuple[dict[int, Place], int]:
    """All blocks in the same place: the least memory, and no overlap."""
    return {block: Place(0, size) for block, size in sizes.items()}, max(sizes.values(), default=0)


def place_in_ring(work: Workload, sizes: Sizes, num_places: int) -> tuple[dict[int, Place], int]:
    """Blocks take `num_places` places in turn, in the order of their first visit."""
    order = [*dict.fromkeys([*turns(work.order, sizes), *sizes])]
    widths = [
        max((sizes[b] for b in order[ring::num_places]), default=0) for ring in range(num_places)
    ]
    offsets = [sum(widths[:ring]) for ring in range(num_places)]
    places = {block: Place(offsets[i % num_places], sizes[block]) for i, block in enumerate(order)}
    return places, sum(widths)


def place_in_turn(work: Workload, sizes: Sizes, *, window: int) -> tuple[dict[int, Place], int]:
    """One after the other around a window of `window` bytes, and around again.

    So several blocks are ahead of the one that computes. The window is at least as large as the
    largest two neighbours, and no larger than all blocks together.
    """
    pairs = neighbours(turns(work.order, sizes))
    least = max([max(sizes.values(), default=0), *(sizes[a] + sizes[b] for a, b in pairs)])
    window = min(max(window, least), sum(sizes.values()))
    places: dict[int, Place] = {}
    offset = 0
    for block in dict.fromkeys([*turns(work.order, sizes), *sizes]):
        if offset + sizes[block] > window:
            offset = 0
        places[block] = Place(offset, sizes[block])
        offset += sizes[block]
    return places, window


def _two_colours(blocks: Iterable[int], pairs: set[tuple[int, int]]) -> dict[int, bool]:
    """A colour for each block, neighbours different wherever two colours allow it."""
    near: dict[int, list[int]] = {block: [] for block in blocks}
    for a, b in sorted(pairs):
        near[a].append(b)
        near[b].append(a)
    colour: dict[int, bool] = {}
    for start in near:
        waiting = [] if start in colour else [(start, False)]
        while waiting:
            block, wanted = waiting.pop()
            if block not in colour:
                colour[block] = wanted
                waiting += [(other, not wanted) for other in near[block]]
    return colour
