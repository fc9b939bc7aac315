"""Making plans: from a bound in bytes, or from the method's two parameters k and k'.

With a bound: the window holds two consecutive blocks, and every further byte makes tensors resident
(a resident byte saves a transfer at every visit; where blocks are alike, a deeper window saves
none). Once a pass was timed, other plans are played through as well, with deeper windows and with
residents chosen by time, and the fastest is taken.

Where fetches copy next to nothing, the window holds one block.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from superpipeline.errors import BudgetError, InputError
from superpipeline.placing import (
    Placing,
    Sizes,
    place_in_ring,
    place_in_turn,
    place_one_at_a_time,
    place_two_ended,
)
from superpipeline.plan import Place, Plan, Workload, check, neighbours, turns
from superpipeline.residency import Promotions, by_size, paced, promotions
from superpipeline.simulate import predict
from superpipeline.sizes import format_bytes

# Windows that are tried beside the least one that overlaps, as multiples of it.
_DEEPER = (1.5, 2.0, 3.0)
# A bound is as good as full when less than this part of it is left.
_WORTH_FILLING = 10_000
# How much slower the present plan must be before another takes its place.
_WORTH_IT = 1.02


def plan_for_bound(work: Workload, bound_bytes: int) -> Plan:
    """The plan that streams least within `bound_bytes` of device memory for weights.

    Raises:
        BudgetError: the bound is below `least_bytes(work)`; it says the least, and which block
            needs it.
    """
    if bound_bytes >= work.weight_bytes and not work.trained:
        everything = frozenset(range(len(work.weights)))
        return _assemble(work, bound_bytes, everything, place_two_ended)
    placings = (place_two_ended, place_one_at_a_time)
    for placing in placings[work.in_place :]:
        resident = _fill(work, bound_bytes, work.must_reside, placing)
        if resident is not None:
            plan = _assemble(work, bound_bytes, resident, placing)
            return _fastest(plan) if placing is place_two_ended else plan
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
    return work.bytes_of(work.must_reside) + max(sizes.values(), default=0)


def least_overlapping_bytes(work: Workload) -> int:
    """The smallest bound at which copies overlap compute."""
    sizes = _streamed_sizes(work, work.must_reside)
    return work.bytes_of(work.must_reside) + place_two_ended(work, sizes)[1]


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


def _fill(
    work: Workload, bound: int, forced: frozenset[int], placing: Placing,
    order: Promotions = promotions,
) -> frozenset[int] | None:  # fmt: skip
    """`forced` and as many further weights as fit, or None where not even the window fits."""
    room = _Room(work, bound, placing)
    picks = order(work, forced)
    resident = forced.union(room.start_of(picks, forced))
    if not room.fits(resident):
        return None
    if work.in_place:
        resident = room.with_whole_blocks(resident)
    picks += by_size(work, work.rows - forced - work.trained)
    while True:
        before = resident
        resident = room.filled(picks, resident)
        if resident == before:
            return resident


class _Room(NamedTuple):
    """What fits beside a window, under a bound."""

    work: Workload
    bound: int
    placing: Placing

    def fits(self, resident: frozenset[int]) -> bool:
        return _device_bytes(self.work, resident, self.placing) <= self.bound

    def start_of(self, picks: list[int], resident: frozenset[int]) -> list[int]:
        """As many of `picks` as fit beside `resident` together, from the first on.

        More residents take more bytes: each frees at most what it takes. (Exceptions, rare: a
        weight tied between neighbours frees it twice, and an odd circle needs a smaller window.
        Then a shorter start than the longest may be found; it fits all the same.)
        """
        low, high = 0, len(picks)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.fits(resident.union(picks[:middle]))
            low, high = (middle, high) if fits else (low, middle - 1)
        return picks[:low]

    def with_whole_blocks(self, resident: frozenset[int]) -> frozenset[int]:
        """`resident` without what is only a part of a block, and smaller blocks that fit whole."""
        blocks = [frozenset(block.weights) for block in self.work.blocks]
        cut = [b for b in blocks if b & resident and not b <= resident | self.work.must_reside]
        resident = (resident - frozenset().union(*cut)) | (resident & self.work.must_reside)
        for block in sorted(blocks, key=self.work.bytes_of, reverse=True):
            if self.fits(resident | block):
                resident |= block
        return resident

    def filled(self, picks: list[int], resident: frozenset[int]) -> frozenset[int]:
        """`resident` and what of `picks` fits beside it, each weight tried at least once."""
        rejected: set[int] = set()
        while True:
            left = [w for w in picks if w not in resident and w not in rejected]
            found = self._some_of(left, resident, rejected)
            if not found:
                return resident
            resident = resident.union(found)

    def _some_of(self, picks: list[int], resident: frozenset[int], rejected: set[int]) -> list[int]:
        """Weights that fit beside `resident`: several, or the first; those before it are rejected.

        With a block gone from the circle others become neighbours: the window may grow.
        """
        spare = self.bound - _device_bytes(self.work, resident, self.placing)
        if spare * _WORTH_FILLING < self.bound:
            spare = 0  # only what narrows the window by as much as it takes
        if found := self.start_of(_affordable(self.work, picks, spare), resident):
            return found
        sizes, shrinking = self.work.weights, _shrinking(self.work, resident, self.placing)
        for weight in picks:
            is_candidate = sizes[weight].num_bytes <= spare or weight in shrinking
            if is_candidate and self.fits(resident | {weight}):
                return [weight]
            rejected.add(weight)
        return []


def _affordable(work: Workload, weights: list[int], spare: int) -> list[int]:
    """Those that fit into `spare` bytes together, each taken if it still fits."""
    taken: list[int] = []
    for weight in weights:
        if work.weights[weight].num_bytes <= spare:
            taken.append(weight)
            spare -= work.weights[weight].num_bytes
    return taken


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


def _streamed_sizes(work: Workload, resident: frozenset[int]) -> Sizes:
    sizes = {
        index: sum(work.weights[w].num_bytes for w in block.weights if w not in resident)
        for index, block in enumerate(work.blocks)
    }
    return {index: size for index, size in sizes.items() if size}


def _device_bytes(work: Workload, resident: frozenset[int], placing: Placing) -> int:
    return work.bytes_of(resident) + placing(work, _streamed_sizes(work, resident))[1]


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


def _fastest(plan: Plan) -> Plan:
    """`plan`, or the fastest of others for the same bound, played through."""
    if plan.workload.trained:
        return plan
    plans = [plan, *_without_collisions(plan), *_timed(plan)]
    times = [time_of(other) for other in plans] if len(plans) > 1 else [0.0]
    return plans[times.index(min(times))]


def time_of(plan: Plan) -> float:
    """How long a pass takes, in bytes that cross the link meanwhile.

    Where no pass was timed, compute and copies are taken to take equally long, and compute of each
    block as long as its bytes: there a plan's shape matters most.
    """
    work = plan.workload
    busy = dict(enumerate(work.busy or _balanced(plan)))
    return predict(plan, link_rate=1.0, compute_s=busy).time_s


def faster(present: Plan, work: Workload) -> Plan | None:
    """A plan for `work`, now that a pass was timed, if one is faster than `present` by enough.

    Args:
        work: that of `present`, with `Workload.busy`.
    """
    bound = present.bound_bytes
    if bound is None:
        return None
    present = replace(present, workload=work)
    shown = predict(present, link_rate=1.0, compute_s=dict(enumerate(work.busy)))
    if shown.time_s <= _WORTH_IT * max(shown.link_s, shown.compute_s):
        return None  # one of the two is always at work: what is left is not the plan's
    plan = plan_for_bound(work, bound)
    return plan if time_of(plan) * _WORTH_IT <= shown.time_s else None


def _balanced(plan: Plan) -> list[float]:
    """Compute and copies take equally long: there a plan's shape matters most."""
    work = plan.workload
    computed = [work.bytes_of(block.weights) for block in work.blocks]
    whole = sum(computed[block] * count for block, count in work.visits.items())
    return [num_bytes * plan.streamed_bytes / whole for num_bytes in computed]


