"""The header of a safetensors file, checked against the file before anything is used.

    file    [ length: 8 bytes ][ header: JSON, `length` bytes ][ the tensors' bytes ]

The header says each tensor's dtype, shape and range. A file that was cut short, is damaged or is
something else is refused here, by name and offset. Nothing of it is ever executed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from superpipeline.errors import DiskError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_LENGTH_BYTES = 8
_LONGEST = 100_000_000  # what the format's own reader accepts
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class Entry(NamedTuple):
    """A tensor of the file: bytes [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_length(start: bytes, path: Path, file_bytes: int) -> int:
    """How long the header is, from the first 8 bytes of a file of `file_bytes`.

    Raises:
        DiskError: the file is too short for it, or is not a safetensors file.
    """
    if len(start) < _LENGTH_BYTES:
        raise DiskError(
            f"{path} is not a safetensors file: it has {file_bytes} bytes, and the length of its "
            f"header alone takes {_LENGTH_BYTES}"
        )
    length = int.from_bytes(start, "little")
    is_header = _LENGTH_BYTES + length <= min(file_bytes, _LONGEST)
    # A header's length may begin with the same bytes.
    if start.startswith(_PICKLES) and not is_header:
        raise DiskError(
            f"{path} is a pickle, which can run any code when it is loaded: it is not opened. If "
            f"you trust it, save its tensors with safetensors.torch.save_file(tensors, "
            f"'{path.stem}.safetensors')"
        )
    if length > _LONGEST:
        raise DiskError(
            f"{path} is not a safetensors file: its first 8 bytes would be a header of {length} "
            f"bytes, and the format allows {_LONGEST}"
        )
    if _LENGTH_BYTES + length > file_bytes:
        raise DiskError(
            f"{path} ends at byte {file_bytes}, within its header, which takes "
            f"{_LENGTH_BYTES + length}: it was cut short; get it again"
        )
    return length


def parse(header: bytes, path: Path, file_bytes: int) -> dict[str, Entry]:
    """Every tensor that the header of a file of `file_bytes` names, in the order of the file.

    Raises:
        DiskError: the header is damaged, or does not fit the file.
    """
    try:
        described = json.loads(header)
    except ValueError as error:
        raise DiskError(f"{path}: the header (from byte 8) is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise DiskError(f"{path}: the header (from byte 8) is no table of tensors")
    described.pop("__metadata__", None)
    start = _LENGTH_BYTES + len(header)
    entries = {name: _entry(name, entry, path, start) for name, entry in described.items()}
    in_order = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    _check_ranges(in_order, path, start, file_bytes)
    return in_order


def _entry(name: str, described: Any, path: Path, start: int) -> Entry:
    fields = _fields(described)
    if fields is None:
        raise DiskError(f"{path}: the header does not say where {name} is: {described!r}")
    kind, shape, begin, end = fields
    if kind not in DTYPES:
        raise DiskError(
            f"{path}: {name} has the dtype {kind}, which is none of {', '.join(DTYPES)}"
        )
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != needed:
        raise DiskError(
            f"{path}: {name} ({kind}, {list(shape)}) takes {needed} bytes, and the header gives it "
            f"{end - begin}, from byte {start + begin} on"
        )
    return Entry(DTYPES[kind], shape, start + begin, start + end)


def _fields(described: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    try:
        kind, shape = described["dtype"], tuple(described["shape"])
        begin, end = described["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    return (kind, shape, begin, end) if whole and isinstance(kind, str) else None


def _check_ranges(in_order: dict[str, Entry], path: Path, start: int, file_bytes: int) -> None:
    before, last = "the header", start
    for name, entry in in_order.items():
        if entry.end > file_bytes:
            raise DiskError(
                f"{path} ends at byte {file_bytes}, and {name} takes bytes {entry.begin} to "
                f"{entry.end}: the file was cut short; get it again"
            )
        if entry.begin < last and entry.begin != entry.end:
            raise DiskError(
                f"{path}: {name}, from byte {entry.begin} on, overlaps {before}, which ends at "
                f"byte {last}"
            )
        if entry.end > last:
            before, last = name, entry.end
