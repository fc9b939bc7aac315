"""load(model=...): a module that the user built is filled by name, or left exactly as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import superpipeline
from same_model import parameters, value_of
from superpipeline.assign import parameters_on_meta
from superpipeline.checkpoint import find
from superpipeline.disk import locate
from superpipeline.errors import BudgetError, InputError
from superpipeline.load import fill, load
from tiny import TinyLM
from zoo import assert_bit_equal, by_name
from zoo.case import scatter_weights, token_ids


class Odd(nn.Module):
    """Tied weights, a frozen one, an integer one, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.scales = nn.ParameterList(torch.ones(16) for _ in range(2))
        self.layers[1].weight.requires_grad_(False)
        self.codes = nn.Parameter(torch.arange(16), requires_grad=False)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("ramp", torch.arange(16) / 16, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.mean + self.ramp + self.codes
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x * self.scales[0] + self.scales[1])


def made(folder: Path) -> tuple[Odd, Path]:
    """A model with values, saved without the second name of what is tied."""
    torch.manual_seed(0)
    model = Odd()
    scatter_weights(model)
    model.mean.normal_()
    save_model(model, str(folder / "odd.safetensors"))
    return model, folder / "odd.safetensors"


def empty() -> Odd:
    with parameters_on_meta():
        return Odd()


def test_it_is_filled_by_name(tmp_path):
    plain, file = made(tmp_path)
    model = empty()
    fill(model, find(file))
    assert model.head.weight is model.embed.weight
    assert all(locate(p.data) for p in parameters(model).values())
    for name, tensor in parameters(plain).items():
        assert_bit_equal(value_of(parameters(model)[name]), tensor)
        assert parameters(model)[name].requires_grad == tensor.requires_grad
    assert_bit_equal(list(model.buffers()), list(plain.buffers()))


def test_built_on_the_meta_device_as_a_whole(tmp_path):
    plain = TinyLM().eval()
    save_file(plain.state_dict(), tmp_path / "tiny.safetensors")
    with torch.device("meta"):
        model = TinyLM().eval()
    out = load(tmp_path / "tiny.safetensors", "50%", model=model, device="cpu", quiet=True)
    assert out is model
    ids = token_ids()
    with torch.no_grad():
        assert_bit_equal(model(ids), plain(ids))
    assert superpipeline.handle(model).stats().disk_bytes > 0


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
def test_dtype_is_of_floating_weights_only(dtype, tmp_path):
    plain, file = made(tmp_path)
    model = empty()
    target = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    load(file, "100%", model=model, dtype=dtype, device="cpu", quiet=True)
    superpipeline.handle(model).close()
    for name, tensor in parameters(plain).items():
        wanted = tensor.to(target) if tensor.is_floating_point() else tensor
        assert_bit_equal(value_of(parameters(model)[name]), wanted)


def test_a_model_of_transformers_may_be_given_too(tmp_path):
    case = by_name("llama")
    plain = case.build()
    plain.save_pretrained(tmp_path)
    with parameters_on_meta():
        model = type(plain)(plain.config).eval()
    fill(model, find(tmp_path))
    with torch.no_grad():
        assert_bit_equal(case.calls[0].run(model), case.calls[0].run(plain))


# --- refused, and nothing was changed ------------------------------------------------------------


def objects(model: nn.Module) -> list[int]:
    return [id(t) for t in (*parameters(model).values(), *model.buffers())]


def refused(file: Path, model: nn.Module, error: Any = InputError, **options: Any) -> str:
    before, copies = objects(model), list(model.state_dict().values())
    with pytest.raises(error) as caught:
        load(file, options.pop("weights", "60%"), model=model, device="cpu", **options)
    assert objects(model) == before
    for now, then in zip(model.state_dict().values(), copies, strict=True):
        assert now.device == then.device
        assert now.data_ptr() == then.data_ptr()
    return str(caught.value)


def test_keys_that_do_not_fit_are_all_named(tmp_path):
    tensors = Odd().state_dict()
    for name in ("embed.weight", "head.weight", "layers.0.bias", "mean"):
        del tensors[name]
    tensors |= {"layers.1.weight": torch.ones(16, 15), "extra": torch.ones(1)}
    tensors |= {f"more.{i}": torch.ones(1) for i in range(20)}
    save_file(tensors, tmp_path / "odd.safetensors")
    said = refused(tmp_path / "odd.safetensors", empty())
    assert "missing in the file (2): embed.weight, layers.0.bias;" in said  # mean has values
    assert "not in the model (21): extra, more.0, more.1, more.10," in said
    assert "more.9" not in said
    assert "of another shape (1): layers.1.weight (16, 15) in the file, (16, 16) in the m" in said


def test_buffers_without_values_are_named(tmp_path):
    _, file = made(tmp_path)
    with torch.device("meta"):
        model = Odd()
    said = refused(file, model)
    assert "have no values (1): ramp" in said
    assert "model.ramp = ..." in said
    model.ramp = torch.arange(16) / 16
    load(file, "60%", model=model, device="cpu", quiet=True)


def test_a_bound_that_is_too_small_leaves_the_model_as_it_was(tmp_path):
    _, file = made(tmp_path)
    assert "too little" in refused(file, empty(), BudgetError, weights=10)
    assert "how much" in refused(file, empty(), weights=None)


def test_a_streamed_model(tmp_path):
    _, file = made(tmp_path)
    model = empty()
    load(file, "60%", model=model, device="cpu", quiet=True)
    with pytest.raises(InputError, match="is streamed already"):
        load(file, "60%", model=model, device="cpu")


# --- parameters_on_meta --------------------------------------------------------------------------


def test_parameters_are_on_meta_and_buffers_are_not():
    model = empty()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.head.weight is model.embed.weight
    assert not model.layers[1].weight.requires_grad
    assert_bit_equal(model.ramp, Odd().ramp)
    assert not any(parameter.is_meta for parameter in Odd().parameters())


def test_one_parameter_under_two_names():
    """Story: the memory of one that was given up is used again, and so is its id."""
    with parameters_on_meta():
        first = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(100))
        both = nn.Module()
        shared = nn.Parameter(torch.ones(4))
        both.a, both.b = shared, shared
    assert len({id(parameter) for parameter in first}) == 100
    assert both.a is both.b
