"""Units that are cut into their layers: the same bits, and a smaller window."""

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import blocks, build
from superpipeline.errors import BudgetError
from test_equality import bound_for
from test_from_disk import results
from zoo import CASES, ZooCase, assert_bit_equal, by_name


@pytest.fixture(autouse=True)
def cut_small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's units are small."""
    monkeypatch.setattr(build, "LARGEST_BLOCK", 1)
    monkeypatch.setattr(build, "LEAST_TRANSFER", {"cpu": 1})
    monkeypatch.setattr(blocks, "LEAST_PART_BYTES", 2048)


@pytest.mark.parametrize("bound", ["least", "40%"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_computes_the_same_in_layers(case: ZooCase, bound: str) -> None:
    model, plain = case.build(), case.build()
    expected = results(plain, case)
    options = bound_for(model, bound)
    try:
        superpipeline.stream(model, **options, device="cpu", quiet=True)
    except BudgetError as error:  # `bound_for` knows whole units
        superpipeline.stream(model, error.least_bytes, device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    for ours, theirs in zip(results(model, case), expected, strict=True):
        assert_bit_equal(ours, theirs)
    assert pipe.stats().streamed_bytes > 0
    pipe.close()
    for ours, theirs in zip(results(model, case), results(plain, case), strict=True):
        assert_bit_equal(ours, theirs)


def test_the_window_is_smaller_and_less_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for most in (10**9, 1):
        monkeypatch.setattr(build, "LARGEST_BLOCK", most)
        model = superpipeline.stream(by_name("llama").build(), "50%", device="cpu", quiet=True)
        plans.append(superpipeline.handle(model).plan)
    whole, cut = plans
    assert cut.window_bytes < whole.window_bytes * 0.7
    assert cut.streamed_bytes < whole.streamed_bytes
    assert cut.device_bytes <= whole.bound_bytes


def test_a_whole_model_and_blocks_counted_in_k_are_not_cut() -> None:
    model = by_name("llama").build()
    superpipeline.stream(model, "50%", device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    many = len(pipe.plan.workload.blocks)
    for options in ({"weights": "100%"}, {"k": 2}):
        superpipeline.stream(model, **options, device="cpu", quiet=True)
        assert len(pipe.plan.workload.blocks) < many
        superpipeline.stream(model, "50%", device="cpu", quiet=True)
        assert len(pipe.plan.workload.blocks) == many


def test_what_a_unit_registers_itself_is_resident() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(64))
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu()) * self.scale

    torch.manual_seed(0)
    model = nn.Sequential(*[Scaled() for _ in range(4)])
    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        superpipeline.stream(model, "50%", device="cpu", quiet=True)
        for _ in range(3):
            assert torch.equal(model(x), expected)
    plan = superpipeline.handle(model).plan
    resident = {plan.workload.weights[index].name for index in plan.resident}
    assert {f"{layer}.scale" for layer in range(4)} <= resident
    assert all(block.name.endswith(("up", "down")) for block in plan.workload.blocks)


def test_layers_stay_whole_where_activations_are_recomputed_or_leave() -> None:
    """Of a layer in parts, what lies between the parts would stay on the device."""
    model = by_name("llama").build()
    superpipeline.stream(model, "50%", device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    num_cut = len(pipe.plan.workload.blocks)
    for activations in ("recompute", "offload", "recompute+offload"):
        superpipeline.stream(model, "60%", device="cpu", quiet=True, activations=activations)
        assert len(pipe.plan.workload.blocks) < num_cut / 2
        superpipeline.stream(model, "50%", device="cpu", quiet=True)
        assert len(pipe.plan.workload.blocks) == num_cut
