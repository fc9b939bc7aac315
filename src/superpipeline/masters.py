"""Mixed precision: parameters of full precision on the host, and copies of them that compute.

    between passes       a parameter shows its master: what optimizers, EMA and state dicts see
    forward to backward  it shows its copy, in `param_dtype`; the engine knows of nothing else
    before a fetch       copies whose masters were changed are made anew (`ready`)

[Note: gradients]
    Autograd makes them in the copy's dtype. While a backward runs the gradients from before are set
    aside; when it ends they are added up in `grad_dtype` and given back in the master's dtype, on
    the host. A sum in bfloat16 is exact in float32, so nothing is lost on the way there and back.

[Note: when a copy may be believed]
    If nothing suggests an edit of its master since: the version counter, sampled bytes, and, where
    the parameter trains, the count of optimizer steps.

The plain loop that this equals bit for bit is `train_by_copy` in tests/training/reference.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from superpipeline import edits
from superpipeline.blocks import is_scripted
from superpipeline.disk import locate
from superpipeline.errors import UnsupportedError
from superpipeline.sums import Sums
from superpipeline.weights import outside_inference_mode

_SAMPLES = 64


@dataclass(eq=False, slots=True)
class Master:
    """A parameter with its two values.

    Attributes:
        truth: in full precision, on the host.
        copy: what computes; wherever the engine has put it.
        before: its gradient from before the backward that runs.
    """

    name: str
    parameter: torch.Tensor
    truth: torch.Tensor
    copy: torch.Tensor
    is_shown: bool = False
    is_stale: bool = False
    before: torch.Tensor | None = None
    _seen: object = None
    _version: int = 0
    _probe: Any = field(init=False, default=None)

    def take(self, truth: torch.Tensor) -> None:
        """Another tensor is the truth."""
        self.truth, self._seen = truth, None
        reach = 1 + sum((n - 1) * s for n, s in zip(truth.size(), truth.stride(), strict=True))
        step = max(1, reach // _SAMPLES) | 1
        count = -(-reach // step)
        self._probe = truth.detach().as_strided((count,), (step,)).numpy()

    def look(self) -> None:
        """Notes whether the truth may have been changed."""
        steps = edits.generation.steps if self.parameter.requires_grad else 0
        seen = (self.parameter._version, steps, self._probe.tobytes())
        self.is_stale |= seen != self._seen
        self._seen = seen

    def swap_in(self) -> None:
        self.look()
        self.parameter.data = self.copy
        self._version, self.is_shown = self.parameter._version, True

    def swap_out(self) -> None:
        self.copy = self.parameter.data
        self.parameter.data, self.is_shown = self.truth, False

    def stand_in(self, dtype: torch.dtype) -> None:
        """While an update is pending: code may ask for the dtype before it needs the values."""
        storage, size = self.parameter.data.untyped_storage(), self.parameter.size()
        self.parameter.data = torch.empty(0, dtype=dtype).set_(storage, 0, size, (0,) * len(size))

    def refresh(self) -> None:
        """Makes the copy anew."""
        self.copy.copy_(self.truth)
        self.is_stale = False

    @property
    def is_apart(self) -> bool:
        """Whether nobody sees the copy, and the host can write it."""
        rests = not self.is_shown and self.parameter.data_ptr() == self.truth.data_ptr()
        return rests and self.copy.device.type == "cpu"

    @property
    def is_written(self) -> bool:
        """Whether the copy was written in place since it is shown."""
        return self.is_shown and self.parameter._version != self._version

    def set_gradient(self, gradient: torch.Tensor | None) -> None:
        """Sets `.grad`, of the truth's dtype; hides the copy."""
        self.parameter.grad = None
        if self.is_shown:
            self.swap_out()
        self.parameter.grad = gradient


class Renewal:
    """Copies that are made anew by whoever updates their masters.

    `make` on any thread, while nobody else sees master or copy; then `accept` by the caller of the
    model, as soon as the parameters show the masters again.
    """

    def __init__(self, masters: Iterable[Master]) -> None:
        self._masters = list(masters)

    def make(self) -> None:
        for master in self._masters:
            master.refresh()

    def accept(self) -> None:
        for master in self._masters:
            master.look()
            master.is_stale = False


