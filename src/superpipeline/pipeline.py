"""The handle of one streamed model: builds it up, re-plans it, takes it down again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from superpipeline import explain as words
from superpipeline.assembly import Assembly
from superpipeline.build import Layout, lay_out, most_block_bytes
from superpipeline.calls import Entry, refuse_functional_call
from superpipeline.discovery import Discovery
from superpipeline.engine import Engine
from superpipeline.errors import BudgetError, ClosedError
from superpipeline.host import check_host_memory
from superpipeline.masters import Masters
from superpipeline.optimizer import LazyOptimizer, Share, shares
from superpipeline.options import Options, lies_otherwise
from superpipeline.pack import Pack
from superpipeline.passes import Passes
from superpipeline.plan import Plan
from superpipeline.profile import link_rate
from superpipeline.sizes import parse_bytes
from superpipeline.streams import Streams
from superpipeline.trace import Counters, Stats
from superpipeline.updates import Updates
from superpipeline.verify import Verification, compare
from superpipeline.window import maps_files


class Pipeline:
    """What `superpipeline.handle(model)` returns.

    Attributes:
        assembly: the model taken apart.
        updates: of weights, that a lazy optimizer's step left pending.
        masters: of parameters that compute in another precision.
    """

    def __init__(self, model: nn.Module, options: Options, streams: Streams) -> None:
        self._model = weakref.ref(model)
        self.options = options
        self._counters = Counters()
        self._streams = streams
        self.updates = Updates()
        self.masters = Masters(
            model, options.param_dtype, options.grad_dtype, self.updates.stand_ins
        )
        self._passes = Passes(self)
        self.assembly = Assembly(self._passes, streams, self._counters, self.updates, self.masters)
        self._uncalled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._stale = self._is_news = False
        self._closed = False
        self._original = {id(t): t.device for t in (*model.parameters(), *model.buffers())}
        try:
            self.masters.show(model)
            layout = self._lay_out(model)
            self._set_up(model, layout, self._plan_for(layout))
        except BaseException:
            self._abandon()
            raise
        self.masters.hide()
        self._passes.say(words.headline(self))

    @property
    def engine(self) -> Engine | None:
        """Carries the plan out; None once closed."""
        return self.assembly.engine

    @property
    def entries(self) -> dict[int, Entry]:
        """By id of the module whose calls are seen."""
        return self.assembly.entries

    @property
    def _layout(self) -> Layout:
        return self.assembly.layout

    @property
    def _pack(self) -> Pack:
        return self.assembly.pack

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
        c, peak = self._counters, self.assembly.peak_bytes
        return Stats(
            c.passes, c.visits, c.fetches, c.streamed_bytes, c.late_fetches, peak,
            c.disk_bytes, c.backward_streamed_bytes, c.gradient_bytes_peak,
        )  # fmt: skip

    def explain(self) -> str:
        """What is resident, what streams, what overlaps and what it costs, in words and numbers."""
        return words.explain(self)

    @contextmanager
    def weights(self) -> Iterator[nn.Module]:
        """The model with the real values of its weights, whatever is under way.

        Between passes they are real anyway; within the block no update of them is pending.

        Example:
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
            >>> pipe = superpipeline.handle(superpipeline.stream(model, weights="50%", quiet=True))
            >>> with pipe.weights() as plain:
            ...     norm = plain[0].weight.norm()
        """
        with self.updates.none_pending():
            self._passes.rest()
            yield self.model

    def optimizer(self, optimizer: Optimizer, *, per_parameter: bool = False) -> LazyOptimizer:
        """`optimizer`, stepping block by block on a worker while the next forward runs, exactly.

        Use what it returns in its stead, also for schedulers and scalers. Between `step` and the
        next forward a weight whose update is pending shows NaN; read or write such weights inside
        `with pipe.weights():`. State dicts wait by themselves. Costs no memory to speak of.

        Args:
            optimizer: of those that torch has, any whose update of a parameter reads nothing of
                another parameter: not LBFGS.
            per_parameter: vouches for that of an optimizer of another kind.

        Raises:
            UnsupportedError: it is not known to update each parameter by itself.

        Example:
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(6)])
            >>> pipe = superpipeline.handle(superpipeline.stream(model, weights="50%", quiet=True))
            >>> optimizer = pipe.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
            >>> model(torch.ones(1, 64)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        self._passes.engine  # noqa: B018  (raises when closed)
        lazy = LazyOptimizer(optimizer, self, per_parameter=per_parameter)
        if not self.updates.are_used:
            self.assembly.guard_state_dicts(self.model)
        return lazy

    def shares(self) -> dict[int, Share]:
        """What of a step is to be made together, by id of the parameter."""
        self._passes.exclusively()  # not entered: a step within a forward is refused
        self._passes.rest()
        if self.masters.parameters:
            # Protects copies that are on their way to the device from the updates' new ones.
            self._streams.synchronize()
        return {} if self.engine is None else shares(self._layout, self.engine.plan)

    @property
    def in_backward(self) -> bool:
        """Whether a backward is under way."""
        return self._passes.back.is_running

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
            self.assembly.settle(self.model)
            self.masters.hide()
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
        plain, streamed = self.assembly.run_plain, self.assembly.run_streamed
        return compare(call, (args, kwargs), plain, streamed, buffers)

    def close(self) -> None:
        """Makes the model the plain one again, its weights where they were before. Idempotent.

        Host memory stays as it is until the weights are freed; pinned memory is unpinned. Weights
        on disk show the file's bytes; those that a NaN stands in for are read into host memory.

        Raises:
            HostMemoryError: they do not fit there; nothing was changed.
            UpdateError: a pending update had failed; all the same it is closed.
        """
        if self._closed:
            return
        with self._passes.exclusively():
            needed = sum(weight.num_bytes for weight, _ in self._pack.stood_in())
            check_host_memory(needed, "closing the handle")
            failed = self.updates.close()
            self.masters.show(self._model())
            if self.engine is not None:
                self.engine.casts.let_go()
            self.assembly.take_down()
            self._pack.make_real()
            self._closed = True
            self._pack.unpin()
            self.masters.release()
            self._passes.activations.close()
            self._streams.close()
        self.assembly.move_back(self._original)
        if failed is not None:
            raise failed

    # ---- building up and taking down ------------------------------------------------------------

    def replan(self, options: Options) -> None:
        """Takes new options into effect; if they cannot work, raises and changes nothing."""
        with self._passes.exclusively():
            self.assembly.settle(self.model)
            before, self.options = self.options, options
            try:
                layout = self._layout
                if self._lies_otherwise(before) or self._is_outdated():
                    layout = self._lay_out(self.model)
                plan = self._plan_for(layout)
            except BaseException:
                self.options = before
                self.masters.hide()
                raise
            self.assembly.peak_bytes = 0
            if layout is self._layout:
                self.assembly.change_plan(self.model, plan)
            else:
                self.assembly.take_down()
                self._set_up(self.model, layout, plan)
            self.masters.hide()
        self._passes.say(words.headline(self))

    def rebuild_if_changed(self) -> bool:
        """Packs anew when the user replaced, added or removed tensors. Called as a pass begins."""
        if self._closed:
            raise ClosedError("this handle was closed; call superpipeline.stream(model, ...) again")
        self.updates.begin_pass()
        self.masters.show(self.model)
        if not self._is_outdated():
            self._take_up_news()
            self.assembly.take_time(self.model)
            self.show_copies()
            return False
        refuse_functional_call()
        self.assembly.settle(self.model)
        model = self.model
        layout = self._lay_out(model)
        plan = self._plan_for(layout)  # may raise, and nothing was changed so far
        self.assembly.take_down()
        self._set_up(model, layout, plan)
        return True

    def show_copies(self) -> None:
        """Parameters show what computes; within a pass or a backward of the model."""
        self.assembly.show_copies(self.model)

    def _lies_otherwise(self, before: Options) -> bool:
        total = sum(weight.padded_bytes for weight in self._layout.weights)
        most = most_block_bytes(self.options.cutting_bound, total)
        return lies_otherwise(self.options, before) or most != self._layout.most_block_bytes

    def _lay_out(self, model: nn.Module) -> Layout:
        options = self.options
        layout = lay_out(
            model, options.device, options.k_prime, self._uncalled, self.assembly.where,
            options.cutting_bound,
        )  # fmt: skip
        layout.in_place = maps_files(self._streams)
        return layout

    def _set_up(self, model: nn.Module, layout: Layout, plan: Plan) -> None:
        self._stale = self._is_news = False
        host_memory = self.options.host_memory
        self.assembly.set_up(model, layout, plan, host_memory, lambda: self._plan_for(layout))

    def _abandon(self) -> None:
        self._closed = True
        self.assembly.abandon()
        self.masters.release()
        self._streams.close()

    def _is_outdated(self) -> bool:
        """Whether the layout no longer describes the model, or a change of plan was cut short."""
        stale = self._stale and not self._passes.graph_lives
        return stale or self.assembly.is_outdated(self.model)

    def discovery(self) -> Discovery:
        """A watch for one pass of a new kind."""
        self.assembly.settle(self.model)  # which weights it reads where is not known yet
        return self.assembly.discovery()

    def learn(self, discovery: Discovery | None) -> None:
        """Plans anew if a pass showed something that the plan did not know."""
        engine = self._passes.engine
        layout = self._layout
        changed = layout.note_better_resident(engine.written | self._passes.exposed)
        if discovery is not None:
            self.assembly.timing.drop()
            self._note_uncalled(discovery)
            changed |= layout.note_rewritten(discovery.rewritten)
            changed |= layout.note_reads(discovery.touched)
            changed |= layout.note_order(engine.order.trace)
        self._is_news |= changed
        self._take_up_news()

    def learn_training(self) -> None:
        """A backward has ended: what trains on the host must not reside on another device."""
        layout = self._layout
        self._is_news |= layout.note_trained() if self._on_gpu else layout.note_edits()
        self._take_up_news()

    def _take_up_news(self) -> None:
        """Plans anew what passes have shown, unless a backward may still need the present plan."""
        if self._is_news and not self._passes.graph_lives and not self._is_outdated():
            self.assembly.settle(self.model)
            self._is_news = False
            self.assembly.change_plan(self.model, self._plan_for(self._layout))

    def _note_uncalled(self, discovery: Discovery) -> None:
        """A block whose module is passed over, though modules inside it are called, is cut up."""
        for root in self.assembly.passed_over(discovery.called):
            self._uncalled.add(root)
            self._stale = True

    def _plan_for(self, layout: Layout) -> Plan:
        """The plan for what is known; what had better be resident is, if the bound allows."""
        try:
            return self._plan_with(layout)
        except BudgetError:
            # What the device cannot read where it is has to reside.
            if not layout.give_up_wishes(self.assembly.unreadable):
                raise
            return self._plan_with(layout)

    def _plan_with(self, layout: Layout) -> Plan:
        work = layout.workload()
        if self.options.k is not None:
            return words.checked_overlap(self, layout.plan_for_k(work, self.options))
        bound = parse_bytes(self.options.weights or 0, work.weight_bytes)
        return words.checked_overlap(self, layout.plan_for_bound(work, bound))

    @property
    def _on_gpu(self) -> bool:
        return self.options.device.type != "cpu"
