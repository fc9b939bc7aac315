"""The plan: which bytes are resident, each block's place in the window, and the order. Pure data.

A plan is made and checked without a device and without torch; the engine carries it out and adds no
policy of its own. `planner.py` makes plans.

    window   0 ────────────────────────────────────────────── window_bytes
             ├─ place of blocks 0, 2, 4 … ─┤
                          ├──── place of blocks 1, 3, 5 … ────┤
             while block 1 computes at the right end, block 2 is copied in at the left
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from superpipeline.sizes import format_bytes


class WeightSpec(NamedTuple):
    """A byte range that moves as one: usually one tensor.

    `num_bytes` is what it takes on the device, alignment included.
    """

    name: str
    num_bytes: int


class BlockSpec(NamedTuple):
    """The unit fetched together: indices of its weights. A tied weight stands in several blocks."""

    name: str
    weights: tuple[int, ...]


class Place(NamedTuple):
    """A block's fixed byte range in the window."""

    offset: int
    num_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes

    def overlaps(self, other: "Place") -> bool:
        return self.offset < other.end and other.offset < self.end


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What has to be planned for.

    Attributes:
        order: block indices as they are visited, read as a circle (the pass is repeated).
        must_reside: weights that have to be resident (buffers, parameters read outside any block).
        rows: weights that are looked up by rows on the host and need no window of their own.
        trained: weights that an optimizer steps on the host; they reside only if they must.
        in_place: whether a fetch copies next to nothing (see `paged.py`), so that there is nothing
            to overlap, and what costs time is that there is a visit with a fetch.
        busy: for each block, the bytes that cross the link while it computes once; empty where no
            pass was timed.
    """

    weights: tuple[WeightSpec, ...]
    blocks: tuple[BlockSpec, ...]
    order: tuple[int, ...]
    must_reside: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()
    in_place: bool = False
    busy: tuple[float, ...] = ()

    @property
    def weight_bytes(self) -> int:
        return sum(weight.num_bytes for weight in self.weights)

    def bytes_of(self, weights: Iterable[int]) -> int:
        return sum(self.weights[weight].num_bytes for weight in weights)

    @cached_property
    def visits(self) -> Mapping[int, int]:
        """How often each block is visited in one turn of the circle."""
        counts: dict[int, int] = {}
        for block in self.order:
            counts[block] = counts.get(block, 0) + 1
        return counts


def turns(order: Sequence[int], placed: Iterable[int]) -> tuple[int, ...]:
    """`order` without blocks that have no place and without a block following itself.

    Example:
        >>> turns((0, 1, 1, 2, 0), placed={0, 1})
        (0, 1)
    """
    keep = set(placed)
    kept: list[int] = []
    for block in order:
        if block in keep and (not kept or kept[-1] != block):
            kept.append(block)
    while len(kept) > 1 and kept[0] == kept[-1]:
        kept.pop()
    return tuple(kept)


def neighbours(circle: Sequence[int]) -> set[tuple[int, int]]:
    """The pairs that follow each other in the circle, each once, smaller index first."""
    closed = [*circle, circle[0]] if circle else []
    return {(min(a, b), max(a, b)) for a, b in pairwise(closed) if a != b}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which weights are resident, where each block's streamed weights go, and the order.

    Attributes:
        bound_bytes: the bound given as `weights=`, or None where k and k' were given.
        resident: indices of the resident weights.
        places: for each block with streamed weights, its byte range in the window.
        slots: for each such block, each streamed weight's offset in the window.
    """

    workload: Workload
    bound_bytes: int | None
    resident: frozenset[int]
    places: Mapping[int, Place]
    slots: Mapping[int, Mapping[int, int]]
    window_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All weights, each once."""
        return self.workload.weight_bytes

    @cached_property
    def resident_bytes(self) -> int:
        return self.workload.bytes_of(self.resident)

    @property
    def device_bytes(self) -> int:
        """Every byte that weights take on the device, at every moment."""
        return self.resident_bytes + self.window_bytes

    @cached_property
    def circle(self) -> tuple[int, ...]:
        """The order of the blocks that need a fetch, as a circle."""
        return turns(self.workload.order, self.places)

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes fetched in one turn of the circle once it runs steadily.

        A block whose bytes no other block takes in between is not fetched again.
        """
        from superpipeline.simulate import steps

        return sum(self.places[block].num_bytes for action, block in steps(self) if action == "F")

    @property
    def is_at_rest(self) -> bool:
        """Whether all places fit side by side, so that nothing needs a second fetch."""
        return self.streamed_bytes == 0

    @cached_property
    def overlaps(self) -> Mapping[int, frozenset[int]]:
        """For each placed block, the placed blocks (itself included) that share bytes with it."""
        at: dict[Place, list[int]] = {}
        for block, place in self.places.items():
            at.setdefault(place, []).append(block)
        sharing = {
            place: frozenset(
                b for other, blocks in at.items() if place.overlaps(other) for b in blocks
            )
            for place in at
        }  # thousands of blocks have few different places, so the sets are few
        return {block: sharing[place] for block, place in self.places.items()}

    @cached_property
    def collisions(self) -> tuple[tuple[int, int], ...]:
        """Neighbours in the circle that share bytes: the fetch of one waits for the other."""
        return tuple(
            sorted(pair for pair in neighbours(self.circle) if pair[1] in self.overlaps[pair[0]])
        )

    def fetches_ahead(
        self, current: int | None, upcoming: Iterable[int], on_device: Iterable[int]
    ) -> list[int]:
        """The blocks to fetch now, in order, so that nothing needed sooner is overwritten.

        `upcoming` may be endless: it is read until a block has to wait for bytes that the current
        block or a sooner one needs.
        """
        here = set(on_device)
        needed = set() if current is None else {current}
        fetches: list[int] = []
        for count, block in enumerate(upcoming):
            if count > len(self.places) or block not in self.places:
                break
            if block in needed:
                continue
            if not needed.isdisjoint(self.overlaps[block]):
                break
            if block not in here:
                fetches.append(block)
            needed.add(block)
        return fetches

    def schedule(self) -> str:
        """One steady pass: F fetch, C compute, E evict, each with the block's index.

        Example:
            `F0 F1 C0 E0 F2 C1 E1 F3 C2 …`
        """
        from superpipeline.simulate import steps

        return " ".join(f"{step.action}{step.block}" for step in steps(self))

    def __str__(self) -> str:
        bound = "k, k'" if self.bound_bytes is None else format_bytes(self.bound_bytes)
        return (
            f"plan: {format_bytes(self.weight_bytes)} in {bound}: "
            f"{format_bytes(self.resident_bytes)} resident, "
            f"{format_bytes(self.window_bytes)} window, "
            f"{format_bytes(self.streamed_bytes)} streamed each pass; {self.schedule()}"
        )


def check(plan: Plan) -> None:
    """Raises AssertionError if the plan could ever be wrong; the planner calls it on every plan."""
    work = plan.workload
    assert plan.bound_bytes is None or plan.device_bytes <= plan.bound_bytes, "over the bound"
    assert work.must_reside <= plan.resident, "a weight that must reside does not"
    for index, block in enumerate(work.blocks):
        streamed = [weight for weight in block.weights if weight not in plan.resident]
        if not streamed:
            assert index not in plan.places, f"{block.name} needs no place"
            continue
        assert index in plan.places and index in plan.slots, f"{block.name} has no place"
        place, slots = plan.places[index], plan.slots[index]
        assert 0 <= place.offset and place.end <= plan.window_bytes, f"{block.name} outside"
        assert set(slots) == set(streamed), f"{block.name} misses a slot"
        ranges = sorted((slots[w], slots[w] + work.weights[w].num_bytes) for w in streamed)
        assert place.offset <= ranges[0][0] and ranges[-1][1] <= place.end, f"{block.name} spills"
        assert all(a[1] <= b[0] for a, b in pairwise(ranges)), f"{block.name} overlaps itself"
