"""Until gradients are supported: a backward that reaches a streamed weight raises.

Between visits a place holds other blocks' bytes, so a backward that read the window would compute
finite, wrong gradients. Three doors lead there, and each is shut:

    tensors that autograd saved in the window     a saved-tensor hook
    gradients of the weights themselves           a hook on each block output that needs them
    weights that a custom function keeps on ctx   the same hook: it runs before the block's nodes
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from superpipeline.errors import BackwardError
from superpipeline.window import Window

_TEXT = (
    "a backward reached block {block}, whose weights are streamed; training through streamed "
    "blocks is not supported yet. Run the forward under torch.no_grad(), or call "
    "superpipeline.handle(model).close() and train the plain model"
)


_IGNORE_TRACING = (True,)  # the only argument; Dynamo never traces this


class Refused:
    """Stands in autograd's graph for a tensor that lay in the window."""

    def __init__(self, block: str) -> None:
        self.block = block


def run_refusing_backward(function: Callable[[], Any], window: Window, block: str) -> Any:
    """Calls `function` so that whatever it saves for a backward in the window is refused there.

    Composes with the pair of saved-tensor hooks that is active: a pass-through pair of ours would
    silently switch theirs (activation checkpointing, offload) off.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(*_IGNORE_TRACING)

    def pack(tensor: torch.Tensor) -> Any:
        if window.holds(tensor):
            return Refused(block)
        return tensor if outer is None else outer[0](tensor)

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, Refused):
            refuse(packed.block)
        return packed if outer is None else outer[1](packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function()


def guarded(output: torch.Tensor, block: str) -> torch.Tensor:
    """`output`; a backward that comes through it raises before it runs any node of the block."""
    if output.grad_fn is not None:
        output.grad_fn.register_prehook(lambda *_: refuse(block))
    return output


def refuse(block: str) -> NoReturn:
    """Raises what a backward through a streamed block gets."""
    raise BackwardError(_TEXT.format(block=block))
