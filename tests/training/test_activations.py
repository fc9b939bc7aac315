"""What a block saves: kept, computed again, or on the host, always with the plain model's bits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import superpipeline
from superpipeline import BackwardError, offload
from training import models
from training.cases import CASES
from training.reference import Tensors, stream_within
from training.side_by_side import everything, gradients, inputs, loss_of, sgd, side_by_side, train
from training.test_what_moves import Watching, deep, known, streaming
from zoo.case import BUILD_SEED, seeded

MODES = ["keep", "recompute", "offload", "recompute+offload"]
EVERY = pytest.mark.parametrize("activations", MODES)
AWAY = pytest.mark.parametrize("activations", ["offload", "recompute+offload"])


@pytest.fixture(autouse=True)
def everything_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", {"cpu": 1})


def offloader(model: nn.Module) -> Any:
    return superpipeline.handle(model)._passes.activations._offload


def stack_of(layer: Callable[[], nn.Module], count: int = 5) -> Callable[[], nn.Module]:
    return seeded(lambda: models.Stack([layer() for _ in range(count)]).train(), BUILD_SEED)


def steps(model: nn.Module) -> Tensors:
    return everything(model, train(model, sgd(model), range(4)))


# ---- memory -------------------------------------------------------------------------------------


@AWAY
def test_at_most_two_blocks_activations_are_on_the_device(activations: str) -> None:
    alive = {}
    for mode in ("keep", activations):
        model, _ = streaming(deep(), activations=mode)
        known(model)
        with Watching() as watching:
            loss = loss_of(model, 3)
            alive[mode] = watching.alive(torch.float32, 1024)
        loss.backward()
    per_block = alive["keep"] // 8
    assert alive[activations] <= 2 * per_block + 16 * 1024  # between blocks, and the loss


def test_the_backward_brings_two_blocks_at_a_time() -> None:
    model, _ = streaming(deep(), activations="offload")
    known(model)
    streams, most, present = offloader(model)._streams, 0, []
    allocate = streams.allocate

    def watch(num_bytes: int) -> torch.Tensor:
        nonlocal most
        memory = allocate(num_bytes)
        present.append((num_bytes, StorageWeakRef(memory.untyped_storage())))
        most = max(most, sum(size for size, storage in present if not storage.expired()))
        return memory

    loss = loss_of(model, 3)
    streams.allocate = watch
    loss.backward()
    assert len(present) >= 8
    assert most <= 2 * max(size for size, _ in present)
    assert all(storage.expired() for _, storage in present), "something stays on the device"


def test_host_memory_is_lent_again() -> None:
    """Pinned memory is dear: steps of the same shapes allocate none."""
    model, _ = streaming(deep(), activations="offload")
    known(model)
    memory = offloader(model).memory
    before = memory.num_bytes
    train(model, sgd(model), range(3))
    assert memory.num_bytes == before > 0
    assert memory.lent_bytes == 0
    superpipeline.handle(model).close()
    assert memory.num_bytes == 0


def test_host_memory_grows_with_the_batch_and_no_further() -> None:
    """Sequences of many lengths: as many buffers as blocks, as large as the largest."""
    model, _ = streaming(deep(), activations="offload")
    for length in (4, 16, 8, 12, 16, 3):
        model(torch.randn(2, length, models.WIDTH)).sum().backward()
        model.zero_grad()
    memory = offloader(model).memory
    largest = max(buffer.bytes.numel() for buffer, _ in memory._buffers)
    assert len(memory._buffers) <= 10
    assert memory.num_bytes <= 10 * largest


class Repeating(nn.Module):
    """Saves one tensor many times: whole, in parts, and as other blocks save it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(models.WIDTH, 3 * models.WIDTH)
        self.mask: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.mask is not None
        q, k, v = self.up(x).chunk(3, dim=-1)
        y = q * k + k * v + q.flatten(0, 1).view_as(q) * v
        return x + y * self.mask


def test_a_tensor_that_is_saved_several_times_moves_once() -> None:
    model = stack_of(Repeating, 4)()
    mask = torch.rand(2, 8, models.WIDTH)
    for part in model.layers:
        part.mask = mask
    model, _ = streaming(model, activations="offload")
    model(inputs().args[0]).sum().backward()
    before = offloader(model).moved_bytes
    model(inputs().args[0]).sum().backward()
    row = mask.nbytes
    # Of each layer its input, what `up` gave, and the sum y; once the mask, and stem and head's x.
    assert offloader(model).moved_bytes - before <= row * (4 * (1 + 3 + 1) + 1 + 2)


def test_outputs_that_are_saved_are_freed() -> None:
    """A node that keeps its own output through a saved-tensor hook is never freed."""

    class Bent(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x))

    build = stack_of(lambda: Bent(models.WIDTH, models.WIDTH))
    for activations in MODES:
        model, _ = streaming(build(), activations=activations)
        with Watching() as watching:
            loss = loss_of(model)
            del loss
            gc.collect()
            # At most what the last call saved, until the next one.
            assert watching.alive(torch.float32, 1024) <= 8192, activations


