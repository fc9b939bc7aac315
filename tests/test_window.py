"""Where weights go, their gradients go."""

import pytest
import torch
from torch import nn

from superpipeline.window import _move


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gradient_goes_with_its_weight(there):
    """Else the next one would be added to it from another device."""
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    _move(weight, torch.empty(4, device=there))
    assert weight.device.type == weight.grad.device.type == there


def test_a_masters_gradient_stays():
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    weight.data = weight.data.bfloat16()
    _move(weight, torch.zeros(4, dtype=torch.bfloat16))
    assert weight.sum() == 0
    assert weight.grad.dtype is torch.float32


def test_a_buffer_that_is_no_leaf_has_none():
    made = torch.ones(4, requires_grad=True) * 2
    with torch.no_grad():
        _move(made, torch.zeros(4))
    assert made.sum() == 0
