"""Tensors to a safetensors file and back into tensors that are there, without a copy of all.

Bytes go from a tensor's memory to the file and from the file to a tensor's memory. Beside them one
tensor at most is copied: one on another device, or one whose elements do not lie in order.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from superpipeline import header
from superpipeline.errors import DiskError, InputError

_NAMES = {dtype: name for name, dtype in header.DTYPES.items()}
_METADATA = {"format": "pt"}  # transformers asks for it


def write(
    file: BinaryIO,
    tensors: Mapping[str, torch.Tensor],
    values: Callable[[str], torch.Tensor],
) -> None:
    """Writes a safetensors file with these names, dtypes and shapes; `values` gives what is in
    them, one at a time.

    Raises:
        InputError: a tensor cannot be held by the format; nothing was written.
        OSError: of the file.
    """
    # Wide ones first: so each begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    described: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        described[name] = {
            "dtype": _dtype_name(name, tensor), "shape": [*tensor.shape],
            "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        value = values(name).detach()
        file.write(_memory(value.cpu().contiguous()))


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not is_plain or is_traceable_wrapper_subclass(tensor) or tensor.dtype not in _NAMES:
        raise InputError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype} with layout {tensor.layout} on "
            f"{tensor.device}, which a safetensors file cannot hold; if it does not train, leave "
            f"it out with frozen=False"
        )
    return _NAMES[tensor.dtype]


def entries(file: BinaryIO, path: Path) -> dict[str, header.Entry]:
    """Where in a safetensors file each tensor is.

    Raises:
        DiskError: the file is damaged, or is no safetensors file.
    """
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = header.header_length(start := file.read(8), path, file_bytes)
    assert len(start) == 8
    return header.parse(file.read(length), path, file_bytes)


def read(file: BinaryIO, entry: header.Entry, target: torch.Tensor) -> None:
    """Fills `target`, of the same dtype and shape, in place, and counts that as a change of it.

    Raises:
        DiskError: the file ends too early.
        OSError: it cannot be read.
    """
    if target.device.type == "cpu" and target.is_contiguous():
        _fill(file, entry.begin, target.detach())
    else:
        value = torch.empty(entry.shape, dtype=entry.dtype)
        _fill(file, entry.begin, value)
        target.detach().copy_(value)
    torch.autograd.graph.increment_version(target)


def _fill(file: BinaryIO, begin: int, target: torch.Tensor) -> None:
    memory = _memory(target)
    file.seek(begin)
    done = 0
    while done < len(memory):
        # A system call reads some 2 GiB at most.
        count = file.readinto(memory[done:])  # type: ignore[attr-defined]
        if not count:
            raise DiskError(f"{file.name} ends at byte {begin + done}; it was cut short")
        done += count


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data
