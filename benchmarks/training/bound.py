"""The least time of a training step whose weights are stepped on the host, whatever an engine does.

With clipping no weight can be stepped before the last gradient is there, and none can compute
before it was stepped: a step takes the backward, and then the optimizer beside the next forward.
Without, all may overlap.
"""

from typing import NamedTuple


class Terms(NamedTuple):
    """Seconds of one optimizer step, each measured by itself.

    Attributes:
        forward, backward: of all micro-batches, with the plain model on the device.
        first_forward: of the first micro-batch: the only one that an optimizer can run beside.
        optimizer: the whole step on the host.
        link: weights to the device or gradients from it, whichever takes longer.
    """

    forward: float
    backward: float
    first_forward: float
    optimizer: float
    link: float


def bound_s(terms: Terms, *, clips: bool) -> float:
    """Seconds of a step.

    Example:
        >>> terms = Terms(1.0, 2.0, 0.25, 0.5, 1.5)
        >>> bound_s(terms, clips=True), bound_s(terms, clips=False)
        (3.0, 3.0)
    """
    if clips:
        return terms.backward + max(terms.forward, terms.optimizer)
    return max(terms.forward + terms.backward, terms.optimizer, terms.link)


def first_forward_bound_s(terms: Terms, *, clips: bool) -> float:
    """The same, knowing that the second micro-batch waits for the first: larger if there are two.

    Example:
        >>> first_forward_bound_s(Terms(1.0, 2.0, 0.25, 0.5, 1.5), clips=True)
        3.25
    """
    if not clips:
        return bound_s(terms, clips=False)
    others = terms.forward - terms.first_forward
    return terms.backward + others + max(terms.first_forward, terms.optimizer)
