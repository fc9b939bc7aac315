"""A plan played through without a device: the steps it takes, and the time it would need. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from superpipeline.plan import Plan, turns


class Step(NamedTuple):
    """One thing that happens to a block: F fetch, C compute, E evict."""

    action: Literal["F", "C", "E"]
    block: int


class Prediction(NamedTuple):
    """One steady pass: how long it takes, and how long the link and the device are busy in it."""

    time_s: float
    link_s: float
    compute_s: float


def play(plan: Plan, num_passes: int) -> list[list[Step]]:
    """The steps of each pass, from an empty window on, with every block's successor known.

    Blocks without a place compute too: while they do, every place is free for a fetch.
    """
    visits = turns(plan.workload.order, range(len(plan.workload.blocks)))
    on_device = set[int]()
    passes: list[list[Step]] = []
    for _ in range(num_passes):
        steps_of_pass: list[Step] = []
        for position, block in enumerate(visits):
            upcoming = (
                visits[i % len(visits)] for i in range(position + 1, position + len(visits))
            )
            steps_of_pass += _begin_turn(plan, block, upcoming, on_device)
            steps_of_pass.append(Step("C", block))
        passes.append(steps_of_pass)
    return passes


def _begin_turn(
    plan: Plan, block: int, upcoming: Iterable[int], on_device: set[int]
) -> Iterator[Step]:
    """The fetches as `block` takes its turn, each after the evictions it needs."""
    placed = block in plan.places
    wanted = [block] if placed and block not in on_device else []
    ahead = plan.fetches_ahead(
        block if placed else None,
        (other for other in upcoming if other in plan.places),
        on_device.union(wanted),
    )
    for fetch in [*wanted, *ahead]:
        evicted = sorted((on_device & plan.overlaps[fetch]) - {fetch})
        yield from (Step("E", other) for other in evicted)
        on_device.difference_update(evicted)
        on_device.add(fetch)
        yield Step("F", fetch)


def steps(plan: Plan) -> list[Step]:
    """The steps of one steady pass."""
    return play(plan, 3)[-1]


def predict(plan: Plan, *, link_rate: float, compute_s: Mapping[int, float]) -> Prediction:
    """The time of one steady pass.

    Args:
        link_rate: bytes a second from host to device.
        compute_s: seconds of compute for one visit of each block, wholly resident ones too; 0
            where it is missing.
    """
    drained: dict[int, float] = {}
    filled: dict[int, float] = {}
    link = device = 0.0
    starts: list[float] = []
    busy = computing = 0.0
    for steps_of_pass in play(plan, 3):
        starts.append(device)
        busy = computing = 0.0
        for action, block in steps_of_pass:
            if action == "F":
                start = max([link, *(drained.get(o, 0.0) for o in plan.overlaps[block])])
                link = filled[block] = start + plan.places[block].num_bytes / link_rate
                busy += plan.places[block].num_bytes / link_rate
            elif action == "C":
                device = max(device, filled.get(block, 0.0)) + compute_s.get(block, 0.0)
                drained[block] = device
                computing += compute_s.get(block, 0.0)
    return Prediction(device - starts[-1] if starts else 0.0, busy, computing)