# ---- bits ---------------------------------------------------------------------------------------


class Looking(torch.autograd.Function):
    """Notes how what it saved lies in memory when the backward reads it."""

    seen: list[tuple[Any, ...]]

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return sum(t.sum() for t in tensors) * torch.ones(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
        for t in saved:
            lies = t.dtype, tuple(t.shape), t.stride(), t.data_ptr() % 64
            Looking.seen.append((lies, t.detach().clone()))
        return tuple(grad * torch.ones_like(t) for t in saved)


class Odd(nn.Module):
    """Saves tensors that lie in every way: transposed, expanded, cut out, at odd addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(models.WIDTH, models.WIDTH)
        self.seen_before: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        flat = torch.cat([y.flatten(), y.flatten()[:7]])
        picture = y.view(2, 2, 4, models.WIDTH).to(memory_format=torch.channels_last)
        saved = (
            y.transpose(1, 2), y[:, :1].expand(2, 5, models.WIDTH), y[:, 1::3, 5:90:2],
            flat[3:-1], picture, picture[:, 1], y.sum(), y[:0], torch.view_as_complex(
                y.view(2, 8, -1, 2)
            ).conj(),
        )  # fmt: skip
        real = [t.real if t.is_complex() else t for t in saved]
        type(self).lies += [
            ((t.dtype, tuple(t.shape), t.stride(), t.data_ptr() % 64), t.detach().clone())
            for t in real
        ]
        return x + y * Looking.apply(*real)

    lies: ClassVar[list[tuple[Any, ...]]] = []


@EVERY
def test_what_is_saved_comes_back_as_it_lay(activations: str) -> None:
    """Bits of a sum depend on strides and, on a CPU, on the address."""
    model, _ = streaming(stack_of(Odd, 1)(), "k2", activations=activations)
    Odd.lies, Looking.seen = [], []
    model(inputs().args[0]).sum().backward()
    assert len(Looking.seen) == 9
    for (lies, values), (lay, before) in zip(Looking.seen, Odd.lies[:9], strict=True):
        assert torch.equal(values, before)
        assert lies[:3] == lay[:3]
        if values.numel():
            assert lies[3] == lay[3]


class Stateful(models.Dropped):
    """Its forward depends on state that each call changes, and leaves a trace everywhere."""

    def __init__(self) -> None:
        super().__init__(models.WIDTH, models.HIDDEN)
        self.batch_norm = nn.BatchNorm1d(8)
        self.calls = 0
        self.trace: torch.Tensor | None = None
        self.register_buffer("mean", torch.zeros(models.WIDTH))
        self.register_buffer("replaced", torch.zeros(models.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean.data.mul_(0.9).add_(x.detach().mean(dim=(0, 1)))
        self.replaced = self.replaced * 0.5 + x.detach().mean(dim=(0, 1))
        x = super().forward(self.batch_norm(x) * (1 + self.mean) + self.replaced)
        self.trace = x.square().mean()
        return x * self.calls if self.calls % 2 else x


@EVERY
def test_state_is_as_in_the_plain_model(activations: str) -> None:
    """A batch that a BatchNorm counted twice, an average that a recompute moved on: statistics
    drifted, and nothing said so. Here the forward reads what it wrote, too."""

    def script(model: nn.Module) -> Tensors:
        seen = train(model, sgd(model), range(3))
        for index in range(2):  # two graphs at once: state moves on before the backward
            loss_of(model, index).backward(retain_graph=True)
        first, second = loss_of(model, 0), loss_of(model, 1)
        second.backward()
        first.backward()
        seen |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        seen |= {f"calls {i}": torch.tensor(part.calls) for i, part in enumerate(model.layers)}
        seen |= {f"trace {i}": part.trace.detach() for i, part in enumerate(model.layers)}
        return everything(model, seen) | gradients(model)

    side_by_side(script, stack_of(Stateful), activations=activations)


class Writing(models.Dropped):
    """Appends to a list and a dict that it is given, and reads what was there before."""

    def forward(self, x: torch.Tensor, notes: dict[str, Any]) -> torch.Tensor:  # type: ignore[override]
        notes["means"].append(x.mean(dim=1))
        notes["count"] += 1
        x = super().forward(x) * notes["count"] + notes["means"][-1][:, None]
        notes["last"] = x
        return x


class Notes(models.Stack):
    def __init__(self) -> None:
        super().__init__([Writing(models.WIDTH, models.HIDDEN) for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        notes: dict[str, Any] = {"means": [], "count": 0}
        x = self.stem(x)
        for part in self.layers:
            x = part(x, notes)
        assert len(notes["means"]) == notes["count"] == 5
        return self.head(x + notes["means"][2][:, None] + notes["last"])


@EVERY
def test_containers_that_a_block_writes_into(activations: str) -> None:
    """What is computed again must not find what the first call wrote, nor write it once more."""
    side_by_side(steps, seeded(Notes, BUILD_SEED), activations=activations)


def test_a_mode_that_changed_before_the_backward() -> None:
    """Dropout is on or off as it was in the forward."""

    def script(model: nn.Module) -> Tensors:
        loss = loss_of(model)
        model.eval()
        loss.backward()
        assert not model.layers[0].training
        return gradients(model)

    side_by_side(script, activations="recompute")


@EVERY
def test_the_same_graph_twice_and_in_parts(activations: str) -> None:
    def script(model: nn.Module) -> Tensors:
        loss = loss_of(model)
        upper = list(model.layers[3].parameters())
        found = torch.autograd.grad(loss, upper, retain_graph=True)
        loss.backward(retain_graph=True)
        loss_of(model, 1).backward()
        loss.backward()
        return gradients(model) | {f"found {i}": grad for i, grad in enumerate(found)}

    side_by_side(script, activations=activations)


@EVERY
def test_hooks_of_the_users_own(activations: str) -> None:
    def script(model: nn.Module) -> Tensors:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model)
        loss.backward()
        return gradients(model)

    side_by_side(script, activations=activations)


@AWAY
def test_a_backward_that_fails_leaves_nothing(activations: str) -> None:
    def script(model: nn.Module) -> Tensors:
        loss = loss_of(model)

        def fail(_: Any) -> None:
            raise ValueError("on purpose")

        hook = model.layers[2].up.weight.register_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            loss.backward()
        hook.remove()
        model.zero_grad()
        return steps(model)

    side_by_side(script, activations=activations)


@EVERY
def test_a_graph_that_is_looked_at(activations: str) -> None:
    """A debugger reads `grad_fn._saved_self`, outside of any backward."""

    def script(model: nn.Module) -> Tensors:
        kept: list[torch.Tensor] = []
        hook = model.layers[3].up.register_forward_hook(lambda *args: kept.append(args[2]))
        loss = loss_of(model)
        hook.remove()
        found: Tensors = {}
        waiting = [kept[0].grad_fn]
        while waiting:
            node = waiting.pop()
            for name in ("_saved_mat1", "_saved_mat2", "_saved_self"):
                if isinstance(getattr(node, name, None), torch.Tensor):
                    found[f"{len(found)} {name}"] = getattr(node, name).clone()
            waiting += [above for above, _ in node.next_functions if above is not None]
        loss.backward()
        return found | gradients(model)

    side_by_side(script, activations=activations)


# ---- what is refused ----------------------------------------------------------------------------


class Overwriting(models.Dropped):
    """Writes to what its own nodes have saved."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.up(self.norm(x)))
        y = self.down(hidden * hidden)
        with torch.no_grad():
            hidden.add_(1)
        return x + y


@pytest.mark.parametrize("activations", ["keep", "offload"])
def test_a_saved_activation_that_was_written(activations: str) -> None:
    """Saved-tensor hooks switch PyTorch's check off. (What is computed again is not looked at by
    PyTorch's own checkpoint either.)"""
    build = stack_of(lambda: Overwriting(models.WIDTH, models.HIDDEN))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(build()).backward()
    model, _ = streaming(build(), activations=activations)
    with pytest.raises(BackwardError, match=r"modified by an inplace operation: a float32 \[2, 8"):
        loss_of(model).backward()


@pytest.mark.parametrize("activations", ["recompute", "recompute+offload"])
def test_an_input_that_was_written_before_it_is_computed_with_again(activations: str) -> None:
    model, _ = streaming(CASES["dropout"].build(), activations=activations)
    x = torch.randn(2, 8, models.WIDTH) * 1
    loss = model.layers[1](model.layers[0](x)).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@EVERY
def test_higher_order_gradients_are_refused(activations: str) -> None:
    model, _ = streaming(deep(), activations=activations)
    with pytest.raises(BackwardError, match="create_graph"):
        loss_of(model).backward(create_graph=True)


# ---- options ------------------------------------------------------------------------------------


def test_the_mode_can_be_changed() -> None:
    model = stream_within(deep(), "k2", activations="offload")
    known(model)
    assert offloader(model).moved_bytes > 0
    moved = offloader(model).moved_bytes
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    known(model)
    assert offloader(model).moved_bytes == moved


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_blocks_that_are_resident(activations: str) -> None:
    """Memory is to be foreseen: what a block saves does not depend on where its weights are."""
    model, _ = streaming(deep(), "100%" if False else "50%", activations=activations)
    superpipeline.stream(model, "100%", device="cpu", activations=activations, quiet=True)
    known(model)
    with Watching() as watching:
        loss = loss_of(model, 3)
        alive = watching.alive(torch.float32, 8 * 1024)
    assert alive <= 12 * 16 * 1024
    with Watching() as watching:
        loss.backward()
    assert watching.counts["gelu"] == (8 if activations == "recompute" else 0)
