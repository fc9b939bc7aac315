"""A sibling of the user's optimizer: the same class and attributes, some of the parameters.

    user's optimizer   group 0: p q r s      state: {p: …, q: …, r: …, s: …}
                       group 1: t u                  │ the same entries
    sibling, block 0   group 0: p' q'        state: {p': …, q': …}     p' has the bytes of p,
    sibling, block 1   group 0: r' s'  group 1: u'                     and the gradient of p

What a sibling has, so that nothing which is changed after `step()` reaches it:

    hyperparameters         copies; what depends on a whole group is resolved for the whole group
    gradients               copies on write: memory is copied only if somebody writes to one
    grad_scale, found_inf   copies (a GradScaler sets them before `step` and removes them after it)
    state                   the entries of the user's optimizer; new ones are handed over when done

[Note: the third copy of a gradient]
    The user gives a gradient up (`zero_grad`) while the worker gives up, or writes, its own copy of
    it. PyTorch's copies on write do not survive that where it leaves none: of two threads that
    count down at once, one frees what the other still locks. (Seen: a worker that hangs in
    `p.grad = None`, without the interpreter lock; later a crash.) So a third copy is kept until the
    worker is done, and given up by whoever hands the state over.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import _default_to_fused_or_foreach
from torch.utils._pytree import tree_map_only

from superpipeline.errors import UnsupportedError
from superpipeline.gradients import HostPool

HOOKS = (
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
)  # fmt: skip
_SCALING = ("grad_scale", "found_inf")

Groups = list[dict[str, Any]]


class Sibling:
    """Steps some parameters of `optimizer`, later: on tensors of its own over the same bytes.

    Args:
        groups: parameters that have gradients, with their options.
        asked: the optimizer whose step the user called, on which a GradScaler sets its attributes.
        memory: for copies of gradients.

    Attributes:
        parameters: what it steps.
        borrows: whether it reads the user's gradients where they are.
    """

    def __init__(
        self, optimizer: Optimizer, groups: Groups, asked: Optimizer, memory: HostPool
    ) -> None:
        self._memory = memory
        self._twins = {p: _Twin.of(p) for group in groups for p in group["params"]}
        self.parameters = list(self._twins)
        self.borrows = any(twin.versions for twin in self._twins.values())
        self._state = optimizer.state
        known = {twin.tensor: self._state[p] for p, twin in self._twins.items() if p in self._state}
        own = [g | {"params": [self._twins[p].tensor for p in g["params"]]} for g in groups]
        self._optimizer = _alike(optimizer, own, defaultdict(dict, known), asked)
        self._unscales = vars(self._optimizer).get("grad_scale") is not None

    def step(self) -> None:
        """Steps, once; lets go of its copies of the gradients."""
        try:
            self._copy_for_fused()
            _step(self._optimizer)
        finally:
            for twin in self._twins.values():
                twin.tensor.grad = None

    def _copy_for_fused(self) -> None:
        """Fused steps ask for gradients to write to, though they do not: that would copy them into
        new memory, and the system needs longer to give its pages than to copy."""
        for group in self._optimizer.param_groups:
            for tensor in group["params"] if group.get("fused") else []:
                if tensor.grad is not None and _is_lazy(tensor.grad):
                    tensor.grad = self._memory.like(tensor.grad).copy_(tensor.grad)

    def let_go(self) -> None:
        """Frees the gradients; never on the worker: see [Note: the third copy of a gradient]."""
        for twin in self._twins.values():
            twin.kept.clear()

    def hand_over(self) -> str:
        """Gives new entries of the state to the user's optimizer; says what is wrong."""
        self.let_go()
        for parameter, twin in self._twins.items():
            if twin.tensor in self._optimizer.state:
                self._state[parameter] = self._optimizer.state[twin.tensor]
        # Where the step unscales, it writes to gradients itself.
        if self._unscales or not any(twin.is_changed for twin in self._twins.values()):
            return ""
        return "a gradient was changed in place meanwhile; change gradients before step()"


def step_at_once(optimizer: Optimizer, groups: Groups, asked: Optimizer) -> None:
    """Steps `groups` as `optimizer` would."""
    _step(_alike(optimizer, groups, optimizer.state, asked))


