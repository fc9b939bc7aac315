"""A plan played through without a device: the steps it takes, and the time it would need. Pure."""

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Literal, NamedTuple

from superpipeline.plan import Plan


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
    """The steps of each pass, from an empty window on, with every block's successor known."""
    circle, on_device = plan.circle, set[int]()
    passes: list[list[Step]] = []
    for _ in range(num_passes):
        steps_of_pass: list[Step] = []
        for position, block in enumerate(circle):
            ahead = islice(cycle(circle), position + 1, position + 1 + len(circle))
            wanted = [] if block in on_device else [block]
            here = on_device | {block}
            for fetch in [*wanted, *plan.fetches_ahead(block, ahead, here)]:
                evicted = sorted((on_device & plan.overlaps[fetch]) - {fetch})
                steps_of_pass += [Step("E", other) for other in evicted]
                on_device.difference_update(evicted)
                on_device.add(fetch)
                steps_of_pass.append(Step("F", fetch))
            steps_of_pass.append(Step("C", block))
        passes.append(steps_of_pass)
    return passes


def steps(plan: Plan) -> list[Step]:
    """The steps of one steady pass."""
    return play(plan, 3)[-1]


def predict(plan: Plan, *, link_rate: float, compute_s: Mapping[int, float]) -> Prediction:
    """The time of one steady pass.

    Args:
        link_rate: bytes a second from host to device.
        compute_s: seconds of compute for one visit of each block; 0 where it is missing.
    """
    drained: dict[int, float] = {}
    filled: dict[int, float] = {}
    link = device = 0.0
    starts: list[float] = []
    busy = 0.0
    for steps_of_pass in play(plan, 3):
        starts.append(device)
        busy = 0.0
        for action, block in steps_of_pass:
            if action == "F":
                start = max([link, *(drained.get(o, 0.0) for o in plan.overlaps[block])])
                link = filled[block] = start + plan.places[block].num_bytes / link_rate
                busy += plan.places[block].num_bytes / link_rate
            elif action == "C":
                device = max(device, filled[block]) + compute_s.get(block, 0.0)
                drained[block] = device
    computing = sum(compute_s.get(block, 0.0) for block in plan.circle)
    return Prediction(device - starts[-1] if starts else 0.0, busy, computing)
