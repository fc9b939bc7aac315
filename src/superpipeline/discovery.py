"""The first pass: which modules are called, and which weights other code than their block's reads.

Operations are watched by the addresses of their operands. (A TorchFunctionMode would switch fast
paths off, which changes bits, and would miss scripted code and aliases; a dispatch mode does
neither.) A read outside the weight's block is served from the host's bytes and noted; the next plan
gives the weight to the block that read it, or makes it resident.

In inference mode operations are not watched: there a dispatch mode sees whole composite operations
and runs them by another route, and a GRU was seen to come out with other bits. Reads outside a
block then go on being served from the host's bytes: right, at the price of link time.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from superpipeline.engine import Engine
from superpipeline.ondisk import Keeper, OnDisk
from superpipeline.states import Block
from superpipeline.weights import Weight


class Atlas:
    """Finds the weight that an address belongs to. Costs about 1 µs for a lookup.

    Far residents are those that no device could read where they are kept.
    """

    def __init__(self, home: Mapping[Weight, Keeper], far_residents: Iterable[Weight] = ()) -> None:
        self.home = home
        self._far = set(far_residents)
        spans = [(*keeper.span(weight), weight.index) for weight, keeper in home.items()]
        spans += [(w.aliases[0].tensor.data_ptr(), w.num_bytes, w.index) for w in self._far]
        spans = sorted(span for span in spans if span[1])
        self._begins = [begin for begin, _, _ in spans]
        self._spans = spans
        self._weights = {weight.index: weight for weight in home}

    def needs_residence(self, weight: Weight, reader: Block | None) -> bool:
        """Whether a resident may not be let go, as others than its block read it."""
        return weight in self._far and (reader is None or weight not in reader.weights)

    def find(self, address: int) -> Weight | None:
        """The weight whose host bytes hold `address`."""
        position = bisect_right(self._begins, address) - 1
        if position < 0:
            return None
        begin, num_bytes, index = self._spans[position]
        return self._weights[index] if address < begin + num_bytes else None


_PLAIN = (torch.Tensor, nn.Parameter)  # others need not have an address


class Discovery:
    """Watches one pass, as a context manager.

    Attributes:
        touched: weights read while they were not in place, with the blocks whose turn it was.
        rewritten: weights that a forward wrote while it was not their turn.
        called: ids of the modules that were called.
    """

    def __init__(self, engine: Engine, atlas: Atlas, rows: Iterable[Weight]) -> None:
        self._operations = Operations(engine, atlas, rows)
        self.touched = self._operations.touched
        self.rewritten = self._operations.rewritten
        self.called: set[int] = set()
        self._exit = ExitStack()

    def __enter__(self) -> None:
        # A global hook: unlike one on a module, it leaves PyTorch's fast paths on.
        hook = register_module_forward_pre_hook(self._note_call)
        self._exit.callback(hook.remove)
        if not torch.is_inference_mode_enabled():
            self._exit.enter_context(self._operations)

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _note_call(self, module: nn.Module, _: Any) -> None:
        self.called.add(id(module))


class Operations(TorchDispatchMode):
    """Watches operations for weights that are not in place."""

    def __init__(self, engine: Engine, atlas: Atlas, rows: Iterable[Weight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.touched: dict[Weight, set[int | None]] = {}
        self.rewritten: set[Weight] = set()
        self._engine = engine
        self._atlas = atlas
        self._rows = set(rows)
        self._device = engine.streams.device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._engine.is_moving:
            return func(*args, **kwargs)
        far = False
        for leaf in tree_leaves((args, kwargs)):
            if type(leaf) in _PLAIN:
                far |= self._note(func, leaf)
        if func._schema.is_mutable:
            self._note_writes(_written_by(func, args, kwargs))
        if far:
            # Not pinned, or on disk: the device cannot read these bytes, so it gets a copy.
            args, kwargs = tree_map_only(torch.Tensor, self._to_device, (args, kwargs))
        return func(*args, **kwargs)

    def _note(self, func: Any, tensor: torch.Tensor) -> bool:
        """Notes a read of an idle weight; True if the device cannot make it."""
        if self._engine.window.holds(tensor) or self._note_cast(tensor):
            return False
        weight = self._atlas.find(tensor.data_ptr())
        if weight is None:
            return False
        reader = self._engine.reader
        is_resident = weight.index in self._engine.plan.resident
        if is_resident and not self._atlas.needs_residence(weight, reader):
            return False
        if weight in self._rows and func is torch.ops.aten.embedding.default:
            return False
        self.touched.setdefault(weight, set()).add(None if reader is None else reader.index)
        self._engine.casts.exempt.add(weight.index)
        is_elsewhere = tensor.device != self._device and tensor.device.type == "cpu"
        if is_resident:
            return False
        return is_elsewhere or not self._atlas.home[weight].is_readable

    def _note_cast(self, tensor: torch.Tensor) -> bool:
        """Notes a read of autocast's copy of a weight by other code than the weight's block."""
        casts, reader = self._engine.casts, self._engine.reader
        weight = casts.weight_of(tensor)
        if weight is None:
            return False
        if reader is None or weight not in reader.weights:
            if casts.is_hidden(tensor):
                index = None if reader is None else reader.index
                self.touched.setdefault(weight, set()).add(index)
            casts.read_outside(tensor)
        return True

    def _note_writes(self, operands: Iterable[Any]) -> None:
        """Writes through `parameter.data` count no version; they are seen here."""
        current = self._engine.current
        for tensor in operands:
            address = tensor.data_ptr() if type(tensor) in _PLAIN else 0
            idle = self._atlas.find(address)
            if idle is not None and idle.index not in self._engine.plan.resident:
                self._engine.distrust(idle)
                self.rewritten.add(idle)
            elif current is not None and self._engine.window.holds(tensor):
                self._engine.written |= {p.weight for p in current.pointers if p.holds(address)}

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        weight = self._atlas.find(tensor.data_ptr()) if tensor.device.type == "cpu" else None
        if weight is None:
            return tensor
        keeper = self._atlas.home[weight]
        if isinstance(keeper, OnDisk) and not keeper.is_readable:
            tensor = keeper.real(weight, tensor)
        return tensor.to(self._device)


def _written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The tensors among the operands that the operation's schema says it writes."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            operand = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(operand) if isinstance(t, torch.Tensor))


def kind_of(value: object) -> object:
    """What of an argument may lead a forward along another way: flags, and what is left out."""
    return value if value is None or isinstance(value, bool | str) else type(value)
