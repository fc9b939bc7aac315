"""A run that was saved goes on as if it had never stopped, in the memory that it has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import superpipeline
from superpipeline.resume import load_checkpoint, save_checkpoint
from training import saving
from training.cases import CASES
from training.recipes import OPTIMIZERS, trained
from training.reference import (
    Loop,
    Row,
    Run,
    _caster,
    assert_same,
    assert_same_tensors,
    prepared,
    stream_within,
    train_plain,
    weights_of,
)
from training.saving import everything_in, python, tensors_of
from training.side_by_side import loss_of, sgd, train

HALF, WHOLE = 3, 6

# ---- three steps and three more -----------------------------------------------------------------


class Way(NamedTuple):
    """A run: how it begins and how it goes on. "lazy" streams, with the handle's optimizer."""

    row: Row
    first: str = "streamed"
    then: str = "streamed"
    frozen: bool = True
    param_dtype: torch.dtype | None = None

    def __str__(self) -> str:
        dtype = str(self.param_dtype or "float32").removeprefix("torch.")
        return f"{self.row}-{self.first}-{self.then}-{dtype}"


WAYS = [
    Way(Row("dropout", "adamw", "plain")),
    Way(Row("dropout", "adamw_fused", "clip"), "lazy", "lazy"),
    Way(Row("dropout", "adamw", "plain"), "plain", "plain"),
    Way(Row("gpt2", "adamw", "scaler"), "lazy", "plain"),
    Way(Row("llama_tied", "muon", "clip"), "plain", "lazy"),
    Way(Row("resnet", "sgd", "plain"), "streamed", "lazy"),
    Way(Row("recurrent", "adamw_foreach", "accumulate"), "lazy", "streamed"),
    Way(Row("mixtral", "adafactor", "everything", activations="recompute"), "lazy", "lazy"),
    Way(Row("llama", "adamw", "lora", activations="offload"), "lazy", "lazy", frozen=False),
    Way(Row("vit", "adamw", "frozen_half"), "plain", "streamed", frozen=False),
    Way(Row("dropout", "adamw", "clip"), "lazy", "streamed", param_dtype=torch.bfloat16),
]


class Training:
    """A run that can be saved: the loop of `reference.py`, and its objects by name."""

    def __init__(self, way: Way, how: str, *, is_fresh: bool = False) -> None:
        case, recipe, model = prepared(way.row)
        if is_fresh:
            shift(model, frozen=way.frozen)
        optimizers = OPTIMIZERS[way.row.optimizer](trained(model))
        if how != "plain":
            options = {"activations": way.row.activations, "param_dtype": way.param_dtype}
            model = stream_within(model, way.row.bound, **options)
        if how == "lazy":
            optimizers = [superpipeline.handle(model).optimizer(each) for each in optimizers]
        self.way, self.how, self.model = way, how, model
        self.loop = Loop(case, recipe, model, optimizers, _caster(way.param_dtype))

    def objects(self) -> dict[str, Any]:
        numbered = {f"optimizer{i}": each for i, each in enumerate(self.loop.optimizers)}
        numbered |= {f"scheduler{i}": each for i, each in enumerate(self.loop.schedulers)}
        return numbered | {"scaler": self.loop.scaler}

    def go(self, begin: int, end: int) -> Training:
        for index in range(begin, end):
            self.loop._accumulate(index)
            self.loop._update()
            self.loop.run.rng.append(torch.get_rng_state())
        return self

    def read(self) -> Run:
        self.loop.evaluate()
        if self.how == "plain":
            return self.loop.read()
        with superpipeline.handle(self.model).weights():
            return self.loop.read()


