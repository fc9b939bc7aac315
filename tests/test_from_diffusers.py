"""What diffusers decides as it loads is decided the same way over mapped weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DiTTransformer2DModel,
    PriorTransformer,
    Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file

from same_model import assert_same_model, parameters
from superpipeline.checkpoint import find
from superpipeline.errors import InputError
from superpipeline.load import load, read_model
from zoo import by_name

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def dit(tmp_path) -> Path:
    by_name("dit").build().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, *drop: str, **add: torch.Tensor) -> None:
    tensors = {n: t for n, t in load_file(folder / FILE).items() if n not in drop}
    save_file(tensors | add, folder / FILE, metadata={"format": "pt"})


def test_auto_is_the_dtype_as_saved(tmp_path):
    model = by_name("flux").build().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    assert_same_model(read_model(find(tmp_path)), plain)


def test_buffers_that_no_file_holds_are_made_in_the_dtype(tmp_path):
    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16,
        num_embeddings=7, additional_embeddings=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(str(tmp_path), torch_dtype=torch.float16)
    assert plain.causal_attention_mask.dtype is torch.float16
    assert_same_model(read_model(find(tmp_path), dtype=torch.float16), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_has_to_stay_in_float32(dtype, tmp_path):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(str(tmp_path), torch_dtype=dtype)
    assert {p.dtype for p in parameters(plain).values()} == {dtype, torch.float32}
    assert_same_model(read_model(find(tmp_path), dtype=dtype), plain)


def test_names_of_the_first_versions(tmp_path):
    by_name("autoencoder").build().save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / FILE)
    renamed = {}
    for name, tensor in tensors.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")  # noqa: PLW2901
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    save_file(renamed, tmp_path / FILE, metadata={"format": "pt"})
    plain = AutoencoderKL.from_pretrained(str(tmp_path), torch_dtype=torch.float32)
    assert_same_model(read_model(find(tmp_path)), plain)


def test_a_class_that_was_renamed(dit):
    config = json.loads((dit / "config.json").read_text())
    config |= {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    (dit / "config.json").write_text(json.dumps(config))
    plain = Transformer2DModel.from_pretrained(str(dit), torch_dtype=torch.float32)
    assert type(plain) is DiTTransformer2DModel
    assert_same_model(read_model(find(dit)), plain)


@pytest.mark.parametrize("kind", [AutoModel, DiTTransformer2DModel])
def test_model_class(kind, dit):
    plain = kind.from_pretrained(str(dit), torch_dtype=torch.float32)
    assert_same_model(read_model(find(dit), model_class=kind), plain)


def test_the_default_dtype_comes_back(dit):
    read_model(find(dit), dtype=torch.float16)
    assert torch.get_default_dtype() is torch.float32


def test_unused_weights_are_a_warning(dit, caplog, monkeypatch):
    edit(dit, extra=torch.ones(2))
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    read_model(find(dit))
    (text,) = {record.getMessage() for record in caplog.records}
    assert "DiTTransformer2DModel does not use: extra" in text


def test_weights_without_values_are_refused(dit):
    edit(dit, "proj_out_1.weight", "proj_out_1.bias")
    with pytest.raises(InputError, match=r"does not hold proj_out_1.*\(2 in all\)"):
        read_model(find(dit))


def test_other_shapes_are_refused(dit):
    edit(dit, **{"proj_out_1.bias": torch.ones(3)})
    with pytest.raises(InputError, match=r"proj_out_1.bias is \(3,\) there"):
        read_model(find(dit))


CODE = """
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

class OwnModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""
SCRIPT = """
import sys, torch
from superpipeline.load import load
model = load(sys.argv[1], "60%", device="cpu", quiet=True, trust_remote_code=True)
print(type(model).__name__, float(model(torch.ones(1, 8)).sum()))
"""


def test_code_of_its_own_runs_only_where_allowed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    config = {"_class_name": "OwnModel", "auto_map": {"AutoModel": "own.OwnModel"}, "width": 8}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"layers.{i}.weight": torch.eye(8) for i in range(3)}
    tensors |= {f"layers.{i}.bias": torch.zeros(8) for i in range(3)}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(InputError, match="trust_remote_code=True"):
        load(folder, "60%")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},  # where diffusers copies the code
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["OwnModel", "8.0"], done.stderr


def test_refusals(dit):
    config = json.loads((dit / "config.json").read_text())
    (dit / "config.json").write_text(json.dumps(config | {"_class_name": "TelepathyModel"}))
    with pytest.raises(InputError, match="TelepathyModel"):
        load(dit, "40%")
    changed = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (dit / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="is quantized"):
        load(dit, "40%")