class _Twin(NamedTuple):
    """What is stepped in a parameter's stead: a tensor over its bytes, with its gradient.

    Attributes:
        kept: the gradient once more; see [Note: the third copy of a gradient].
        versions: shares the version counter of the user's gradient, if that could not be made to
            be copied on write, and what the counter was.
    """

    tensor: torch.Tensor
    kept: list[torch.Tensor]
    versions: tuple[torch.Tensor, int] | None

    @classmethod
    def of(cls, parameter: torch.Tensor) -> _Twin:
        twin = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        vars(twin).update(vars(parameter))
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        try:
            twin.grad = torch._lazy_clone(gradient)
        except RuntimeError:  # sparse, or in memory that is not simply torch's: pinned, shared
            if gradient.layout is not torch.strided:
                twin.grad = gradient.clone()
                return cls(twin, [], None)
            twin.grad = gradient
            counter = gradient.detach()
            counter.data = gradient.new_empty(0)  # it must not keep the memory
            return cls(twin, [], (counter, gradient._version))
        return cls(twin, [torch._lazy_clone(gradient)], None)

    @property
    def is_changed(self) -> bool:
        """Whether the user has written to the gradient that is read where it is."""
        return self.versions is not None and self.versions[0]._version != self.versions[1]


def _alike(
    optimizer: Optimizer, groups: Groups, state: defaultdict[torch.Tensor, Any], asked: Optimizer
) -> Optimizer:
    alike: Optimizer = object.__new__(type(optimizer))
    found = {name: vars(asked)[name] for name in _SCALING if name in vars(asked)}
    scaling = tree_map_only(torch.Tensor, torch.clone, found)
    vars(alike).update(vars(optimizer) | scaling, state=state, param_groups=groups)
    for name in HOOKS:
        setattr(alike, name, OrderedDict())
    return alike


def _step(optimizer: Optimizer) -> None:
    """The class's own step: what users call has hooks, and may be wrapped by a scheduler.

    Raises:
        UnsupportedError: it keeps something besides parameters and their state.
    """
    step: Any = type(optimizer).step
    before = _kept_elsewhere(optimizer)
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)
    after = _kept_elsewhere(optimizer)
    changed = [key for key, value in after.items() if _differ(value, before.get(key))]
    if changed:
        # One that counts its steps there would count each block's.
        raise UnsupportedError(
            f"{type(optimizer).__name__} writes {', '.join(changed)} in its step, and not only "
            f"parameters and their state: it cannot run block by block; use the optimizer itself"
        )


def _is_lazy(tensor: torch.Tensor) -> bool:
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]  # has no stub


def _kept_elsewhere(optimizer: Optimizer) -> dict[str, Any]:
    own = {key: value for key, value in vars(optimizer).items() if not key.startswith("_")}
    groups = [
        (f"param_groups[{index}][{key!r}]", value)
        for index, group in enumerate(own.pop("param_groups"))
        for key, value in group.items()
    ]
    del own["state"]
    return own | dict(groups)


def _differ(one: Any, other: Any) -> bool:
    return one is not other and (isinstance(one, torch.Tensor) or one != other)


# ---- hyperparameters ----------------------------------------------------------------------------


def options_of(
    optimizer: Optimizer, group: Mapping[str, Any], parameters: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """A group's hyperparameters as they are now, and as they are for all `parameters` together."""
    own = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
    options: dict[str, Any] = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), own)
    if not parameters:
        return options
    if isinstance(optimizer, torch.optim.Adafactor):
        if options["eps"][0] is None:
            # Adafactor takes the first parameter's for the whole group.
            first = _first_dtype(parameters, by_dtype=bool(options["foreach"]))
            options["eps"] = (torch.finfo(first).eps, options["eps"][1])
    elif options.get("foreach", False) is None and options.get("fused") is None:
        _, foreach = _default_to_fused_or_foreach(list(parameters), differentiable=False)
        is_adam = isinstance(optimizer, torch.optim.Adam)
        if is_adam and isinstance(options["lr"], torch.Tensor) and not options["capturable"]:
            foreach = False
        options["foreach"] = foreach
    return options


def _first_dtype(parameters: Sequence[torch.Tensor], *, by_dtype: bool) -> torch.dtype:
    if not by_dtype:
        return parameters[0].dtype
    grouped = Optimizer._group_tensors_by_device_and_dtype([list(parameters)])
    return next(iter(grouped))[1] or parameters[0].dtype
