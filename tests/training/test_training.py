"""Ten steps through a bound are the plain model's ten steps, for every pair of choices.

Losses, gradients, random state, weights, buffers and optimizer state agree bit for bit, and bytes
were fetched in forwards and in backwards: without that, agreement would show nothing.
"""

from __future__ import annotations

import pytest
import torch

from training.reference import (
    Row,
    Run,
    assert_same,
    train_by_copy,
    train_plain,
    train_streamed,
)
from training.tables import MIXED_ROWS, ROWS

BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_ten_steps_are_the_plain_models(row: Row) -> None:
    streamed = train_streamed(row)
    assert_same(streamed, train_plain(row))
    assert_streamed(streamed)


@pytest.mark.parametrize(("row", "grad_dtype"), MIXED_ROWS, ids=[f"{r}-{d}" for r, d in MIXED_ROWS])
def test_bfloat16_copies_of_masters(row: Row, grad_dtype: str) -> None:
    """`param_dtype=torch.bfloat16` is the loop with a bfloat16 model and fp32 masters."""
    dtypes = {"grad_dtype": None if grad_dtype == "None" else getattr(torch, grad_dtype)}
    streamed = train_streamed(row, param_dtype=BFLOAT16, **dtypes)
    expected = train_by_copy(row, param_dtype=BFLOAT16, **dtypes)
    assert_same(with_wide_gradients(streamed), with_wide_gradients(expected))
    assert {weight.dtype for weight in streamed.weights.values()} == {torch.float32}
    assert_streamed(streamed)


def test_half_the_bytes_cross_the_link_in_bfloat16() -> None:
    row = Row("mlp", "adamw", "plain", bound="k2")
    full, half = train_streamed(row), train_streamed(row, param_dtype=BFLOAT16)
    for wide, narrow in zip(full.streamed, half.streamed, strict=True):
        assert narrow <= 0.55 * wide  # places are padded


def with_wide_gradients(run: Run) -> Run:
    """Whether a bfloat16 gradient lies in an fp32 tensor is not what is compared."""
    run.gradients = [
        {name: None if grad is None else grad.float() for name, grad in step.items()}
        for step in run.gradients
    ]
    return run


def assert_streamed(run: Run) -> None:
    forward, backward = run.streamed
    assert forward > 0, "nothing was streamed in the forwards"
    assert backward > 0, "nothing was streamed in the backwards"
