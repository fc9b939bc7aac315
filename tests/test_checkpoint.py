"""Which files are a model's weights, and every refusal of what is not a checkpoint."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub_server import COMMIT, hub_server
from superpipeline.checkpoint import Checkpoint, find
from superpipeline.disk import DiskFile, locate
from superpipeline.errors import DiskError, InputError


def put(folder: Path, name: str, **tensors: float) -> Path:
    """A safetensors file with one number a tensor."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.full((3,), value) for key, value in tensors.items()}, path)
    return path


def put_index(folder: Path, name: str, **weight_map: str) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_shards(folder: Path, stem: str, index: str) -> None:
    put(folder, f"{stem}-00001-of-00002.safetensors", a=1.0)
    put(folder, f"{stem}-00002-of-00002.safetensors", b=2.0)
    names = {"a": f"{stem}-00001-of-00002.safetensors", "b": f"{stem}-00002-of-00002.safetensors"}
    put_index(folder, index, **names)


def files_of(checkpoint: Checkpoint) -> list[DiskFile]:
    stored = [locate(tensor) for tensor in checkpoint.tensors().values()]
    return [source.file for each in stored if each for source in each.sources]


def test_files_that_are_larger_than_memory_are_not_kept_in_the_page_cache(tmp_path, monkeypatch):
    put_shards(tmp_path, "model", "model.safetensors.index.json")
    assert all(file.keep_cached for file in files_of(find(tmp_path)))
    num_bytes = find(tmp_path).num_bytes
    monkeypatch.setattr("superpipeline.checkpoint.free_host_memory", lambda: num_bytes)
    assert not any(file.keep_cached for file in files_of(find(tmp_path)))


def values(checkpoint: Checkpoint) -> dict[str, float]:
    return {name: float(tensor[0]) for name, tensor in checkpoint.tensors().items()}


def refusal(source, error=InputError, **options) -> str:
    with pytest.raises(error) as caught:
        find(source, **options).tensors()
    return str(caught.value)


# --- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("model.safetensors", None),
        ("diffusion_pytorch_model.safetensors", None),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("consolidated.safetensors", None),
    ],
)
def test_one_file_in_a_folder(name, variant, tmp_path):
    put(tmp_path, name, a=1.0, b=2.0)
    checkpoint = find(tmp_path, variant=variant)
    assert checkpoint.files == (tmp_path / name,)
    assert values(checkpoint) == {"a": 1.0, "b": 2.0}
    assert checkpoint.num_bytes == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    ("index", "variant"),
    [
        ("model.safetensors.index.json", None),
        ("diffusion_pytorch_model.safetensors.index.json", None),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", "fp16"),
        ("diffusion_pytorch_model.safetensors.fp16.index.json", "fp16"),
    ],
)
def test_shards_with_an_index(index, variant, tmp_path):
    put_shards(tmp_path, "part", index)
    put(tmp_path, "stray.safetensors", c=3.0)
    checkpoint = find(str(tmp_path), variant=variant)
    assert len(checkpoint.files) == 2
    assert values(checkpoint) == {"a": 1.0, "b": 2.0}


def test_variants_do_not_mix(tmp_path):
    put(tmp_path, "model.safetensors", a=1.0)
    put(tmp_path, "model.fp16.safetensors", a=2.0)
    assert values(find(tmp_path)) == {"a": 1.0}
    assert values(find(tmp_path, variant="fp16")) == {"a": 2.0}


def test_one_file_is_preferred_to_shards_as_transformers_does(tmp_path):
    put(tmp_path, "model.safetensors", a=5.0)
    put_shards(tmp_path, "model", "model.safetensors.index.json")
    assert values(find(tmp_path)) == {"a": 5.0}


def test_the_configuration_may_name_the_file(tmp_path):
    put(tmp_path, "model.safetensors", a=1.0)
    put(tmp_path, "other.safetensors", a=2.0)
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert values(find(tmp_path)) == {"a": 2.0}


def test_a_file_and_an_index_by_name(tmp_path):
    file = put(tmp_path, "any.safetensors", a=1.0)
    put_shards(tmp_path, "part", "x.safetensors.index.json")
    assert values(find(file)) == {"a": 1.0}
    assert values(find(tmp_path / "x.safetensors.index.json")) == {"a": 1.0, "b": 2.0}


def test_subfolder(tmp_path):
    put(tmp_path, "transformer/diffusion_pytorch_model.safetensors", a=1.0)
    assert values(find(tmp_path, subfolder="transformer")) == {"a": 1.0}


