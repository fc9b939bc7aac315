"""The engine carries out a plan: whose turn it is, what is fetched, what waits for what.

It has no policy: which block comes next is `order.py`'s guess, what may be fetched now is
`Plan.fetches_ahead`. It is used by one thread at a time (`passes.py` sees to that).

[Note: who orders whom]
    fetch of a block   after the drained event of every block that shares bytes with its place
    a turn             after the filled event of its block
    drained            recorded when another block takes the turn or the pass ends, on the stream
                       that is current then, joined with the one before if that changed

      FETCH    ──F0──F1──────────w(drained 0)─F2──────────w(drained 1)─F3──
      COMPUTE       w(filled 0)─C0─┘ w(filled 1)─C1────────┘ w(filled 2)─C2─

[Note: when a device copy may be believed]
    Within a pass always. From one pass to the next only if nothing suggests an edit: version
    counters, the count of optimizer steps, addresses, and sampled bytes of the host copy are as
    they were. (`p.data.add_()` and fused optimizers do not raise version counters, so those alone
    would miss real edits.)
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from superpipeline import edits
from superpipeline.ondisk import Keeper, OnDisk
from superpipeline.order import Order
from superpipeline.outputs import same_layout_copy
from superpipeline.plan import Plan
from superpipeline.pointers import Idle, Pointer
from superpipeline.streams import COMPUTE, FETCH, Run, Streams
from superpipeline.trace import Counters, label
from superpipeline.weights import Alias, Weight
from superpipeline.window import Window


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


class Engine:
    """Blocks, a window and the streams, doing what the plan says.

    Attributes:
        current: the block whose turn it is.
        written: streamed weights that a forward writes; they had better be resident.
        idle: what is not in its turn.
        is_moving: whether what runs now is the engine's own work, not the model's.
    """

    def __init__(
        self,
        plan: Plan,
        blocks: Sequence[Block],
        home: dict[Weight, Keeper],
        streams: Streams,
        counters: Counters,
        written: set[Weight],
    ) -> None:
        self.plan = plan
        self._home = home
        self.blocks = blocks
        self.streams = streams
        self.window = Window(plan, streams)
        self.order = Order(plan.circle)
        self.counters = counters
        self.current: Block | None = None
        self.written = written
        self._streamed = {w for b in blocks for w in b.weights if w.index not in plan.resident}
        self._here: set[int] = set()
        self._occupied: set[int] = set()  # whose places copies or kernels may still be using
        self._seen: dict[int, object] = {}
        self._stream = streams.compute_stream()
        for block in blocks:
            self._give_place(block)
        self.idle = Idle(home, plan.resident)
        self.is_moving = self._is_shown = self._is_called = False
        # The window's memory may still be read by kernels of whoever had it before.
        streams.wait(FETCH, streams.record(COMPUTE))

    def _give_place(self, block: Block) -> None:
        home = self._home
        streamed = [w for w in block.weights if w.index not in self.plan.resident]
        block.state, block.filled, block.drained = State.ON_HOST, None, None
        block.runs = self.window.runs(block.index, streamed, home)
        block.num_bytes = sum(run.destination.numel() for run in block.runs)
        block.disk_bytes = sum(
            run.destination.numel() for run in block.runs if isinstance(run.source, OnDisk)
        )
        block.pointers = [
            self._pointer(alias, weight, block.index, home[weight])
            for weight in streamed
            for alias in weight.aliases
        ]

    def _pointer(self, alias: Alias, weight: Weight, block: int, keeper: Keeper) -> Pointer:
        here = alias.view(self.window.bytes, self.window.start(block, weight))
        return Pointer(alias, weight, here, keeper)

    @property
    def reader(self) -> Block | None:
        """The block whose call reads weights now; None between calls."""
        return self.current if self._is_called else None

    # ---- turns ------------------------------------------------------------------------------

    def take_turn(self, block: Block | None) -> None:
        """Ends the turn of the current block and gives it to `block`, whose weights are then there.

        Never blocks the host on a GPU; on the CPU it waits for the fetch.
        """
        self.is_moving = True
        self._is_called = block is not None
        if block is not self.current or not self._resume():
            self._end_turn()
            self.current = block
            if block is not None:
                self._begin_turn(block)
        self.is_moving = False

    def end_call(self) -> None:
        """The current block's call has returned: until its next one, its weights show as idle.

        Its caller may take a view of a weight, and the place is given away at the next turn; of the
        host's bytes a view stays right. The place itself stays the block's until then.
        """
        block = self.current
        self._is_called = False
        if block is not None and self._is_shown:
            self.is_moving = True
            self._put_back(block)
            self.is_moving = False

    def _resume(self) -> bool:
        """Shows the current block again; False if it was written meanwhile: then it is fetched."""
        block = self.current
        if block is None or not block.runs or self._is_shown:
            return True
        if block.versions != block.present_versions():
            return False
        self._show(block)
        return True

    def _show(self, block: Block) -> None:
        for pointer in block.pointers:
            pointer.bring()
        self._is_shown = True

    def _begin_turn(self, block: Block) -> None:
        self.order.visit(block.index, placed=bool(block.runs))
        self.counters.visits += 1
        if not block.runs:
            self._fetch_ahead()
            return
        if block.state is State.ON_HOST or block.versions != block.present_versions():
            # Not foreseen, or another module's forward wrote the weights after they were fetched.
            self.counters.late_fetches += 1
            self._fetch(block)
        self._fetch_ahead()
        self._wait_for_fetch(block)
        self._show(block)

    def _end_turn(self) -> None:
        self.follow_stream()
        block = self.current
        if block is None or not block.runs:
            return
        if self._is_shown:
            self._put_back(block)
        if torch.is_autocast_enabled(self.streams.device.type):
            # Autocast would keep a cast copy of every weight of the pass alive on the device.
            torch.clear_autocast_cache()
        # Protects the block's place from the next fetch into it.
        block.drained = self.streams.record(COMPUTE)

    def _put_back(self, block: Block) -> None:
        for pointer in block.pointers:
            if pointer.put_back(is_written=pointer.weight in self.written):
                self.written.add(pointer.weight)
            for home in pointer.alias.homes:
                theirs = home.registry.get(home.key)
                if theirs is pointer.tensor and pointer.is_idle:
                    continue
                if theirs is not None and self.window.holds(theirs):
                    # The forward made a part of the weight the weight: it must outlive the place.
                    theirs.data = same_layout_copy(theirs.detach())
        # What the block wrote itself is in its place as well: no reason to fetch it again.
        block.versions = block.present_versions()
        self._is_shown = False

    def follow_stream(self) -> None:
        """Orders the present compute stream after the one used before, if it is another.

        Protects every place: drained is recorded on one stream and speaks for all before it.
        """
        now = self.streams.compute_stream()
        if now is not self._stream:
            self.streams.join(self._stream)
            self._stream = now

    # ---- fetches ----------------------------------------------------------------------------

    def _fetch_ahead(self) -> None:
        current = self.current
        index = current.index if current is not None and current.runs else None
        for other in self.plan.fetches_ahead(index, self.order.upcoming(), self._here):
            self._fetch(self.blocks[other])

    def _fetch(self, block: Block) -> None:
        for index in self.plan.overlaps[block.index] & self._occupied:
            other = self.blocks[index]
            assert other is not self.current or other is block, f"{other.name} is in use"
            if other.drained is not None:
                # Protects the bytes that kernels of `other`'s latest turn still read.
                self.streams.wait(FETCH, other.drained)
                other.drained = None
            self._occupied.discard(index)
            if other.state is not State.ON_HOST:
                self._evict(other)
        with label("fetch", block.name):
            self.streams.copy(block.runs)
        block.filled = self.streams.record(FETCH)
        block.versions = block.present_versions()
        block.state = State.FETCHING
        self._here.add(block.index)
        self._occupied.add(block.index)
        self.counters.fetches += 1
        self.counters.streamed_bytes += block.num_bytes
        self.counters.disk_bytes += block.disk_bytes

    def _wait_for_fetch(self, block: Block) -> None:
        if block.state is State.FETCHING:
            # Protects the turn from reading its place before the copy has landed.
            self.streams.wait(COMPUTE, block.filled)
            block.state = State.ON_DEVICE

    def distrust(self, weight: Weight) -> None:
        """Forgets device copies of `weight` made ahead of its turn: its host bytes are written."""
        for block in self.blocks:
            if weight in block.weights and block is not self.current:
                self._evict(block)

    def _evict(self, block: Block) -> None:
        """Gives the device copy up; weights are never copied back."""
        block.state = State.ON_HOST
        self._here.discard(block.index)

    # ---- passes -----------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Makes idle weights readable from the device and distrusts copies that may be stale."""
        self.follow_stream()
        self.order.begin_pass(mode=torch.is_grad_enabled())
        for index in list(self._here):
            if self._seen.get(index) != self._fingerprint(self.blocks[index]):
                self._evict(self.blocks[index])
        self.idle.show()
        self.counters.passes += 1

    def end_pass(self) -> None:
        """Back to idle: every weight's truth on the host, the start of the next pass on its way."""
        self._end_turn()
        self.current = None
        self.idle.hide()
        self._fetch_ahead()
        self._seen = {index: self._fingerprint(self.blocks[index]) for index in self._here}

    def reset(self) -> None:
        """Back to idle from anywhere, after an exception: nothing on the device is believed."""
        self.current, self.is_moving, self._is_called = None, False, False
        for block in self.blocks:
            self._put_back(block)
        self.idle.hide()
        self.follow_stream()
        # Protects whatever the failed pass still computes on, in every place.
        self.streams.wait(FETCH, self.streams.record(COMPUTE))
        for block in self.blocks:
            block.state, block.drained = State.ON_HOST, None
        self._here.clear()
        self._occupied.clear()

    def host_bytes(self, weight: Weight) -> torch.Tensor:
        """The bytes of `weight` (uint8) in host memory; read into it, if they are on disk."""
        return self._home[weight].bytes_of(weight)

    def _fingerprint(self, block: Block) -> object:
        return edits.fingerprint((w, self._home[w]) for w in block.weights if w in self._streamed)
