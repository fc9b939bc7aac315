"""Module calls tell the passes whose turn it is, and nothing else.

A module whose call matters gets a subclass of its class, of the same name, that announces the call.
Hooks would do the same, but PyTorch's layers take other (differently rounded) code paths when any
hook is attached, hooks are skipped on Ctrl-C, and `module.forward(x)` never runs them. FSDP2 swaps
classes in the same way.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from superpipeline.errors import UnsupportedError

if TYPE_CHECKING:
    from superpipeline.engine import Block
    from superpipeline.passes import Passes

KEY = "_superpipeline"


class Entry:
    """What a swapped module knows: its passes, and its block (None for a mere container).

    Attributes:
        entered: whether it was ever called.
    """

    __slots__ = ("__weakref__", "active", "block", "entered", "module", "passes")

    def __init__(self, module: nn.Module, passes: Passes, block: Block | None) -> None:
        self.module = weakref.ref(module)
        self.passes = passes
        self.block = block
        self.active = False
        self.entered = False

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls `function` as a visit of this module's block, in a pass of its own if none runs."""
        if torch.compiler.is_compiling():
            refuse_compile()
        passes = self.passes
        if passes.owner != get_ident():
            return passes.run(self, function, args, kwargs)
        if self.block is None or (self.active and passes.inside is self.block):
            return function(*args, **kwargs)
        return passes.visit(self, function, args, kwargs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedError(
            "a streamed model cannot be copied: its weights take turns in one window; call "
            "superpipeline.handle(model).close() first, or copy model.state_dict()"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedError(
            "a streamed model cannot be pickled; save model.state_dict() or "
            "model.save_pretrained(...), or call superpipeline.handle(model).close() first"
        )


def entry_of(module: nn.Module) -> Entry | None:
    """The entry of a swapped module."""
    entry = module.__dict__.get(KEY)
    return entry if isinstance(entry, Entry) else None


def refuse_compile() -> NoReturn:
    raise UnsupportedError(
        "a streamed model cannot be compiled: its weights change place between calls; remove "
        "torch.compile, or call superpipeline.handle(model).close() first"
    )


class Swaps:
    """The swapped classes of one streamed model; `undo` gives every module its own class back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._classes: dict[tuple[type, bool], type] = {}
        self._swapped: list[tuple[weakref.ref[nn.Module], type]] = []

    def swap(self, module: nn.Module, entry: Entry | None) -> None:
        """Makes `module` announce its calls to `entry`; without one it only answers `device`."""
        kind = type(module)
        if entry is not None:
            module.__dict__[KEY] = entry
        key = (kind, entry is not None)
        if key not in self._classes:
            self._classes[key] = self._subclass(kind, announces=entry is not None)
        self._swapped.append((weakref.ref(module), kind))
        module.__class__ = self._classes[key]

    def undo(self) -> None:
        for reference, kind in reversed(self._swapped):
            module = reference()
            if module is not None:
                module.__dict__.pop(KEY, None)
                module.__class__ = kind
        self._swapped.clear()

    def _subclass(self, kind: type, *, announces: bool) -> type:
        body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        body["__doc__"] = kind.__doc__
        if answers_device(kind) and self._device.type != "cpu":
            device = self._device
            body["device"] = property(lambda _: device)
        if announces:
            body |= _announcing(kind, self._device)
        return type(kind)(kind.__name__, (kind,), body)


def answers_device(kind: type) -> bool:
    """Whether the class has a `device` property, as transformers' and diffusers' models do."""
    return isinstance(getattr(kind, "device", None), property)


def _announcing(kind: type, device: torch.device) -> dict[str, Any]:
    plain: Any = kind

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[KEY].call(functools.partial(plain.__call__, self), args, kwargs)

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[KEY].call(functools.partial(plain.forward, self), args, kwargs)

    def _apply(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        _refuse_other_placement(self, fn, device)
        self.__dict__[KEY].passes.say_once(f".to({device}) does nothing: the model streams there")
        return self

    return {"__call__": __call__, "forward": forward, "_apply": _apply}


def _refuse_other_placement(
    module: nn.Module, fn: Callable[..., Any], device: torch.device
) -> None:
    """Tries `fn` (what .to(), .half(), .cuda() apply) on an empty tensor of each dtype."""
    for dtype in {tensor.dtype for tensor in module.parameters()}:
        probe = torch.empty(0, dtype=dtype, device=device)
        result = fn(probe)
        if result.device != device or result.dtype != dtype:
            raise UnsupportedError(
                f"{type(module).__name__} is streamed to {device} as {dtype}; it cannot be moved "
                f"to {result.device} or turned into {result.dtype}. Call "
                f"superpipeline.handle(model).close(), move or convert the model, and stream again"
            )
