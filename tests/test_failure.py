"""Failure is a state: after any exception, at any moment, the next call is right and nothing leaks."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from tiny import BOUND, TinyLM, build, ids, same_weights, stream
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from zoo import assert_bit_equal, by_name
from zoo.layers import WIDTH, Layer, layer_list

import superpipeline
from superpipeline import BackwardError, ClosedError, UnsupportedError
from superpipeline import streams as streams_file
from superpipeline.engine import Engine
from superpipeline.pipeline import Pipeline
from superpipeline.streams import CpuEvent


class Boom(Exception):
    """Raised on purpose."""


def streamed() -> tuple[TinyLM, Pipeline, torch.Tensor]:
    """A streamed model after its first pass, its handle, and inputs."""
    model, inputs = build(), ids()
    pipe = stream(model)
    with torch.no_grad():
        model(inputs)
    return model, pipe, inputs


def expect_plain(model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = build()(inputs)
        for _ in range(2):
            assert_bit_equal(model(inputs), expected)


def call_expecting(error: type[BaseException], model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad(), pytest.raises(error):
        model(inputs)


def raise_boom(*_: Any) -> None:
    raise Boom


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


# ---- exceptions in the user's code ----------------------------------------------------------


@pytest.mark.parametrize("fail", [raise_boom, interrupt])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", [*(f"layers.{i}" for i in range(5)), "layers.2.down", "embed", "norm", "head", ""]
)
def test_the_call_after_an_exception_is_right(
    name: str, when: str, fail: Callable[..., None]
) -> None:
    error = Boom if fail is raise_boom else KeyboardInterrupt
    model, inputs = build(), ids()
    pipe = stream(model)
    module = model.get_submodule(name)
    for first in (True, False):  # in the pass that discovers, and in a later one
        hook = (
            module.register_forward_pre_hook(fail)
            if when == "before"
            else module.register_forward_hook(fail)
        )
        call_expecting(error, model, inputs)
        call_expecting(error, model, inputs)
        hook.remove()
        assert same_weights(model, build())
        if first:
            expect_plain(model, inputs)
    expect_plain(model, inputs)
    pipe.close()
    assert same_weights(model, build())


@pytest.mark.parametrize("fail", [raise_boom, interrupt])
def test_an_exception_in_nested_blocks(fail: Callable[..., None]) -> None:
    """Experts inside layers; one that no token chose is not called, and does not raise."""
    case = by_name("module_list_moe")
    plain, model = case.build(), case.build()
    (x,) = case.inputs().args
    pipe = stream(model, "40%")
    num_raised = 0
    with torch.no_grad():
        expected = plain(x)
        for expert in [module for module in model.modules() if isinstance(module, Layer)]:
            hook = expert.register_forward_hook(fail)
            try:
                model(x)
            except (Boom, KeyboardInterrupt):
                num_raised += 1
            hook.remove()
            assert_bit_equal(model(x), expected)
    assert num_raised > 4
    pipe.close()
    assert same_weights(model, plain)


class Forgiving(nn.Module):
    """Catches what its children raise and goes on without them, with weights of its own."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(300, WIDTH) / 8)
            self.parts = layer_list(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = x + self.scale.sum(0)
                try:
                    x = part(x)
                except Boom:
                    x = x * 2
                x = x + self.scale[0]
            return x

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Outer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("bound", ["45%", "70%"])
def test_a_parent_that_catches_goes_on_right(bound: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Forgiving()

    plain, model, x = make(), make(), torch.randn(2, 3, WIDTH)
    pipe = stream(model, bound)
    for failing in itertools.product([None, 0, 1], repeat=2):
        hooks = [
            target.layers[i].parts[which].register_forward_hook(raise_boom)
            for target in (plain, model)
            for i, which in enumerate(failing)
            if which is not None
        ]
        with torch.no_grad():
            expected = plain(x)
            for _ in range(2):
                assert_bit_equal(model(x), expected)
        for hook in hooks:
            hook.remove()
    assert pipe.stats().streamed_bytes > 0


def test_out_of_memory_gets_a_note() -> None:
    model, _, inputs = streamed()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = model.layers[3].register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError) as caught:
        model(inputs)
    (note,) = caught.value.__notes__
    assert "superpipeline: weights hold" in note and "superpipeline.stream(model, weights=" in note
    hook.remove()
    expect_plain(model, inputs)


def test_a_generator_closed_early_and_a_checkpoint_that_stops_early() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layer_list(5)

        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            for layer in self.layers:
                x = layer(x)
                yield x

    torch.manual_seed(0)
    model = Steps()
    stream(model, "50%")
    x = torch.randn(1, 3, WIDTH)
    with torch.no_grad():
        everything = [*model(x)]
        running = model(x)
        assert_bit_equal(next(running), everything[0])
        running.close()
        for y, expected in zip(model(x), everything, strict=True):
            assert_bit_equal(y, expected)


# ---- exceptions in our own code -------------------------------------------------------------


class Trap:
    """Replaces a method by one that raises at its n-th call, before or after doing its work."""

    def __init__(self, error: BaseException, *, at: int, before: bool) -> None:
        self.error, self.at, self.before, self.count = error, at, before, 0
        self.sprung = False

    def set(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            springs = self.count == self.at
            self.sprung |= springs
            if springs and self.before:
                raise self.error
            result = original(*args, **kwargs)
            if springs:
                raise self.error
            return result

        monkeypatch.setattr(owner, name, trapped)


OURS = [
    (Engine, "take_turn"),
    (Engine, "begin_pass"),
    (Engine, "end_pass"),
    (Engine, "reset"),
    (Engine, "_fetch"),
    (Engine, "_end_turn"),
    (CpuEvent, "wait"),
    (Pipeline, "learn"),
    (Pipeline, "rebuild_if_changed"),
]
PLANNING = ["_change_plan", "_install", "_release_device", "_plan_for", "_set_up", "_take_down"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name"), OURS, ids=[f"{o.__name__}.{n}" for o, n in OURS])
def test_ctrl_c_inside_ours_at_every_call(
    owner: type, name: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = by_name("llama")
    plain, inputs = case.build(), case.inputs().kwargs
    with torch.no_grad():
        expected = plain(**inputs)
    for at in itertools.count(1):
        model = case.build()
        pipe = stream(model, "50%")
        trap = Trap(KeyboardInterrupt(), at=at, before=before)
        with monkeypatch.context() as patch, torch.no_grad():
            trap.set(patch, owner, name)
            hook = model.model.layers[3].register_forward_hook(raise_boom)
            for call in range(3):
                try:
                    model(**inputs)
                except Boom:
                    hook.remove()
                except KeyboardInterrupt:
                    break
                assert call < 3
            hook.remove()
        with torch.no_grad():
            for _ in range(2):
                assert_bit_equal(model(**inputs), expected)
        assert superpipeline.handle(model) is pipe
        pipe.close()
        assert same_weights(model, plain)
        if not trap.sprung:
            break
    assert at > 1, f"{name} was never called"


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", PLANNING)
@pytest.mark.parametrize("options", [{"weights": "70%"}, {"k": 4, "k_prime": 2}], ids=str)
def test_ctrl_c_while_planning_anew(
    options: dict[str, Any], name: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recover in ("call", "stream", "close"):
        model, pipe, inputs = streamed()
        with monkeypatch.context() as patch:
            Trap(KeyboardInterrupt(), at=1, before=before).set(patch, Pipeline, name)
            with contextlib.suppress(KeyboardInterrupt):
                superpipeline.stream(model, **options, quiet=True)
        if recover == "close":
            pipe.close()
            assert type(model) is TinyLM
        elif recover == "stream":
            stream(model, "60%")
        expect_plain(model, inputs)
        assert same_weights(model, build())


def test_no_memory_for_a_new_plan_leaves_a_model_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window of a new plan may not fit although the old one did; the model was dead then."""
    model, pipe, inputs = streamed()
    with monkeypatch.context() as patch:
        Trap(torch.OutOfMemoryError("no"), at=1, before=True).set(
            patch, superpipeline.pipeline, "Engine"
        )
        with pytest.raises(torch.OutOfMemoryError):
            superpipeline.stream(model, "60%", quiet=True)
    expect_plain(model, inputs)
    with monkeypatch.context() as patch:
        Trap(torch.OutOfMemoryError("no"), at=1, before=True).set(
            patch, superpipeline.pipeline, "Engine"
        )
        with pytest.raises(torch.OutOfMemoryError):
            superpipeline.stream(model, "55%", quiet=True)
    superpipeline.stream(model, "70%", quiet=True)
    expect_plain(model, inputs)
    with monkeypatch.context() as patch:
        Trap(torch.OutOfMemoryError("no"), at=1, before=True).set(
            patch, superpipeline.pipeline, "Engine"
        )
        with pytest.raises(torch.OutOfMemoryError):
            superpipeline.stream(model, "55%", quiet=True)
    pipe.close()
    assert type(model) is TinyLM
    assert same_weights(model, build())


def test_a_failed_copy_surfaces_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for at in itertools.count(1):
        model, inputs = build(), ids()
        pipe = stream(model)
        trap = Trap(OSError("the disk went away"), at=at, before=True)
        failures = 0
        with monkeypatch.context() as patch, torch.no_grad():
            trap.set(patch, streams_file, "_copy")
            for _ in range(2):
                try:
                    model(inputs)
                except OSError as error:
                    failures += 1
                    assert "the disk went away" in str(error)
        with torch.no_grad(), contextlib.suppress(OSError):
            model(inputs)  # meets the failure of a copy made ahead for it
        expect_plain(model, inputs)
        pipe.close()
        assert same_weights(model, build())
        if not trap.sprung:
            assert failures == 0
            break
    assert at > 4


# ---- closing and freeing --------------------------------------------------------------------


def test_close_and_plan_during_a_pass_are_refused() -> None:
    model, pipe, inputs = streamed()
    for use in (
        pipe.close,
        lambda: superpipeline.stream(model, "60%", quiet=True),
        lambda: pipe.verify(inputs),
    ):
        hook = model.layers[2].register_forward_hook(lambda *_, use=use: use() and None)
        with torch.no_grad(), pytest.raises(UnsupportedError, match="within a forward"):
            model(inputs)
        hook.remove()
        expect_plain(model, inputs)
    pipe.close()


def test_after_close() -> None:
    model, pipe, inputs = streamed()
    pipe.close()
    pipe.close()
    expect_plain(model, inputs)
    for use in (
        lambda: pipe.plan,
        lambda: pipe.host_bytes,
        pipe.explain,
        lambda: pipe.verify(inputs),
        lambda: pipe.verify_call(model, inputs),
    ):
        with pytest.raises(ClosedError):
            use()
    again = stream(model)
    assert again is not pipe
    expect_plain(model, inputs)
    again.close()
    loss = model(inputs).square().sum()
    loss.backward()
    plain = build()
    plain(inputs).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(ours.grad, theirs.grad)


def fetch_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "superpipeline-fetch"}


def test_a_dropped_model_frees_everything() -> None:
    gc.collect()
    others = fetch_threads()
    model, pipe, inputs = streamed()
    (thread,) = fetch_threads() - others
    alive = [weakref.ref(thing) for thing in (model, pipe, pipe.engine, *pipe._pack.buffers)]
    alive += [weakref.ref(type(model)), weakref.ref(pipe._streams)]
    del model, pipe
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    thread.join(60)
    assert not thread.is_alive()


def test_a_dropped_model_with_a_handle_frees_the_model() -> None:
    model, pipe, inputs = streamed()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(ClosedError, match="no longer exists"):
        pipe.verify(inputs)
    pipe.close()


def test_nothing_leaks_over_fifty_cycles() -> None:
    model, inputs = nn.Sequential(*layer_list(40)), torch.randn(1, 3, WIDTH)  # 4 MiB
    process = psutil.Process()
    num_bytes = sum(p.nbytes for p in model.parameters())

    def cycles(count: int) -> None:
        for _ in range(count):
            with superpipeline.streaming(model, "30%", device="cpu", quiet=True), torch.no_grad():
                model(inputs)
                model(inputs)
        gc.collect()

    cycles(10)
    threads, classes, before = fetch_threads(), len(Layer.__subclasses__()), process.memory_info()
    cycles(50)
    assert fetch_threads() == threads
    assert len(Layer.__subclasses__()) == classes
    # Fifty leaks of the window alone would be fifteen times the model.
    assert process.memory_info().rss - before.rss < 2 * num_bytes


# ---- backward -------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Streamed blocks with every way for a loss to be reached beside the output."""

    class Keeping(Layer):
        kept: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            self.kept = y * 2
            return y

    def __init__(self, layer: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList((layer or self.Keeping)() for _ in range(5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return {"last": states[-1], "states": states}


class StashingLinear(torch.autograd.Function):
    """Keeps a view of its weight on ctx instead of saving it, as 4-bit matmuls do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight.t()
        return x @ ctx.weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.weight.t(), None


class Stashing(nn.Module):
    """A block whose only node with weights is a StashingLinear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return StashingLinear.apply(x, self.weight)[..., :WIDTH]


class Biased(nn.Module):
    """A block in which only a bias is trained: nothing that lies in the window is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(192, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.detach(), self.weight) + self.bias.sum(0)


def backward_of(make: Callable[[], nn.Module], loss: Callable[[nn.Module], torch.Tensor]) -> None:
    """The plain model's backward works; the streamed one's raises; the next call is right."""
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    pipe = stream(model, "45%")
    loss(plain).backward()
    for _ in range(2):
        value = loss(model)
        with pytest.raises(BackwardError, match="streamed"):
            value.backward()
        assert not any(
            alias.tensor.grad is not None
            for weight in pipe._layout.weights
            if weight.index not in pipe.plan.resident
            for alias in weight.aliases
        )
        model.zero_grad()
    assert_bit_equal(loss(model), loss(plain))
    x = torch.ones(1, 2, WIDTH)
    with torch.no_grad():
        assert_bit_equal(model(x), plain(x))
    pipe.close()
    loss(model).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert_bit_equal(ours.grad, theirs.grad)


def given(*, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, 3, WIDTH, generator=generator).requires_grad_(requires_grad)


def frozen() -> nn.Module:
    return Blocks().requires_grad_(False)


def checkpointed(*, reentrant: bool) -> Callable[[], nn.Module]:
    class Checkpointed(Blocks):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return {"last": x}

    return Checkpointed


LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]] = {
    "output": (Blocks, lambda m: m(given())["last"].sum()),
    "hidden_state": (Blocks, lambda m: m(given())["states"][2].square().sum()),
    "attribute": (Blocks, lambda m: (m(given()), m.layers[1].kept.sum())[1]),
    "input_grads_of_frozen": (frozen, lambda m: m(given(requires_grad=True))["last"].sum()),
    "frozen_attribute": (
        frozen,
        lambda m: (m(given(requires_grad=True)), m.layers[2].kept.sum())[1],
    ),
    "ctx": (lambda: Blocks(Stashing), lambda m: m(given(requires_grad=True))["last"].sum()),
    "bias_only": (lambda: Blocks(Biased), lambda m: m(given())["last"].sum()),
    "checkpointed": (checkpointed(reentrant=False), lambda m: m(given())["last"].sum()),
    "checkpointed_reentrant": (
        checkpointed(reentrant=True),
        lambda m: m(given(requires_grad=True))["last"].sum(),
    ),
    "around_a_call": (
        Blocks,
        lambda m: checkpoint(lambda x: m(x)["last"], given(), use_reentrant=False).sum(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_backward_through_streamed_blocks_raises(name: str) -> None:
    backward_of(*LOSSES[name])


def test_a_backward_outside_streamed_blocks_is_the_plain_models() -> None:
    plain, model, inputs = build(), build(), ids()
    stream(model)
    grads = []
    for backbone in (plain, model):
        torch.manual_seed(1)
        head = nn.Linear(1024, 4)
        with torch.no_grad():
            features = backbone(inputs)
        head(features).logsumexp(-1).sum().backward()
        head(backbone(inputs).detach()).square().sum().backward()
        grads.append([p.grad for p in head.parameters()])
        assert all(p.grad is None for p in backbone.parameters())
    assert_bit_equal(grads[1], grads[0])


def test_what_a_block_passes_on_untouched_keeps_its_backward() -> None:
    """The guard on a block's outputs was once put on the node of the input that it handed on."""

    class Passing(Layer):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> Any:
            return pair[0], super().forward(pair[1])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Passing() for _ in range(4))

        def forward(self, pair: Any) -> Any:
            for layer in self.layers:
                pair = layer(pair)
            return pair

    torch.manual_seed(0)
    model = Model()
    stream(model, "60%")
    scale = torch.ones(WIDTH, requires_grad=True)
    x = given() * scale
    untouched, result = model((x, x))
    untouched.sum().backward(retain_graph=True)
    assert_bit_equal(scale.grad, given().sum((0, 1)))
    with pytest.raises(BackwardError):
        result.sum().backward()


def test_a_model_that_fits_trains_as_the_plain_one() -> None:
    plain, model, inputs = build(), build(), ids()
    stream(model, "100%")
    for target in (plain, model):
        optimizer = torch.optim.AdamW(target.parameters(), lr=1e-3)
        for _ in range(3):
            target(inputs).logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_weights(model, plain)
    expect = plain(inputs)
    assert_bit_equal(model(inputs), expect)


def test_a_weight_decay_on_host_weights_is_no_backward_through_blocks() -> None:
    plain, (model, _, inputs) = build(), streamed()
    for target in (plain, model):
        sum(p.square().sum() for p in target.parameters()).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(ours.grad, theirs.grad)
    expect_plain(model, inputs)


def test_the_bound_used_here_streams() -> None:
    model, pipe, _ = streamed()
    assert pipe.stats().streamed_bytes > 0 and pipe.plan.bound_bytes is not None
    assert BOUND.endswith("%") and model.training is False
