"""Where passes begin and end: one at a time, from any thread; back to idle after any failure."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from superpipeline import explain as words
from superpipeline.activations import Activations
from superpipeline.backward import Graph, WayBack
from superpipeline.calls import Entry, refuse_transforms
from superpipeline.discovery import Discovery, kind_of
from superpipeline.engine import Engine
from superpipeline.errors import ClosedError, UnsupportedError
from superpipeline.late import LateHooks
from superpipeline.notices import say
from superpipeline.outputs import map_tensors, same_layout_copy
from superpipeline.states import Block
from superpipeline.trace import Counters
from superpipeline.weights import Weight

if TYPE_CHECKING:
    from superpipeline.pipeline import Pipeline


Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Turns(Protocol):
    """What a pass needs of the engine, or of the reference that stands in for it in verify()."""

    def take_turn(self, block: Block | None) -> None: ...
    def end_call(self) -> None: ...
    def begin_pass(self) -> None: ...
    def end_pass(self) -> None: ...
    def reset(self) -> None: ...


class Passes:
    """Runs passes for one streamed model.

    Attributes:
        owner: the thread whose pass is running, or None.
        turns: who gives turns: the engine, except during verify().
        inside: the block of the innermost call that is running.
        exposed: weights of which a block returned a view; they have to become resident.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.owner: int | None = None
        self.exposed: set[Weight] = set()
        self.turns: Turns | None = None
        self.pipeline = pipeline
        self.inside: Block | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._signatures: set[object] = set()
        self._said: set[str] = set()
        self.back = WayBack(self)
        self.activations = Activations(self)
        self.late = LateHooks()
        self._is_nested = False
        self._at_ease: Counters | None = None  # counts visits of a pass in which nothing is fetched
        self._graph: weakref.ref[Graph] | None = None

    @property
    def engine(self) -> Engine:
        engine = self.pipeline.engine
        if engine is None:
            raise ClosedError("this model is no longer streamed; call superpipeline.stream again")
        return engine

    def forget_signatures(self) -> None:
        """The next pass discovers again, whatever it looks like."""
        self._signatures.clear()

    def exclusively(self) -> AbstractContextManager[Any]:
        """Keeps passes of other threads out; not to be entered from within a pass."""
        self._refuse_fork()
        if self.owner == threading.get_ident():
            raise UnsupportedError("this cannot be done from within a forward of the model")
        return self._lock

    # ---- one pass -----------------------------------------------------------------------------

    def run(self, entry: Entry, function: Function, args: Args, kwargs: Kwargs) -> Any:
        """A top-level call: calls from other threads wait until it has ended."""
        self._refuse_fork()
        refuse_transforms()
        with self._lock:
            self.owner = threading.get_ident()
            try:
                entry = self._take_up_edits(entry)
                return self._run(entry, function, args, kwargs)
            finally:
                self.inside = self._at_ease = None
                self._rest()
                self.owner = None

    def _rest(self) -> None:
        """Masters show again, unless a backward may come for the copies."""
        if not self.graph_lives or sys.exc_info()[0] is not None:
            self.pipeline.masters.hide()

    def _end(self, turns: Turns) -> None:
        if turns is self.pipeline.engine:
            self.engine.awaits_backward = self.graph_lives
        turns.end_pass()

    def _look_after_gradients(self, output: Any) -> None:
        masters = self.pipeline.masters
        masters.refuse_written()
        leave = (engine := self.pipeline.engine) is not None and engine.gradients is not None
        if torch.is_grad_enabled() and (leave or masters.parameters):
            self.back.watch_pass(output, self.present_graph())

    def _run(self, entry: Entry, function: Function, args: Args, kwargs: Kwargs) -> Any:
        turns, engine = self.turns, self.pipeline.engine
        assert turns is not None
        try:
            turns.begin_pass()
            args, kwargs = self._bring_inputs((args, kwargs))
            discovery = self._discovery(entry, args, kwargs)
            if discovery is None and engine is not None and turns is engine:
                self._at_ease = None if engine.plan.places else engine.counters
            with discovery or nullcontext():
                output = self.visit(entry, function, args, kwargs)
            self._look_after_gradients(output)
            self._end(turns)
            if turns is engine:
                self.pipeline.learn(discovery)
        except BaseException as error:
            self._fail(error)
            raise
        return output

    def visit(self, entry: Entry, function: Function, args: Args, kwargs: Kwargs) -> Any:
        """One call of a block's module; brings the enclosing block back when it is done."""
        block = entry.block
        entry.entered = True
        if block is None:
            return function(*args, **kwargs)
        if self._at_ease is not None and not torch.is_grad_enabled():
            return self._pass_by(entry, self._at_ease, function, args, kwargs)
        outer, streams = self.inside, self.turns is self.pipeline.engine
        if outer is not None and outer.runs and streams:
            # The enclosing block's place may be overwritten during this visit.
            args, kwargs = map_tensors(lambda tensor: self._keep(tensor, outer), (args, kwargs))
        if streams and torch.is_grad_enabled():
            visit = partial(self._visit, entry, block, function)
            return self.activations.visit(entry, visit, args, kwargs)
        return self._visit(entry, block, function, *args, **kwargs)

    @staticmethod
    def _pass_by(
        entry: Entry, counters: Counters, function: Function, args: Args, kwargs: Kwargs
    ) -> Any:
        """A call in a pass in which nothing is fetched (a module's own forward comes here too)."""
        if entry.active:
            return function(*args, **kwargs)
        entry.active = True
        counters.visits += 1
        try:
            return function(*args, **kwargs)
        finally:
            entry.active = False

    def _visit(
        self, entry: Entry, block: Block, function: Function, /, *args: Any, **kwargs: Any
    ) -> Any:
        turns, outer, was_active = self.turns, self.inside, entry.active
        assert turns is not None
        self.inside, entry.active = block, True
        try:
            turns.take_turn(block)
            if turns is not self.pipeline.engine or not self._has_a_say(block):
                return function(*args, **kwargs)
            return self._compute(block, function, args, kwargs)
        finally:
            entry.active = was_active
            self.inside = outer
            if outer is not None:
                turns.take_turn(outer)
            else:
                turns.end_call()

    def go_on(
        self,
        block: Block | None,
        function: Function,
        args: Args,
        kwargs: Kwargs,
    ) -> Any:
        """A call within the visit of the same block, or of a container."""
        streams = block is not None and block.runs and self.turns is self.pipeline.engine
        if not streams or not torch.is_grad_enabled() or not self.back.is_covered:
            return function(*args, **kwargs)
        assert block is not None
        return self.back.run_saving(
            lambda: function(*args, **kwargs), block, self.engine, self.present_graph()
        )

    def _has_a_say(self, block: Block) -> bool:
        """Whether there is anything to see to in a call of `block`: not if it is resident."""
        return bool(block.runs) or (torch.is_grad_enabled() and self.activations.offloads)

    def _compute(
        self,
        block: Block,
        function: Function,
        args: Args,
        kwargs: Kwargs,
    ) -> Any:
        if not torch.is_grad_enabled():
            with self.engine.casts.uncached():
                output = function(*args, **kwargs)
            return map_tensors(lambda tensor: self._keep(tensor, block), output)
        engine, graph = self.engine, self.present_graph()
        with self.activations.keeping(block) as keep:
            output = self.back.run_saving(
                lambda: function(*args, **kwargs), block, engine, graph, keep
            )
        if block.runs:
            self.back.watch(output, (args, kwargs), block, engine)
        return map_tensors(lambda tensor: self._keep(tensor, block), output)

    def present_graph(self) -> Graph:
        """What everything that is saved now holds on to."""
        graph = None if self._graph is None else self._graph()
        if graph is None:
            graph = Graph()
            self._graph = weakref.ref(graph, self._on_graph_gone)
        return graph

    def _on_graph_gone(self, _: object) -> None:
        """Nobody will ask for a backward of what a pass has saved."""
        self.rest()

    def rest(self) -> None:
        """Masters show, for whoever reads weights now; not while a pass or a backward runs."""
        masters, engine = self.pipeline.masters, self.pipeline.engine
        if not masters.is_shown or not self._lock.acquire(blocking=False):
            return
        try:
            if engine is not None:
                engine.idle.hide()
            masters.hide()
        finally:
            self._lock.release()

    @property
    def graph_lives(self) -> bool:
        """Whether anything that a forward saved may still be needed by a backward."""
        return self._graph is not None and self._graph() is not None

    def _keep(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """`tensor` in memory of its own: a view of the window would change under its user."""
        if not self.engine.window.holds(tensor):
            return tensor
        for pointer in block.pointers:
            begin = pointer.here.data_ptr()
            if begin <= tensor.data_ptr() < begin + pointer.weight.num_bytes:
                self.exposed.add(pointer.weight)
        return same_layout_copy(tensor)

    # ---- backwards ----------------------------------------------------------------------------

    def enter_backward(self, thread: int) -> None:
        """Keeps passes of other threads out; a pass of `thread` is what the backward is part of.

        `thread` ran the forward. On a GPU this runs on autograd's thread, and `thread` waits.
        """
        self._is_nested = self.owner is not None and self.owner in {thread, threading.get_ident()}
        if not self._is_nested:
            self._lock.acquire()
            self.pipeline.show_copies()
        self.pipeline.masters.begin_backward()
        self._put_hooks_off()
        self.engine.begin_backward(nested=self._is_nested)

    def _put_hooks_off(self) -> None:
        gradients, masters = self.engine.gradients, self.pipeline.masters.parameters
        if gradients is not None:
            self.late.put_off([*gradients.parameters, *masters], gradients.is_own)
        elif masters:
            self.late.put_off(masters, lambda _: False)

    def leave_backward(self, *, failed: bool) -> None:
        """Back to idle, or to the forward that the backward was part of."""
        engine, masters = self.pipeline.engine, self.pipeline.masters
        try:
            if engine is not None and failed:
                engine.reset()
                masters.drop()
                self.late.drop()
            elif engine is not None:
                engine.end_backward(nested=self._is_nested)
                if not self._is_nested:
                    self.pipeline.learn_training()
                masters.end_backward(nested=self._is_nested)
        finally:
            if not self._is_nested:
                self._lock.release()
        if self._is_nested and engine is not None:
            engine.take_turn(self.inside)
        self.late.run()

    def look(self, block: Block, engine: Engine, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor`, which lies in the place of `block`."""
        with self.apart():
            engine.take_turn(block)
            return same_layout_copy(tensor)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """For a turn that belongs to no pass and to no backward."""
        engine = self.engine
        with self.exclusively():
            self.owner = threading.get_ident()
            engine.begin_backward(nested=False)
            try:
                yield
            finally:
                self.owner = None
                engine.end_backward(nested=False)

    # ---- its ends -----------------------------------------------------------------------------

    def _take_up_edits(self, entry: Entry) -> Entry:
        """Rebuilds if the user changed the model. Raises with everything as it was."""
        if self.turns is not self.pipeline.engine:
            return entry
        module = entry.module()
        if self.pipeline.rebuild_if_changed() and module is not None:
            entry = self.pipeline.entries.get(id(module), Entry(module, self, None))
        self.turns = self.engine
        return entry

    def _bring_inputs(self, inputs: Any) -> Any:
        """Inputs on another device are moved to the one that computes."""
        device = self.engine.streams.device
        if device.type == "cpu":
            return inputs

        def bring(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.device == device or tensor.is_meta else tensor.to(device)

        return map_tensors(bring, inputs)

    def _discovery(self, entry: Entry, args: Args, kwargs: Kwargs) -> Discovery | None:
        """A watch over this pass if none of its kind was seen before."""
        if self.turns is not self.pipeline.engine:
            return None
        module = entry.module()
        signature = (
            id(module), module is not None and module.training, torch.is_grad_enabled(),
            self.engine.casts.is_on,
            tuple(kind_of(value) for value in args),
            frozenset((name, kind_of(value)) for name, value in kwargs.items()),
        )  # fmt: skip
        if signature in self._signatures:
            return None
        self._signatures.add(signature)
        return self.pipeline.discovery()

    def _fail(self, error: BaseException) -> None:
        if self.turns is not None:
            self.turns.reset()
        self.forget_signatures()
        engine = self.pipeline.engine
        if isinstance(error, torch.OutOfMemoryError) and engine is not None:
            words.note_memory(error, engine.plan, engine.streams.device)

    def _refuse_fork(self) -> None:
        # The lock may be held, and the copying thread does not exist, in a forked process.
        if os.getpid() != self._process:
            raise UnsupportedError(
                "a streamed model cannot be used in a forked process; load the model and stream "
                "it there, or start the process with the 'spawn' method"
            )

    def say(self, text: str) -> None:
        """One line to standard error, unless quiet."""
        if not self.pipeline.options.quiet:
            say(text)

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)
