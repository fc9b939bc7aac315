"""Cutting a model into blocks: which module's call needs which weights.

A block is a repeated unit (a decoder layer, a residual block: a child of a list of like modules) or
another module with parameters of its own. The walk goes down from the root until it meets one:

    root ─ embed_tokens            a part of its own, looked up by rows
         ─ layers (list) ─ 0       a unit: one part, whatever is inside
                         ─ 1
         ─ norm, lm_head           parts of their own; grouped when small

A unit of more bytes than the caller asks for is cut as well, down to its layers: the window has
room for two blocks at least, and what it takes cannot be resident. Norms and the like, too small
for a transfer, then are strays.

What the walk gets wrong (weights read by another module's code) discovery puts right.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

# Smaller tables travel with their block: a row lookup over the link has a latency of its own.
LEAST_ROWS_BYTES = 64 * 1024
# Outside repeated units, a module larger than this share of the model is cut further.
LARGEST_SHARE = 8
# In a unit that is cut, modules smaller than this are resident: each would be a visit.
LEAST_PART_BYTES = 256 * 1024

_LISTS = (nn.ModuleList, nn.ModuleDict)
_NO_FORWARD = nn.Module.forward


@dataclass(eq=False)
class Part:
    """Modules whose call needs `tensors` on the device.

    Attributes:
        roots: the modules whose call is the visit.
        tensors: ids of the parameters and buffers that belong to it.
        alone: visited conditionally or many times, so never grouped with a neighbour.
    """

    name: str
    roots: list[nn.Module]
    tensors: list[int] = field(default_factory=list)
    alone: bool = False


@dataclass(eq=False)
class Cut:
    """A model cut into parts.

    Attributes:
        parts: in registration order.
        rows: embedding modules whose table is looked up by rows.
        containers: callable modules above the parts; a pass can begin at any of them.
        strays: tensors that must be resident: no callable module owns them, or they are the small
            parts of a unit that is cut.
    """

    parts: list[Part] = field(default_factory=list)
    rows: list[nn.Embedding] = field(default_factory=list)
    containers: list[nn.Module] = field(default_factory=list)
    strays: list[int] = field(default_factory=list)


def cut(
    model: nn.Module, uncalled: Collection[nn.Module] = (), most_bytes: int | None = None
) -> Cut:
    """`model` cut into parts; `uncalled` modules are never called, so their children are parts.

    Units of more than `most_bytes` are cut. Costs one walk over the modules; changes nothing.
    """
    return _Cutter(model, uncalled, most_bytes).cut


def can_be_called(module: nn.Module) -> bool:
    """Whether calls of `module` can be seen: it has a forward and is not compiled TorchScript."""
    return type(module).forward is not _NO_FORWARD and not is_scripted(module)


def is_scripted(module: nn.Module) -> bool:
    """Whether `module` is compiled TorchScript, whose calls Python does not see."""
    return isinstance(module, torch.jit.ScriptModule)


class _Cutter:
    def __init__(
        self, model: nn.Module, uncalled: Collection[nn.Module], most_bytes: int | None
    ) -> None:
        self.cut = Cut()
        self.most_bytes = most_bytes
        self.uncalled = {id(module) for module in uncalled}
        self.seen: set[int] = set()
        self.limit = _num_bytes(model) // LARGEST_SHARE
        self._visit(model, "", owner=None, is_unit=False, depth=0)

    def _visit(
        self, module: nn.Module, name: str, *, owner: Part | None, is_unit: bool, depth: int
    ) -> None:
        """Cuts `module`; `depth` counts the lists of units above it."""
        if id(module) in self.seen or not _num_tensors(module):
            return
        if depth <= 1 and self._is_rows(module):
            self.seen.add(id(module))
            self.cut.rows.append(module)  # type: ignore[arg-type]  # _is_rows checked the class
            return
        if is_scripted(module):
            self._leave_out(module)
        elif can_be_called(module) and self._is_block(module, is_unit=is_unit, root=not name):
            self._take(module, name, depth)
        else:
            self._descend(module, name, owner=owner, depth=depth)

    def _is_rows(self, module: nn.Module) -> bool:
        return (
            isinstance(module, nn.Embedding)
            and module.max_norm is None  # max_norm writes to the table
            and not module.sparse
            and "weight" in module._parameters
            and _tensor_bytes(module.weight) >= LEAST_ROWS_BYTES
        )

    def _is_block(self, module: nn.Module, *, is_unit: bool, root: bool) -> bool:
        if id(module) in self.uncalled:
            return False
        if _is_atomic(module) or not any(_num_tensors(child) for child in module.children()):
            return True
        if _has_units(module, inside=is_unit):
            return False
        if is_unit:
            return not self._is_too_large(module)
        return not root and _num_bytes(module) <= self.limit

    def _is_too_large(self, module: nn.Module) -> bool:
        return self.most_bytes is not None and _num_bytes(module) > self.most_bytes

    def _take(self, module: nn.Module, name: str, depth: int) -> None:
        part = Part(name or type(module).__name__, [module], alone=depth > 1)
        for child in module.modules():
            if id(child) in self.seen:
                continue
            if child is not module and depth == 0 and self._is_rows(child):
                self._visit(child, name, owner=part, is_unit=False, depth=depth)
                continue
            self.seen.add(id(child))
            if is_scripted(child):
                self._leave_out(child)
            else:
                part.tensors += _own(child)
        if part.tensors:
            self.cut.parts.append(part)
        else:
            self.cut.containers.append(module)

    def _descend(self, module: nn.Module, name: str, *, owner: Part | None, depth: int) -> None:
        self.seen.add(id(module))
        if can_be_called(module) and id(module) not in self.uncalled:
            owner = Part(name or type(module).__name__, [module], alone=True)
            self.cut.parts.append(owner)
        if owner is None:
            self.cut.strays += _own(module)
        else:
            owner.tensors += _own(module)
        is_list = isinstance(module, (*_LISTS, nn.Sequential))
        units = is_list and (isinstance(module, _LISTS) or _repeats(module))
        splits = depth > 0 and self._is_too_large(module)
        if splits and owner is not None and owner.roots[0] is module:
            self._make_strays(owner)
        for key, child in module.named_children():
            if splits and id(child) not in self.seen and _num_bytes(child) < LEAST_PART_BYTES:
                self._leave_out(child)
                self.cut.containers += [m for m in child.modules() if can_be_called(m)]
                continue
            self._visit(
                child, f"{name}.{key}" if name else key,
                owner=owner, is_unit=units or depth > 0, depth=depth + units,
            )  # fmt: skip
        if owner is not None and owner.roots[0] is module and not owner.tensors:
            self.cut.parts.remove(owner)
            self.cut.containers.append(module)

    def _make_strays(self, owner: Part) -> None:
        """Of a unit that is cut, what it registers itself: a turn of its own between others'."""
        self.cut.strays += owner.tensors
        owner.tensors.clear()

    def _leave_out(self, module: nn.Module) -> None:
        for child in module.modules():
            self.seen.add(id(child))
            self.cut.strays += _own(child)


