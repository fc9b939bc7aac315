"""An edit of weights after streaming began is seen by the next call, whatever form it takes.

Device copies of the first blocks are fetched when a pass ends, before the user edits: those copies
are the ones that would be stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from tiny import (
    build,
    expect_like,
    ids,
    name_of,
    same_weights,
    stream,
)
from zoo import assert_bit_equal, by_name
from zoo.layers import WIDTH, Layer

Edit = Callable[[nn.Module, str], None]


def split(name: str) -> tuple[str, str]:
    owner, _, key = name.rpartition(".")
    return owner, key


def add_in_place(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).add_(0.25)


def add_to_data(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data.add_(0.25)


def copy_to_data(model: nn.Module, name: str) -> None:
    data = model.get_parameter(name).data
    data.copy_(data * 1.5)


def set_data(model: nn.Module, name: str) -> None:
    param = model.get_parameter(name)
    param.data = param.data * 1.5


def write_through_numpy(model: nn.Module, name: str) -> None:
    model.get_parameter(name).data.numpy()[...] *= 1.5


def new_parameter(model: nn.Module, name: str) -> None:
    owner, key = split(name)
    weight = model.get_parameter(name)
    setattr(model.get_submodule(owner), key, nn.Parameter(weight.detach() * 1.5))


def registry_entry(model: nn.Module, name: str) -> None:
    owner, key = split(name)
    registry = model.get_submodule(owner)._parameters
    registry[key] = nn.Parameter(model.get_parameter(name).detach() * 1.5)


def optimizer_step(kind: type[torch.optim.Optimizer], **options: Any) -> Edit:
    def edit(model: nn.Module, name: str) -> None:
        param = model.get_parameter(name)
        param.grad = torch.ones_like(param)
        kind([param], lr=0.1, **options).step()
        param.grad = None

    return edit


def step_on_one_element(model: nn.Module, name: str) -> None:
    """No version counter moves, and no sample of values is likely to hold the element."""
    param = model.get_parameter(name)
    param.grad = torch.zeros_like(param)
    param.grad.view(-1)[7] = 1.0
    torch.optim.SGD([param], lr=0.1, fused=True).step()
    param.grad = None


def load_state(*, assign: bool) -> Edit:
    def edit(model: nn.Module, name: str) -> None:
        state = {key: value.clone() for key, value in model.state_dict().items()}
        state[name] *= 1.5
        model.load_state_dict(state, assign=assign)

    return edit


def parametrize(model: nn.Module, name: str) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    owner, key = split(name)
    torch.nn.utils.parametrize.register_parametrization(model.get_submodule(owner), key, Half())


def convert_leaf(model: nn.Module, name: str) -> None:
    """`.to()` on a module inside a block: allowed, as on the plain model."""
    owner, _ = split(name)
    module = model.get_submodule(owner)
    module.to(torch.float64)
    module.to(torch.float32)


RESIDENCES = ["streamed", "resident", "rows"]
EDITS: dict[str, Edit] = {
    "add_": add_in_place,
    "data.add_": add_to_data,
    "data.copy_": copy_to_data,
    "data=": set_data,
    "numpy": write_through_numpy,
    "new_parameter": new_parameter,
    "registry": registry_entry,
    "sgd": optimizer_step(torch.optim.SGD),
    "adamw_fused": optimizer_step(torch.optim.AdamW, fused=True),
    "adamw_foreach": optimizer_step(torch.optim.AdamW, foreach=True),
    "sgd_one_element": step_on_one_element,
    "load_state_dict": load_state(assign=False),
    "load_state_dict_assign": load_state(assign=True),
    "parametrize": parametrize,
}


@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_seen_by_the_next_call(edit: Edit, residence: str) -> None:
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    name = name_of(pipe, residence)
    edit(plain, name)
    edit(model, name)
    expect_like(plain, model, inputs)
    assert pipe.stats().streamed_bytes > 0
    edit(plain, name)  # once more, after whatever the first edit led to
    edit(model, name)
    expect_like(plain, model, inputs)
    pipe.close()
    assert same_weights(model, plain)
    expect_like(plain, model, inputs)


def then_close(model: nn.Module) -> None:
    superpipeline.handle(model).close()


def then_plan_anew(model: nn.Module) -> None:
    superpipeline.stream(model, "45%", quiet=True)


def then_plan_with_k(model: nn.Module) -> None:
    superpipeline.stream(model, k=4, k_prime=2, quiet=True)


def then_verify(model: nn.Module) -> None:
    superpipeline.handle(model).verify(ids())


@pytest.mark.parametrize("residence", RESIDENCES)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("after", [then_close, then_plan_anew, then_plan_with_k, then_verify])
def test_an_edit_is_not_lost_without_a_call(
    after: Callable[[nn.Module], None], edit: Edit, residence: str
) -> None:
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    name = name_of(pipe, residence)
    edit(plain, name)
    edit(model, name)
    after(model)
    assert same_weights(model, plain)
    expect_like(plain, model, inputs)


@pytest.mark.parametrize("residence", RESIDENCES)
def test_a_swap_through_data_and_back_loses_nothing(residence: str) -> None:
    """The classical `p.data, other = other, p.data`: the user now holds our host bytes.

    They were once written over with the values swapped in, when the weight went back to the host.
    """
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    name = name_of(pipe, residence)
    param, twin = model.get_parameter(name), plain.get_parameter(name)
    old, new = param.detach().clone(), torch.full_like(param.data, 0.125)
    param.data, other = new, param.data
    twin.data = torch.full_like(twin.data, 0.125)
    expect_like(plain, model, inputs)
    superpipeline.stream(model, "45%", quiet=True)
    expect_like(plain, model, inputs)
    assert_bit_equal(other, old)
    param.data, other = other, param.data
    twin.data = old.clone()
    expect_like(plain, model, inputs)
    assert bool((other == 0.125).all())
    pipe.close()
    assert same_weights(model, plain)


def test_old_parameters_keep_their_values() -> None:
    model, inputs = build(), ids()
    stream(model)
    with torch.no_grad():
        model(inputs)
    old = model.layers[0].up.weight
    values = old.detach().clone()
    model.layers[0].up.weight = nn.Parameter(torch.zeros_like(old))
    with torch.no_grad():
        model(inputs)
        model(inputs)
    assert_bit_equal(old, values)
    superpipeline.handle(model).close()
    assert_bit_equal(old, values)


def test_another_shape_and_dtype_through_data() -> None:
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    for target in (plain, model):
        for layer in target.layers[:2]:
            layer.up.weight.data = torch.cat([layer.up.weight.data, layer.up.weight.data[:64]])
            layer.up.bias.data = torch.cat([layer.up.bias.data, layer.up.bias.data[:64]])
            layer.down.weight.data = torch.cat(
                [layer.down.weight.data, layer.down.weight.data[:, :64]], dim=1
            )
    expect_like(plain, model, inputs)
    pipe.close()
    assert same_weights(model, plain)


@pytest.mark.parametrize("grow", [7, -7])
def test_resize_token_embeddings(grow: int) -> None:
    case = by_name("llama_bfloat16")
    plain, model, inputs = case.build(), case.build(), case.inputs().kwargs["input_ids"] % 900
    pipe = stream(model, "60%")
    size = plain.config.vocab_size + grow
    with torch.no_grad():
        assert_bit_equal(model(inputs), plain(inputs))
        for target in (plain, model):
            torch.manual_seed(3)
            target.resize_token_embeddings(size)
        expected = plain(inputs)
        for _ in range(2):
            assert_bit_equal(model(inputs), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    pipe.close()
    assert same_weights(model, plain)


def test_an_edit_after_a_failed_call_is_not_lost() -> None:
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    names = [name_of(pipe, residence) for residence in RESIDENCES]
    with torch.no_grad(), pytest.raises(IndexError):
        model(inputs + 10**6)
    for name in names:
        set_data(plain, name)
        set_data(model, name)
    with torch.no_grad(), pytest.raises(IndexError):
        model(inputs + 10**6)
    expect_like(plain, model, inputs)
    superpipeline.handle(model).close()
    assert same_weights(model, plain)


def test_a_streamed_buffer_replaced_through_data() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            for layer in self.layers:
                table = torch.randint(-9, 9, (1600, WIDTH), dtype=torch.int8)
                layer.register_buffer("table", table)  # 100 KiB of integers: it streams

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + layer.table.float().sum(0)
            return x

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Tables()

    plain, model, inputs = make(), make(), torch.randn(2, 3, WIDTH)
    pipe = stream(model, "60%")
    expect_like(plain, model, inputs)
    for target in (plain, model):
        for layer in target.layers:
            layer.table.data = layer.table.data * 2
    expect_like(plain, model, inputs)
    pipe.close()
    assert same_weights(model, plain)
