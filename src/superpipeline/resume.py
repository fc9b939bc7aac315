"""A training run saved whole, so that it goes on as if it had never stopped, bit for bit.

    model.safetensors     the weights and buffers, each once
    state.optimizer.pt    what `optimizer.state_dict()` gives; so for each object that has one
    state.pt              numbers and the like (`step=3`), random states, extra state of modules

`versions.py` makes them change all at once. Nothing that is read can run code: tensors and plain
data only. Weights go from the model's memory to the file and back into the same memory.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from superpipeline import tensorfile
from superpipeline.calls import entry_of
from superpipeline.errors import DiskError, InputError
from superpipeline.header import Entry
from superpipeline.optimizer import LazyOptimizer
from superpipeline.versions import Draft, Version, reading, replacing
from superpipeline.weights import outside_inference_mode

_MODEL, _STATE = "model.safetensors", "state.pt"


class _Slot(NamedTuple):
    """A parameter or a persistent buffer, where the model holds it."""

    module: nn.Module
    key: str
    tensor: torch.Tensor

    @property
    def is_frozen(self) -> bool:
        return isinstance(self.tensor, nn.Parameter) and not self.tensor.requires_grad

    @property
    def is_stood_in(self) -> bool:
        """Whether one element repeats in place of values that are elsewhere."""
        return self.tensor.numel() > 1 and not any(self.tensor.stride())

    def value(self) -> torch.Tensor:
        if not self.is_stood_in:
            return self.tensor
        value: torch.Tensor = self.module.state_dict()[self.key]
        return value


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    frozen: bool = True,
    rng: bool = True,
    **state: Any,
) -> None:
    """Saves a training run between two steps, whole or not at all.

    Until the new checkpoint is whole and on the disk, the folder's checkpoint is the one before:
    whatever happens meanwhile, `kill -9` and a full disk included. Waits for pending updates of
    lazy optimizers. Gradients are not saved.

    Costs no copy of the weights: host memory for one tensor at most. The disk holds the checkpoint
    before and this one, until that is done. One process at a time may save to a folder.

    Args:
        folder: made if it is not there. Its weights can be read by `superpipeline.load` and
            `from_pretrained` (which want the model's `config.json` beside them).
        model: streamed or plain.
        frozen: whether to save parameters that do not train; without them, `load_checkpoint` leaves
            the model's own.
        rng: whether to save the random states of torch (all devices), Python and NumPy.
        state: by names of your own, what else the run consists of. Of objects that have a
            `state_dict` (optimizers, schedulers, a GradScaler) that is saved; numbers, text,
            tensors, lists and dicts are saved as they are.

    Raises:
        InputError: something cannot be saved; the folder is as it was.
        DiskError: the system refused; the folder's checkpoint is the one before.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     superpipeline.save_checkpoint(folder, model, optimizer=optimizer, step=3)
        ...     superpipeline.load_checkpoint(folder, model, optimizer=optimizer)
        {'step': 3}
    """
    _check_names(state)
    objects = {name: value for name, value in state.items() if _has_state(value)}
    plain = {name: value for name, value in state.items() if name not in objects}
    with outside_inference_mode(), _real_weights(model), replacing(Path(folder)) as draft:
        if frozen:
            _refuse_hidden_state(model)
        kept = {name: s for name, s in _slots(model).items() if frozen or not s.is_frozen}
        tensors = {name: slot.tensor for name, slot in kept.items()}
        with draft.file(_MODEL) as file:
            tensorfile.write(file, tensors, lambda name: kept[name].value())
        for name, held in objects.items():
            _write(draft, f"state.{name}.pt", held.state_dict(), f"{name}.state_dict()")
        rest = {"plain": plain, "extra": _extra_state(model), "rng": _random() if rng else None}
        _write(draft, _STATE, rest, "one of " + ", ".join(plain or ["the model's extra state"]))
        about = {"frozen": frozen, "shapes": _shapes_by_name(objects)}
        draft.commit({name: tensor.nbytes for name, tensor in tensors.items()}, about)


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, *, rng: bool = True, **objects: Any
) -> dict[str, Any]:
    """Puts a run back to where `save_checkpoint` saved it; returns what was saved as it is.

    Weights are read into the memory that the parameters have; optimizers, schedulers and the like
    are given their states; random states are set. What the checkpoint holds beyond that is not
    read, so `load_checkpoint(folder, model)` gives a trained model. A checkpoint of a streamed
    model fits the plain one and the other way round, lazy optimizers as well.

    Args:
        folder: as given to `save_checkpoint`.
        model: of the same names, shapes and dtypes.
        rng: whether to set random states, if they were saved.
        objects: those whose state is to be set, by the names that they were saved under.

    Raises:
        InputError: there is no checkpoint, or it does not fit; nothing was changed.
        DiskError: a file is damaged. If that shows only while its bytes are read, the model and the
            objects are in no state to go on with; load another checkpoint.

    Example:
        `load_checkpoint("run", model, optimizer=optimizer)["step"]`; see `save_checkpoint`.
    """
    with outside_inference_mode(), _real_weights(model), reading(Path(folder)) as version:
        slots = _slots(model)
        entries = tensorfile.entries(version.files[_MODEL], version.folder / _MODEL)
        _check_weights(version, slots, entries)
        _check_objects(version, objects)
        rest = _load(version, _STATE)
        _check_extra(version, model, rest["extra"])
        for name, held in objects.items():
            if isinstance(held, Optimizer):
                held.state.clear()  # not the old one and the new one at once
            held.load_state_dict(_load(version, f"state.{name}.pt"))
        for name, entry in entries.items():
            _read(version.files[_MODEL], entry, slots[name])
        for name, extra in rest["extra"].items():
            model.get_submodule(name).set_extra_state(extra)
    if rng and rest["rng"] is not None:
        _set_random(rest["rng"])
    plain: dict[str, Any] = rest["plain"]
    return plain


# ---- the model ----------------------------------------------------------------------------------


@contextmanager
def _real_weights(model: nn.Module) -> Iterator[None]:
    """Inside, no update is pending of whatever is streamed of `model`."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a checkpoint is of a torch.nn.Module, got {type(model).__name__}; write "
            f"save_checkpoint(folder, model, optimizer=optimizer)"
        )
    entries = (entry_of(module) for module in model.modules())
    pipelines = {id(e.passes): e.passes.pipeline for e in entries if e is not None}
    with ExitStack() as stack:
        for pipeline in pipelines.values():
            stack.enter_context(pipeline.weights())
        yield


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Every tensor that a checkpoint holds, under its first name."""
    found: dict[str, _Slot] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        buffers = {
            key: buffer
            for key, buffer in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{key}" if prefix else key] = _Slot(module, key, tensor)
    return found


def _refuse_hidden_state(model: nn.Module) -> None:
    """Quantized layers keep scales and the like beside their parameters and buffers."""
    own = nn.Module._save_to_state_dict
    for name, module in model.named_modules():
        if type(module)._save_to_state_dict is own:
            continue
        held: dict[str, Any] = {}
        module._save_to_state_dict(held, "", keep_vars=False)
        hidden = held.keys() - module._parameters.keys() - module._buffers.keys()
        if hidden - {nn.modules.module._EXTRA_STATE_KEY_SUFFIX}:
            raise InputError(
                f"{name} ({type(module).__name__}) keeps {', '.join(sorted(hidden))} beside its "
                f"parameters and buffers; if it does not train, leave it out with frozen=False"
            )


def _extra_state(model: nn.Module) -> dict[str, Any]:
    own = nn.Module.get_extra_state
    return {
        name: module.get_extra_state()
        for name, module in model.named_modules()
        if type(module).get_extra_state is not own
    }


def _read(file: BinaryIO, entry: Entry, slot: _Slot) -> None:
    if slot.is_stood_in:  # there is no memory to read into; the engine takes this up
        slot.tensor.data = torch.empty(entry.shape, dtype=entry.dtype, device=slot.tensor.device)
    tensorfile.read(file, entry, slot.tensor)


def _check_weights(
    version: Version, slots: Mapping[str, _Slot], entries: Mapping[str, Entry]
) -> None:
    needed = {name for name, slot in slots.items() if version.about["frozen"] or not slot.is_frozen}
    missing, beyond = sorted(needed - entries.keys()), sorted(entries.keys() - slots.keys())
    wrong = [
        f"{name} has {entry.dtype} {list(entry.shape)}, the model {tensor.dtype} {[*tensor.shape]}"
        for name, entry in entries.items()
        if name in slots
        and (entry.dtype, entry.shape)
        != ((tensor := slots[name].tensor).dtype, tuple(tensor.shape))
    ]
    wrong += [f"it lacks {name}" for name in missing] + [f"it holds {name}" for name in beyond]
    if wrong:
        more = "" if len(wrong) <= 3 else f"; {len(wrong)} tensors differ"
        raise InputError(
            f"the checkpoint in {version.folder} is of another model: "
            f"{'; '.join(wrong[:3])}{more}. Build the model as it was when it was saved"
        )


def _check_extra(version: Version, model: nn.Module, extra: Mapping[str, Any]) -> None:
    if extra.keys() != (present := _extra_state(model)).keys():
        raise InputError(
            f"the checkpoint in {version.folder} has extra state of {sorted(extra)}, and the model "
            f"of {sorted(present)}. Build the model as it was when it was saved"
        )


# ---- what has a state ---------------------------------------------------------------------------


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None))


def _check_names(state: Mapping[str, Any]) -> None:
    for name in state:
        if not (name.isidentifier() and name.isascii()):
            raise InputError(f"{name!r} names a file of the checkpoint; use letters, digits and _")


def _shapes_by_name(objects: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _shapes(held) for n, held in objects.items() if isinstance(held, Optimizer)}


def _shapes(optimizer: Optimizer) -> list[Any]:
    """The optimizer's class, and the shape of each parameter of each group."""
    kind = type(optimizer._base if isinstance(optimizer, LazyOptimizer) else optimizer)
    groups = [[[*p.shape] for p in group["params"]] for group in optimizer.param_groups]
    return [kind.__name__, groups]


