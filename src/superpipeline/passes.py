"""Where passes begin and end: one at a time, from any thread; back to idle after any failure."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from superpipeline.backward import guarded, run_refusing_backward
from superpipeline.calls import Entry
from superpipeline.discovery import Discovery
from superpipeline.engine import Block, Engine
from superpipeline.errors import ClosedError, UnsupportedError
from superpipeline.outputs import map_tensors, same_layout_copy
from superpipeline.sizes import format_bytes
from superpipeline.weights import Weight

if TYPE_CHECKING:
    from superpipeline.pipeline import Pipeline


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

    def run(
        self,
        entry: Entry,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A top-level call: calls from other threads wait until it has ended."""
        self._refuse_unsuitable()
        with self._lock:
            self.owner = threading.get_ident()
            try:
                entry = self._take_up_edits(entry)
                return self._run(entry, function, args, kwargs)
            finally:
                self.inside = None
                self.owner = None

    def _run(
        self,
        entry: Entry,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        turns = self.turns
        assert turns is not None
        try:
            turns.begin_pass()
            args, kwargs = self._bring_inputs((args, kwargs))
            discovery = self._discovery(entry, args, kwargs)
            with discovery or nullcontext():
                output = self.visit(entry, function, args, kwargs)
            turns.end_pass()
            if turns is self.pipeline.engine:
                self.pipeline.learn(discovery)
        except BaseException as error:
            self._fail(error)
            raise
        return output

    def visit(
        self,
        entry: Entry,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One call of a block's module; brings the enclosing block back when it is done."""
        block = entry.block
        entry.entered = True
        if block is None:
            return function(*args, **kwargs)
        turns, outer, was_active = self.turns, self.inside, entry.active
        assert turns is not None
        streams = turns is self.pipeline.engine
        if outer is not None and outer.runs and streams:
            # The enclosing block's place may be overwritten during this visit.
            args, kwargs = map_tensors(lambda tensor: self._keep(tensor, outer), (args, kwargs))
        self.inside, entry.active = block, True
        try:
            turns.take_turn(block)
            if not block.runs or not streams:
                return function(*args, **kwargs)
            return self._compute(block, function, args, kwargs)
        finally:
            entry.active = was_active
            self.inside = outer
            if outer is not None:
                turns.take_turn(outer)
            else:
                turns.end_call()

    def _compute(
        self,
        block: Block,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if not torch.is_grad_enabled():
            return map_tensors(lambda tensor: self._keep(tensor, block), function(*args, **kwargs))
        # What a block hands on as it got it is no business of the block's backward.
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        theirs = {None, *(tensor.grad_fn for tensor in inputs)}

        def guard(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if tensor.grad_fn in theirs else guarded(tensor, block.name)

        output = run_refusing_backward(
            lambda: function(*args, **kwargs), self.engine.window, block.name
        )
        return map_tensors(lambda tensor: guard(self._keep(guard(tensor), block)), output)

    def _keep(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        """`tensor` in memory of its own: a view of the window would change under its user."""
        if not self.engine.window.holds(tensor):
            return tensor
        for pointer in block.pointers:
            begin = pointer.here.data_ptr()
            if begin <= tensor.data_ptr() < begin + pointer.weight.num_bytes:
                self.exposed.add(pointer.weight)
        return same_layout_copy(tensor)

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

    def _discovery(
        self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Discovery | None:
        """A watch over this pass if none of its kind was seen before."""
        if self.turns is not self.pipeline.engine:
            return None
        module = entry.module()
        signature = (
            id(module), module is not None and module.training, torch.is_grad_enabled(),
            tuple(_kind(value) for value in args),
            frozenset((name, _kind(value)) for name, value in kwargs.items()),
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
            plan = engine.plan
            error.add_note(
                f"superpipeline: weights hold {format_bytes(plan.device_bytes)} of "
                f"{engine.streams.device}; "
                f"the rest was activations and caches. Give the weights less, for example "
                f"superpipeline.stream(model, weights={format_bytes(plan.device_bytes // 2)!r}), "
                f"or use a smaller batch"
            )

    def _refuse_fork(self) -> None:
        # The lock may be held, and the copying thread does not exist, in a forked process.
        if os.getpid() != self._process:
            raise UnsupportedError(
                "a streamed model cannot be used in a forked process; load the model and stream "
                "it there, or start the process with the 'spawn' method"
            )

    def _refuse_unsuitable(self) -> None:
        self._refuse_fork()
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UnsupportedError(
                "torch.func transforms cannot run through a streamed model; call "
                "superpipeline.handle(model).close() first"
            )
        if torch._C._get_tracing_state() is not None:
            raise UnsupportedError("a streamed model cannot be traced; close() it first")

    # ---- words --------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """One line to standard error, unless quiet."""
        if not self.pipeline.options.quiet:
            sys.stderr.write(f"superpipeline: {text}\n")

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


def _kind(value: object) -> object:
    """What of an argument may lead a forward along another way: flags, and what is left out."""
    return value if value is None or isinstance(value, bool | str) else type(value)
