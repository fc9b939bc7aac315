"""Changes of a streamed model's structure, and the edits that libraries make."""

from __future__ import annotations

from collections.abc import Callable

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


def replace_layer(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layers[2] = Layer(hidden=320)


def append_layer(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layers.append(Layer())


def insert_layer(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layers.insert(1, Layer())


def write_into_modules(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.layers[1]._modules["up"] = nn.Linear(WIDTH, 192)


def delete_layer(model: nn.Module) -> None:
    del model.layers[1]


def cut_layers_off(model: nn.Module) -> None:
    model.layers = model.layers[:3]


def share_layer(model: nn.Module) -> None:
    model.layers[3] = model.layers[1]


def swap_layers(model: nn.Module) -> None:
    model.layers[0], model.layers[4] = model.layers[4], model.layers[0]


def tie_head(model: nn.Module) -> None:
    model.head.weight = model.embed.weight


def tie_layers(model: nn.Module) -> None:
    model.layers[3].up.weight = model.layers[1].up.weight


def drop_bias(model: nn.Module) -> None:
    model.head.bias = None


def delete_and_register_buffer(model: nn.Module) -> None:
    weight = model.layers[0].up.weight
    del model.layers[0].up.weight
    model.layers[0].up.register_buffer("weight", weight.detach() * 2)


def add_weight_norm(model: nn.Module) -> None:
    for layer in model.layers:
        torch.nn.utils.parametrizations.weight_norm(layer.up)
    torch.nn.utils.parametrizations.weight_norm(model.head)


def add_weight_norm_hooks(model: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.layers[0].up)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.head)


def prune(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.layers[0].up, "weight", amount=0.3)
    prune.l1_unstructured(model.head, "weight", amount=0.3)


STRUCTURAL = [
    replace_layer,
    append_layer,
    insert_layer,
    write_into_modules,
    delete_layer,
    cut_layers_off,
    share_layer,
    swap_layers,
    tie_head,
    tie_layers,
    drop_bias,
    delete_and_register_buffer,
    add_weight_norm,
    add_weight_norm_hooks,
    prune,
]


@pytest.mark.parametrize("change", STRUCTURAL)
def test_a_change_of_structure_is_seen_and_streams(change: Callable[[nn.Module], None]) -> None:
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    change(plain)
    change(model)
    expect_like(plain, model, inputs)
    packed = {id(alias.tensor) for weight in pipe._layout.weights for alias in weight.aliases}
    assert packed == {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    pipe.verify(inputs)
    pipe.close()
    assert same_weights(model, plain)
    assert [type(m) for m in model.modules()][1:3] == [type(m) for m in plain.modules()][1:3]
    expect_like(plain, model, inputs)


def test_a_weight_norm_may_come_and_go_while_the_model_streams() -> None:
    """Taking our classes out again once dropped the parametrized class that lay above them."""
    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    parametrizations, removing = torch.nn.utils.parametrizations, torch.nn.utils.parametrize
    for target in (plain, model):
        parametrizations.weight_norm(target.head)
    expect_like(plain, model, inputs)
    for target in (plain, model):
        removing.register_parametrization(target.head, "bias", nn.Tanh())
    expect_like(plain, model, inputs)
    for target in (plain, model):
        removing.remove_parametrizations(target.head, "weight")
    expect_like(plain, model, inputs)
    for target in (plain, model):
        removing.remove_parametrizations(target.head, "bias", leave_parametrized=False)
    expect_like(plain, model, inputs)
    pipe.close()
    assert type(model.head) is nn.Linear
    assert same_weights(model, plain)


@pytest.mark.parametrize("data_too", [False, True])
def test_a_budget_that_an_edit_outgrew_is_reported_until_it_is_raised(data_too: bool) -> None:
    """The edit is not lost, and the model does not silently turn into the plain one."""
    plain, model, inputs = build(), build(), ids()
    stream(model, "40%")
    expect_like(plain, model, inputs)
    for target in (plain, model):
        torch.manual_seed(5)
        target.layers[2] = Layer(hidden=4096)
        if data_too:
            target.layers[0].up.weight.data = target.layers[0].up.weight.data * 2
    for _ in range(2):
        with torch.no_grad(), pytest.raises(superpipeline.BudgetError) as caught:
            model(inputs)
    superpipeline.stream(model, caught.value.least_bytes * 2, quiet=True)
    expect_like(plain, model, inputs)
    superpipeline.handle(model).close()
    assert same_weights(model, plain)


@pytest.mark.parametrize("merge_safely", [False, True])
def test_lora_added_merged_unmerged_and_unloaded(merge_safely: bool) -> None:
    from peft import LoraConfig, get_peft_model

    case = by_name("llama")
    plain, model = case.build(), case.build()
    inputs = case.inputs().kwargs
    pipe = stream(model, "50%")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    def same(ours: nn.Module, theirs: nn.Module) -> None:
        with torch.no_grad():
            expected = theirs(**inputs)
            for _ in range(2):
                assert_bit_equal(ours(**inputs), expected)

    same(model, plain)
    wrapped = []
    for target in (model, plain):
        torch.manual_seed(11)
        wrapped.append(get_peft_model(target, config))
    ours, theirs = wrapped
    same(ours, theirs)
    for step in ("merge_adapter", "unmerge_adapter", "merge_adapter"):
        for target in wrapped:
            options = {"safe_merge": merge_safely} if step == "merge_adapter" else {}
            getattr(target, step)(**options)
        same(ours, theirs)
        if step == "unmerge_adapter":
            with ours.disable_adapter(), theirs.disable_adapter():
                same(ours, theirs)
    same(ours.unload(), theirs.unload())
    assert pipe.stats().streamed_bytes > 0
    pipe.close()
    assert same_weights(model, plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_ema_weights_swapped_in_and_out(foreach: bool) -> None:
    from diffusers.training_utils import EMAModel

    plain, model, inputs = build(), build(), ids()
    pipe = stream(model)
    expect_like(plain, model, inputs)
    averages = [EMAModel(m.parameters(), decay=0.5, foreach=foreach) for m in (plain, model)]
    for average, target in zip(averages, (plain, model), strict=True):
        target.get_parameter(name_of(pipe, "streamed")).data.add_(0.25)
        average.step(target.parameters())
    expect_like(plain, model, inputs)
    for average, target in zip(averages, (plain, model), strict=True):
        average.store(target.parameters())
        average.copy_to(target.parameters())
    expect_like(plain, model, inputs)
    for average, target in zip(averages, (plain, model), strict=True):
        average.restore(target.parameters())
    expect_like(plain, model, inputs)
    pipe.close()
    assert same_weights(model, plain)


def test_averaged_model_and_vector_to_parameters() -> None:
    plain, model, inputs = build(), build(), ids()
    stream(model)
    expect_like(plain, model, inputs)
    for target in (plain, model):
        vector = torch.nn.utils.parameters_to_vector(target.parameters())
        torch.nn.utils.vector_to_parameters(vector.detach() * 0.75, target.parameters())
    expect_like(plain, model, inputs)
    superpipeline.handle(model).close()
    assert same_weights(model, plain)
