"""An edit of weights after streaming began is seen by the next call, whatever form it takes.

Device copies of the first blocks are fetched when a pass ends, before the user edits: those copies
are the ones that would be stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build, ids, name_of, same_weights, stream
from torch import nn
from zoo import assert_bit_equal, by_name
from zoo.layers import WIDTH, Layer

import superpipeline

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
    "load_state_dict": load_state(assign=False),
    "load_state_dict_assign": load_state(assign=True),
    "parametrize": parametrize,
}


def expect_like(plain: nn.Module, model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = plain(inputs)
        assert_bit_equal(model(inputs), expected)
        assert_bit_equal(model(inputs), expected)


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


# ---- the model's structure ------------------------------------------------------------------


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


def test_a_budget_that_an_edit_outgrew_is_reported_until_it_is_raised() -> None:
    """The edit is not lost, and the model does not silently turn into the plain one."""
    plain, model, inputs = build(), build(), ids()
    stream(model, "40%")
    expect_like(plain, model, inputs)
    for target in (plain, model):
        torch.manual_seed(5)
        target.layers[2] = Layer(hidden=4096)
        target.layers[0].up.weight.data = target.layers[0].up.weight.data * 2
    for _ in range(2):
        with torch.no_grad(), pytest.raises(superpipeline.BudgetError) as caught:
            model(inputs)
    superpipeline.stream(model, caught.value.least_bytes * 2, quiet=True)
    expect_like(plain, model, inputs)
    superpipeline.handle(model).close()
    assert same_weights(model, plain)


# ---- libraries ------------------------------------------------------------------------------


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
        add_to_data(target, name_of(pipe, "streamed"))
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
                layer.register_buffer("table", torch.randn(400, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + layer.table.sum(0)
            return x

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Tables()

    class Inside(Tables):
        """The same, read in the layer's own turn."""

    plain, model, inputs = make(), make(), torch.randn(2, 3, WIDTH)
    pipe = stream(model, "60%")
    expect_like(plain, model, inputs)
    for target in (plain, model):
        for layer in target.layers:
            layer.table.data = layer.table.data * 2
    expect_like(plain, model, inputs)
    pipe.close()
    assert same_weights(model, plain)
