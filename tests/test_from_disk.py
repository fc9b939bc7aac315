"""Every model of the zoo, its weights on disk, gives the plain model's bits."""

from pathlib import Path

import pytest
import torch

import superpipeline
from on_disk import align_parameters, map_parameters, refused_at_most, stand_in_parameters
from test_equality import bound_for
from zoo import CASES, ZooCase, assert_bit_equal, flatten


def results(model: torch.nn.Module, case: ZooCase) -> list[list[torch.Tensor]]:
    """Two runs in a row of the first call."""
    with torch.no_grad():
        return [[t.detach().clone() for t in flatten(case.calls[0].run(model))] for _ in range(2)]


def expect_equal(case: ZooCase, model: torch.nn.Module, plain: torch.nn.Module, bound: str) -> None:
    expected = results(plain, case)
    options = bound_for(model, bound)
    superpipeline.stream(model, **options, device="cpu", quiet=True)
    handle = superpipeline.handle(model)
    for ours, theirs in zip(results(model, case), expected, strict=True):
        assert_bit_equal(ours, theirs)
    assert handle.stats().streamed_bytes > 0
    assert handle.stats().peak_device_bytes <= options.get("weights", handle.plan.weight_bytes)
    handle.close()
    assert_bit_equal(results(model, case), results(plain, case))


@pytest.mark.parametrize("bound", ["least", "40%", "k2"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mapped_weights(case: ZooCase, sharded: bool, bound: str, tmp_path: Path) -> None:
    """The reference computes through the mapping: the same bytes at the same alignment."""
    model, plain = case.build(), case.build()
    for number, each in enumerate((model, plain)):
        (tmp_path / str(number)).mkdir()
        num_bytes = map_parameters(each, tmp_path / str(number), sharded=sharded)
    assert num_bytes > 0 or case.name == "strided_parameters"
    expect_equal(case, model, plain, bound)


@pytest.mark.parametrize("bound", ["least", "40%"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_with_stand_ins(case: ZooCase, bound: str, tmp_path: Path) -> None:
    """A part of a stand-in that other code than its block's reads is refused, not guessed."""
    model, plain = case.build(), case.build()
    stand_in_parameters(model, tmp_path)
    align_parameters(plain)
    # What the host cannot show has to be resident when other code than its block's reads it.
    with refused_at_most(case):
        expect_equal(case, model, plain, bound)
