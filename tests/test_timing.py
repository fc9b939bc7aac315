"""Timed passes: which are timed, what is read of them, and that the plan follows."""

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import assembly
from superpipeline.cpu_streams import CpuStreams
from superpipeline.plan import Plan
from superpipeline.stopwatch import Stopwatch, Timing


class Lumpy(nn.Module):
    """Blocks of equal bytes; only every third one takes time, says the clock below."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(18))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Clock:
    """Marks of scripted moments: the device's time goes on by what a block is said to take."""

    def __init__(self, monkeypatch, seconds_of_visit):
        self.now, self.turn, self.is_late = 0.0, 0, False
        self.seconds_of_visit = seconds_of_visit
        monkeypatch.setattr(CpuStreams, "keeps_time", True)
        monkeypatch.setattr(CpuStreams, "mark", lambda _: self.mark())
        monkeypatch.setattr(CpuStreams, "seconds", lambda _, a, b: None if self.is_late else b - a)

    def mark(self):
        self.turn += 1
        if self.turn % 2 == 0:  # the end of a turn
            self.now += self.seconds_of_visit(self.turn // 2 - 1)
        return self.now


def test_the_first_second_fourth_and_eighth_pass_are_timed():
    timing = Timing(CpuStreams())
    timed = [number for number in range(1, 20) if timing.begin_pass() is not None]
    assert timed == [1, 2, 4, 8, 16]


def test_times_are_read_once_and_only_when_the_device_is_done(monkeypatch):
    clock = Clock(monkeypatch, lambda visit: [1.0, 3.0, 5.0][visit])
    timing = Timing(CpuStreams())
    watch = timing.begin_pass()
    assert isinstance(watch, Stopwatch)
    for block in (0, 1, 1):
        watch.begin_turn(block)
        watch.end_turn()
    assert timing.times() is None  # the pass is not over
    watch.end_pass()
    clock.is_late = True
    assert timing.times() is None
    clock.is_late = False
    assert timing.times() == {0: 1.0, 1: 4.0}
    assert timing.times() is None


def test_a_dropped_pass_is_no_measure():
    timing = Timing(CpuStreams())
    watch = timing.begin_pass()
    watch.end_pass()
    timing.drop()
    assert timing.times() is None


def streamed(monkeypatch, seconds):
    """The model, its plain output, its input, and the handle; blocks take `seconds(block)`."""
    torch.manual_seed(0)
    model, x = Lumpy().eval(), torch.randn(4, 256)
    with torch.no_grad():
        expected = model(x)
    Clock(monkeypatch, lambda visit: seconds(visit % 18))
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    monkeypatch.setattr(assembly, "link_rate", lambda _: 1e9)
    return model, expected, x, pipe


@torch.no_grad()
def test_the_plan_follows_what_passes_show(monkeypatch):
    copy_s = 256 * 256 * 4 / 1e9
    model, expected, x, pipe = streamed(monkeypatch, lambda block: copy_s * 3 * (block % 3 == 0))
    before = pipe.plan
    for _ in range(4):
        assert torch.equal(model(x), expected)
    assert pipe.plan.workload.busy
    assert pipe.plan.window_bytes > before.window_bytes
    assert pipe.plan.device_bytes <= before.bound_bytes
    assert pipe.stats().peak_device_bytes <= before.bound_bytes
    plan = pipe.plan
    for _ in range(20):
        assert torch.equal(model(x), expected)
    assert pipe.plan is plan  # the same times again are no news


@torch.no_grad()
def test_a_plan_that_keeps_the_link_at_work_stays(monkeypatch):
    model, expected, x, pipe = streamed(monkeypatch, lambda _: 0.0)
    assert torch.equal(model(x), expected)
    plan = pipe.plan
    for _ in range(10):
        assert torch.equal(model(x), expected)
    assert pipe.plan is plan


def test_passes_with_gradients_are_not_timed(monkeypatch):
    model, expected, x, pipe = streamed(monkeypatch, lambda block: 1.0 * (block % 3 == 0))
    for _ in range(4):
        output = model(x)
        assert torch.equal(output, expected)
        output.sum().backward()
    assert not pipe.plan.workload.busy


@torch.no_grad()
def test_a_failed_pass_is_no_measure(monkeypatch):
    model, expected, x, pipe = streamed(monkeypatch, lambda block: 1.0 * (block % 3 == 0))
    model(x)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(4, 255))
    assert pipe.engine.stopwatch is None
    assert not pipe.plan.workload.busy
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_k_and_k_prime_are_left_as_they_were_given(monkeypatch):
    model, expected, x, _ = streamed(monkeypatch, lambda block: 1.0 * (block % 3 == 0))
    superpipeline.stream(model, k=4, k_prime=1, quiet=True)
    plan = superpipeline.handle(model).plan
    for _ in range(6):
        assert torch.equal(model(x), expected)
    assert superpipeline.handle(model).plan.resident == plan.resident


@torch.no_grad()
def test_a_pass_in_which_nothing_is_fetched_takes_no_turns(monkeypatch):
    """The modules are called as if nobody watched; visits count all the same."""
    model, expected, x, pipe = streamed(monkeypatch, lambda _: 0.0)
    superpipeline.stream(model, weights="100%", device="cpu", quiet=True)
    assert torch.equal(model(x), expected)  # the first of its kind is watched
    visits = pipe.stats().visits

    def refuse(self, block):
        raise AssertionError("a turn was taken")

    monkeypatch.setattr(type(pipe.engine), "take_turn", refuse)
    assert torch.equal(model(x), expected)
    assert pipe.stats().visits == visits + 18
    with torch.enable_grad(), pytest.raises(AssertionError, match="a turn was taken"):
        model(x)


@torch.no_grad()
def test_a_resident_after_a_resident_looks_for_nothing_to_fetch(monkeypatch):
    """Nothing was evicted since the last look, and nothing else is expected."""
    model, expected, x, pipe = streamed(monkeypatch, lambda _: 0.0)
    superpipeline.stream(model, weights="90%", device="cpu", quiet=True)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    monkeypatch.setattr(CpuStreams, "keeps_time", False)  # else plans are played through as well
    looks, look, plan = [], Plan.fetches_ahead, pipe.plan
    monkeypatch.setattr(Plan, "fetches_ahead", lambda *args: looks.append(args[1]) or look(*args))
    late = pipe.stats().late_fetches
    assert torch.equal(model(x), expected)
    runs = sum(
        index in plan.places or index == 0 or index - 1 in plan.places for index in range(18)
    )
    assert 0 < len(plan.places) < 9
    assert len(looks) == runs + (17 in plan.places)  # the end of the pass looks as well
    assert pipe.stats().late_fetches == late
