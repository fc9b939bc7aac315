"""The handle of one streamed model: builds it up, re-plans it, takes it down again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from superpipeline import explain as words
from superpipeline.build import Layout, lay_out
from superpipeline.calls import (
    Entry,
    HostLookup,
    Swaps,
    answers_device,
    entry_of,
    refuse_functional_call,
)
from superpipeline.discovery import Atlas, Discovery
from superpipeline.disk import locate
from superpipeline.edits import Watch
from superpipeline.engine import Engine
from superpipeline.errors import BudgetError, ClosedError
from superpipeline.host import check_host_memory, return_freed_memory
from superpipeline.options import Options, lies_otherwise
from superpipeline.pack import Pack, on_disk
from superpipeline.passes import Passes
from superpipeline.plan import Plan
from superpipeline.profile import link_rate
from superpipeline.sizes import parse_bytes
from superpipeline.standins import show_in_state_dicts
from superpipeline.streams import Streams
from superpipeline.trace import Counters, Stats
from superpipeline.verify import Reference, Verification, compare
from superpipeline.weights import outside_inference_mode
from superpipeline.window import Residents


class Pipeline:
    """What `superpipeline.handle(model)` returns.

    Attributes:
        engine: carries the plan out; None once closed.
        entries: by id of the module whose calls are seen.
    """

    def __init__(self, model: nn.Module, options: Options, streams: Streams) -> None:
        self._model = weakref.ref(model)
        self.options = options
        self.engine: Engine | None = None
        self.entries: dict[int, Entry] = {}
        self._pack: Pack
        self._counters = Counters()
        self._peak_bytes = 0
        self._streams = streams
        self._passes = Passes(self)
        self._uncalled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._stale = False
        self._closed = False
        self._original = {id(t): t.device for t in (*model.parameters(), *model.buffers())}
        layout = self._lay_out(model)
        plan = self._plan_for(layout)  # may raise, and nothing was changed so far
        try:
            self._set_up(model, layout, plan)
        except BaseException:
            self._abandon()
            raise
        self._passes.say(words.headline(self))

    # ---- what users read ----------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The streamed model.

        Raises:
            ClosedError: it no longer exists.
        """
        model = self._model()
        if model is None:
            raise ClosedError("the streamed model no longer exists")
        return model

    @property
    def plan(self) -> Plan:
        """What is resident, the places, and the order. `print(pipe.plan)` shows it."""
        return self._passes.engine.plan

    @property
    def link_rate(self) -> float:
        """Host-to-device bytes a second, measured once per device."""
        return link_rate(self.options.device)

    @property
    def host_bytes(self) -> int:
        """Host memory that holds the weights."""
        self._passes.engine  # noqa: B018  (raises when closed)
        return self._pack.num_bytes

    @property
    def disk_bytes(self) -> int:
        """Weights that stay on disk."""
        self._passes.engine  # noqa: B018  (raises when closed)
        return self._pack.disk_bytes

    @property
    def pinned(self) -> bool:
        """Whether the device copies from pinned host memory."""
        return self._pack.pinned

    def __repr__(self) -> str:
        return f"<Pipeline {words.headline(self)}>" if self.engine else "<Pipeline, closed>"

    def stats(self) -> Stats:
        """Counts since streaming began."""
        c = self._counters
        return Stats(
            c.passes, c.visits, c.fetches, c.streamed_bytes, c.late_fetches, self._peak_bytes,
            c.disk_bytes,
        )  # fmt: skip

    def explain(self) -> str:
        """What is resident, what streams, what overlaps and what it costs, in words and numbers."""
        return words.explain(self)

    def verify(self, *args: Any, **kwargs: Any) -> Verification:
        """Compares `model(*args, **kwargs)` bit for bit with the plain model's result.

        The plain model runs twice, then the streamed one; each gets its own copy of the inputs,
        the same random state and the same buffers. Where the plain model does not fit on the
        device, each block's weights are copied there for its visit and freed after it.

        Raises:
            VerificationError: a bit differs, or nothing was streamed.
        """
        return self.verify_call(self.model, *args, **kwargs)

    def verify_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Verification:
        """The same for any call that uses the model, such as `model.generate`."""
        with self._passes.exclusively():
            self.rebuild_if_changed()
        engine = self._passes.engine
        # A large buffer that no pass was seen to write is not copied; before the first, any may be.
        written = engine.plan.resident | self._layout.noted
        buffers = [
            alias.tensor
            for weight in self._layout.weights
            if weight.index in written or not self._counters.passes
            for alias in weight.aliases
            if alias.is_buffer
        ]
        return compare(call, (args, kwargs), self._run_plain, self._run_streamed, buffers)

    def close(self) -> None:
        """Makes the model the plain one again, its weights where they were before. Idempotent.

        Host memory stays as it is until the weights are freed; pinned memory is unpinned. Weights
        on disk show the file's bytes; those that a NaN stands in for are read into host memory.

        Raises:
            HostMemoryError: they do not fit there; nothing was changed.
        """
        if self._closed:
            return
        with self._passes.exclusively():
            needed = sum(weight.num_bytes for weight, _ in self._pack.stood_in())
            check_host_memory(needed, "closing the handle")
            self._take_down()
            self._pack.make_real()
            self._closed = True
            self._pack.unpin()
            self._streams.close()
        for weight in self._layout.weights:
            for alias in weight.aliases:
                device = self._original.get(id(alias.tensor), alias.tensor.device)
                if alias.tensor.device != device:
                    alias.tensor.data = alias.tensor.data.to(device)

    # ---- building up and taking down ------------------------------------------------------------

    def replan(self, options: Options) -> None:
        """Takes new options into effect; if they cannot work, raises and changes nothing."""
        with self._passes.exclusively():
            before, self.options = self.options, options
            try:
                layout = self._layout
                if lies_otherwise(options, before) or self._is_outdated():
                    layout = self._lay_out(self.model)
                plan = self._plan_for(layout)
            except BaseException:
                self.options = before
                raise
            self._peak_bytes = 0
            if layout is self._layout:
                self._change_plan(plan)
            else:
                self._take_down()
                self._set_up(self.model, layout, plan)
        self._passes.say(words.headline(self))

    def rebuild_if_changed(self) -> bool:
        """Packs anew when the user replaced, added or removed tensors. Called as a pass begins."""
        if self._closed:
            raise ClosedError("this handle was closed; call superpipeline.stream(model, ...) again")
        if not self._is_outdated():
            return False
        refuse_functional_call()
        model = self.model
        layout = self._lay_out(model)
        plan = self._plan_for(layout)  # may raise, and nothing was changed so far
        self._take_down()
        self._set_up(model, layout, plan)
        return True

    @property
    def _is_set_up(self) -> bool:
        return "_residents" in vars(self)

    def _lay_out(self, model: nn.Module) -> Layout:
        options = self.options
        where = self._pack.where(self._residents) if self._is_set_up else locate
        return lay_out(model, options.device, options.k_prime, self._uncalled, where)

    def _is_outdated(self) -> bool:
        """Whether the layout no longer describes the model, or a change of plan was cut short."""
        return self.engine is None or self._stale or self._watch.changed(self.model)

    def discovery(self) -> Discovery:
        """A watch for one pass of a new kind."""
        rows = [self._layout.weights[index] for index in self._layout.rows]
        return Discovery(self._passes.engine, self._atlas, rows)

    def learn(self, discovery: Discovery | None) -> None:
        """Plans anew if a pass showed something that the plan did not know."""
        engine = self._passes.engine
        layout = self._layout
        changed = layout.note_better_resident(engine.written | self._passes.exposed)
        if discovery is not None:
            self._note_uncalled(discovery)
            changed |= layout.note_rewritten(discovery.rewritten)
            changed |= layout.note_reads(discovery.touched)
            changed |= layout.note_order(engine.order.trace)
        if changed and not self._is_outdated():
            self._change_plan(self._plan_for(layout))

    def _note_uncalled(self, discovery: Discovery) -> None:
        """A block whose module is passed over, though modules inside it are called, is cut up."""
        for block in self._layout.blocks:
            for root in block.live_roots():
                entry = self.entries.get(id(root))
                inside = {id(child) for child in root.modules()} - {id(root)}
                if entry is not None and not entry.entered and inside & discovery.called:
                    self._uncalled.add(root)
                    self._stale = True

    def _plan_for(self, layout: Layout) -> Plan:
        """The plan for what is known; what had better be resident is, if the bound allows."""
        try:
            return self._plan_with(layout)
        except BudgetError:
            # What the device cannot read where it is has to reside.
            unreadable = self._pack.unreadable if self._is_set_up else frozenset[int]()
            if not layout.give_up_wishes(unreadable):
                raise
            return self._plan_with(layout)

    def _plan_with(self, layout: Layout) -> Plan:
        work = layout.workload()
        if self.options.k is not None:
            return words.checked_overlap(self, layout.plan_for_k(work, self.options))
        bound = parse_bytes(self.options.weights or 0, work.weight_bytes)
        return words.checked_overlap(self, layout.plan_for_bound(work, bound))

    @outside_inference_mode()
    def _set_up(self, model: nn.Module, layout: Layout, plan: Plan) -> None:
        self._layout = layout
        device = self.options.device
        stays = on_disk(layout, plan, device, self.options.host_memory)
        self._pack = Pack(layout, device, self._pack if self._is_set_up else None, stays)
        if layout.drop_unreadable_rows(self._pack.unreadable):
            plan = self._plan_for(layout)
        self._stale = False
        self._passes.forget_signatures()
        self._install(plan)
        self._swap(model)
        self._hooks = show_in_state_dicts(model, self._pack.stood_in())
        self._watch = Watch(model, layout.weights, plan.resident, device)
        return_freed_memory()

    def _install(self, plan: Plan) -> None:
        layout = self._layout
        residents = [layout.weights[index] for index in sorted(plan.resident)]
        self._residents = Residents(residents, self._pack.home, self._streams)
        self.engine = Engine(
            plan, layout.blocks, self._pack.home, self._streams, self._counters, layout.written
        )
        far = [w for w in residents if w.index in self._pack.unreadable]
        self._atlas = Atlas(self._pack.home, far)
        self._passes.turns = self.engine
        self._peak_bytes = max(self._peak_bytes, plan.device_bytes)

    @outside_inference_mode()
    def _change_plan(self, plan: Plan) -> None:
        engine = self._passes.engine
        if (plan.resident, plan.slots) == (engine.plan.resident, engine.plan.slots):
            engine.reset()  # who calls stream() again may have edited weights unseen
            engine.plan = plan
            engine.order.follow(plan.circle)
            return
        self._release_device()
        self._install(plan)
        self._watch = Watch(self.model, self._layout.weights, plan.resident, self.options.device)

    @outside_inference_mode()
    def _release_device(self) -> None:
        """Frees the window and the residents; afterwards every weight is a host tensor."""
        if self.engine is not None:
            self.engine.follow_stream()  # the last pass may have run on another stream
        self._streams.synchronize()
        self.engine = self._passes.turns = None
        self._residents.give_back()
        for block in self._layout.blocks:
            block.forget_place()

    @outside_inference_mode()
    def _abandon(self) -> None:
        """Undoes as much of a set-up as was done when it failed."""
        if "_swaps" in vars(self):
            self._swaps.undo()
        if "_residents" in vars(self):
            self._residents.give_back()
        if "_pack" in vars(self):
            self._pack.unpin()
        self.engine, self._closed = None, True
        self._streams.close()

    def _take_down(self) -> None:
        # The engine is idle here. To re-point its tensors would lose what the user put there.
        self._release_device()
        self._swaps.undo()
        for hook in self._hooks:
            hook.remove()
        self.entries.clear()

    def _swap(self, model: nn.Module) -> None:
        self._swaps = Swaps(self.options.device)
        for module, block in self._layout.callable_modules():
            self.entries[id(module)] = Entry(module, self._passes, block)
        unreadable = self._pack.unreadable if self._on_gpu else frozenset[int]()
        for table, index in self._layout.tables():
            if index in unreadable:
                self.entries[id(table)] = HostLookup(table, self._passes, None)
        for module in [*model.modules()]:
            entry = self.entries.get(id(module))
            if entry is not None or answers_device(type(module)):
                self._swaps.swap(module, entry)
        if entry_of(model) is None:
            self.entries[id(model)] = Entry(model, self._passes, None)
            self._swaps.swap(model, self.entries[id(model)])
        self._layout.forget_modules()

    # ---- verify -------------------------------------------------------------------------------

    def _run_plain(self, call: Callable[[], Any]) -> Any:
        engine = self._passes.engine
        streamed = sum(block.num_bytes for block in engine.blocks)
        free = torch.cuda.mem_get_info(engine.streams.device)[0] if self._on_gpu else streamed
        self._passes.turns = Reference(engine, fits=streamed < free * 3 // 4)
        try:
            return call()
        finally:
            self._passes.turns = engine

    def _run_streamed(self, call: Callable[[], Any]) -> tuple[Any, int]:
        # From cold, so that a plan which streams at all does so in this call.
        self._passes.engine.reset()
        before = self._counters.streamed_bytes
        result = call()
        return result, self._counters.streamed_bytes - before

    @property
    def _on_gpu(self) -> bool:
        return self.options.device.type != "cpu"
