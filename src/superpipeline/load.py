"""load(): a model straight from safetensors files, never held in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from superpipeline import from_diffusers, from_transformers
from superpipeline.api import check_bounds, stream
from superpipeline.assign import Match, assign, match, restored_on_error, unsaved
from superpipeline.calls import entry_of
from superpipeline.checkpoint import Checkpoint, find
from superpipeline.errors import InputError
from superpipeline.gather import reading_lazily
from superpipeline.progress import bars
from superpipeline.sizes import Size

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUM_LISTED = 10


def load(  # noqa: PLR0913 - each is a decision of its own
    source: str | os.PathLike[str],
    weights: Size | None = None,
    *,
    host_memory: Size | None = None,
    k: int | None = None,
    k_prime: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    model: nn.Module | None = None,
    model_class: Any = None,
    revision: str | None = None,
    variant: str | None = None,
    subfolder: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Any:
    """A model from safetensors files, streamed from disk: it is never in memory as a whole.

    Results are bit for bit those of the model that `from_pretrained` gives. Its weights are read
    while it computes; what the bounds allow of them is kept.

    Args:
        source: a folder, or a hub id, of a transformers or diffusers model; with `model`, also a
            safetensors file.
        weights: the bound on device bytes that weights take, as for `stream`.
        host_memory: as for `stream`: where a GPU computes, the bound on pinned host bytes that
            weights take; the rest stays on disk. The ring that reads go through, 128 MiB, counts
            in it.
        k: instead of `weights`, as for `stream`.
        k_prime: as for `stream`.
        device: where to compute; by default the accelerator if there is one, else the CPU.
        dtype: what to convert floating weights to; "auto" is as they were saved.
        model: any module that you built on the meta device; it is filled by name, and returned.
        model_class: a class, or Auto class, to use instead of the one that was saved.
        revision: of a hub repository: a branch, tag or commit.
        variant: such as "fp16", for files like `model.fp16.safetensors`.
        subfolder: where in the folder or repository the model is, such as "transformer".
        trust_remote_code: whether code that comes with the model may run.
        quiet: no line and no bars on standard error.

    Costs reading what stays in host memory and on the device, once. Only safetensors files are
    opened: pickle files can run any code.

    Raises:
        InputError: nothing that can be loaded there, or names and shapes do not agree.
        DiskError: a file is damaged or missing.
        BudgetError, HostMemoryError, UnsupportedError: as `stream` does.

    Example:
        ```python
        model = superpipeline.load("models/llama", weights="1GiB", device="cpu")
        model = superpipeline.load("weights.safetensors", weights="40%", model=my_module)
        ```
    """
    no_number = weights is None and k is None and k_prime is None
    # Before a download. What is here is looked at first: then the refusal names its bytes.
    asked = "100%" if no_number and Path(source).expanduser().exists() else weights
    check_bounds(asked, k, k_prime, host_memory, device)
    checked = _check_dtype(dtype)
    if model is not None:
        _check_module(model, model_class)
    checkpoint = find(source, revision=revision, variant=variant, subfolder=subfolder, quiet=quiet)
    bounds: dict[str, Any] = {
        "weights": weights, "host_memory": host_memory, "k": k, "k_prime": k_prime,
        "device": device, "quiet": quiet,
    }  # fmt: skip
    if model is None:
        built = read_model(
            checkpoint, dtype=checked, model_class=model_class, trust_remote_code=trust_remote_code
        )
        with bars(quiet=quiet):
            return stream(built, **bounds)
    with restored_on_error(model), bars(quiet=quiet):
        fill(model, checkpoint, dtype=checked)
        return stream(model, **bounds)


def read_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str = "auto",
    model_class: Any = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The plain model over mapped weights: equal to what `from_pretrained` gives, nothing read.

    Raises:
        InputError: not a folder of transformers or diffusers, or one that they cannot load.
    """
    config = checkpoint.config
    if from_diffusers.is_diffusers(config):
        read = from_diffusers.read
    elif from_transformers.is_transformers(config):
        read = from_transformers.read
    else:
        raise InputError(_no_class(checkpoint))
    with _on_host():
        return read(
            checkpoint, dtype=dtype, model_class=model_class, trust_remote_code=trust_remote_code
        )


def fill(model: nn.Module, checkpoint: Checkpoint, *, dtype: torch.dtype | str = "auto") -> None:
    """Puts the checkpoint's mapped tensors into `model`, by name.

    Raises:
        InputError: names or shapes do not agree, or buffers have no values. Nothing was changed.
    """
    tensors = checkpoint.tensors()
    found = match(model, tensors)
    _check_match(model, checkpoint.source, found)
    _check_buffers(model)

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        del name
        if isinstance(dtype, torch.dtype) and tensor.is_floating_point():
            return dtype
        return tensor.dtype

    with _on_host(), reading_lazily() as lazily:
        assign(found.found, tensors, dtype_of)
        lazily.finish(model)


@contextmanager
def _on_host() -> Iterator[None]:
    """Whatever is around the call: `torch.device("meta")`, a default device, inference mode."""
    here = torch.get_default_device().type == "cpu"
    with torch.inference_mode(False), nullcontext() if here else torch.device("cpu"):
        yield


def _check_dtype(dtype: Any) -> torch.dtype | str:
    if dtype == "auto":
        return "auto"
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if named not in _DTYPES:
        names = ", ".join(repr(str(known).removeprefix("torch.")) for known in _DTYPES)
        raise InputError(f"dtype={dtype!r}: give 'auto', {names}, or a torch.dtype of these")
    return named


def _check_module(model: Any, model_class: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model= takes a module that you built, got {model!r}; a class goes to model_class="
        )
    if model_class is not None:
        raise InputError("give model= or model_class=, not both: a module has its class")
    if entry_of(model) is not None:
        raise InputError(
            f"this {type(model).__name__} is streamed already; call "
            f"superpipeline.handle(model).close() first"
        )


def _check_match(model: nn.Module, source: str, found: Match) -> None:
    # What the user gave values need not be in the checkpoint.
    missing = [name for name, slot in found.missing.items() if slot.tensor.is_meta]
    shapes = [
        f"{name} {tuple(stored)} in the file, {tuple(expected)} in the model"
        for name, (stored, expected) in found.misshaped.items()
    ]
    problems = [
        f"{what} ({len(names)}): {', '.join(names[:_NUM_LISTED])}"
        + (", ..." if len(names) > _NUM_LISTED else "")
        for what, names in (
            ("missing in the file", missing),
            ("not in the model", found.unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{source} does not fit this {type(model).__name__}; {'; '.join(problems)}"
        )


def _check_buffers(model: nn.Module) -> None:
    names = [name for name, buffer in unsaved(model) if buffer.is_meta]
    if names:
        raise InputError(
            f"buffers that no file holds have no values ({len(names)}): "
            f"{', '.join(names[:_NUM_LISTED])}. Fill them in before: model.{names[0]} = ...; or "
            f"build the model with `with accelerate.init_empty_weights(): ...`, where only "
            f"parameters are left without values"
        )


def _no_class(checkpoint: Checkpoint) -> str:
    if not checkpoint.config:
        return (
            f"{checkpoint.source} has no config.json that says what model the weights are for; "
            f"build it and give it: with torch.device('meta'): model = MyModel(...); "
            f"superpipeline.load({checkpoint.source!r}, ..., model=model)"
        )
    return (
        f"{checkpoint.folder / 'config.json'} is neither of transformers nor of diffusers; build "
        f"the model and give it: superpipeline.load({checkpoint.source!r}, ..., model=model)"
    )
