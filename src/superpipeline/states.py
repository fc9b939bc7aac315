"""Blocks as the engine sees them, and what the host thread may assume of each."""

import weakref
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import nn

from superpipeline.pointers import Pointer
from superpipeline.streams import Run
from superpipeline.weights import Weight


class State(Enum):
    """What the host thread may assume of a block.

    ON_HOST ── fetch ──> FETCHING ── wait_for_fetch ──> ON_DEVICE ── evict ──> ON_HOST
    """

    ON_HOST = "on host"
    FETCHING = "fetching"
    ON_DEVICE = "on device"


@dataclass(eq=False, slots=True)
class Block:
    """The unit fetched together.

    Attributes:
        filled: happens when its latest fetch is done.
        drained: happens when its latest turn is done; None once a fetch has waited for it.
        runs: the copies of a fetch; empty for a block that is wholly resident.
        disk_bytes: how many of its `num_bytes` are read from disk.
        versions: what the version counters were when it was fetched.
    """

    index: int
    name: str
    weights: list[Weight]
    roots: list[weakref.ref[nn.Module]] = field(default_factory=list)
    state: State = State.ON_HOST
    filled: Any = None
    drained: Any = None
    runs: list[Run] = field(default_factory=list)
    pointers: list[Pointer] = field(default_factory=list)
    num_bytes: int = 0
    disk_bytes: int = 0
    versions: list[int] = field(default_factory=list)

    def present_versions(self) -> list[int]:
        """The version counters of its streamed tensors."""
        return [pointer.tensor._version for pointer in self.pointers]

    def live_roots(self) -> list[nn.Module]:
        """The modules whose call is a visit."""
        return [module for root in self.roots if (module := root()) is not None]

    def forget_place(self) -> None:
        """Lets go of the window, whose plan has ended."""
        self.state, self.filled, self.drained = State.ON_HOST, None, None
        self.runs, self.pointers, self.num_bytes, self.disk_bytes = [], [], 0, 0
