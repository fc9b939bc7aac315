"""What transformers decides as it loads is decided the same way over mapped weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from same_model import assert_same_model
from superpipeline.checkpoint import find
from superpipeline.errors import InputError
from superpipeline.load import load, read_model
from zoo import by_name


@pytest.fixture
def llama(tmp_path) -> Path:
    by_name("llama").build().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes entries; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(folder: Path, *drop: str, **add: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in drop}
    save_file(tensors | add, file, metadata={"format": "pt"})


@pytest.fixture
def reports(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """transformers' log, which by itself does not reach the root logger."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # the command line makes it quiet
    return caplog


def lines(reports: pytest.LogCaptureFixture) -> list[str]:
    """What was reported; the lines of a report come in any order."""
    return sorted("\n".join(record.getMessage() for record in reports.records).splitlines())


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForCausalLM, LlamaModel, LlamaForCausalLM])
def test_model_class(kind, llama):
    model = read_model(find(llama), model_class=kind)
    assert_same_model(model, kind.from_pretrained(str(llama)))


def test_the_base_class_of_two_modalities(tmp_path):
    by_name("qwen2_vl").build().save_pretrained(tmp_path)
    plain = AutoModel.from_pretrained(str(tmp_path))
    assert_same_model(read_model(find(tmp_path), model_class=AutoModel), plain)


def test_the_text_part_alone(tmp_path):
    """An Auto class may take one part of a model, with that part's configuration."""
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": [1],
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_global_layers": 1, "image_size": 28, "patch_size": 14, "max_num_tiles": 1,
        "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision)
    MllamaForConditionalGeneration(config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert type(plain.config) is MllamaTextConfig
    assert_same_model(read_model(find(tmp_path), model_class=AutoModelForCausalLM), plain)


def test_without_architectures_the_base_model(llama):
    edit_config(llama, architectures=None)
    assert_same_model(read_model(find(llama)), AutoModel.from_pretrained(str(llama)))


def test_a_head_that_was_not_saved_is_made_and_reported(llama, reports):
    """As from_pretrained does, word for word, and with the same random values."""
    kind = AutoModelForSequenceClassification
    torch.manual_seed(3)
    plain = kind.from_pretrained(str(llama))
    expected = lines(reports)
    assert any("score.weight" in line for line in expected)
    assert any(str(llama) in line for line in expected)
    reports.clear()
    torch.manual_seed(3)
    model = read_model(find(str(llama)), model_class=kind)
    assert lines(reports) == expected
    assert_same_model(model, plain)


def test_unexpected_and_missing_keys_are_reported_as_ever(llama, reports):
    edit_weights(llama, "model.norm.weight", **{"model.extra": torch.ones(2)})
    plain = LlamaForCausalLM.from_pretrained(str(llama))
    expected = lines(reports)
    for name in ("model.norm.weight", "model.extra", str(llama)):
        assert any(name in line for line in expected)
    reports.clear()
    model = read_model(find(str(llama)))
    assert lines(reports) == expected
    assert_same_model(model, plain)


def test_other_shapes_are_refused_as_ever(llama):
    edit_weights(llama, "model.norm.weight", **{"model.norm.weight": torch.ones(3)})
    with pytest.raises(RuntimeError) as plain:
        LlamaForCausalLM.from_pretrained(str(llama))
    with pytest.raises(RuntimeError) as ours:
        read_model(find(llama))
    assert str(ours.value) == str(plain.value)


def test_the_dtype_of_the_weights_where_the_configuration_has_none(tmp_path):
    """The first floating tensor by name decides."""
    model = by_name("llama").build().to(torch.bfloat16)
    model.model.embed_tokens.to(torch.float32)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=None)
    for drop in ((), ("lm_head.weight",)):
        edit_weights(tmp_path, *drop)
        plain = LlamaForCausalLM.from_pretrained(str(tmp_path))
        torch.manual_seed(0)
        model = read_model(find(tmp_path))
        assert model.dtype == plain.dtype
        assert model.config.dtype == plain.config.dtype


def test_the_progress_bars_of_transformers_come_back(llama):
    from transformers.utils.logging import is_progress_bar_enabled

    before = is_progress_bar_enabled()
    read_model(find(llama))
    assert is_progress_bar_enabled() == before


# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "whisper"])
@pytest.mark.parametrize("has_file", [True, False])
def test_generation_config(name, has_file, tmp_path):
    model = by_name(name).build()
    model.generation_config.max_length = 17
    model.save_pretrained(tmp_path)
    if not has_file:
        (tmp_path / "generation_config.json").unlink()
        edit_config(tmp_path, max_length=19)
    plain = type(model).from_pretrained(str(tmp_path))
    assert plain.generation_config.max_length == (17 if has_file else 19)
    assert_same_model(read_model(find(tmp_path)), plain)


# --- code that comes with the model --------------------------------------------------------------

CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_its_own"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.post_init()
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
    (folder / "code_of_its_own.py").write_text(CODE)
    config = {
        "model_type": "tiny_of_its_own",
        "architectures": ["TinyModel"],
        "auto_map": {
            "AutoConfig": "code_of_its_own.TinyConfig",
            "AutoModel": "code_of_its_own.TinyModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"layers.{i}.{n}": torch.eye(8) for i in range(3) for n in ("weight",)}
    tensors |= {f"layers.{i}.bias": torch.zeros(8) for i in range(3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="trust_remote_code=True"):
        load(folder, "60%")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},  # where transformers copies the code
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["TinyModel", "8.0"], done.stderr


# --- refusals ------------------------------------------------------------------------------------


def test_a_quantized_model(llama):
    edit_config(llama, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"is quantized \(gptq\)"):
        load(llama, "40%")


def test_a_class_that_this_version_does_not_have(llama):
    edit_config(llama, architectures=["LlamaForTelepathy"])
    expected = f"transformers {transformers.__version__} has no LlamaForTelepathy"
    with pytest.raises(InputError, match=expected):
        load(llama, "40%")
    edit_config(llama, model_type="telepathy")
    with pytest.raises(InputError, match="telepathy"):
        load(llama, "40%")


def test_a_class_of_something_else(llama):
    with pytest.raises(InputError, match="is no class of transformers"):
        load(llama, "40%", model_class=torch.nn.Linear)
    with pytest.raises(InputError, match="Unrecognized configuration class"):
        load(llama, "40%", model_class=transformers.AutoModelForCTC)


class WantsAFolder(LlamaForCausalLM):
    """As some classes of transformers, it reads a further file of its folder."""

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        model = super().from_pretrained(folder, *args, **kwargs)
        model.further = Path(folder, "further.txt").read_text()
        return model


def test_a_class_that_reads_more_of_its_folder(llama):
    with pytest.raises(InputError, match="cannot load"):
        load(llama, "40%", model_class=WantsAFolder)


def test_without_transformers(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'superpipeline\[hub\]'"):
        load(llama, "40%")
