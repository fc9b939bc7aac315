"""Every model of the zoo on the adversary: no race, and the plain model's bits."""

import gc

import pytest
import torch
from torch import nn

import superpipeline
from simulator import simulated
from test_equality import bound_for
from zoo import CASES, ZooCase, assert_bit_equal, flatten

# Their code reads weights of modules that it does not call; such reads are served from the host.
READ_FROM_ELSEWHERE = {
    "root_positional_table", "uncalled_embedding", "functional_head", "bare_containers",
    "numbered_attributes", "called_by_method", "dit", "whisper",
    "scripted_children", "shared_storage",
}  # fmt: skip


@pytest.mark.parametrize("bound", ["least", "40%", "k2", "k4"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_race_and_the_plain_bits(
    case: ZooCase, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = case.calls[0]
    plain, model = case.build(), case.build()
    options = bound_for(model, bound)
    poison = case.name not in READ_FROM_ELSEWHERE
    with torch.no_grad(), simulated(monkeypatch, poison_idle=poison) as streams:
        superpipeline.stream(model, **options, device="cpu", quiet=True)
        for _ in range(2):
            expected = [t.clone() for t in flatten(call.run(plain))]
            assert_bit_equal([t.clone() for t in flatten(call.run(model))], expected)
        assert streams.num_copies > 0


def test_a_model_may_be_forgotten_while_a_fetch_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a pass the next one's first blocks are fetched; the window's memory goes to others."""
    with torch.no_grad(), simulated(monkeypatch) as streams:
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
        superpipeline.stream(model, k=2, device="cpu", quiet=True)
        x = torch.ones(1, 16)
        model(x)
        assert streams.num_pending > 0
        del model
        gc.collect()
        x + 1  # raises RaceError if memory was given up that is still written to
        assert streams.num_pending > 0
