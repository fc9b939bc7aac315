"""Module calls tell the passes whose turn it is, and nothing else.

A module whose call matters gets a subclass of its class, of the same name, that announces the call.
Hooks would do the same, but PyTorch's layers take other (differently rounded) code paths when any
hook is attached, hooks are skipped on Ctrl-C, and `module.forward(x)` never runs them. FSDP2 swaps
classes in the same way.

[Note: parametrized classes]
    torch.nn.utils.parametrize does so too: a class ParametrizedLinear(Linear) for one module, with
    a property for each parametrized weight. It expects to find its class on top, so ours goes
    between: ParametrizedLinear(Linear-that-announces(Linear)). A user who parametrizes or takes a
    parametrization away while the model streams finds the same order, and `undo` restores it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.stateless import _functional_call

from superpipeline.errors import UnsupportedError
from superpipeline.outputs import map_tensors

if TYPE_CHECKING:
    from superpipeline.passes import Passes
    from superpipeline.states import Block

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
        if torch.compiler.is_compiling() or _compiling_caller():
            refuse_compile()
        passes = self.passes
        if passes.owner != get_ident():
            if torch._C._current_graph_task_id() == -1:
                return passes.run(self, function, args, kwargs)
            passes.back.begin(
                get_ident()
            )  # a node of a backward computes this part of the forward again
        if self.block is None or (self.active and passes.inside is self.block):
            return passes.go_on(self.block, function, args, kwargs)
        return passes.visit(self, function, args, kwargs)

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise UnsupportedError(
            "a streamed model cannot be copied: its weights take turns in one window; call "
            "superpipeline.handle(model).close() first, or copy model.state_dict()"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.refuse_pickle()

    def refuse_pickle(self) -> NoReturn:
        raise UnsupportedError(
            "a streamed model cannot be copied or pickled; save model.state_dict() or "
            "model.save_pretrained(...), or call superpipeline.handle(model).close() first"
        )


class HostLookup(Entry):
    """A table that the device cannot read: it is looked up on the host, and only the rows travel.

    Waits for the indices to arrive on the host; used only where memory could not be pinned.
    """

    __slots__ = ()

    def call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return super().call(functools.partial(self._look_up, function), args, kwargs)

    def _look_up(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        table = self.module()
        if table is None or any(parameter.is_cuda for parameter in table.parameters()):
            return function(*args, **kwargs)
        device = self.passes.engine.streams.device
        args, kwargs = map_tensors(lambda tensor: tensor.cpu(), (args, kwargs))
        return map_tensors(lambda rows: rows.to(device), function(*args, **kwargs))


def entry_of(module: nn.Module) -> Entry | None:
    """The entry of a swapped module."""
    entry = module.__dict__.get(KEY)
    return entry if isinstance(entry, Entry) else None


def refuse_compile() -> NoReturn:
    """Raises what torch.compile of a streamed model gets."""
    raise UnsupportedError(
        "a streamed model cannot be compiled: its weights change place between calls; remove "
        "torch.compile (after model.compile() set model._compiled_call_impl = None), or call "
        "superpipeline.handle(model).close() first"
    )


def _compiling_caller() -> bool:
    """Whether this call runs under torch.compile although Dynamo could not trace into it."""
    dynamo = getattr(torch._C, "_dynamo", None)
    callback = None if dynamo is None else dynamo.eval_frame.get_eval_frame_callback()
    return callback is not None and callback is not False


def refuse_functional_call() -> None:
    """Raises if the model's tensors were exchanged by torch.func.functional_call, not the user."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _functional_call.__code__:
            raise UnsupportedError(
                "torch.func.functional_call cannot run through a streamed model; call "
                "superpipeline.handle(model).close() first"
            )


