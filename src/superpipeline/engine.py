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

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

import torch

from superpipeline import edits
from superpipeline.casts import Casts
from superpipeline.gradients import leaving
from superpipeline.ondisk import Keeper, shown
from superpipeline.order import Order, Phase
from superpipeline.outputs import same_layout_copy
from superpipeline.paged import ReadAhead
from superpipeline.plan import Plan
from superpipeline.pointers import Idle, Pointer
from superpipeline.states import Block, State
from superpipeline.stopwatch import Stopwatch
from superpipeline.streams import COMPUTE, FETCH, Streams
from superpipeline.trace import Counters, label
from superpipeline.weights import Weight
from superpipeline.window import Window


class Engine:
    """Blocks, a window and the streams, doing what the plan says.

    Attributes:
        current: the block whose turn it is.
        written: streamed weights that a forward writes; they had better be resident.
        idle: what is not in its turn.
        casts: autocast's copies of the weights.
        awaits_backward: whether a backward may come for the forward that ends now; until then a
            parameter keeps the device it had in the graph.
        gradients: what takes gradients to the host; None where they are there.
        before_fetch: called with a block before its host bytes are read.
        stopwatch: times the turns of this pass, if it is to be timed.
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
        self._shown_files = shown(k for w, k in home.items() if w.index not in plan.resident)
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
        self._read_ahead = ReadAhead([block.runs for block in blocks])
        self.idle = Idle(home, plan.resident)
        self.casts = self._make_casts()
        self.is_moving = self._is_shown = self._is_called = False
        self._settled_at: int | None = None
        self._in_backward = self._expects_backward = self.awaits_backward = False
        most = 2 * max((block.num_bytes for block in blocks), default=0)
        streamed = (w for w in home if w.index not in plan.resident)
        self.gradients = leaving(streamed, streams, counters, most)
        self.before_fetch: Callable[[Block], None] = lambda _: None
        self.stopwatch: Stopwatch | None = None
        # The window's memory may still be read by kernels of whoever had it before.
        streams.wait(FETCH, streams.record(COMPUTE))

    def _make_casts(self) -> Casts:
        pointers = [pointer for block in self.blocks for pointer in block.pointers]
        weights = {id(alias.tensor): weight for weight in self._home for alias in weight.aliases}
        return Casts(self.window, pointers, weights)

    def _give_place(self, block: Block) -> None:
        home = self._home
        streamed = [w for w in block.weights if w.index not in self.plan.resident]
        block.state, block.filled, block.drained = State.ON_HOST, None, None
        block.runs = self.window.runs(block.index, streamed, home)
        block.num_bytes = sum(run.destination.numel() for run in block.runs)
        from_disk = (run for run in block.runs if not isinstance(run.source, torch.Tensor))
        block.disk_bytes = sum(run.destination.numel() for run in from_disk)
        view = self.window.view
        block.pointers = [
            Pointer(alias, weight, view(alias, weight, block.index, home[weight]), home[weight])
            for weight in streamed
            for alias in weight.aliases
        ]

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
            self._change_turn(block)
            if block is not None and block.runs:
                self._show(block)
        if block is not None and torch.is_grad_enabled():
            self.casts.show(block.pointers)
        self.is_moving = False

    def bring(self, block: Block) -> None:
        """The same for a backward: the bytes are in place, where saved views show them.

        The tensors themselves go on showing the host's bytes: what computes with them outside of a
        module's call (a part of the block that is checkpointed) may keep views for longer than the
        turn lasts, and of the host's bytes a view stays right.
        """
        if block is self.current and block.versions == block.present_versions():
            return
        self.is_moving = True
        self._change_turn(block)
        self.is_moving = False

    def _change_turn(self, block: Block | None) -> None:
        self._end_turn()
        self.current = block
        if block is not None:
            self._begin_turn(block)

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
        if block.runs:
            self._have(block)
        else:
            self._fetch_ahead()
        if self.stopwatch is not None:
            self.stopwatch.begin_turn(block.index)

    def _have(self, block: Block) -> None:
        """Fetches the block if it is not on its way, and orders the turn after its arrival."""
        if block.state is State.ON_HOST or block.versions != block.present_versions():
            # Not foreseen, or another module's forward wrote the weights after they were fetched.
            # Pages that are brought in at once cost no wait worth the name.
            self.counters.late_fetches += not self.plan.workload.in_place
            self._fetch(block)
        self._fetch_ahead()
        self._wait_for_fetch(block)

    def _end_turn(self) -> None:
        self.follow_stream()
        if self.stopwatch is not None:
            self.stopwatch.end_turn()
        block = self.current
        if block is None or not block.runs:
            return
        if self._is_shown:
            self._put_back(block)
        self.casts.hide(block.pointers)
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
        if index is None and self._settled_at == self.order.changes:
            return  # all that can be fetched was: since then only residents had a turn
        for other in self.plan.fetches_ahead(index, self.order.upcoming(), self._here):
            self._fetch(self.blocks[other])
        self._read_ahead.look(self.order.upcoming())
        self._settled_at = self.order.changes if index is None else None

    def _fetch(self, block: Block) -> None:
        for index in self.plan.overlaps[block.index] & self._occupied:
            other = self.blocks[index]
            assert other is not self.current or other is block, f"{other.name} is in use"
            if other.drained is not None:
                # Protects the bytes that kernels of `other`'s latest turn still read.
                self.streams.wait(FETCH, other.drained)
                other.drained = None
            self._occupied.discard(index)
            self.streams.vacate(other.runs)
            if other.state is not State.ON_HOST:
                self._evict(other)
        # The host bytes may be those of an update that is still under way.
        self.before_fetch(block)
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
        self.counters.backward_streamed_bytes += block.num_bytes if self._in_backward else 0

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

    def distrust_tensors(self, ids: AbstractSet[int]) -> None:
        """The same for parameters, by id, between passes."""
        for index in list(self._here):
            if any(id(pointer.tensor) in ids for pointer in self.blocks[index].pointers):
                self._evict(self.blocks[index])

    def _evict(self, block: Block) -> None:
        """Gives the device copy up; weights are never copied back."""
        block.state = State.ON_HOST
        self._settled_at = None
        self._here.discard(block.index)

    # ---- passes -----------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Makes idle weights readable from the device and distrusts copies that may be stale."""
        for piece in self._shown_files:  # whoever looks at a file that was cut ends the process
            piece.file.check_unchanged(piece.offset)
        self.order.begin_pass(Phase.GRAD if torch.is_grad_enabled() else Phase.NO_GRAD)
        self._distrust_edited()
        self.idle.show()
        self.counters.passes += 1

    def _distrust_edited(self) -> None:
        for index in list(self._here):
            if self._seen.get(index) != self._fingerprint(self.blocks[index]):
                self._evict(self.blocks[index])

    def end_pass(self) -> None:
        """Back to idle: every weight's truth on the host, what comes next on its way."""
        self.window.check_unchanged()
        self._end_turn()
        self.current = None
        if not self.awaits_backward:
            self.idle.hide()
        if torch.is_grad_enabled():
            if self._expects_backward:
                self.order.turn_back()
            self._expects_backward = False
        self._fetch_ahead()
        self._note_seen()
        if self.stopwatch is not None:
            self.stopwatch.end_pass()
            self.stopwatch = None

    def _note_seen(self) -> None:
        self._seen = {index: self._fingerprint(self.blocks[index]) for index in self._here}

    def begin_backward(self, *, nested: bool) -> None:
        """Like `begin_pass`; a nested one runs within a forward, which goes on afterwards."""
        self._in_backward = True
        self.order.turn_back()
        if not nested:
            self._distrust_edited()
            self.idle.show()
        if self.gradients is not None:
            self.gradients.begin()

    def end_backward(self, *, nested: bool) -> None:
        """Back to idle. Nothing is fetched ahead: most likely an optimizer changes the weights."""
        self.window.check_unchanged()
        self._end_turn()
        self.current = None
        self._in_backward = False
        if nested:
            self.order.go_on()
        else:
            self._expects_backward = True
            self.idle.hide()
            self._note_seen()
        if self.gradients is not None:
            self.gradients.end()

    def reset(self) -> None:
        """Back to idle from anywhere, after an exception: nothing on the device is believed."""
        self.current, self.is_moving, self._is_called = None, False, False
        self._in_backward, self.stopwatch = False, None
        for block in self.blocks:
            self._put_back(block)
        self.idle.hide()
        self.follow_stream()
        # Protects whatever the failed pass still computes on, in every place.
        self.streams.wait(FETCH, self.streams.record(COMPUTE))
        if self.gradients is not None:
            self.gradients.drop()
        for block in self.blocks:
            block.state, block.drained = State.ON_HOST, None
            self.streams.vacate(block.runs)
        self._here.clear()
        self._settled_at = None
        self._occupied.clear()

    def let_go(self) -> None:
        """Nobody will ask this engine for anything: the parameters are the user's alone."""
        self.idle.hide()
        if self.gradients is not None:
            self.gradients.close()

    def host_bytes(self, weight: Weight) -> torch.Tensor:
        """The bytes of `weight` (uint8) in host memory; read into it, if they are on disk."""
        return self._home[weight].bytes_of(weight)

    def _fingerprint(self, block: Block) -> object:
        return edits.fingerprint((w, self._home[w]) for w in block.weights if w in self._streamed)