def _timed(plan: Plan) -> Iterator[Plan]:
    """Windows of other depths, and residents chosen by bytes or by time."""
    work, bound = plan.workload, plan.bound_bytes
    if not work.busy or bound is None:
        return
    deeper = [partial(place_in_turn, window=int(plan.window_bytes * m)) for m in _DEEPER]
    ways: list[tuple[Placing, Promotions]] = [(place_two_ended, paced)]
    ways += [(placing, order) for order in (promotions, paced) for placing in deeper]
    for placing, order in ways:
        resident = _fill(work, bound, work.must_reside, placing, order)
        if resident is not None:
            yield _assemble(work, bound, resident, placing)


def _without_collisions(plan: Plan) -> Iterator[Plan]:
    """The same with the smallest streamed block resident, if that mends the circle.

    An odd circle of blocks leaves two neighbours at the same end of the window, and the fetch of
    one waits for the other. With one block fewer the circle is even.
    """
    if not plan.collisions or plan.bound_bytes is None:
        return
    work = plan.workload
    smallest = min(plan.circle, key=lambda block: plan.places[block].num_bytes)
    forced = work.must_reside | frozenset(work.blocks[smallest].weights)
    resident = _fill(work, plan.bound_bytes, forced, place_two_ended)
    if resident is not None:
        yield _assemble(work, plan.bound_bytes, resident, place_two_ended)


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
    text = (
        f"weights={format_bytes(bound)} is too little: block {work.blocks[largest].name} alone "
        f"needs {format_bytes(sizes[largest])}, and {format_bytes(least - sizes[largest])} must "
        f"stay resident. The least is weights={least} ({format_bytes(least)}); from "
        f"{overlapping} ({format_bytes(overlapping)}) on, copies overlap compute."
    )
    return text.partition("; from ")[0] if work.in_place else text
