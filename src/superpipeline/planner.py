"""Making plans: from a bound in bytes, or from the method's two parameters k and k'.

With a bound: the window holds two consecutive blocks, and every further byte makes tensors resident
(a resident byte saves a transfer at every visit; a deeper window saves none). Residents are chosen
by water-filling: always from the block with the most streamed bytes, weighted by its visits, so the
largest streamed block shrinks, and the window with it.
"""

import heapq
from collections.abc import Callable, Iterable

from superpipeline.errors import BudgetError, InputError
from superpipeline.plan import Place, Plan, Workload, check, neighbours, turns
from superpipeline.simulate import predict
from superpipeline.sizes import format_bytes

Sizes = dict[int, int]
Placing = Callable[[Workload, Sizes], tuple[dict[int, Place], int]]


def plan_for_bound(work: Workload, bound_bytes: int) -> Plan:
    """The plan that streams least within `bound_bytes` of device memory for weights.

    Raises:
        BudgetError: the bound is below `least_bytes(work)`; it says the least, and which block
            needs it.
    """
    if bound_bytes >= work.weight_bytes and not work.trained:
        everything = frozenset(range(len(work.weights)))
        return _assemble(work, bound_bytes, everything, place_two_ended)
    for placing in (place_two_ended, place_one_at_a_time):
        resident = _fill(work, bound_bytes, work.must_reside, placing)
        if resident is not None:
            plan = _assemble(work, bound_bytes, resident, placing)
            return _without_collisions(plan) if placing is place_two_ended else plan
    raise BudgetError(_too_little(work, bound_bytes), least_bytes=least_bytes(work))


