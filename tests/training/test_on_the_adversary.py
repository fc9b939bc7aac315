"""Every model that trains here, on the adversary: no race in forwards and backwards, plain bits."""

from __future__ import annotations

import pytest
import torch

import superpipeline
from simulator import simulated
from superpipeline import offload
from training.cases import CASES
from training.recipes import RECIPES, prepare
from training.reference import (
    TRAIN_SEED,
    Step,
    Tensors,
    assert_same_tensors,
    stream_within,
    streamed_bytes,
)
from training.side_by_side import gradients
from training.tables import ACTIVATIONS

# Code of theirs reads weights of blocks outside their turns; the host serves such reads.
READ_FROM_ELSEWHERE = {"stray_reads", "weight_views"}
BOUNDS = ("20%", "50%", "k2", "k4")
RECIPE_NAMES = ("plain", "checkpoint", "checkpoint_reentrant", "autocast", "frozen_half")

ROWS = [
    (name, recipe, ACTIVATIONS[(at + way) % 4], BOUNDS[(at // 2 + way) % 4])
    for at, name in enumerate(CASES)
    for way, recipe in enumerate(RECIPE_NAMES)
    if recipe not in CASES[name].without
]


def three_backwards(row: tuple[str, str, str, str], *, streamed: bool) -> Tensors:
    """What three micro-batches return, and their gradients, which add up."""
    name, recipe_name, activations, bound = row
    case, recipe = CASES[name], RECIPES[recipe_name]
    model = prepare(case.build(), recipe, case)
    case.attach(model)
    if streamed:
        model = stream_within(model, bound, activations=activations)
    torch.manual_seed(TRAIN_SEED)
    seen: Tensors = {}
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for index in range(3):
        step = Step(index, recipe, scaler)
        for at, tensor in enumerate(case.work(case, model, case.inputs(index), step)):
            seen[f"{index}.{at}"] = tensor.detach().clone()
        seen |= {f"{index}: {key}": value for key, value in gradients(model).items()}
    if streamed:
        assert all(streamed_bytes(superpipeline.handle(model)))
    return seen


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_no_race_and_the_plain_bits(
    row: tuple[str, str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", {"cpu": 1})
    expected = three_backwards(row, streamed=False)
    with simulated(monkeypatch, poison_idle=row[0] not in READ_FROM_ELSEWHERE) as streams:
        assert_same_tensors("result", three_backwards(row, streamed=True), expected)
    # What torch.autograd.grad returns is the caller's, wherever it lies.
    assert streams.num_copies_out > 0 or row[0] == "only_asks"
