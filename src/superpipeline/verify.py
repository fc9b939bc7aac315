"""Proof: a streamed call compared bit for bit with the plain model's.

The plain model runs twice first. Where it differs from itself, the operation is nondeterministic
and no statement about streaming can be made; that is reported, not failed.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from superpipeline.engine import Engine
from superpipeline.errors import VerificationError
from superpipeline.outputs import tensors
from superpipeline.pointers import Pointer
from superpipeline.sizes import format_bytes
from superpipeline.states import Block
from superpipeline.weights import outside_inference_mode


class Verification(NamedTuple):
    """What verify() found.

    Attributes:
        equal: every tensor of the result has the plain model's bits.
        deterministic: the plain model gave the same bits twice.
        num_tensors: how many tensors were compared.
        streamed_bytes: fetched during the streamed call.
        nondeterministic: positions of tensors in which the plain model differs from itself.
    """

    equal: bool
    deterministic: bool
    num_tensors: int
    streamed_bytes: int
    nondeterministic: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.deterministic:
            return (
                f"not decided: tensors {list(self.nondeterministic)} of {self.num_tensors} differ "
                f"between two runs of the plain model itself (a nondeterministic operation; see "
                f"torch.use_deterministic_algorithms)"
            )
        return (
            f"verified: {self.num_tensors} tensors bit-equal to the plain model's, "
            f"{format_bytes(self.streamed_bytes)} streamed"
        )


class Reference:
    """Gives turns like the engine, but every block's weights are fresh copies of the host's bytes.

    One block at a time and synchronously, or all of them at once where they fit.
    """

    def __init__(self, engine: Engine, begin: Callable[[], object], *, fits: bool) -> None:
        self._engine = engine
        self._begin, self._fits = begin, fits
        self._copies: dict[int, dict[int, torch.Tensor]] = {}
        self._versions: dict[int, int] = {}
        self._current: Block | None = None

    def take_turn(self, block: Block | None) -> None:
        if block is self._current:
            return
        self._put_back()
        self._current = block
        if block is None:
            return
        fresh = self._copies.get(block.index) or self._fresh(block)
        if self._fits:
            self._copies[block.index] = fresh
        for pointer in block.pointers:
            pointer.tensor.data = fresh[id(pointer.alias)]
            self._versions[id(pointer.alias)] = pointer.tensor._version

    def end_call(self) -> None:
        """Nothing to do: a fresh copy stays right for whoever takes a view of it."""

    def begin_pass(self) -> None:
        self._begin()
        self._engine.idle.show()

    def end_pass(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._put_back()
        self._current = None
        self._engine.idle.hide()

    def _put_back(self) -> None:
        if self._current is None:
            return
        for pointer in self._current.pointers:
            wrote = pointer.tensor._version != self._versions[id(pointer.alias)]
            if wrote and pointer.tensor.data_ptr() != pointer.host.data_ptr():
                pointer.keep(pointer.tensor)
            pointer.tensor.data = pointer.idle

    def _fresh(self, block: Block) -> dict[int, torch.Tensor]:
        with outside_inference_mode():
            return {id(pointer.alias): self._copy(pointer) for pointer in block.pointers}

    def _copy(self, pointer: Pointer) -> torch.Tensor:
        device = self._engine.streams.device
        if device.type == "cpu" and pointer.keeper.is_readable:
            return pointer.host  # at the plain tensor's alignment already
        held = self._engine.host_bytes(pointer.weight)
        return pointer.alias.view(held if device.type == "cpu" else held.to(device), 0)


def compare(
    call: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    run_plain: Callable[[Callable[[], Any]], Any],
    run_streamed: Callable[[Callable[[], Any]], tuple[Any, int]],
    buffers: list[torch.Tensor],
) -> Verification:
    """Runs `call` plain, plain again and streamed, from the same state, and compares.

    Raises:
        VerificationError: a bit differs, or nothing was streamed.
    """

    def once() -> list[torch.Tensor]:
        args, kwargs = _copy_of(inputs)
        with _same_state(buffers):
            return [tensor.detach().clone() for tensor in tensors(call(*args, **kwargs))]

    first, second = run_plain(once), run_plain(once)
    if not first:
        raise VerificationError(
            "the call gave no tensors, so nothing can be compared; let it return tensors"
        )
    streamed, streamed_bytes = run_streamed(once)
    unstable = tuple(i for i, pair in enumerate(zip(first, second, strict=True)) if _differ(*pair))
    if unstable:
        return Verification(
            equal=False, deterministic=False, num_tensors=len(first),
            streamed_bytes=streamed_bytes, nondeterministic=unstable,
        )  # fmt: skip
    if len(first) != len(streamed):
        raise VerificationError(
            f"{len(streamed)} tensors came out, the plain model gives {len(first)}"
        )
    wrong = [i for i, pair in enumerate(zip(first, streamed, strict=True)) if _differ(*pair)]
    if wrong:
        raise VerificationError(_describe(first, streamed, wrong))
    if not streamed_bytes:
        raise VerificationError(
            "nothing was streamed, so nothing was verified: everything that ran is resident; give "
            "a smaller bound, or use the plain model"
        )
    return Verification(
        equal=True, deterministic=True, num_tensors=len(first), streamed_bytes=streamed_bytes
    )


def _copy_of(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """A deep copy; modules among the inputs stay themselves, and tensors need not be leaves."""
    known: dict[int, Any] = {
        id(leaf): leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.nn.Module)
    }
    for tensor in tensors(inputs):
        if not tensor.is_leaf:
            known[id(tensor)] = tensor.detach().clone().requires_grad_()
    return copy.deepcopy(inputs, known)


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return True
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _describe(first: list[torch.Tensor], streamed: list[torch.Tensor], wrong: list[int]) -> str:
    index = wrong[0]
    a, b = first[index], streamed[index]
    return (
        f"{len(wrong)} of {len(first)} tensors differ from the plain model's; the first is number "
        f"{index}, {tuple(a.shape)} {a.dtype} (streamed {tuple(b.shape)} {b.dtype}), with "
        f"{int((a != b).sum()) if a.shape == b.shape else 'all'} of {a.numel()} elements different"
    )


@contextmanager
def _same_state(buffers: list[torch.Tensor]) -> Iterator[None]:
    """Random number generators and buffers are afterwards as they were before."""
    saved = [(buffer, buffer.detach().clone()) for buffer in buffers]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
