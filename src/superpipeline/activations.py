"""What becomes of what a block saves for its backward: `activations=` of stream().

    keep                what autograd saves stays on the device, as in the plain model
    recompute           only the inputs of each block's call stay; the rest is computed again
                        (recompute.py)
    offload             what autograd saves goes to the host (offload.py)
    recompute+offload   the inputs of each block's call go to the host, the rest is computed again

All modes give the same bits. They act on every call of a block under a graph, also of blocks that
are wholly resident; what is computed between blocks is kept. Weights, and casts of them, never are:
the way back brings them.

[Note: together with the user's own]
    Saved-tensor hooks of the user, and checkpoints around a block, get what the block saves, as in
    the plain model. Within a checkpoint (theirs, or of the block around a block) nothing is to be
    done: what is saved there is dropped, or needed at once. What a reentrant checkpoint saves in
    the backward is needed at once as well; that one shows as a graph task without hooks. A
    checkpoint decides by what was saved the first time, so both times must decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import checkpoint

from superpipeline.backward import Keep, top_hooks
from superpipeline.engine import Engine
from superpipeline.offload import Offload
from superpipeline.recompute import State, call_recomputing
from superpipeline.saved import Kept
from superpipeline.states import Block

if TYPE_CHECKING:
    from superpipeline.calls import Entry
    from superpipeline.passes import Passes


class Activations:
    """Carries `activations=` out for one streamed model."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._offload: Offload | None = None
        self._weights: tuple[Engine | None, set[int]] = None, set()

    @property
    def _mode(self) -> str:
        """What is asked for; see [Note: together with the user's own]."""
        hooks = top_hooks()
        if hooks is None:
            is_repeated = torch._C._current_graph_task_id() != -1
        else:
            is_repeated = getattr(hooks[0], "__module__", "") == checkpoint.__name__
        return "keep" if is_repeated else self._passes.pipeline.options.activations

    @property
    def offloads(self) -> bool:
        """Whether what is saved goes to the host."""
        return "offload" in self._mode

    def visit(
        self, entry: Entry, visit: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`visit(*args, **kwargs)`, which visits a block under a graph; only its inputs are kept,
        if that is asked for."""
        block, module = entry.block, entry.module()
        if block is None or module is None or "recompute" not in self._mode:
            return visit(*args, **kwargs)
        passes, engine = self._passes, self._passes.engine
        graph, before = passes.present_graph(), State(module, engine.casts.is_streamed)

        def again(*args: Any, **kwargs: Any) -> Any:
            with passes.back.again(block, engine, graph.thread):
                return visit(*args, **kwargs)

        def call() -> Any:
            return call_recomputing(visit, again, before, args, kwargs)

        if not self.offloads:
            return call()
        with self.keeping(block) as keep:
            return passes.back.run_saving(call, block, engine, graph, keep)

    @contextmanager
    def keeping(self, block: Block) -> Iterator[Keep]:
        """For the length of a block's call; gives what keeps a tensor that autograd saves."""
        if not self.offloads:
            yield Kept
            return
        if self._offload is None:
            self._offload = Offload(self._passes.engine.streams)
        with self._offload.stashing(block.name, self._is_weight, get_ident()) as keep:
            yield keep

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is, or is a view of, a parameter or buffer, which stays anyway."""
        engine, ids = self._weights
        if engine is not self._passes.engine:
            model = self._passes.pipeline.model
            ids = {id(weight) for weight in (*model.parameters(), *model.buffers())}
            self._weights = self._passes.engine, ids
        return id(tensor if tensor._base is None else tensor._base) in ids

    def end_backward(self) -> None:
        """Nothing that was brought back stays on the device."""
        if self._offload is not None:
            self._offload.end_backward()

    def close(self) -> None:
        """Gives up the host's memory."""
        if self._offload is not None:
            self._offload.close()
