"""A model taken apart, and what was made of its parts: buffers, residents, an engine, new classes.

    Layout ── Pack ── Residents, Engine ── swapped classes, hooks ── Watch
              (host)  (device; made anew by a change of plan)

Set up and taken down between passes. `pipeline.py` decides when, and for which plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from superpipeline.build import Layout
from superpipeline.calls import Entry, HostLookup, Swaps, answers_device, entry_of
from superpipeline.discovery import Atlas, Discovery
from superpipeline.disk import locate
from superpipeline.edits import Watch
from superpipeline.engine import Engine
from superpipeline.host import return_freed_memory
from superpipeline.masters import Masters, before_reading
from superpipeline.optimizer import shares
from superpipeline.pack import Pack, on_disk
from superpipeline.passes import Passes
from superpipeline.plan import Plan
from superpipeline.planner import faster
from superpipeline.profile import link_rate
from superpipeline.sizes import Size
from superpipeline.standins import show_in_state_dicts
from superpipeline.states import Block
from superpipeline.stopwatch import Timing
from superpipeline.streams import Streams
from superpipeline.trace import Counters
from superpipeline.updates import Updates
from superpipeline.verify import Reference
from superpipeline.weights import Locate, outside_inference_mode
from superpipeline.window import Residents


class Assembly:
    """Of one streamed model.

    Attributes:
        engine: carries the plan out; None while there is none.
        entries: by id of the module whose calls are seen.
        peak_bytes: the most device bytes that weights took.
        timing: of the passes of this layout.
    """

    layout: Layout
    pack: Pack
    timing: Timing

    def __init__(
        self, passes: Passes, streams: Streams, counters: Counters, updates: Updates,
        masters: Masters,
    ) -> None:  # fmt: skip
        self._passes, self._streams, self._counters = passes, streams, counters
        self._updates, self._masters = updates, masters
        self.engine: Engine | None = None
        self.entries: dict[int, Entry] = {}
        self.peak_bytes = 0
        self._residents: Residents | None = None
        self._swaps = Swaps(streams.device)
        self._hooks: list[RemovableHandle] = []

    @property
    def where(self) -> Locate:
        """Says where tensors are on disk."""
        return locate if self._residents is None else self.pack.where(self._residents)

    @property
    def unreadable(self) -> frozenset[int]:
        """Weights that the device cannot read where they are kept."""
        return frozenset() if self._residents is None else self.pack.unreadable

    def is_outdated(self, model: nn.Module) -> bool:
        """Whether this no longer describes the model, or a change of plan was cut short."""
        return self.engine is None or self._watch.changed(model)

    def discovery(self) -> Discovery:
        """A watch for one pass of a new kind."""
        rows = [self.layout.weights[index] for index in self.layout.rows]
        return Discovery(self._passes.engine, self._atlas, rows)

    def passed_over(self, called: AbstractSet[int]) -> Iterator[nn.Module]:
        """Blocks' modules that were not called, though modules inside them were (by id)."""
        for block in self.layout.blocks:
            for root in block.live_roots():
                entry = self.entries.get(id(root))
                inside = {id(child) for child in root.modules()} - {id(root)}
                if entry is not None and not entry.entered and inside & called:
                    yield root

    # ---- what verify() compares ---------------------------------------------------------------

    def run_plain(self, call: Callable[[], Any]) -> Any:
        """`call` on the plain model's path: nothing is streamed."""
        engine = self._passes.engine
        streamed = sum(block.num_bytes for block in engine.blocks)
        on_gpu = self._streams.device.type != "cpu"
        free = torch.cuda.mem_get_info(engine.streams.device)[0] if on_gpu else streamed
        show = partial(self._masters.show, None)  # the pass before hid them again
        self._passes.turns = Reference(engine, show, fits=streamed < free * 3 // 4)
        try:
            return call()
        finally:
            self._passes.turns = engine

    def run_streamed(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """`call`, and how many bytes it streamed: from cold, so that any plan streams some."""
        self._passes.engine.reset()
        before = self._counters.streamed_bytes
        result = call()
        return result, self._counters.streamed_bytes - before

    # ---- what parameters show -----------------------------------------------------------------

    def show_copies(self, model: nn.Module) -> None:
        """What computes. What is read before its block's fetch, or perhaps is, is made anew."""
        self._masters.show(model)
        stale = self._masters.stale()
        if not stale or self.engine is None:
            return
        # Protects copies that are on their way to the device from new bytes under them.
        self._streams.synchronize()
        self.engine.distrust_tensors(stale)
        known = shares(self.layout, self.engine.plan)
        lazily = not torch.is_inference_mode_enabled() and self._passes.turns is self.engine
        self._masters.ready(
            tensor
            for tensor in self._masters.parameters
            if not (lazily and id(tensor) in known and known[id(tensor)].blocks)
        )

    def settle(self, model: nn.Module) -> None:
        """No update is pending any more, no copy stale."""
        self._updates.finish()
        self.show_copies(model)
        self._masters.ready(self._masters.parameters)

    # ---- up ---------------------------------------------------------------------------------

    @outside_inference_mode()
    def set_up(
        self, model: nn.Module, layout: Layout, plan: Plan, host_memory: Size | None,
        plan_anew: Callable[[], Plan],
    ) -> None:  # fmt: skip
        """Packs the weights for `plan`, or, where packing shows that it must change, another."""
        previous = None if self._residents is None else self.pack
        self.layout = layout
        self.timing = Timing(self._streams)
        device = self._streams.device
        stays = on_disk(layout, plan, device, host_memory)
        self.pack = Pack(layout, device, previous, stays)
        if layout.drop_unreadable_rows(self.pack.unreadable):
            plan = plan_anew()
        self._passes.forget_signatures()
        self._install(plan)
        self._swap(model)
        self._hooks = show_in_state_dicts(model, self.pack.stood_in())
        if self._updates.are_used:
            self.guard_state_dicts(model)
        if self._masters.parameters:
            self._hooks += before_reading(model, self._passes.rest)
        self._watch = self._make_watch(model, plan)
        return_freed_memory()

    def guard_state_dicts(self, model: nn.Module) -> None:
        """State dicts wait for pending updates from here on."""
        self._hooks += self._updates.guard_state_dicts(model)

    def _install(self, plan: Plan) -> None:
        layout = self.layout
        residents = [layout.weights[index] for index in sorted(plan.resident)]
        self._residents = Residents(residents, self.pack.home, self._streams)
        self.engine = Engine(
            plan, layout.blocks, self.pack.home, self._streams, self._counters, layout.written
        )
        self.engine.before_fetch = self._before_fetch
        if self.engine.gradients is not None:
            self.engine.gradients.adder = self._masters
        unreadable = self.pack.unreadable
        far = [weight for weight in residents if weight.index in unreadable]
        self._atlas = Atlas(self.pack.home, far)
        self.engine.casts.take_over(layout.cast_outside)
        self._passes.turns = self.engine
        self.peak_bytes = max(self.peak_bytes, plan.device_bytes)

    def _before_fetch(self, block: Block) -> None:
        self._updates.wait_for(block)
        self._masters.ready(pointer.tensor for pointer in block.pointers)

    def _swap(self, model: nn.Module) -> None:
        self._swaps = Swaps(self._streams.device)
        for module, block in self.layout.callable_modules():
            self.entries[id(module)] = Entry(module, self._passes, block)
        on_gpu = self._streams.device.type != "cpu"
        unreadable = self.pack.unreadable if on_gpu else frozenset[int]()
        for table, index in self.layout.tables():
            if index in unreadable:
                self.entries[id(table)] = HostLookup(table, self._passes, None)
        for module in [*model.modules()]:
            entry = self.entries.get(id(module))
            if entry is not None or answers_device(type(module)):
                self._swaps.swap(module, entry)
        if entry_of(model) is None:
            self.entries[id(model)] = Entry(model, self._passes, None)
            self._swaps.swap(model, self.entries[id(model)])
        self.layout.forget_modules()

    def _make_watch(self, model: nn.Module, plan: Plan) -> Watch:
        weights, device = self.layout.weights, self._streams.device
        return Watch(model, weights, plan.resident, device, self._updates.stand_ins)

    def take_time(self, model: nn.Module) -> None:
        """Plans anew if a timed pass shows a faster plan; has the next timed if it is its turn."""
        engine, is_idle = self._passes.engine, not self._passes.graph_lives
        if not self._streams.keeps_time or torch.is_grad_enabled() or not is_idle:
            return
        if (times := self.timing.times()) is not None:
            self.layout.note_times(times, link_rate(self._streams.device))
            plan = faster(engine.plan, self.layout.workload())
            if plan is not None:
                self.change_plan(model, plan)
        self._passes.engine.stopwatch = self.timing.begin_pass()

    # ---- another plan, and down ---------------------------------------------------------------

    @outside_inference_mode()
    def change_plan(self, model: nn.Module, plan: Plan) -> None:
        """Another plan for the same layout: what is packed stays."""
        engine = self._passes.engine
        if (plan.resident, plan.slots) == (engine.plan.resident, engine.plan.slots):
            engine.reset()  # who calls stream() again may have edited weights unseen
            engine.plan = plan
            engine.order.follow(plan.circle)
            return
        self._release_device()
        self._install(plan)
        self._watch = self._make_watch(model, plan)

    @outside_inference_mode()
    def _release_device(self) -> None:
        """Frees the window and the residents; afterwards every weight is a host tensor."""
        if self.engine is not None:
            self.engine.follow_stream()  # the last pass may have run on another stream
            self.engine.let_go()
        self._streams.synchronize()
        self.engine = self._passes.turns = None
        assert self._residents is not None
        self._residents.give_back()
        for block in self.layout.blocks:
            block.forget_place()
        self._streams.give_back()

    def take_down(self) -> None:
        """The engine is idle. To re-point its tensors would lose what the user put there."""
        self._release_device()
        self._swaps.undo()
        for hook in self._hooks:
            hook.remove()
        self.entries.clear()

    def move_back(self, devices: Mapping[int, torch.device]) -> None:
        """Moves each tensor, by id, to the device where it was at first."""
        for weight in self.layout.weights:
            for alias in weight.aliases:
                device = devices.get(id(alias.tensor), alias.tensor.device)
                if alias.tensor.device != device:
                    alias.tensor.data = alias.tensor.data.to(device)

    @outside_inference_mode()
    def abandon(self) -> None:
        """Undoes as much of a set-up as was done when it failed."""
        self._swaps.undo()
        if self._residents is not None:
            self._residents.give_back()
        if "pack" in vars(self):
            self.pack.unpin()
        self.engine = None
