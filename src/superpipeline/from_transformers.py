"""A transformers model over mapped weights: what `from_pretrained(folder)` gives, nothing read.

transformers does all of it: it builds the class without values, renames, checks and reports. It is
only handed the tensors instead of the folder.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from superpipeline.checkpoint import Checkpoint
from superpipeline.errors import InputError
from superpipeline.gather import reading_lazily


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether `config.json` is one of transformers."""
    return "model_type" in config or "architectures" in config or "auto_map" in config


def read(
    checkpoint: Checkpoint, *, dtype: torch.dtype | str, model_class: Any, trust_remote_code: bool
) -> nn.Module:
    """The model in `checkpoint` over its mapped tensors.

    Raises:
        InputError: transformers does not know the model, or wants permission to run its code.
        RuntimeError: shapes differ, as `from_pretrained` says it.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise InputError(
            f"{checkpoint.source} is a transformers model: pip install 'superpipeline[hub]'"
        ) from error
    checkpoint.refuse_quantized()
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
        kind, config = _class_for(config, model_class, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {checkpoint.source}: {error}") from error
    tensors = checkpoint.tensors()
    options = {"config": config, "state_dict": tensors, "dtype": dtype}
    options |= _generation(kind, checkpoint)
    with _no_bars(), _reported_as(checkpoint.source), reading_lazily() as lazily:
        try:
            model: nn.Module = kind.from_pretrained(None, **options)
        except (OSError, ValueError, TypeError) as error:  # some classes want a folder
            raise InputError(f"cannot load {checkpoint.source}: {error}") from error
        lazily.finish(model)
    _name(model, checkpoint.source)
    if trust_remote_code and hasattr(model, "load_custom_generate"):
        _use_custom_generate(model, checkpoint)
    return model


# ---- the class ----------------------------------------------------------------------------------


def _class_for(config: Any, model_class: Any, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class that `from_pretrained` would make, and the configuration that it would get."""
    import transformers

    if model_class is None:
        model_class = _saved_class(config, trust_remote_code=trust_remote_code)
    if issubclass(model_class, transformers.PreTrainedModel):
        return model_class, config
    if not hasattr(model_class, "from_config"):
        raise ValueError(f"model_class={model_class!r} is no class of transformers")
    with torch.device("meta"):  # it tells its class by making one, which without values is little
        made = model_class.from_config(config, trust_remote_code=trust_remote_code)
    is_text_part = type(made.config) is not type(config)
    return type(made), config.get_text_config() if is_text_part else config


def _saved_class(config: Any, *, trust_remote_code: bool) -> Any:
    """The class that was saved, which `config.json` names."""
    import transformers

    name = (config.architectures or [None])[0]
    own_code = [
        auto
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith("AutoModel") and reference.split(".")[-1] == name
    ]
    if own_code and trust_remote_code:
        return getattr(transformers, own_code[0])
    if name is None:
        return transformers.AutoModel
    if hasattr(transformers, name):
        return getattr(transformers, name)
    if own_code:
        raise ValueError(
            f"{name} is code that comes with the model; if you trust it, give "
            f"trust_remote_code=True"
        )
    raise ValueError(
        f"transformers {transformers.__version__} has no {name}, which config.json names; use "
        f"a version that has it, or give model_class="
    )


# ---- what from_pretrained takes from the folder -------------------------------------------------


def _generation(kind: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    if not kind.can_generate():
        return {}
    from transformers import GenerationConfig

    folder = checkpoint.folder
    if (folder / "generation_config.json").is_file():
        return {"generation_config": GenerationConfig.from_pretrained(folder)}
    # Older models have it in config.json, among the rest.
    config = GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True
    )
    return {"generation_config": config}


def _name(model: Any, source: str) -> None:
    model.config.name_or_path = source
    for module in model.modules():
        if getattr(module, "name_or_path", None) == "None":
            module.name_or_path = source


def _use_custom_generate(model: Any, checkpoint: Checkpoint) -> None:
    try:
        generate = model.load_custom_generate(checkpoint.folder, trust_remote_code=True)
    except OSError:
        return  # it has none
    model.generate = functools.partial(generate, model=model)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bar that counts tensors: nothing is read yet, so it says nothing."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _reported_as(source: str) -> Iterator[None]:
    """Lets transformers' report on missing and unexpected keys name where they were looked for."""

    def rename(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace("from: None\n", f"from: {source}\n", 1)
        return True

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(rename)
    try:
        yield
    finally:
        logger.removeFilter(rename)
