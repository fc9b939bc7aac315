"""Autocast's copies of weights: of one block at a time, as the weights themselves.

Autocast casts a weight at its first use and keeps the copy until the user's `with` ends, and
autograd keeps what it saved of it until the backward: in the end every streamed weight would lie on
the device, in bfloat16. Here the memory of a copy lasts for a turn, and the copy itself for as long
as in the plain model:

    saved by autograd      the weight is saved in its place, and cast again in the backward
    in autocast's cache    hidden when the turn ends (pointed at one NaN), cast anew into the same
                           tensor when the block has its next turn
    without a graph        the cache is off during a block's call: a copy lasts for one operation

[Note: why the cache is not cleared]
    Autograd adds a weight's gradients up in its copy's dtype, where the uses of the weight share
    the copy, and in float32 where each has its own. So a block that is visited again under one
    `autocast` has to find the same tensor. Besides, the cache is everybody's: models that do not
    stream have copies in it.

[Note: which copies are known]
    A saved tensor's node says that it is the cast of a parameter. That takes 1 µs for each tensor
    saved in the cast's dtype. A frozen weight's copy has no node, and autocast makes a new one for
    each use; in blocks with such weights a dispatch mode notes what is cast (25 µs an operation).

    A copy that the model makes by hand stays as it is, as a part of what the model computes: it may
    have been written to through `.data`, which nothing tells. Python holds such a copy while the
    operation that saves it runs; one of autocast's is seen by autocast alone.

[Note: copies outlive an engine]
    A new plan may come while `autocast` is still open, so the copies are everybody's, as the cache
    is. The next engine knows them; of weights that do not stream any more they are shown at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from superpipeline.ondisk import OnDisk
from superpipeline.pointers import Pointer
from superpipeline.saved import Packed, Way
from superpipeline.weights import Weight, outside_inference_mode
from superpipeline.window import Window

_NARROW = {torch.bfloat16, torch.float16}


class Cast(Packed):
    """For a view of a weight's cast; `weight` stands for the weight."""

    __slots__ = ("_dtype", "_offset", "_size", "_stride", "weight")

    def __init__(self, weight: Packed, cast: torch.Tensor) -> None:
        self.weight = weight
        self._dtype = cast.dtype
        self._size, self._stride = cast.size(), cast.stride()
        self._offset = cast.storage_offset()

    def unpack(self, way: Way) -> torch.Tensor:
        whole = self.weight.unpack(way).to(self._dtype)
        return whole.as_strided(self._size, self._stride, self._offset)


class Copy(NamedTuple):
    """A copy in autocast's cache, and the version of the weight that it was seen with first."""

    tensor: TensorWeakRef
    version: int


_copies: dict[int, list[Copy]] = {}  # by the id of the weight's tensor
_nan: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}  # what hidden copies show