def shift(model: nn.Module, *, frozen: bool) -> None:
    """Other weights and buffers than those that were saved, where they are to be loaded."""
    for parameter in model.parameters():
        if frozen or parameter.requires_grad:
            parameter.data.add_(1.0)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and key not in module._non_persistent_buffers_set:
                buffer.add_(1.0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_it_goes_on_as_if_it_had_never_stopped(way: Way, tmp_path: Path) -> None:
    """Nor does saving leave a trace in the run that is saved."""
    first = Training(way, way.first).go(0, HALF)
    save_checkpoint(tmp_path / "run", first.model, frozen=way.frozen, step=HALF, **first.objects())
    expected = first.go(HALF, WHOLE).read()
    if way.param_dtype is None:
        assert_same(expected, train_plain(way.row, WHOLE))

    then = Training(way, way.then, is_fresh=True)
    torch.manual_seed(99)
    objects = then.objects()
    assert load_checkpoint(tmp_path / "run", then.model, **objects) == {"step": HALF}
    resumed = then.go(HALF, WHOLE).read()
    for one in (expected.seen, expected.gradients, expected.rng):
        del one[:HALF]
    assert_same(resumed, expected)


def test_all_random_states(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), random.random(), shared.random(), shared.normal()]

    shared: Any = np.random.mtrand._rand  # that of np.random.random() and the like
    shared.normal()  # which makes two and keeps one
    save_checkpoint(tmp_path, nn.Linear(2, 2))
    expected = draw()
    assert draw() != expected
    load_checkpoint(tmp_path, nn.Linear(2, 2), rng=False)
    assert draw() != expected
    load_checkpoint(tmp_path, nn.Linear(2, 2))
    assert draw() == expected


def test_a_process_of_its_own_goes_on(tmp_path: Path) -> None:
    """Nothing of a run is in the process that saved it."""
    expected = saving.losses(tmp_path / "a", 0, 6)
    assert saving.losses(tmp_path / "b", 0, 3) == expected[:3]
    code = f"from training import saving; print(saving.losses({str(tmp_path / 'b')!r}, 3, 6))"
    assert python(code) == str(expected[3:])


# ---- what is in a checkpoint --------------------------------------------------------------------


def test_others_can_read_the_weights(tmp_path: Path) -> None:
    """safetensors itself, `from_pretrained` and `load`."""
    from transformers import AutoModelForCausalLM

    case = CASES["llama_tied"]
    model = case.build()
    save_checkpoint(tmp_path, model)
    model.config.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    names = {name for name, _ in model.named_parameters()}  # a tied one is there once
    assert found.keys() == names
    assert_same_tensors("weight", found, {n: p.detach() for n, p in model.named_parameters()})
    for other in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        superpipeline.load(
            tmp_path, "60%", device="cpu", quiet=True, model_class=AutoModelForCausalLM
        ),
    ):
        assert_same_tensors("weight", weights_of(other), weights_of(model))
        assert other.lm_head.weight is other.model.embed_tokens.weight


