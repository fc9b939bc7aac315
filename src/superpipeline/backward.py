"""The way back: what a forward saved in the window is right again when a backward reads it.

Places are fixed, so a view that autograd saved needs only its block's bytes, not another address.
Four doors lead from a backward to a block's weights, and each gives the block its turn first:

    tensors that autograd saved in the window     saved-tensor hooks, entered for the block's call
    a recomputation (activation checkpointing)    the call of the block's module, as in a forward
    whatever a block's first node reads           a hook on the block's outputs
    weights that a custom function keeps on ctx   a hook on each node that is written in Python

[Note: a backward is a pass of its own]
    It begins with the first turn that a graph's nodes ask for and ends with the graph's callback,
    or when the callback is dropped uncalled because a node raised. Meanwhile passes of other
    threads wait. On a GPU nodes run on a thread of autograd, so the calling thread says nothing:
    who runs inside a graph task belongs to the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from superpipeline.casts import Cast
from superpipeline.engine import Engine
from superpipeline.errors import BackwardError
from superpipeline.saved import Kept, Packed, Way
from superpipeline.states import Block

if TYPE_CHECKING:
    from superpipeline.passes import Passes

Keep = Callable[[torch.Tensor], Any]
Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

_IGNORE_TRACING = (True,)  # the only argument; Dynamo never traces this


class Graph:
    """Lives as long as anything that a pass saved: a plan is changed only when none does.

    Attributes:
        thread: which ran the forward.
    """

    __slots__ = ("__weakref__", "thread")

    def __init__(self) -> None:
        self.thread = get_ident()


class Saved(Packed):
    """Stands in autograd's graph for a tensor that lay in the window.

    It is detached: a parameter that is saved itself will be pointed elsewhere.
    """

    __slots__ = ("block", "engine", "graph", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, block: Block, engine: Engine, graph: Graph) -> None:
        self.tensor = tensor.detach()
        self.version = tensor._version
        self.block = block
        self.engine = engine
        self.graph = graph

    def unpack(self, way: Way) -> torch.Tensor:
        self.check()
        return way.read(self)

    def check(self) -> None:
        """Raises what PyTorch would raise for a tensor that was written after it was saved."""
        if self.tensor._version != self.version:
            raise BackwardError(
                f"a weight of {self.block.name} needed for the backward has been modified by an "
                f"inplace operation: it is at version {self.tensor._version}, expected version "
                f"{self.version}. Change weights after the backward"
            )


class WayBack:
    """Gives blocks their turns in backwards; begins and ends these.

    Attributes:
        is_running: whether a backward of this model is under way.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self.is_running = False
        self._pack: Callable[[torch.Tensor], Any] | None = None
        self._outer: Hooks | None = None

    # ---- in the forward -------------------------------------------------------------------------

    def run_saving(
        self,
        function: Callable[[], Any],
        block: Block,
        engine: Engine,
        graph: Graph,
        keep: Keep = Kept,
    ) -> Any:
        """Calls `function` so that a backward finds what it saves.

        What lies in the window, and casts of it, are brought again; the rest goes to the pair of
        saved-tensor hooks that is active, as a pass-through pair of ours would silently switch
        theirs (activation checkpointing, offload) off, or else to `keep`.
        """
        outer = top_hooks()
        if outer is not None and outer[0] is self._pack:
            outer = self._outer  # of the enclosing block, whose own way of keeping is not for us
        casts = engine.casts

        def save(tensor: torch.Tensor) -> Packed:
            is_placed = engine.window.holds(tensor)
            return Saved(tensor, block, engine, graph) if is_placed else Kept(tensor)

        def pack(tensor: torch.Tensor) -> Any:
            if engine.window.holds(tensor):
                return Saved(tensor, block, engine, graph)
            weight = casts.source(tensor)
            if outer is not None:
                return outer[0](tensor)
            return keep(tensor) if weight is None else Cast(save(weight), tensor)

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, Packed):
                return packed.unpack(self)
            assert outer is not None
            return outer[1](packed)

        before = self._pack, self._outer
        watched = (alias.tensor for weight in block.weights for alias in weight.aliases)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, unpack),
            casts.watching(watched if outer is None else ()),
        ):
            self._pack, self._outer = pack, outer
            try:
                return function()
            finally:
                self._pack, self._outer = before

    @property
    def is_covered(self) -> bool:
        """Whether other saved-tensor hooks were entered since the block's own.

        A checkpoint within the block's call runs the block's forward in hooks of its own, and again
        in the backward: both times the block has to see to what it saves.
        """
        top = top_hooks()
        return top is not None and top[0] is not self._pack

    def watch(self, output: Any, inputs: Any, block: Block, engine: Engine) -> None:
        """Hooks the nodes of a block's call that may read its weights without a saved tensor."""
        before = {id(node) for node in _nodes(inputs)}
        outputs = [node for node in _nodes(output) if id(node) not in before]
        hooked = {id(node): node for node in (*outputs, *_written_in_python(outputs, before))}

        def bring(*_: Any) -> None:
            self.bring(block, engine, thread)

        thread = get_ident()
        for node in hooked.values():
            node.register_prehook(bring)

    def watch_pass(self, output: Any, graph: Graph) -> None:
        """Makes the backward begin with its first node, whatever that needs.

        A gradient may be accumulated before any block's node has run: of an embedding table, or of
        what other code reads where it is on the host.
        """
        thread, until_then = graph.thread, [graph]

        def begin(*_: Any) -> None:
            until_then.clear()  # who keeps the loss must not keep the plan
            self.begin(thread)

        for node in _nodes(output):
            node.register_prehook(begin)

    # ---- in the backward ------------------------------------------------------------------------

    def bring(self, block: Block, engine: Engine, thread: int) -> None:
        """Gives `block` the turn, in a backward.

        Raises:
            BackwardError: its window is gone, or gradients of gradients are asked for.
        """
        self._check(block, engine)
        if torch.is_grad_enabled():
            raise BackwardError(
                f"gradients of gradients (create_graph=True) cannot go through {block.name}, whose "
                f"weights are streamed; call superpipeline.handle(model).close() and use the plain "
                f"model"
            )
        self.begin(thread)
        engine.bring(block)

    def _check(self, block: Block, engine: Engine) -> None:
        if engine is not self._passes.pipeline.engine:
            raise BackwardError(
                f"the backward reached {block.name}, but since its forward the model was planned "
                f"anew (stream, close, or a module added); run forward and backward again"
            )

    @contextmanager
    def again(self, block: Block, engine: Engine, thread: int) -> Iterator[None]:
        """For a call of `block` that is made again, for what a node of a graph task needs.

        Raises:
            BackwardError: its window is gone.
        """
        self._check(block, engine)
        if torch._C._current_graph_task_id() != -1:
            self.begin(thread)
            yield
        elif self._passes.owner == get_ident():
            yield
        else:  # somebody looks at grad_fn._saved_self, outside of any backward
            with self._passes.apart():
                yield

    def begin(self, thread: int) -> None:
        """A node of a graph task needs the model: its backward begins, if it has not yet."""
        if self.is_running:
            return
        self._passes.enter_backward(thread)
        self.is_running = True
        torch.autograd.Variable._execution_engine.queue_callback(_End(self))

    def end(self, *, failed: bool) -> None:
        """The backward is over: back to idle, or to the forward that it was part of."""
        self.is_running = False
        self._passes.activations.end_backward()
        self._passes.leave_backward(failed=failed)

    def read(self, saved: Saved) -> torch.Tensor:
        """What was saved in the window, in place again."""
        if torch._C._current_graph_task_id() == -1:
            # Somebody looks at grad_fn._saved_weight, outside of any backward.
            return self._passes.look(saved.block, saved.engine, saved.tensor)
        self.bring(saved.block, saved.engine, saved.graph.thread)
        return saved.tensor


def top_hooks() -> Hooks | None:
    """The pair of saved-tensor hooks that is active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(*_IGNORE_TRACING)


class _End:
    """Called when the graph task has ended; dropped uncalled when a node raised."""

    def __init__(self, way: WayBack) -> None:
        self._way: WayBack | None = way

    def __call__(self) -> None:
        way, self._way = self._way, None
        if way is not None:
            way.end(failed=False)

    def __del__(self) -> None:
        if self._way is not None:
            self._way.end(failed=True)


def _nodes(value: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]


def _written_in_python(outputs: Iterable[Any], before: set[int]) -> list[Any]:
    """Nodes of custom functions between `outputs` and the nodes `before` the block."""
    found, waiting, seen = [], list(outputs), set(before)
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found.append(node)
        waiting += [following for following, _ in node.next_functions]
    return found