class Casts:
    """The cast copies of one engine's weights.

    Attributes:
        exempt: indices of weights that other code than their block's reads: never hidden.
    """

    def __init__(
        self, window: Window, pointers: Iterable[Pointer], weights: Mapping[int, Weight]
    ) -> None:
        """`weights` has the weight of every tensor, by the tensor's id."""
        self.exempt: set[int] = set()
        self._window = window
        self._device = window.bytes.device
        self._pointers = {id(pointer.tensor): pointer for pointer in pointers}
        self._weights = weights
        self._watch: _Watch | None = None
        _measured()  # here rather than in the midst of a pass

    def take_over(self, exempt: set[int]) -> None:
        """After another engine: see [Note: copies outlive an engine]."""
        self.exempt = exempt
        for key in [*_copies]:
            _alive(key)
        self._reveal(
            key
            for key, weight in self._weights.items()
            if key not in self._pointers or weight.index in exempt
        )

    def let_go(self) -> None:
        """The model will be the plain one again: shows every copy of its weights."""
        self._reveal(self._weights)

    def is_streamed(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a streamed weight or buffer of the model."""
        return id(tensor) in self._pointers

    def _is_resident(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._weights and id(tensor) not in self._pointers

    @property
    def is_on(self) -> bool:
        """Whether autocast is on for the device."""
        return torch.is_autocast_enabled(self._device.type)

    # ---- what autograd saves -----------------------------------------------------------------

    def source(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What `tensor`, which autograd saves, is (a view of) a cast of, if that is a weight.

        A copy that is in the cache is remembered.
        """
        if tensor.dtype not in _NARROW:  # within an operation that autocast wraps it shows as off
            return None
        whole = tensor if tensor._base is None else tensor._base
        if self.is_hidden(whole):
            self.read_outside(whole)
        is_by_hand = sys.getrefcount(whole) > _measured().while_saved[whole is tensor]
        node = whole.grad_fn
        if is_by_hand or node is None:
            return self._watch.source_of(whole) if self._watch and not is_by_hand else None
        if type(node).__name__ != "ToCopyBackward0" or whole._version:
            return None
        weight = getattr(node.next_functions[0][0], "variable", None)
        if not isinstance(weight, torch.Tensor) or weight.stride() != whole.stride():
            return None
        if not self._window.holds(weight) and not self._is_resident(weight):
            return None
        return weight.detach() if self._remember(whole, weight) else None

    def _remember(self, whole: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the copy is still what a new cast would give."""
        copies = _alive(id(weight))
        for copy in copies:
            if copy.tensor() is whole:
                return copy.version == weight._version
        _copies[id(weight)] = [*copies, Copy(TensorWeakRef(whole), weight._version)]
        return True

    def watching(self, weights: Iterable[torch.Tensor]) -> AbstractContextManager[Any]:
        """For the length of a block's call; see [Note: which copies are known]."""
        if not self.is_on or self._watch is not None:
            return nullcontext()
        dtype = torch.get_autocast_dtype(self._device.type)
        frozen = any(
            w.is_floating_point() and not w.requires_grad and w.dtype not in (dtype, torch.float64)
            for w in weights
        )
        return self._watch_casts() if frozen else nullcontext()

    @contextmanager
    def _watch_casts(self) -> Iterator[None]:
        self._watch = _Watch(lambda t: self._window.holds(t) or self._is_resident(t))
        try:
            with self._watch:
                yield
        finally:
            self._watch = None

    # ---- autocast's cache --------------------------------------------------------------------

    def uncached(self) -> AbstractContextManager[None]:
        """Nothing that is cast within goes into the cache."""
        if not self.is_on or not torch.is_autocast_cache_enabled():
            return nullcontext()
        return _without_cache()

    def hide(self, pointers: Iterable[Pointer]) -> None:
        """The turn of these tensors ends: gives the memory of their cached copies up."""
        if not _copies:
            return
        for pointer in pointers:
            if pointer.weight.index in self.exempt:
                continue
            for copy in _alive(id(pointer.tensor)):
                if copy.version == pointer.tensor._version:
                    self._hide(copy.tensor)

    def _hide(self, reference: TensorWeakRef) -> None:
        if _references(reference) != _measured().in_cache:
            return  # somebody has got hold of it
        tensor = reference()
        assert tensor is not None
        with outside_inference_mode():
            key = tensor.dtype, self._device
            if key not in _nan:
                _nan[key] = torch.full((), torch.nan, dtype=tensor.dtype, device=self._device)
            tensor.data = _nan[key].expand(tensor.size())

    def show(self, pointers: Iterable[Pointer]) -> None:
        """These tensors are in place: their hidden copies are cast anew."""
        if not _copies:
            return
        for pointer in pointers:
            for tensor in self._hidden(id(pointer.tensor)):
                with outside_inference_mode():
                    tensor.data = pointer.here.to(tensor.dtype)

    def is_hidden(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a copy that is hidden now."""
        nan = _nan.get((tensor.dtype, self._device))
        return nan is not None and tensor.data_ptr() == nan.data_ptr()

    def _hidden(self, key: int) -> list[torch.Tensor]:
        alive = (copy.tensor() for copy in _copies.get(key, ()))
        return [tensor for tensor in alive if tensor is not None and self.is_hidden(tensor)]

    # ---- code outside the weight's block -------------------------------------------------------

    def weight_of(self, tensor: torch.Tensor) -> Weight | None:
        """The weight that `tensor`, an operand, is a known copy of. Costs 10 µs: for discovery."""
        owner = self._owner(tensor)
        return None if owner is None else self._weights[owner]

    def _owner(self, tensor: torch.Tensor) -> int | None:
        if tensor.dtype not in _NARROW:
            return None
        for key, copies in [*_copies.items()]:
            if key in self._weights and any(copy.tensor() is tensor for copy in copies):
                return key
        return None

    def read_outside(self, tensor: torch.Tensor) -> None:
        """Other code than its weight's block reads a copy, which stays as it is from then on.

        If it is hidden, it is cast from the host's bytes.
        """
        owner = self._owner(tensor)
        if owner is None:
            return
        self.exempt.add(self._weights[owner].index)
        self._reveal([owner])

    def _reveal(self, owners: Iterable[int]) -> None:
        for owner in [owner for owner in owners if owner in _copies]:
            for tensor in self._hidden(owner):
                with outside_inference_mode():
                    tensor.data = self._real(owner).to(self._device).to(tensor.dtype)

    def _real(self, owner: int) -> torch.Tensor:
        """The values of a weight, by its tensor's id, between its turns."""
        pointer = self._pointers.get(owner)
        if pointer is None:  # resident
            aliases = self._weights[owner].aliases
            return next(alias.tensor for alias in aliases if id(alias.tensor) == owner).detach()
        value = pointer.tensor.detach()
        if isinstance(pointer.keeper, OnDisk) and not pointer.keeper.is_readable:
            return pointer.keeper.real(pointer.weight, value)
        return value


def _alive(key: int) -> list[Copy]:
    """The copies that still exist; the others are forgotten."""
    copies = [copy for copy in _copies.pop(key, ()) if copy.tensor() is not None]
    if copies:
        _copies[key] = copies
    return copies


class _Watch(TorchDispatchMode):
    """Notes which tensors are casts of weights."""

    def __init__(self, is_weight: Callable[[torch.Tensor], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._is_weight = is_weight
        # The reference keeps a storage's address from being given to another.
        self._sources: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and list(kwargs or ()) == ["dtype"]:
            source = args[0]
            if self._is_weight(source):
                storage = result.untyped_storage()
                self._sources[storage._cdata] = (StorageWeakRef(storage), source.detach())
        return result

    def source_of(self, whole: torch.Tensor) -> torch.Tensor | None:
        """What `whole` is a cast of, if nobody has written it since."""
        found = self._sources.get(whole.untyped_storage()._cdata)
        return None if found is None or whole._version else found[1]


@contextmanager
def _without_cache() -> Iterator[None]:
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


def _references(reference: TensorWeakRef) -> tuple[int, int]:
    """How many hold a tensor, in Python and in all."""
    tensor = reference()
    return sys.getrefcount(tensor), getattr(tensor, "_use_count", int)()


class Measured(NamedTuple):
    """How many hold one of autocast's copies, counted as here; that differs between versions.

    Attributes:
        while_saved: in Python, in the hook that saves it: a view of it (False), or itself (True).
        in_cache: `_references`, once only the cache holds it.
    """

    while_saved: dict[bool, int]
    in_cache: tuple[int, int]


@functools.cache
def _measured() -> Measured:
    copies: list[TensorWeakRef] = []
    while_saved: dict[bool, int] = {}

    def source(tensor: torch.Tensor) -> None:
        whole = tensor if tensor._base is None else tensor._base
        while_saved[whole is tensor] = sys.getrefcount(whole)
        copies.append(TensorWeakRef(whole))

    def pack(tensor: torch.Tensor) -> None:
        source(tensor)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=True),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda _: torch.empty(0)),
    ):
        leaf = torch.ones(1, 1, requires_grad=True)
        torch.nn.functional.linear(leaf, leaf)
        torch.mm(leaf, leaf)
        assert len(while_saved) == 2, while_saved
        return Measured(while_saved, _references(copies[0]))