class Swaps:
    """The swapped classes of one streamed model; `undo` gives every module its own class back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._classes: dict[tuple[type, bool], type] = {}
        self._swapped: list[tuple[weakref.ref[nn.Module], type]] = []

    def swap(self, module: nn.Module, entry: Entry | None) -> None:
        """Makes `module` announce its calls to `entry`; without one it only answers `device`."""
        top = type(module)
        kind = top.__bases__[0] if _is_injected(module) else top
        swapped = self._swapped_class(kind, announces=entry is not None)
        self._swapped.append((weakref.ref(module), swapped))  # first, so that undo() finds it
        if entry is not None:
            module.__dict__[KEY] = entry
        if kind is top:
            module.__class__ = swapped
        else:  # see [Note: parametrized classes]
            top.__bases__ = (swapped,)

    def undo(self) -> None:
        for reference, swapped in reversed(self._swapped):
            module = reference()
            if module is not None:
                module.__dict__.pop(KEY, None)
                _put_back(module, swapped, swapped.__bases__[0])
        self._swapped.clear()

    def _swapped_class(self, kind: type, *, announces: bool) -> type:
        if kind in self._classes.values():
            return kind  # a copied module shares its parametrized class with one swapped before
        key = (kind, announces)
        if key not in self._classes:
            self._classes[key] = self._subclass(kind, announces=announces)
        return self._classes[key]

    def _subclass(self, kind: type, *, announces: bool) -> type:
        body: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        body["__doc__"] = kind.__doc__
        if answers_device(kind) and self._device.type != "cpu":
            device = self._device
            body["device"] = property(lambda _: device)
        if announces:
            body |= _announcing(kind, self._device)
        return type(kind)(kind.__name__, (kind,), body)


def _is_injected(module: nn.Module) -> bool:
    """Whether the module's class is one that register_parametrization made for it."""
    return is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def _put_back(module: nn.Module, swapped: type, kind: type) -> None:
    """Takes `swapped` out of the module's classes, whatever the user has derived from it."""
    if type(module) is swapped:
        module.__class__ = kind
    for above in type(module).__mro__:
        if swapped in above.__bases__:
            above.__bases__ = tuple(kind if base is swapped else base for base in above.__bases__)


def answers_device(kind: type) -> bool:
    """Whether the class has a `device` property, as transformers' and diffusers' models do."""
    return isinstance(getattr(kind, "device", None), property)


def _announcing(kind: type, device: torch.device) -> dict[str, Any]:
    plain: Any = kind

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry = self.__dict__.get(KEY)
        if entry is None:  # a copy that shares its parametrized class
            return plain.__call__(self, *args, **kwargs)
        return entry.call(functools.partial(plain.__call__, self), args, kwargs)

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        entry = self.__dict__.get(KEY)
        if entry is None:
            return plain.forward(self, *args, **kwargs)
        return entry.call(functools.partial(plain.forward, self), args, kwargs)

    def _apply(self: nn.Module, fn: Callable[..., Any], *recurse: Any, **named: Any) -> nn.Module:
        entry = self.__dict__.get(KEY)
        if entry is None:
            return plain._apply(self, fn, *recurse, **named)
        _refuse_other_placement(self, fn, device)
        entry.passes.say_once(f".to({device}) does nothing: the model streams there")
        return self

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        entry = self.__dict__.get(KEY)
        return plain.__reduce_ex__(self, protocol) if entry is None else entry.refuse_pickle()

    return {
        "__call__": call, "forward": forward, "_apply": _apply, "__reduce_ex__": reduce_ex
    }  # fmt: skip


def _refuse_other_placement(
    module: nn.Module, fn: Callable[..., Any], device: torch.device
) -> None:
    """Tries `fn` (what .to(), .half(), .cuda() apply) on a small tensor of each dtype."""
    for dtype in {tensor.dtype for tensor in (*module.parameters(), *module.buffers())}:
        probe = torch.zeros(1, 2, 2, 2, dtype=dtype, device=device)
        result = fn(probe)
        as_is = (result.device, result.dtype, result.stride()) == (device, dtype, probe.stride())
        if not as_is:
            raise UnsupportedError(
                f"{type(module).__name__} is streamed to {device} as {dtype}; it cannot be moved "
                f"to {result.device}, turned into {result.dtype} or laid out anew. Call "
                f"superpipeline.handle(model).close(), move or convert the model, and stream again"
            )


def refuse_transforms() -> None:
    """Raises UnsupportedError where a forward is not run but transformed."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "torch.func transforms cannot run through a streamed model; call "
            "superpipeline.handle(model).close() first"
        )
    if torch._C._get_tracing_state() is not None:
        raise UnsupportedError("a streamed model cannot be traced; close() it first")
