"""What training moves and keeps: fetches of the backward, gradients on the way, activations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import superpipeline
from superpipeline import gradients
from training import models
from training.cases import CASES
from training.recipes import adapt
from training.reference import stream_within, streamed_bytes
from training.side_by_side import loss_of, sgd, train
from zoo.case import BUILD_SEED, seeded

NUM_LAYERS = 8


def deep() -> nn.Module:
    """Eight layers, all of which stream under k = 2."""
    make = seeded(lambda: models.Stack([models.layer() for _ in range(NUM_LAYERS)]), BUILD_SEED)
    return make().train()


def streaming(model: nn.Module, bound: str = "k2", **options: Any) -> tuple[nn.Module, Any]:
    model = stream_within(model, bound, **options)
    return model, superpipeline.handle(model)


def moved_by_a_step(model: nn.Module, handle: Any) -> tuple[int, int]:
    """Bytes fetched in the forward and in the backward of one step, when the order is known."""
    optimizer = sgd(model)
    train(model, optimizer, range(3))
    before = streamed_bytes(handle)
    train(model, optimizer, range(3, 4))
    after = streamed_bytes(handle)
    return after[0] - before[0], after[1] - before[1]


def bytes_of(*modules: nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


# ---- fetches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["k2", "k4", "50%"])
def test_what_the_forward_left_is_not_fetched_again(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a forward once fetched the block that a backward wants second over the one that
    it wants first: each backward began with a wait for the last layer."""
    model, handle = streaming(deep(), bound)
    forward, backward = moved_by_a_step(model, handle)
    streamed = sum(block.num_bytes for block in handle.engine.blocks)
    assert forward >= streamed, "a weight that trains is fetched anew in each pass"
    assert 0 < backward <= streamed - max(block.num_bytes for block in handle.engine.blocks) // 2
    # Of an odd circle two neighbours share a place: on its way back the first waits for the second.
    order = handle.plan.circle.index
    waits = {a for a, b in handle.plan.collisions if order(b) == order(a) + 1}
    late = late_blocks(handle, monkeypatch)
    for index in range(2):
        loss = loss_of(model, index)
        late.clear()
        loss.backward()
        assert set(late) <= waits


