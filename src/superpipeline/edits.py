"""Seeing the user's edits of weights between passes, in whatever form they come.

p.add_(), optimizer.step()            version counters, the count of optimizer steps
p.data.add_(), fused optimizers       sampled bytes of the host copy
p.data = x, load_state_dict(assign),  the address, or the object, that a module's registry holds
module.weight = nn.Parameter(...)
a LoRA added, a layer swapped         PyTorch's registration hooks, then a comparison
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from superpipeline.ondisk import Keeper
from superpipeline.weights import Weight, named_tensors


class _Generation:
    """Two global counters: optimizer steps, and registrations in modules that are watched.

    (Others are many: a forward that takes a slice of a ModuleList makes a list of its own.)
    """

    def __init__(self) -> None:
        self.steps = 0
        self.registrations = 0
        self._count = itertools.count(1)
        self._watched: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """By id: a module may compare and hash as it likes."""
        self._watched.update((id(module), module) for module in modules)

    def on_step(self, *_: Any) -> None:
        self.steps = next(self._count)

    def on_registration(self, module: nn.Module, *_: Any) -> None:
        if self._watched.get(id(module)) is module:
            self.registrations = next(self._count)


generation = _Generation()
register_optimizer_step_post_hook(generation.on_step)
module_hooks.register_module_parameter_registration_hook(generation.on_registration)
module_hooks.register_module_module_registration_hook(generation.on_registration)


def fingerprint(weights: Iterable[tuple[Weight, Keeper]]) -> object:
    """What must not have changed for a block's device copy to be believed in the next pass."""
    return generation.steps, [
        (buffer.sample(weight), *(alias.tensor._version for alias in weight.aliases))
        for weight, buffer in weights
    ]


class Watch:
    """Notices when a model's tensors are no longer the ones that were packed.

    `stand_ins` are addresses of tensors whose update is pending (see `updates.py`).
    `changed()` costs about 0.2 µs for each tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        resident: Collection[int],
        device: torch.device,
        stand_ins: Collection[int] = (),
    ) -> None:
        self._device = device
        self._stand_ins = stand_ins
        self._names = _names(model)
        self._look_at_modules(model)
        self._expected = [
            (home.registry, home.key, alias.tensor, alias.tensor.data_ptr())
            for weight in weights
            for alias in weight.aliases
            for home in alias.homes
            if isinstance(home.registry, dict)  # TorchScript's cannot be assigned to
        ]
        self._buffers = {  # id of a buffer -> whether it is resident
            id(alias.tensor): weight.index in resident
            for weight in weights
            for alias in weight.aliases
            if alias.is_buffer
        }

    def changed(self, model: nn.Module) -> bool:
        """Whether anything was replaced, added or taken away since the last look."""
        for item in self._expected:
            registry, key, tensor, address = item
            now = tensor.data_ptr()
            is_moved = now != address and now not in self._stand_ins
            if registry.get(key) is not tensor or is_moved:
                if self._is_harmless(registry.get(key), tensor):
                    self._expected = [other for other in self._expected if other is not item]
                    continue
                return True
        if generation.registrations == self._registrations and all(
            tuple(registry.values()) == children for registry, children in self._children
        ):
            return False
        if _names(model) != self._names:
            return True
        self._look_at_modules(model)
        return False

    def _look_at_modules(self, model: nn.Module) -> None:
        generation.watch(model.modules())
        self._registrations = generation.registrations
        self._children = _children(model)

    def _is_harmless(self, now: torch.Tensor | None, before: torch.Tensor) -> bool:
        """A forward may assign new tensors to its buffers; on the device they need no moving."""
        if id(before) not in self._buffers or (now is not None and now.device != self._device):
            return False
        # The same streamed buffer at another address would be re-pointed at its next turn.
        return now is not before or self._buffers[id(before)]


def _children(model: nn.Module) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
    """The children of every module that has any.

    `ModuleList.insert` and code that writes to `module._modules` run no registration hook.
    """
    return [(m._modules, tuple(m._modules.values())) for m in model.modules() if m._modules]


def _names(model: nn.Module) -> list[tuple[str, int]]:
    return [
        (home.name, 0 if is_buffer else id(home.registry[home.key]))
        for home, is_buffer in named_tensors(model)
    ]
