"""The zoo is itself deterministic: a plain model, built and run twice, gives the same bits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from zoo import CASE_CALL_IDS, CASE_CALLS, CASES, Call, ZooCase, assert_bit_equal, flatten

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize(("case", "call"), CASE_CALLS, ids=CASE_CALL_IDS)
def test_two_runs_agree(case: ZooCase, call: Call) -> None:
    with torch.no_grad():
        first = call.run(case.build())
        second = call.run(case.build())
    tensors = flatten(first)
    assert tensors
    assert not any(t.isnan().any() for t in tensors), "a NaN could not be told from poison"
    assert_bit_equal(first, second)


@EVERY_CASE
def test_same_weights_from_every_build(case: ZooCase) -> None:
    before = torch.get_rng_state()
    first, second = case.build().state_dict(), case.build().state_dict()
    assert list(first) == list(second)
    assert_bit_equal(first, second)
    assert_bit_equal(case.inputs(), case.inputs())
    assert torch.equal(before, torch.get_rng_state()), "building drew from the caller's generator"


@EVERY_CASE
def test_size_and_mode(case: ZooCase) -> None:
    model = case.build()
    assert 0.3e6 <= weight_bytes(model) <= 6e6
    assert model.training == case.name.endswith("_train")
    assert case.calls[0].name == "forward"


@EVERY_CASE
def test_a_stateless_model_repeats_itself(case: ZooCase) -> None:
    """``stateful`` is not missing where it is needed, and not given where it is not."""
    model, call = case.build(), case.calls[-1]
    with torch.no_grad():
        first = [t.clone() for t in flatten(call.run(model))]
        second = flatten(call.run(model))
    repeats = all(map(torch.equal, first, second))
    assert repeats is not case.stateful


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, each storage once."""
    tensors = chain(model.parameters(), model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_names_are_unique() -> None:
    names = Counter(case.name for case in CASES)
    assert [name for name, count in names.items() if count > 1] == []


@dataclasses.dataclass
class Outer:
    inner: dict[str, Any]
    number: int


def test_flatten_finds_every_tensor() -> None:
    cache = DynamicCache()
    keys, values = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
    cache.update(keys, values, 0)
    one, two = torch.tensor(1), torch.tensor(2)
    found = flatten((Outer({"a": [one, None]}, 3), "text", cache, {"b": (two,)}))
    assert [t.shape for t in found] == [one.shape, keys.shape, values.shape, two.shape]


def test_flatten_refuses_what_it_cannot_look_into() -> None:
    with pytest.raises(TypeError, match="object"):
        flatten([object()])


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([torch.zeros(2)], [], "1 tensors, expected 0"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "dtype"),
        (torch.zeros(2), torch.zeros(1, 2), "shape"),
        (torch.tensor(0.0), torch.tensor(-0.0), "1 of 1 elements"),
        (torch.tensor([1 + 1j, 2j]), torch.tensor([1 + 1j, 3j]), "flat index 1"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "flat index 1"),
    ],
)
def test_differences_are_named(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_bit_equal(actual, expected)


def test_equal_bits_pass() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    strided = torch.arange(6.0).view(2, 3).t()
    assert_bit_equal(
        [nan, strided, torch.empty(0, 3)], [nan.clone(), strided.clone(), torch.empty(0, 3)]
    )