class Masters:
    """Of one streamed model's parameters those that compute in another precision.

    Costs on the host the masters' bytes, beside the copies that stream.

    Args:
        stand_ins: addresses that a parameter has while its update is pending.

    Raises:
        UnsupportedError: a parameter is on disk.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, grad_dtype: torch.dtype | None,
        stand_ins: Collection[int],
    ) -> None:  # fmt: skip
        self._is_on, self._dtype = dtype is not None, dtype or torch.float32
        self._grad_dtype = grad_dtype or self._dtype
        self._sums = Sums(self._dtype, self._grad_dtype)
        self._stand_ins = stand_ins
        self._masters: dict[int, Master] = {}
        self._registrations = -1
        if self._is_on:
            self._refuse_on_disk(model)
            self._adopt(model)

    @property
    def is_shown(self) -> bool:
        """Whether any parameter shows its copy."""
        return any(master.is_shown for master in self._masters.values())

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [master.parameter for master in self._masters.values()]

    def _refuse_on_disk(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if self._is_wider(parameter) and locate(parameter) is not None:
                raise UnsupportedError(
                    f"{name} is on disk in {str(parameter.dtype)[6:]}; param_dtype= casts weights "
                    f"in host memory: load the model with plain from_pretrained, or to compute in "
                    f"{self._dtype} only, superpipeline.load(..., dtype={self._dtype})"
                )

    def _is_wider(self, tensor: torch.Tensor) -> bool:
        if not self._is_on or nn.parameter.is_lazy(tensor) or tensor.is_meta:
            return False
        if is_traceable_wrapper_subclass(tensor) or not tensor.numel():
            return False
        return tensor.is_floating_point() and tensor.dtype.itemsize > self._dtype.itemsize

    def _adopt(self, model: nn.Module) -> None:
        """Takes up parameters that are new, and forgets those that are gone."""
        if not self._is_on or self._registrations == edits.generation.registrations:
            return
        self._registrations = edits.generation.registrations
        known, self._masters = self._masters, {}
        for name, parameter in model.named_parameters():
            master = known.pop(id(parameter), None)
            if master is None and self._is_wider(parameter):
                truth = parameter.data.to("cpu")
                parameter.data = truth
                master = Master(name, parameter, truth, truth.to(self._dtype))
                master.take(truth)
                master.look()
                master.is_stale = False
            if master is not None:
                self._masters[id(parameter)] = master
        for gone in known.values():
            gone.set_gradient(gone.parameter.grad)

    # ---- what parameters show -------------------------------------------------------------------

    @outside_inference_mode()
    def show(self, model: nn.Module | None) -> None:
        """For a pass: the copies. `model` may have parameters that are new; None: it is gone."""
        if model is not None:
            self._adopt(model)
        for key, master in [*self._masters.items()]:
            parameter = master.parameter
            if master.is_shown:
                continue
            if parameter.data_ptr() in self._stand_ins:
                master.stand_in(self._dtype)
                continue
            if parameter.dtype != master.truth.dtype:
                del self._masters[key]  # `model.half()`: the user's, and nothing to cast any more
                continue
            if parameter.data_ptr() != master.truth.data_ptr():
                self._take_up(master)
            master.swap_in()

    def _take_up(self, master: Master) -> None:
        """The user pointed the parameter at another tensor."""
        parameter = master.parameter
        if parameter.device.type != "cpu":
            parameter.data = parameter.data.to("cpu")
        master.take(parameter.data)
        if master.copy.shape != parameter.shape:
            master.copy = parameter.data.to(self._dtype)

    @outside_inference_mode()
    def hide(self) -> None:
        """For the user: the masters. The engine is idle."""
        for master in self._masters.values():
            if master.is_shown:
                master.set_gradient(self._widened(master, master.parameter.grad))
            elif master.parameter.data_ptr() in self._stand_ins:
                master.stand_in(master.truth.dtype)

    @staticmethod
    def _widened(master: Master, gradient: torch.Tensor | None) -> torch.Tensor | None:
        return None if gradient is None else gradient.to("cpu", master.truth.dtype)

    def refuse_written(self) -> None:
        """Raises UnsupportedError if a forward wrote a copy, which nobody would ever see."""
        for master in self._masters.values():
            if master.is_written:
                master.is_stale = True
                raise UnsupportedError(
                    f"the forward writes {master.name} in place; with param_dtype= it has a copy, "
                    f"and the parameter would not change. Leave param_dtype out"
                )

    @outside_inference_mode()
    def ready(self, tensors: Iterable[torch.Tensor]) -> None:
        """Before the copies of these are read. No copy to the device may still read them."""
        for tensor in tensors:
            master = self._masters.get(id(tensor))
            if master is None:
                continue
            if not master.is_shown and tensor.data_ptr() == master.truth.data_ptr():
                master.swap_in()  # its update has just been made
            if master.is_shown and master.is_stale:
                master.refresh()

    def renewal(self, tensors: Iterable[torch.Tensor]) -> Renewal:
        """Of those of these whose copies are on the host; none of them may be read now."""
        known = (self._masters.get(id(tensor)) for tensor in tensors)
        return Renewal(master for master in known if master is not None and master.is_apart)

    def stale(self) -> set[int]:
        """Ids of the tensors whose copies are not what their masters would give."""
        return {key for key, master in self._masters.items() if master.is_stale}

    # ---- gradients ------------------------------------------------------------------------------

    def begin_backward(self) -> None:
        """Sets the gradients from before aside; see [Note: gradients]."""
        for master in self._masters.values():
            if master.parameter.grad is not None:
                master.before, master.parameter.grad = master.parameter.grad, None

    @outside_inference_mode()
    def end_backward(self, *, nested: bool) -> None:
        """Adds up, and gives the gradients to the masters; after a nested one copies still show."""
        for master in self._masters.values():
            before, master.before = master.before, None
            made, was_shown = master.parameter.grad, master.is_shown
            if made is not None or before is not None:
                master.set_gradient(self._sum(master, before, made))
            if nested and was_shown and not master.is_shown:
                master.swap_in()
        if not nested:
            self.hide()

    def _sum(
        self, master: Master, before: torch.Tensor | None, made: torch.Tensor | None
    ) -> torch.Tensor | None:
        if made is None:
            return before
        return self._sums.add(made.to("cpu"), before, master.truth)

    def dtype(self, parameter: torch.Tensor, made: torch.dtype) -> torch.dtype:
        """Gradients of masters arrive in their dtype, which is wider: nothing is lost."""
        master = self._masters.get(id(parameter))
        return made if master is None else master.truth.dtype

    def add(
        self, parameter: torch.Tensor, old: torch.Tensor | None, new: torch.Tensor
    ) -> torch.Tensor:
        """Adds a gradient up as it lands on the host, while others are still being computed."""
        master = self._masters.get(id(parameter))
        if master is None:
            return new if old is None else old.add_(new)
        master.before = self._sums.take(new, master.before)
        return master.before

    def give(self, parameter: torch.Tensor, total: torch.Tensor) -> None:
        """`end_backward` gives those of masters."""
        if id(parameter) not in self._masters:
            parameter.grad = total

    def drop(self) -> None:
        """The backward failed: gradients are as they were before."""
        for master in self._masters.values():
            if master.before is not None:
                before, master.before = master.before, None
                master.set_gradient(before)
        self.hide()

    def release(self) -> None:
        """The parameters are the user's alone."""
        self.hide()
        self._masters.clear()


# ---- who else reads weights between passes ------------------------------------------------------

Rest = Callable[[], None]


def before_reading(model: nn.Module, rest: Rest) -> list[RemovableHandle]:
    """Calls `rest` before steps of optimizers, and before state dicts of any part of `model`."""
    weak = weakref.WeakMethod(rest)
    _resting.append(weak)

    def hook(*_: Any) -> None:
        if (alive := weak()) is not None:
            alive()

    modules = [module for module in model.modules() if not is_scripted(module)]
    return [
        *(module.register_state_dict_pre_hook(hook) for module in modules),
        *(module.register_load_state_dict_pre_hook(hook) for module in modules),
    ]


_resting: list[weakref.WeakMethod[Rest]] = []


def _before_step(*_: Any) -> None:
    for reference in [*_resting]:
        if (rest := reference()) is not None:
            rest()
        else:
            _resting.remove(reference)


register_optimizer_step_pre_hook(_before_step)
