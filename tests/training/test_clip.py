"""Clipping on the host: PyTorch's bits, whatever the gradients are."""

import math

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import clip

SHAPES = [(1000, 1000), (1,), (), (0, 3), (300_000,), (257, 1031), (7,)]
KINDS = {
    "one dtype": lambda i, g: g,
    "two dtypes": lambda i, g: g.bfloat16() if i % 2 else g,
    "transposed": lambda i, g: g.t() if g.dim() == 2 else g,
    "with gaps": lambda i, g: torch.stack([g, g], -1)[..., 0],
    "doubles": lambda i, g: g.double(),
    "not finite": lambda i, g: g / 0 if i == 4 else g,
}


def made(kind, *, with_empty=True):
    torch.manual_seed(0)
    shapes = [shape for shape in SHAPES if with_empty or 0 not in shape]
    gradients = [KINDS[kind](i, torch.randn(shape)) for i, shape in enumerate(shapes)]
    parameters = [nn.Parameter(torch.empty_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return [*parameters, nn.Parameter(torch.zeros(3))]  # the last has no gradient


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("max_norm", [1.0, 1e9])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_pytorchs(kind, norm_type, max_norm):
    with_empty = norm_type < math.inf  # which has none for what is empty
    ours, theirs = (made(kind, with_empty=with_empty) for _ in range(2))
    total = superpipeline.clip_grad_norm_(ours, max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert same_bits(total, expected)
    for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert same_bits(mine.grad, other.grad)
    assert ours[-1].grad is None


def same_bits(one, other):
    return (
        one.dtype == other.dtype
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
    )


@pytest.mark.usefixtures("two_threads")
def test_norms_are_computed_on_threads(monkeypatch):
    """Else the test above compares PyTorch with itself."""
    seen = []
    norms = clip._norms
    monkeypatch.setattr(clip, "_norms", lambda g, n: seen.extend(g) or norms(g, n))
    superpipeline.clip_grad_norm_(made("one dtype"), 1.0)
    assert len(seen) == len(SHAPES)


@pytest.mark.usefixtures("two_threads")
def test_what_is_not_finite_is_said_and_nothing_changed():
    ours, before = made("not finite"), made("not finite")
    with pytest.raises(RuntimeError, match="non-finite"):
        superpipeline.clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    for mine, other in zip(ours[:-1], before[:-1], strict=True):
        assert same_bits(mine.grad, other.grad)


def test_one_tensor_and_none():
    parameter = made("one dtype")[0]
    assert superpipeline.clip_grad_norm_(parameter, 1.0) > 1
    assert superpipeline.clip_grad_norm_([], 1.0) == 0
    assert superpipeline.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0) == 0
