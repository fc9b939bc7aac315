"""load(): over mapped files the model of `from_pretrained` is built, and streams bit for bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from same_model import assert_same_model, parameters
from superpipeline import handle
from superpipeline.checkpoint import find
from superpipeline.disk import locate
from superpipeline.errors import BudgetError, InputError, UnsupportedError
from superpipeline.load import load, read_model
from test_equality import bound_for
from zoo import CASES, assert_bit_equal, by_name, flatten

PRETRAINED = [c for c in CASES if isinstance(c.build(), PreTrainedModel | ModelMixin)]
SHARDS = {"single": "1GB", "sharded": "200KB"}
MiB = 2**20


def save(case: Any, folder: Path, files: str = "single") -> type:
    """Saves the case's model; returns its class."""
    model = case.build()
    model.save_pretrained(folder, max_shard_size=SHARDS[files])
    return type(model)


def plain_model(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """What `from_pretrained` gives; diffusers has to be told to take the dtype as saved."""
    if issubclass(kind, ModelMixin):
        options = {"torch_dtype": options.get("dtype", torch.float32)}
    return kind.from_pretrained(str(folder), **options)


@pytest.mark.parametrize("files", SHARDS)
@pytest.mark.parametrize("case", PRETRAINED, ids=lambda c: c.name)
def test_it_is_the_model_of_from_pretrained(case, files, tmp_path, capfd):
    kind = save(case, tmp_path, files)
    checkpoint = find(tmp_path)
    assert (len(checkpoint.files) > 1) == (files == "sharded")
    capfd.readouterr()
    model = read_model(checkpoint)
    assert capfd.readouterr().err == ""  # no bar that counts tensors
    assert_same_model(model, plain_model(kind, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", PRETRAINED, ids=lambda c: c.name)
def test_dtype(case, dtype, tmp_path):
    kind = save(case, tmp_path)
    model = read_model(find(tmp_path), dtype=dtype)
    assert_same_model(model, plain_model(kind, tmp_path, dtype=dtype))


@pytest.mark.parametrize("bound", ["least", "40%"])
@pytest.mark.parametrize("files", SHARDS)
@pytest.mark.parametrize("case", PRETRAINED, ids=lambda c: c.name)
def test_streamed_from_disk_is_bit_equal(case, files, bound, tmp_path):
    kind = save(case, tmp_path, files)
    plain = plain_model(kind, tmp_path)
    options = bound_for(read_model(find(tmp_path)), bound)
    model = load(tmp_path, **options, device="cpu", quiet=True)
    if case.build().training:  # from_pretrained gives eval mode
        plain, model = plain.train(), model.train()
    with torch.no_grad():
        for call in case.calls:
            for _ in range(2):
                assert_bit_equal(flatten(call.run(model)), flatten(call.run(plain)))
    stats = handle(model).stats()
    assert stats.disk_bytes > 0
    assert stats.peak_device_bytes <= options["weights"]


@pytest.mark.parametrize("name", ["llama", "dit"])
@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")])
def test_what_is_around_the_call_does_not_matter(around, name, tmp_path):
    case = by_name(name)
    plain = plain_model(save(case, tmp_path), tmp_path)
    with around():
        model = read_model(find(tmp_path))
    assert_same_model(model, plain)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


# --- memory --------------------------------------------------------------------------------------


def big_folder(folder: Path) -> int:
    """A Llama of some 200 MiB in bfloat16, in shards; returns its bytes."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    zeros = {n: torch.zeros(p.shape, dtype=torch.bfloat16) for n, p in model.named_parameters()}
    save_file(zeros, folder / "model.safetensors")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in zeros.values())


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_nothing_is_read(dtype, tmp_path):
    num_bytes = big_folder(tmp_path)
    assert num_bytes > 200 * MiB
    read_model(find(tmp_path), dtype=dtype)  # imports, and what grows once
    before = psutil.Process().memory_info().rss
    model = read_model(find(tmp_path), dtype=dtype)
    assert psutil.Process().memory_info().rss - before < 20 * MiB
    assert all(locate(p.data) for p in parameters(model).values() if p.nbytes > 128 * 2**10)


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def llama(tmp_path) -> Path:
    save(by_name("llama"), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": "lots"}, "'lots'"),
        ({"weights": "40%", "host_memory": "much"}, "'much'"),
        ({"weights": "40%", "dtype": "int8"}, "dtype='int8': give 'auto', 'float16'"),
        ({"weights": "40%", "dtype": torch.float8_e4m3fn}, "give 'auto', 'float16'"),
        ({"weights": "40%", "dtype": None}, "dtype=None"),
        ({}, 'Write weights="6GiB" or weights="40%"'),
        ({"weights": "40%", "k": 2}, "weights='40%' or k=2, k_prime=None, not both"),
        ({"k": 2, "k_prime": 3}, "k=2, k_prime=3"),
        ({"weights": "40%", "device": "nowhere"}, "device='nowhere' is no device"),
        ({"weights": "40%", "device": "cpu", "host_memory": "1GiB"}, "no meaning for device='cpu'"),
        ({"weights": "40%", "model": nn.Linear}, "a class goes to model_class="),
        ({"weights": "40%", "model": nn.Linear(1, 1), "model_class": nn.Linear}, "not both"),
    ],
)
def test_refused_before_a_download(options, expected):
    with pytest.raises(InputError, match=re.escape(expected)):
        load("some/model", **options)


def test_without_a_number_the_refusal_names_the_bytes_of_what_is_here(llama):
    with pytest.raises(InputError, match=r"This LlamaForCausalLM has .* and the least that works"):
        load(llama, device="cpu")
    empty = nn.Linear(2, 3, device="meta")
    file = llama / "linear.safetensors"
    save_file(nn.Linear(2, 3).state_dict(), file)
    with pytest.raises(InputError, match=r"This Linear has \d+ B"):
        load(file, device="cpu", model=empty)
    assert empty.weight.is_meta


def test_a_device_that_cannot_be_streamed_to_is_refused_before_a_download():
    with pytest.raises(UnsupportedError, match="streaming to mps is not supported"):
        load("some/model", "40%", device="mps")


def test_a_bound_that_is_too_small_is_refused_as_stream_does(llama):
    with pytest.raises(BudgetError, match="is too little"):
        load(llama, "1KiB", device="cpu")


def test_a_folder_of_nobody(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="has no config"):
        load(tmp_path, "40%")
    with pytest.raises(InputError, match="has no config"):
        load(tmp_path / "model.safetensors", "40%")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(InputError, match="neither of transformers nor of diffusers"):
        load(tmp_path, "40%")