def test_home_is_expanded(tmp_path, monkeypatch):
    put(tmp_path, "llama/model.safetensors", a=1.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values(find("~/llama")) == {"a": 1.0}


def test_tensors_are_mapped_and_not_read(tmp_path):
    put(tmp_path, "model.safetensors", a=1.0)
    stored = locate(find(tmp_path).tensors()["a"])
    assert stored is not None
    assert stored.is_mapped


# --- what is refused -----------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "x.ckpt"])
def test_pickles_are_never_opened(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    said = refusal(tmp_path)
    assert f"only {name}" in said
    assert "save_pretrained" in said
    assert f"{name} is not a .safetensors file" in refusal(tmp_path / name)
    put(tmp_path, "model.safetensors", a=1.0)
    assert values(find(tmp_path)) == {"a": 1.0}
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_that_calls_itself_safetensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "model.safetensors" in refusal(tmp_path, DiskError)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_shard_is_named(tmp_path):
    put_shards(tmp_path, "model", "model.safetensors.index.json")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(tmp_path, DiskError)


def test_a_tensor_in_two_shards(tmp_path):
    put_shards(tmp_path, "model", "model.safetensors.index.json")
    put(tmp_path, "model-00002-of-00002.safetensors", a=3.0, b=2.0)
    said = refusal(tmp_path)
    assert "both model-00001-of-00002" in said
    assert "hold a" in said


def test_a_tensor_that_the_index_promises_is_not_there(tmp_path):
    put_shards(tmp_path, "model", "model.safetensors.index.json")
    put(tmp_path, "model-00002-of-00002.safetensors", c=3.0)
    assert "does not hold b" in refusal(tmp_path, DiskError)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_a_damaged_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "is not an index of safetensors files" in refusal(tmp_path, DiskError)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_that_leads_out_of_its_folder(name, tmp_path):
    put_index(tmp_path, "model.safetensors.index.json", a=name)
    assert "outside of its folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], "holds no weights"),
        (["README.md"], "holds no weights"),
        (["a.safetensors", "b.safetensors"], "but a.safetensors, b.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter"),
        (["adapter_config.json", "model.safetensors"], "holds an adapter"),
        (["model_index.json", "unet/config.json", "vae/config.json"], "subfolder='unet'"),
        (["model.onnx", "tf_model.h5"], "only model.onnx, tf_model.h5"),
    ],
)
def test_folders_without_weights(files, expected, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert expected in refusal(tmp_path)


def test_a_variant_that_is_not_there(tmp_path):
    put(tmp_path, "model.safetensors", a=1.0)
    said = refusal(tmp_path, variant="fp16")
    assert "none of model.fp16.safetensors" in said
    assert "but model.safetensors" in said


def test_sources_that_are_nothing(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "missing")
    assert "not written like a hub id" in refusal("./missing/folder")
    put(tmp_path, "model.safetensors", a=1.0)
    assert "there is no folder" in refusal(tmp_path, subfolder="unet")
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refusal(tmp_path)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'superpipeline[hub]'" in refusal("some/model")


# --- the hub -------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from superpipeline.checkpoint import find
from superpipeline.errors import SuperpipelineError
for options in json.loads(sys.argv[1]):
    try:
        found = find(**options)
        root = found.folder
        print(json.dumps([str(root), {n: float(t[0]) for n, t in found.tensors().items()}]))
    except SuperpipelineError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def ask(home: Path, endpoint: str, *requests: dict, **env: str) -> list:
    """What `find` says to each request, in a process with that hub and that cache."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(requests)],
        env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)} | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_hub(tmp_path):
    """Only what is needed is downloaded; without a network the cache serves."""
    root, home = tmp_path / "hub", tmp_path / "home"
    llama, flux = root / "me" / "llama", root / "me" / "flux"
    put_shards(llama, "model", "model.safetensors.index.json")
    for name in ("model.fp16.safetensors", "original/consolidated.safetensors"):
        put(llama, name, a=9.0)
    (llama / "pytorch_model.bin").write_bytes(b"pickle")
    (llama / "config.json").write_text('{"model_type": "llama"}')
    (llama / "tokenizer.json").write_text("{}")
    put(flux, "transformer/diffusion_pytorch_model.safetensors", t=1.0)
    put(flux, "vae/diffusion_pytorch_model.safetensors", v=1.0)
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        (flux / name).write_text("{}")
    (root / "me" / "old").mkdir()
    (root / "me" / "old" / "pytorch_model.bin").write_bytes(b"pickle")

    with hub_server(root) as (endpoint, got):
        found = ask(
            *(home, endpoint),
            {"source": "me/llama"},
            {"source": "me/llama", "revision": COMMIT, "quiet": True},
            {"source": "me/flux", "subfolder": "transformer"},
            {"source": "me/flux"},
            {"source": "me/old"},
            {"source": "me/missing"},
            {"source": "me/llama", "revision": "v9"},
        )
    (folder, tensors), again, transformer, *refused = found
    assert Path(folder).name == COMMIT
    assert tensors == {"a": 1.0, "b": 2.0}
    assert again == [folder, tensors]
    assert transformer[1] == {"t": 1.0}
    downloads = sorted(path.partition(f"/resolve/{COMMIT}/")[2] for path in got)
    assert [name for name in downloads if "safetensors" in name or ".bin" in name] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert "tokenizer.json" in downloads
    # Each of the five looked once at what main is; the rest was of that commit.
    assert sum("main" in path for path in got) == 5
    for said, expected in zip(
        refused,
        ["is a pipeline of", "only pytorch_model.bin", "no public model", "no revision 'v9'"],
        strict=True,
    ):
        assert said.startswith("InputError: ")
        assert expected in said

    offline = ask(
        *(home, endpoint), {"source": "me/llama"}, {"source": "me/other"}, HF_HUB_OFFLINE="1"
    )
    unreachable = ask(home, endpoint, {"source": "me/llama"}, {"source": "me/other"})
    for cached, other in (offline, unreachable):
        assert cached == [folder, tensors]
        assert "the hub cannot be reached" in other
