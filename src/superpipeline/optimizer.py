"""The step of an optimizer, block by block and lazily: `handle.optimizer(opt)`.

It is a torch optimizer around the user's. Its `step` takes what the update reads, cuts it into one
update for each block, hands these to a worker (`updates.py`), and returns. Each is made by a
sibling of the user's optimizer (`siblings.py`) that has one block's parameters.

Stepped at once, within `step`: parameters that are not the streamed model's or not on the host, and
those of one element, where a NaN would not make a stray write fail.

Only optimizers are taken whose update of a parameter reads nothing of another parameter.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch.optim import Optimizer

from superpipeline.build import Layout
from superpipeline.errors import InputError, UnsupportedError
from superpipeline.gradients import HostPool
from superpipeline.plan import Plan
from superpipeline.siblings import HOOKS, Groups, Sibling, options_of, step_at_once
from superpipeline.updates import Update
from superpipeline.weights import outside_inference_mode

if TYPE_CHECKING:
    from superpipeline.pipeline import Pipeline

# Read, one by one: the update of a parameter uses its gradient, its state and its group.
_PER_PARAMETER = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
)  # fmt: skip


class Share(NamedTuple):
    """Which weights are updated together.

    Attributes:
        name: of the block.
        order: when the next forward wants them; -1 before it begins.
        blocks: the blocks whose fetch reads them.
    """

    name: str
    order: int
    blocks: frozenset[int]


def shares(layout: Layout, plan: Plan) -> dict[int, Share]:
    """The share of every parameter, by its id."""
    blocks: dict[int, list[int]] = {}
    for block in layout.blocks:
        for weight in block.weights:
            blocks.setdefault(weight.index, []).append(block.index)
    order = {block: at for at, block in reversed([*enumerate(plan.circle)])}
    early = plan.resident | layout.rows | layout.noted  # read without a fetch, or elsewhere too
    found: dict[int, Share] = {}
    for weight in layout.weights:
        readers = blocks.get(weight.index, [])
        name = layout.blocks[readers[0]].name if readers else "what is in no block"
        if not readers or weight.index in early:
            share = Share(name, -1, frozenset())
        else:
            first = min(order.get(block, len(order)) for block in readers)
            share = Share(name, first, frozenset(readers))
        found |= {id(alias.tensor): share for alias in weight.aliases}
    return found


class LazyOptimizer(Optimizer):
    """What `handle.optimizer(opt)` returns; groups, state and hooks are those of `opt`.

    `step` returns at once. While an update is pending its parameters show NaN, and what needs a
    weight waits: a forward, a state dict, `handle.weights()`. Only tensors that share memory with
    a weight, made before the step, show whatever the worker is writing. If post-hooks of steps are
    registered, which may look at the weights, or in a backward, `step` waits itself. After
    `handle.close()` it goes on as a plain optimizer.
    """

    def __init__(self, optimizer: Optimizer, pipeline: Pipeline, *, per_parameter: bool) -> None:
        _refuse_unsuitable(optimizer, per_parameter=per_parameter)
        self._base = optimizer
        self._updates = pipeline.updates
        self._memory = HostPool(torch.device("cpu"))
        self._pipeline = weakref.ref(pipeline)
        for name in HOOKS:
            setattr(self, name, getattr(optimizer, name))
        self._patch_step_function()

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        return self._base.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._base.defaults

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:  # type: ignore[override]
        """Waits for what is pending, as `state_dict` and `load_state_dict` do."""
        self._updates.finish()
        return self._base.state

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: whether `step` itself unscales, and leaves infinite steps out."""
        return getattr(self._base, "_step_supports_amp_scaling", False)

    def state_dict(self) -> dict[str, Any]:
        self._updates.finish()
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updates.finish()
        self._base.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002  (torch's own)
        if not set_to_none:
            self._updates.wait_for_borrowers()
        self._base.zero_grad(set_to_none)

    def __getstate__(self) -> NoReturn:
        raise UnsupportedError(
            "the optimizer of a streamed model cannot be copied or pickled; save its state_dict()"
        )

    # ---- a step -----------------------------------------------------------------------------

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes what the updates read, and returns.

        Raises:
            UnsupportedError: a closure is given, or this runs within a forward of the model.
            UpdateError: an update of the step before failed.
        """
        if closure is not None:
            raise UnsupportedError(
                "a closure computes the loss anew, with weights whose updates would be pending; "
                "call step() without one, after loss.backward()"
            )
        self._base._opt_called = True  # type: ignore[attr-defined]  # for its own schedulers
        pipeline, updates = self._pipeline(), self._updates
        waits = self._optimizer_step_post_hooks or (pipeline and pipeline.in_backward)
        with updates.none_pending() if waits else nullcontext(), outside_inference_mode():
            parts = self._cut(pipeline.shares() if pipeline else {})
            if at_once := parts.pop(None, None):
                step_at_once(self._base, at_once, self)
            for share, groups in parts.items():
                assert share is not None
                assert pipeline is not None
                sibling = Sibling(self._base, groups, self, self._memory)
                renewal = pipeline.masters.renewal(sibling.parameters)
                updates.submit(Update(*share, sibling, renewal))

    def _cut(self, shares: Mapping[int, Share]) -> dict[Share | None, Groups]:
        parts: dict[Share | None, Groups] = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            options = options_of(self._base, group, parameters)
            members: dict[Share | None, list[torch.Tensor]] = {}
            for parameter in parameters:
                can_wait = parameter.numel() > 1 and parameter.device.type == "cpu"
                share = shares.get(id(parameter)) if can_wait else None
                members.setdefault(share, []).append(parameter)
            for share, own in members.items():
                parts.setdefault(share, []).append(options | {"params": own})
        return parts


# ---- what is taken ------------------------------------------------------------------------------


def _refuse_unsuitable(optimizer: Optimizer, *, per_parameter: bool) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"handle.optimizer() takes a torch.optim.Optimizer, got {name}; make one from "
            f"model.parameters() first"
        )
    if isinstance(optimizer, LazyOptimizer):
        raise InputError("this optimizer was made by handle.optimizer() already; use it as it is")
    if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
        why = "computes with closures and with all parameters as one vector"
        if isinstance(optimizer, torch.optim.SparseAdam):
            why = "takes sparse gradients only, which are not updated block by block"
        raise UnsupportedError(f"{name} {why}; use the optimizer itself, without the handle's")
    if optimizer.defaults.get("differentiable"):
        raise UnsupportedError("differentiable=True keeps a graph through the step; leave it out")
    if not per_parameter and not _is_listed(optimizer):
        raise UnsupportedError(
            f"{name} is not known to update each parameter by itself. If its update of a parameter "
            f"reads nothing but that parameter, its gradient, its state and its group, and writes "
            f"nothing but the parameter and its state, write handle.optimizer(opt, "
            f"per_parameter=True); else use the optimizer itself"
        )


def _is_listed(optimizer: Optimizer) -> bool:
    return type(optimizer) in {getattr(torch.optim, name, None) for name in _PER_PARAMETER}
