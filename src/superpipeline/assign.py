"""Puts tensors into a model by name: as they are, without copying, ties kept."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Slot:
    """One tensor of a model: a parameter, or a buffer that is saved.

    Attributes:
        names: all that it goes by; more than one where it is tied.
        places: the modules that hold it, with its name there.
    """

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def put(self, tensor: torch.Tensor) -> None:
        """Puts `tensor` everywhere at once, as a parameter if it was one."""
        if isinstance(self.tensor, nn.Parameter):
            wants_grad = self.tensor.requires_grad and tensor.is_floating_point()
            tensor = nn.Parameter(tensor, requires_grad=wants_grad)
        for module, name in self.places:
            setattr(module, name, tensor)


@dataclass(frozen=True)
class Match:
    """Which tensors of a checkpoint belong where in a model.

    Attributes:
        found: by name in the checkpoint.
        missing: names in the model that the checkpoint does not have, one for each slot.
        unexpected: names in the checkpoint that the model does not have.
        misshaped: names in both, with the checkpoint's shape and the model's.
    """

    found: dict[str, Slot]
    missing: dict[str, Slot]
    unexpected: list[str]
    misshaped: dict[str, tuple[torch.Size, torch.Size]]


def match(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Match:
    """Compares names and shapes; changes nothing.

    Of a tied tensor the checkpoint need hold one name only; if it holds several, the first counts.
    """
    slots = list(saved(model))
    present = [(slot, [name for name in slot.names if name in tensors]) for slot in slots]
    known = {name for slot in slots for name in slot.names}
    return Match(
        found={names[0]: slot for slot, names in present if names},
        missing={slot.names[0]: slot for slot, names in present if not names},
        unexpected=[name for name in tensors if name not in known],
        misshaped={
            name: (tensors[name].shape, slot.tensor.shape)
            for slot, names in present
            for name in names
            if tensors[name].shape != slot.tensor.shape
        },
    )


def assign(
    found: Mapping[str, Slot],
    tensors: Mapping[str, torch.Tensor],
    dtype_of: Callable[[str, torch.Tensor], torch.dtype],
) -> None:
    """Puts every tensor that was found into its slot, converted to what `dtype_of` says."""
    for name, slot in found.items():
        slot.put(tensors[name].to(dtype_of(name, tensors[name])))


def saved(model: nn.Module) -> Iterator[Slot]:
    """Every parameter and persistent buffer, in registration order."""
    slots: dict[int, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                slot = slots.setdefault(id(tensor), Slot(tensor))
                slot.names.append(f"{prefix}.{name}" if prefix else name)
                slot.places.append((module, name))
    yield from slots.values()


def unsaved(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every buffer that no checkpoint holds."""
    kept = {id(slot.tensor) for slot in saved(model)}
    for name, buffer in model.named_buffers():
        if id(buffer) not in kept:
            yield name, buffer


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, parameters and buffers are the objects that they were before it."""
    before = list(saved(model))
    try:
        yield
    except BaseException:
        for slot in before:
            for module, name in slot.places:
                setattr(module, name, slot.tensor)
        raise


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made in the block have parameters without values; buffers have theirs.

    Peak memory: one parameter at a time.
    """
    own_thread = threading.get_ident()
    moved: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.is_meta or threading.get_ident() != own_thread:
            return parameter
        known = moved.get(id(parameter))
        if known is not None and known[0]() is parameter:  # an id may be used again
            return known[1]
        meta = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        moved[id(parameter)] = weakref.ref(parameter), meta
        return meta

    # torch annotates it as if it returned nothing, and uses what it returns.
    hook = nn.modules.module.register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()