def late_blocks(handle: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by each block that was not fetched ahead of its turn."""
    late: list[int] = []
    counters, begin = handle.engine.counters, type(handle.engine)._begin_turn

    def begin_turn(engine: Any, block: Any) -> None:
        before = counters.late_fetches
        begin(engine, block)
        late.extend([block.index] * (counters.late_fetches - before))

    monkeypatch.setattr(type(handle.engine), "_begin_turn", begin_turn)
    return late


@pytest.mark.parametrize("lowest", [3, 6])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_backward_fetches_nothing_below_what_trains(lowest: int, activations: str) -> None:
    """Frozen blocks below the lowest one that trains have no part in a backward."""
    model = deep().requires_grad_(False)
    for part in (*model.layers[lowest:], model.head):
        part.requires_grad_(True)
    model, handle = streaming(model, activations=activations)
    _, backward = moved_by_a_step(model, handle)
    assert 0 < backward <= bytes_of(*model.layers[lowest:], model.head) + 8 * 1024  # padding
    assert all(p.grad is None for part in model.layers[:lowest] for p in part.parameters())


def test_frozen_blocks_above_what_trains_are_fetched() -> None:
    """The gradient goes through them."""
    model = deep()
    for part in model.layers[2:]:
        part.requires_grad_(False)
    model, handle = streaming(model)
    _, backward = moved_by_a_step(model, handle)
    assert backward >= bytes_of(*model.layers[2:6])


def test_evaluation_moves_nothing_backwards() -> None:
    model, handle = streaming(deep())
    model.eval()
    with torch.no_grad():
        for index in range(3):
            loss_of(model, index)
    forward, backward = streamed_bytes(handle)
    assert forward > 0
    assert backward == 0


@pytest.mark.parametrize("bound", ["20%", "50%"])
@pytest.mark.parametrize("stepping", ["plain", "lazy"])
def test_the_bound_holds_in_training(bound: str, stepping: str) -> None:
    model, handle = streaming(deep(), bound)
    optimizer = torch.optim.AdamW(model.parameters())
    if stepping == "lazy":
        optimizer = handle.optimizer(optimizer)
    train(model, optimizer, range(4))
    assert handle.plan.bound_bytes is not None
    assert 0 < handle.stats().peak_device_bytes <= handle.plan.bound_bytes


# ---- gradients ----------------------------------------------------------------------------------


def test_gradients_on_the_device_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave as each block's backward ends: never do all of them lie on the device.

    On the CPU PyTorch puts them where they belong, and nothing is counted; here they are taken as
    from another device.
    """
    model, handle = streaming(deep())
    train(model, sgd(model), range(3))
    assert handle.stats().gradient_bytes_peak == 0
    monkeypatch.setattr(gradients, "leave", lambda _: True)
    model, handle = streaming(deep())
    train(model, sgd(model), range(3))
    most = 2 * max(block.num_bytes for block in handle.engine.blocks)
    largest = max(p.nbytes for p in model.parameters())
    assert bytes_of(model.layers[0]) <= handle.stats().gradient_bytes_peak <= most + largest


def test_frozen_weights_are_never_copied_back() -> None:
    """Copying frozen weights, or zeros for their gradients, to the host took a quarter of one
    trainer's time."""
    case = CASES["llama"]
    model = adapt(case.build(), case)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    model, handle = streaming(model, "50%")
    optimizer = sgd(model)
    for index in range(3):
        case.loss(model, case.inputs(index)).backward()
        assert all((p.grad is None) is not p.requires_grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert all(streamed_bytes(handle))
    assert handle.stats().gradient_bytes_peak <= adapters


# ---- activations --------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """Counts operations, and knows which of the tensors they made are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.made: dict[StorageWeakRef, tuple[torch.dtype, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += 1
        given = {storage.data_ptr() for _, storage in _storages((args, kwargs))}
        for dtype, storage in _storages(result):
            if storage.data_ptr() not in given:  # not a view, and not written in place
                self.made[StorageWeakRef(storage)] = (dtype, storage.nbytes())
        return result

    def alive(self, dtype: torch.dtype, least: int = 0) -> int:
        """Bytes of tensors of at least `least` bytes that still exist."""
        return sum(
            size
            for storage, (kind, size) in self.made.items()
            if kind is dtype and size >= least and not storage.expired()
        )


def _storages(tree: Any) -> list[tuple[torch.dtype, torch.UntypedStorage]]:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [(leaf.dtype, leaf.untyped_storage()) for leaf in leaves]


def known(model: nn.Module) -> None:
    """Two steps, after which nothing is watched or planned any more."""
    train(model, sgd(model), range(2))


@pytest.mark.parametrize(
    ("activations", "again"),
    [("keep", 0), ("offload", 0), ("recompute", 1), ("recompute+offload", 1)],
)
def test_what_is_computed_again(activations: str, again: int) -> None:
    """Not recomputing gives the same bits: agreement alone would not show it."""
    model, _ = streaming(deep(), activations=activations)
    known(model)
    loss = loss_of(model, 3)
    with Watching() as watching:
        loss.backward()
    assert watching.counts["gelu"] == again * NUM_LAYERS


def test_a_recompute_keeps_only_the_inputs_of_blocks() -> None:
    alive = {}
    for activations in ("keep", "recompute"):
        model, _ = streaming(deep(), activations=activations)
        known(model)
        least = 2 * 8 * models.WIDTH * 4
        with Watching() as watching:
            loss = loss_of(model, 3)
        alive[activations] = watching.alive(torch.float32, least)
        loss.backward()
    assert alive["recompute"] < alive["keep"] / 3


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_autocast_keeps_no_cast_copy_of_each_block(activations: str) -> None:
    """Autocast casts a weight once and keeps the copy until its block has ended, and autograd
    keeps it until the backward: with every streamed weight in bfloat16 on the device, a bound was
    a bound of nothing."""
    alive = {}
    for target in (deep(), streaming(deep(), activations=activations)[0]):
        known(target)
        with Watching() as watching:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(target, 3)
            alive[target] = watching.alive(torch.bfloat16, models.WIDTH * models.HIDDEN * 2)
        loss.backward()
    plain, streamed = alive.values()
    assert plain == sum(p.nbytes // 2 for part in deep().layers for p in part.parameters()
                        if p.ndim == 2)  # fmt: skip
    assert streamed <= plain * 2 // NUM_LAYERS, "more than two blocks' copies are alive"