def _check_objects(version: Version, objects: Mapping[str, Any]) -> None:
    saved = [parts[1] for name in version.files if len(parts := name.split(".")) == 3]
    for name, held in objects.items():
        if not _has_state(held):
            raise InputError(
                f"{name}={held!r} has no load_state_dict; load_checkpoint(...)[{name!r}] is what "
                f"was saved under that name"
            )
        if f"state.{name}.pt" not in version.files:
            raise InputError(
                f"the checkpoint in {version.folder} has no state of {name!r}, only of "
                f"{', '.join(saved) or 'none'}"
            )
        before = version.about["shapes"].get(name)
        if isinstance(held, Optimizer) and before is not None and before != _shapes(held):
            raise InputError(
                f"{name} is {_in_words(_shapes(held))}; in the checkpoint in {version.folder} it "
                f"is {_in_words(before)}, or has them in another order. Make it as it was"
            )


def _in_words(shapes: list[Any]) -> str:
    kind, groups = shapes
    return f"{kind} of {' + '.join(str(len(group)) for group in groups) or 'no'} parameters"


class _Sink:
    """Keeps the error of a write: PyTorch's writer would put one of its own in its place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self._file.write(data)
        except OSError as error:
            self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """The file's owner does."""


def _write(draft: Draft, name: str, state: Any, what: str) -> None:
    """With torch.save, and so that it can be loaded without running code."""
    with draft.file(name) as file:
        sink: Any = _Sink(file)
        try:
            torch.save(state, sink)
        except (pickle.PickleError, AttributeError, TypeError) as error:
            raise InputError(f"{what} cannot be saved: {error}; leave that out") from error
        if sink.error is not None:
            raise sink.error
        file.seek(0)
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            file.seek(0)
            kinds = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            raise InputError(
                f"{what} holds {', '.join(kinds)}, which could not be loaded again without running "
                f"code; leave that out, or allow it with torch.serialization.add_safe_globals"
            ) from error


def _load(version: Version, name: str) -> Any:
    try:
        return torch.load(version.files[name], map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DiskError(f"{version.files[name].name} is damaged: {reason}") from error


# ---- random states ------------------------------------------------------------------------------


def _random() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  (the one that all share)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    return {
        "torch": torch.get_rng_state(),
        "devices": [] if device is None else device.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": key}},
    }


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state | {"state": numpy_state["state"] | {"key": key}})  # noqa: NPY002
    count = torch.accelerator.device_count()
    for index, saved in enumerate(state["devices"][:count]):
        torch.get_device_module().set_rng_state(saved, index)