def plan_for_k(work: Workload, k: int, k_prime: int) -> Plan:
    """The method's plan: at most k blocks on the device; k' move together (blocks are grouped).

    `work` has one block for each k' blocks of the model; its places are taken in a ring.
    """
    num_places = max(1, k // k_prime)

    def placing(work: Workload, sizes: Sizes) -> tuple[dict[int, Place], int]:
        return place_in_ring(work, sizes, num_places)

    return _assemble(work, None, work.must_reside, placing)


def check_k(k: int | None, k_prime: int | None) -> tuple[int, int]:
    """k and k' with their defaults (k' = 1, k = 2k').

    Raises:
        InputError: not whole numbers of at least 1, or k' > k.
    """
    for name, value in (("k", k), ("k_prime", k_prime)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"{name} must be a whole number, got {value!r}")
    group = 1 if k_prime is None else k_prime
    blocks = 2 * group if k is None else k
    if group < 1 or blocks < group:
        raise InputError(
            f"k={blocks}, k_prime={group}: both must be at least 1 and k_prime at most k; "
            f"write k={2 * max(group, 1)}, k_prime={max(group, 1)}"
        )
    return blocks, group


def least_bytes(work: Workload) -> int:
    """The smallest bound that works: what must reside, and the largest block on its own."""
    sizes = _streamed_sizes(work, work.must_reside)
    return _bytes_of(work, work.must_reside) + max(sizes.values(), default=0)


def least_overlapping_bytes(work: Workload) -> int:
    """The smallest bound at which copies overlap compute."""
    sizes = _streamed_sizes(work, work.must_reside)
    return _bytes_of(work, work.must_reside) + place_two_ended(work, sizes)[1]


def group_neighbours(sizes: list[int], alone: list[bool], least: int, most: int) -> list[list[int]]:
    """Consecutive small blocks put together until a transfer of `least` bytes, at most `most`.

    Blocks marked `alone` (visited conditionally, or many times) are never put together.

    Example:
        >>> group_neighbours([1, 1, 5, 1], [False] * 4, least=2, most=5)
        [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = []
    open_bytes = 0
    for index, size in enumerate(sizes):
        joins = groups and open_bytes and open_bytes < least and open_bytes + size <= most
        if joins and not alone[index]:
            groups[-1].append(index)
            open_bytes += size
        else:
            groups.append([index])
            open_bytes = 0 if alone[index] else size
    return groups


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


def _fill(
    work: Workload, bound: int, forced: frozenset[int], placing: Placing
) -> frozenset[int] | None:
    """`forced` and as many further weights as fit, or None where not even the window fits."""
    picks = promotions(work, forced)

    def fits(resident: frozenset[int]) -> bool:
        return _device_bytes(work, resident, placing) <= bound

    low = _longest_start(picks, lambda start: fits(forced.union(start)))
    resident = forced | {*picks[:low]}
    if not fits(resident):
        return None
    rest = [*picks[low:], *_by_size(work, work.rows - forced - work.trained)]
    while True:
        spare = bound - _device_bytes(work, resident, placing)
        shrinking = _shrinking(work, resident, placing)
        candidates = (
            weight
            for weight in rest
            if weight not in resident
            and (work.weights[weight].num_bytes <= spare or weight in shrinking)
        )
        # With a block gone from the circle others become neighbours, and the window may grow.
        found = next((weight for weight in candidates if fits(resident | {weight})), None)
        if found is None:
            return resident
        resident |= {found}


def _longest_start(picks: list[int], fits: Callable[[list[int]], bool]) -> int:
    """How many of `picks`, from the first on, fit together.

    More residents take more bytes: each frees at most what it takes. (Exceptions, rare: a weight
    tied between neighbours frees it twice, and an odd circle needs a smaller window. Then a shorter
    start than the longest may be found; it fits all the same.)
    """
    low, high = 0, len(picks)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(picks[:middle]) else (low, middle - 1)
    return low


def _shrinking(work: Workload, resident: frozenset[int], placing: Placing) -> set[int]:
    """The weights that all of the widest neighbours hold: the window shrinks as these reside."""
    sizes = _streamed_sizes(work, resident)
    places, window = placing(work, sizes)
    widest = [{block} for block, size in sizes.items() if size == window]
    for a, b in neighbours(turns(work.order, sizes)):
        if sizes[a] + sizes[b] == window and not places[a].overlaps(places[b]):
            widest.append({a, b})
    held = [{weight for b in together for weight in work.blocks[b].weights} for together in widest]
    return set.intersection(*held) - resident if held else set()


def promotions(work: Workload, forced: frozenset[int]) -> list[int]:
    """Every weight of a block outside `forced`, in the order in which it should move up a tier."""
    left = {
        index: _by_size(work, set(block.weights) - forced - work.trained)
        for index, block in enumerate(work.blocks)
    }
    level = {
        index: sum(work.weights[w].num_bytes for w in left[index]) * work.visits.get(index, 0)
        for index in left
    }
    heap = [(-level[index], index) for index in left if left[index]]
    heapq.heapify(heap)
    picked: dict[int, None] = {}
    while heap:
        _, index = heapq.heappop(heap)
        weight = left[index].pop(0)
        picked[weight] = None
        level[index] -= work.weights[weight].num_bytes * work.visits.get(index, 0)
        if left[index]:
            heapq.heappush(heap, (-level[index], index))
    return list(picked)


def _by_size(work: Workload, weights: Iterable[int]) -> list[int]:
    return sorted(weights, key=lambda weight: (-work.weights[weight].num_bytes, weight))


def _streamed_sizes(work: Workload, resident: frozenset[int]) -> Sizes:
    sizes = {
        index: sum(work.weights[w].num_bytes for w in block.weights if w not in resident)
        for index, block in enumerate(work.blocks)
    }
    return {index: size for index, size in sizes.items() if size}


def _bytes_of(work: Workload, weights: Iterable[int]) -> int:
    return sum(work.weights[weight].num_bytes for weight in weights)


def _device_bytes(work: Workload, resident: frozenset[int], placing: Placing) -> int:
    return _bytes_of(work, resident) + placing(work, _streamed_sizes(work, resident))[1]


def _assemble(
    work: Workload, bound: int | None, resident: frozenset[int], placing: Placing
) -> Plan:
    places, window = placing(work, _streamed_sizes(work, resident))
    slots: dict[int, dict[int, int]] = {}
    for block, place in places.items():
        offset = place.offset
        for weight in work.blocks[block].weights:
            if weight not in resident:
                slots.setdefault(block, {})[weight] = offset
                offset += work.weights[weight].num_bytes
    plan = Plan(
        workload=work, bound_bytes=bound, resident=resident,
        places=places, slots=slots, window_bytes=window,
    )  # fmt: skip
    check(plan)
    return plan


def _without_collisions(plan: Plan) -> Plan:
    """`plan`, or the same with the smallest streamed block resident, whichever is faster.

    An odd circle of blocks leaves two neighbours at the same end of the window, and the fetch of
    one waits for the other. With one block fewer the circle is even.
    """
    if not plan.collisions or plan.bound_bytes is None:
        return plan
    work = plan.workload
    if work.trained:
        return plan
    smallest = min(plan.circle, key=lambda block: plan.places[block].num_bytes)
    forced = work.must_reside | frozenset(work.blocks[smallest].weights)
    resident = _fill(work, plan.bound_bytes, forced, place_two_ended)
    if resident is None:
        return plan
    other = _assemble(work, plan.bound_bytes, resident, place_two_ended)
    # Where compute and copies take equally long, a collision costs most; so it is judged there.
    computed = {index: _bytes_of(work, block.weights) for index, block in enumerate(work.blocks)}
    share = plan.streamed_bytes / sum(computed[block] * work.visits[block] for block in work.visits)
    busy = {block: num_bytes * share for block, num_bytes in computed.items()}
    times = [predict(p, link_rate=1.0, compute_s=busy).time_s for p in (plan, other)]
    return other if times[1] < times[0] else plan


def _too_little(work: Workload, bound: int) -> str:
    sizes = _streamed_sizes(work, work.must_reside)
    least, overlapping = least_bytes(work), least_overlapping_bytes(work)
    if not sizes:
        return (
            f"weights={format_bytes(bound)} is too little: {format_bytes(least)} must stay "
            f"resident (buffers, and parameters outside any module that is called). The least is "
            f"weights={least}"
        )
    largest = max(sizes, key=lambda block: sizes[block])
    return (
        f"weights={format_bytes(bound)} is too little: block {work.blocks[largest].name} alone "
        f"needs {format_bytes(sizes[largest])}, and {format_bytes(least - sizes[largest])} must "
        f"stay resident. The least is weights={least} ({format_bytes(least)}); from "
        f"{overlapping} ({format_bytes(overlapping)}) on, copies overlap compute."
    )
