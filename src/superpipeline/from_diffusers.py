"""A diffusers model over mapped weights: what its `from_pretrained(folder)` gives, nothing read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from superpipeline.assign import Match, assign, match, parameters_on_meta
from superpipeline.checkpoint import Checkpoint
from superpipeline.errors import InputError
from superpipeline.gather import reading_lazily

_log = logging.getLogger("diffusers.models.modeling_utils")  # where its own report goes


def is_diffusers(config: Mapping[str, Any]) -> bool:
    """Whether `config.json` is one of diffusers."""
    return "_class_name" in config


def read(
    checkpoint: Checkpoint, *, dtype: torch.dtype | str, model_class: Any, trust_remote_code: bool
) -> nn.Module:
    """The model in `checkpoint` over its mapped tensors.

    "auto" is the dtype of the stored weights, so the same as `torch_dtype=` of that dtype.

    Raises:
        InputError: diffusers does not know the class, or keys are missing or of another shape.
    """
    checkpoint.refuse_quantized()
    tensors = checkpoint.tensors()
    target = _stored_dtype(tensors) if isinstance(dtype, str) else dtype
    model = _build(checkpoint, target, model_class, trust_remote_code=trust_remote_code)
    if checkpoint.index is None:
        model._fix_state_dict_keys_on_load(tensors)  # attention of the first versions
    found = match(model, tensors)
    _report(checkpoint.source, model, found)
    in_float32 = set(_listed(model._keep_in_fp32_modules))

    def dtype_of(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if in_float32 & set(name.split(".")) else target

    with reading_lazily() as lazily:
        assign(found.found, tensors, dtype_of)
        lazily.finish(model)
    model.register_to_config(_name_or_path=checkpoint.source)
    return model.eval()


def _build(
    checkpoint: Checkpoint, dtype: torch.dtype, model_class: Any, *, trust_remote_code: bool
) -> Any:
    """The model without values in its parameters."""
    try:
        from diffusers import AutoModel
    except ImportError as error:
        raise InputError(
            f"{checkpoint.source} is a diffusers model: pip install diffusers"
        ) from error
    # From the folder comes the code of its own that a model may have.
    config = checkpoint.config | {"_name_or_path": str(checkpoint.folder)}
    options = {} if model_class else {"trust_remote_code": trust_remote_code}
    try:
        with _default_dtype(dtype), parameters_on_meta():
            return (model_class or AutoModel).from_config(config, **options)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"cannot load {checkpoint.source}: {error}") from error


def _stored_dtype(tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The first floating one that a model can be made in."""
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return next((t.dtype for t in tensors.values() if t.dtype in usual), torch.float32)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _report(source: str, model: Any, found: Match) -> None:
    """As diffusers does: what is not used is a warning, what has no value is an error."""
    kind = type(model).__name__
    if found.misshaped:
        name, (stored, expected) = next(iter(found.misshaped.items()))
        raise InputError(
            f"cannot load {source} as {kind}: {name} is {tuple(stored)} there, and "
            f"{tuple(expected)} in the model ({len(found.misshaped)} such)"
        )
    without_values = [name for name, slot in found.missing.items() if slot.tensor.is_meta]
    if without_values:
        raise InputError(
            f"cannot load {source} as {kind}: it does not hold {', '.join(without_values[:10])} "
            f"({len(without_values)} in all)"
        )
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    unused = [name for name in found.unexpected if not any(re.search(p, name) for p in patterns)]
    if unused:
        _log.warning("Weights in %s that %s does not use: %s", source, kind, ", ".join(unused))
    if found.missing:
        _log.warning("%s does not hold %s of %s", source, ", ".join(found.missing), kind)