class Odd(nn.Module):
    """Tensors of every kind that a module may have."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6, 4)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.transposed = nn.Parameter(torch.randn(3, 5).t())
        self.last = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.rows, self.overlapping = nn.Parameter(base[:3]), nn.Parameter(base[2:])
        self.same_bytes = nn.Parameter(base[:3])
        self.again = self.layers[1].weight
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.narrow = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.eight = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("complex", torch.randn(2, dtype=torch.complex64))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("kept_out", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)
        self.note = "first"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("streams", [False, True])
def test_every_kind_of_tensor(streams: bool, tmp_path: Path) -> None:
    """In place: each stays where it was, with its strides, ties and overlaps."""
    torch.manual_seed(1)
    model, other = Odd(), Odd()
    model.note = "second"
    model.kept_out.fill_(7)
    if streams:
        model, other = (stream_within(each, "50%") for each in (model, other))
    save_checkpoint(tmp_path, model)
    where = {n: (t.data_ptr(), t.stride(), t._version) for n, t in everything_in(other).items()}
    load_checkpoint(tmp_path, other)
    expected = tensors_of(model) | {"kept_out": torch.ones(2)}
    assert_same_tensors("tensor", tensors_of(other), expected)
    assert other.note == "second"
    assert other.again is other.layers[1].weight
    for name, tensor in everything_in(other).items():
        assert (tensor.data_ptr(), tensor.stride()) == where[name][:2], name
        assert tensor._version > where[name][2] or name == "kept_out", "a change that nobody sees"
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert len({"again", "layers.1.weight"} & {*file.keys()}) == 1


def test_a_loaded_weight_is_what_computes(tmp_path: Path) -> None:
    """A copy on the device from before must not be believed."""
    model = stream_within(CASES["dropout"].build().eval(), "50%")
    with torch.no_grad():
        before = loss_of(model)
        save_checkpoint(tmp_path, model)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert loss_of(model) != before
        load_checkpoint(tmp_path, model)
        assert loss_of(model) == before


def test_between_forward_and_backward(tmp_path: Path) -> None:
    """With copies of lower precision shown, it is the masters that are saved."""
    model = CASES["mlp"].build()
    expected = weights_of(model)
    stream_within(model, "50%", param_dtype=torch.bfloat16)
    loss = model(CASES["mlp"].inputs(0).args[0].bfloat16()).float().square().mean()
    save_checkpoint(tmp_path, model)
    loss.backward()
    found = load_file(next(tmp_path.glob("*.safetensors")))
    assert_same_tensors("weight", found, expected)


def test_an_adapter_alone(tmp_path: Path) -> None:
    """`frozen=False` writes what trains; the base is whatever the model has."""
    row = Row("llama", "adamw", "lora")
    model = prepared(row)[2]
    save_checkpoint(tmp_path, model, frozen=False)
    found = load_file(next(tmp_path.glob("*.safetensors")))
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    base = prepared(row)[2]
    shift(base, frozen=False)
    load_checkpoint(tmp_path, base)
    assert_same_tensors("weight", weights_of(base), weights_of(model))


def test_pending_updates_are_waited_for(tmp_path: Path) -> None:
    """Saving right after the step of a lazy optimizer, in a model that is part of another."""
    model = CASES["dropout"].build()
    expected = CASES["dropout"].build()
    torch.manual_seed(1)
    train(expected, sgd(expected), range(2))
    model = stream_within(model, "50%")
    outer = nn.Sequential(model)
    torch.manual_seed(1)
    train(model, superpipeline.handle(model).optimizer(sgd(model)), range(2))
    save_checkpoint(tmp_path, outer)
    found = load_file(next(tmp_path.glob("*.safetensors")))
    wanted = {f"0.{name}": weight for name, weight in weights_of(expected).items()}
    assert_same_tensors("weight", found, wanted)


def test_weights_that_lie_on_disk(tmp_path: Path) -> None:
    """Mapped ones and those that a NaN stands in for are saved as values, and loaded."""
    from on_disk import map_parameters, stand_in_parameters

    (tmp_path / "mapped").mkdir()
    (tmp_path / "stood_in").mkdir()
    expected = weights_of(CASES["mlp"].build())
    for put, name in ((map_parameters, "mapped"), (stand_in_parameters, "stood_in")):
        model = CASES["mlp"].build().requires_grad_(False)
        put(model, tmp_path / name)
        stream_within(model, "50%")
        save_checkpoint(tmp_path / "run", model)
        found = load_file(next((tmp_path / "run").glob("*.safetensors")))
        assert_same_tensors("weight", found, expected)
        with torch.no_grad():
            before = loss_of(model)
            for file in (tmp_path / "run").glob("*.safetensors"):
                double(file)
            load_checkpoint(tmp_path / "run", model)
            wanted = {key: weight * 2 for key, weight in expected.items()}
            assert_same_tensors("weight", dict(model.state_dict()), wanted)
            assert loss_of(model) != before


def double(file: Path) -> None:
    """Every weight of an fp32 file times two."""
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content, np.float32, offset=begin)
    values *= 2
    file.write_bytes(content)


# ---- memory -------------------------------------------------------------------------------------


def test_saving_and_loading_take_no_second_copy() -> None:
    """Peaks of resident memory beyond what the model and its optimizer hold anyway."""
    code = "from training import host_memory; host_memory.save_and_load()"
    found = json.loads(python(code, MALLOC_MMAP_THRESHOLD_="65536"))
    mib = 2**20
    assert found["model"] >= 100 * mib
    assert found["state"] >= 2 * found["model"]
    assert found["save"] <= 4 * mib
    assert found["load weights"] <= 4 * mib
    assert found["load all"] <= found["state"] + 4 * mib
    assert found["load again"] <= 4 * mib  # the state from before is gone by then