def _own(module: nn.Module) -> list[int]:
    """Ids of the tensors that `module` itself registers."""
    return [
        id(tensor)
        for registry in (module._parameters, module._buffers)
        for tensor in registry.values()
        if tensor is not None
    ]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _num_bytes(module: nn.Module) -> int:
    return sum(_tensor_bytes(tensor) for tensor in _tensors(module))


def _num_tensors(module: nn.Module) -> int:
    return sum(1 for _ in _tensors(module))


def _is_atomic(module: nn.Module) -> bool:
    """One of PyTorch's own layers: its code reads its children's weights without calling them."""
    kind = type(module)
    is_container = isinstance(module, (*_LISTS, nn.Sequential, nn.ParameterList, nn.ParameterDict))
    is_stack = isinstance(module, nn.Transformer | nn.TransformerEncoder | nn.TransformerDecoder)
    return kind.__module__.startswith("torch.nn.modules") and not (is_container or is_stack)


def _repeats(parent: nn.Module) -> bool:
    """Whether `parent` has two children of one class with tensors."""
    kinds = [type(child) for child in parent.children() if _num_tensors(child)]
    return len(kinds) > len(set(kinds))


def _has_units(module: nn.Module, *, inside: bool) -> bool:
    """Whether a list of like modules lies in `module`; inside a unit a Sequential is none."""
    lists = _LISTS if inside else (*_LISTS, nn.Sequential)
    return any(isinstance(child, lists) and _repeats(child) for child in module.modules())
