"""Failure is a state: after any exception the next call is right and nothing leaks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import (
    Pipeline,
    cpu_streams,
)
from superpipeline.assembly import Assembly
from superpipeline.cpu_streams import CpuEvent
from superpipeline.engine import Engine
from tiny import (
    TinyLM,
    build,
    expect_plain,
    ids,
    same_weights,
    stream,
    streamed,
)
from zoo import assert_bit_equal, by_name
from zoo.layers import WIDTH, Layer, layer_list


class BoomError(Exception):
    """Raised on purpose."""


def call_expecting(error: type[BaseException], model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad(), pytest.raises(error):
        model(inputs)


def raise_boom(*_: Any) -> None:
    raise BoomError


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fail", [raise_boom, interrupt])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", [*(f"layers.{i}" for i in range(5)), "layers.2.down", "embed", "norm", "head", ""]
)
def test_the_call_after_an_exception_is_right(
    name: str, when: str, fail: Callable[..., None]
) -> None:
    error = BoomError if fail is raise_boom else KeyboardInterrupt
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
            except (BoomError, KeyboardInterrupt):
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
                except BoomError:
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
PLANNING = [
    (Assembly, "change_plan"),
    (Assembly, "_install"),
    (Assembly, "_release_device"),
    (Pipeline, "_plan_for"),
    (Assembly, "set_up"),
    (Assembly, "take_down"),
]


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
                except BoomError:
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
@pytest.mark.parametrize(("owner", "name"), PLANNING, ids=[n for _, n in PLANNING])
@pytest.mark.parametrize("options", [{"weights": "70%"}, {"k": 4, "k_prime": 2}], ids=str)
def test_ctrl_c_while_planning_anew(
    options: dict[str, Any], owner: type, name: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for recover in ("call", "stream", "close"):
        model, pipe, inputs = streamed()
        with monkeypatch.context() as patch:
            Trap(KeyboardInterrupt(), at=1, before=before).set(patch, owner, name)
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
            patch, superpipeline.assembly, "Engine"
        )
        with pytest.raises(torch.OutOfMemoryError):
            superpipeline.stream(model, "60%", quiet=True)
    expect_plain(model, inputs)
    with monkeypatch.context() as patch:
        Trap(torch.OutOfMemoryError("no"), at=1, before=True).set(
            patch, superpipeline.assembly, "Engine"
        )
        with pytest.raises(torch.OutOfMemoryError):
            superpipeline.stream(model, "55%", quiet=True)
    superpipeline.stream(model, "70%", quiet=True)
    expect_plain(model, inputs)
    with monkeypatch.context() as patch:
        Trap(torch.OutOfMemoryError("no"), at=1, before=True).set(
            patch, superpipeline.assembly, "Engine"
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
            trap.set(patch, cpu_streams, "_land")
            for _ in range(2):
                try:
                    model(inputs)
                except OSError as error:
                    failures += "the disk went away" in str(error)
        with torch.no_grad(), contextlib.suppress(OSError):
            model(inputs)  # meets the failure of a copy made ahead for it
        expect_plain(model, inputs)
        pipe.close()
        assert same_weights(model, build())
        if not trap.sprung:
            assert failures == 0
            break
    assert at > 4
