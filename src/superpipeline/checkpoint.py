"""A checkpoint: the safetensors files that hold a model's weights, in a folder or on the hub.

Pickle files are never opened: loading one can run any code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from superpipeline import hub
from superpipeline.disk import DiskFile, is_worth_caching
from superpipeline.errors import DiskError, InputError
from superpipeline.host import free_host_memory

# In the order in which transformers, then diffusers, look for them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_FILE = ".safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files of one model. They are there; nothing was read of them so far.

    Attributes:
        source: what the user called it.
        folder: where it is on this machine.
        files: the safetensors files, in the order of their names.
        index: says which of several files holds which tensor.
        config: what `config.json` beside them says; empty where there is none.
    """

    source: str
    folder: Path
    files: tuple[Path, ...]
    index: Path | None = None
    config: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all files: the weights' bytes, and some thousands for the headers."""
        return sum(file.stat().st_size for file in self.files)

    def refuse_quantized(self) -> None:
        """Raises InputError if the weights are not in the files as the model computes with them."""
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "a method of its own")
            raise InputError(
                f"{self.source} is quantized ({method}): its quantizer makes the weights, so they "
                f"cannot stay on disk. Load it with from_pretrained and give it to "
                f"superpipeline.stream(model, ...)"
            )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, mapped: only the headers are read.

        Raises:
            InputError: two files hold a tensor of the same name.
            DiskError: a file is damaged, or lacks a tensor that the index says it holds.
        """
        found: dict[str, torch.Tensor] = {}
        file_of: dict[str, str] = {}
        free = free_host_memory()
        for path in self.files:
            held = DiskFile(path, keep_cached=is_worth_caching(path, free)).tensors
            for name in sorted(held):
                if name in found:
                    raise InputError(
                        f"{self.folder}: both {file_of[name]} and {path.name} hold {name}; take "
                        f"the file away that does not belong there"
                    )
                found[name], file_of[name] = held[name], str(path.relative_to(self.folder))
        for name, file in (_weight_map(self.index) if self.index else {}).items():
            if file_of.get(name) != file:
                raise DiskError(
                    f"{self.folder / file} does not hold {name}, which {self.index} promises; get "
                    f"the file again"
                )
        return found


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    quiet: bool = False,
) -> Checkpoint:
    """The checkpoint in the folder, file or hub repository `source`.

    Args:
        revision: of a hub repository: a branch, tag or commit.
        variant: such as "fp16", for files named like `model.fp16.safetensors`.
        subfolder: where in the folder or repository the model is.
        quiet: no progress bars of a download (which goes into the hub's own cache).

    Raises:
        InputError: no such folder or repository, or no safetensors files in it.
        DiskError: the index is damaged, or names a file that is not there.

    Example:
        ```python
        find("models/llama").files  # (PosixPath('models/llama/model.safetensors'),)
        ```
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _one_file(str(source), path)
    place: _Place
    if path.is_dir():
        place = _Folder(path / subfolder if subfolder else path)
    elif isinstance(source, str) and hub.REPOSITORY.fullmatch(source):
        place = hub.Repository(source, revision, subfolder, quiet=quiet)
    else:
        raise InputError(f"there is no folder {source}, and it is not written like a hub id")
    return _in_place(str(source), place, variant)


class _Place(Protocol):
    """Where files are.

    Attributes:
        folder: where they are on this machine, once they were got.
        names: of its files, relative to the folder.
    """

    folder: Path
    names: frozenset[str]

    def get(self, names: Iterable[str]) -> None:
        """Sees to it that these files are in the folder; those in JSON are from the start."""


class _Folder:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        self.folder = folder
        # Not all of the tree: it may be a working directory of any size.
        paths = [*folder.glob("*"), *folder.glob("*/config.json")]
        files = (path.relative_to(folder).as_posix() for path in paths if path.is_file())
        self.names = frozenset(files)

    def get(self, names: Iterable[str]) -> None:
        """They are there."""


def _one_file(source: str, path: Path) -> Checkpoint:
    if path.name.endswith(f"{_FILE}.index.json"):
        files = _existing(path, _shards(path))
        return Checkpoint(source=source, folder=path.parent, files=files, index=path, config={})
    if path.suffix != _FILE:
        raise InputError(
            f"{source} is not a {_FILE} file; give one, or the folder that holds the model"
        )
    return Checkpoint(source=source, folder=path.parent, files=(path,), config={})


def _in_place(source: str, place: _Place, variant: str | None) -> Checkpoint:
    config = _read_config(place.folder / "config.json")
    named = config.get("transformers_weights")
    wanted = [named] if named else _names(variant)
    found = [name for name in wanted if name in place.names]
    others = sorted(name for name in place.names if name.endswith(_FILE) and "/" not in name)
    if not found and len(others) == 1 and not named and not variant:
        found = others
    if not found or "adapter_config.json" in place.names:
        raise InputError(f"{source} {_what_there_is(source, place.names, wanted, others)}")
    index = place.folder / found[0] if found[0].endswith(".json") else None
    names = [found[0]] if index is None else _shards(index)
    place.get(names)
    files = _existing(place.folder / found[0], names)
    return Checkpoint(source=source, folder=place.folder, files=files, index=index, config=config)


def _names(variant: str | None) -> list[str]:
    """Such as `model.fp16.safetensors` or `model.safetensors.index.fp16.json`."""
    if variant is None:
        return list(_NAMES)
    names = [f".{variant}.".join(name.rsplit(".", 1)) for name in _NAMES]
    # As older versions of diffusers wrote it.
    return [*names, f"diffusion_pytorch_model.safetensors.{variant}.index.json"]


def _shards(index: Path) -> list[str]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{index} names the file {name}, which is outside of its folder")
    return names


def _existing(first: Path, names: list[str]) -> tuple[Path, ...]:
    files = tuple(first.parent / name for name in names)
    for file in files:
        if not file.is_file():
            raise DiskError(f"{first} names the file {file.name}, and it is not there; get it")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise DiskError(f"{index} is not an index of safetensors files ({error!r})") from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _what_there_is(source: str, names: frozenset[str], wanted: list[str], others: list[str]) -> str:
    if "adapter_config.json" in names:
        return (
            "holds an adapter (PEFT): load its base model with superpipeline.load(...), then the "
            "adapter with model.load_adapter(...)"
        )
    if "model_index.json" in names:
        return _pipeline(source, names)
    if others:
        return f"has none of {', '.join(wanted)}, but {_few(others)}; say which with variant="
    unread = sorted(name for name in names if name.endswith(_OTHER_FORMATS))
    if unread:
        return (
            f"holds no safetensors files, only {_few(unread)}. Pickle files are never opened here: "
            f"loading one can run any code. If you trust them, convert them once: "
            f"AutoModel.from_pretrained({source!r}).save_pretrained('another-folder')"
        )
    return f"holds no weights: none of {', '.join(wanted)} is there"


def _pipeline(source: str, names: Iterable[str]) -> str:
    parts = sorted(name.split("/")[0] for name in names if name.endswith("/config.json"))
    usual = [name for name in ("transformer", "unet") if name in parts]
    largest = (usual or parts or ["transformer"])[0]
    return (
        f"is a pipeline of several models ({', '.join(parts)}); load its largest one and give it "
        f"to the pipeline: {largest} = superpipeline.load({source!r}, subfolder={largest!r}, ...)"
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
