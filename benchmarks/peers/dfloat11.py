"""DFloat11's compressed form of a model's own weights, made in seconds on the device.

The package loads checkpoints that it compressed beforehand. Its encoder walks over every weight in
Python, which for 8 billion of them takes hours, and its ready checkpoints are on a hub. So the same
bytes are computed here with tensor operations and handed to the package's loader; decoding and
everything after it is the package's. Each use first compares a sample with the package's encoder.
"""

import contextlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

_BYTES_A_THREAD, _THREADS = 8, 512
_BITS_A_THREAD = 8 * _BYTES_A_THREAD
_BITS_A_BLOCK = _BITS_A_THREAD * _THREADS
_SLICE = 1 << 26  # elements encoded in one go

# Which modules are compressed as one, as in the package's published configurations.
PATTERNS = {
    "llama": (r"model\.embed_tokens", r"lm_head", r"model\.layers\.\d+"),
    "flux": (r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"),
}


class Code(NamedTuple):
    """A Huffman code of the 256 exponents: bits of each, how many, and the code of the end."""

    values: torch.Tensor
    lengths: torch.Tensor
    end: tuple[int, int]
    luts: torch.Tensor


class Encoded(NamedTuple):
    """The exponents as a bit stream, and where its threads and blocks of threads begin."""

    encoded: torch.Tensor
    gaps: torch.Tensor
    positions: torch.Tensor


def compress(
    model: nn.Module, name: str, device: torch.device, *, cpu_offload: bool = False
) -> nn.Module:
    """`model` as the package loads it, its weights compressed; the given one is used up."""
    _with_pkg_resources()
    from dfloat11 import DFloat11Model

    _check_encoder()
    patterns = {pattern: _linears(model, pattern) for pattern in PATTERNS[name]}
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as tmp:
        folder = Path(tmp)
        _write(model, patterns, folder, device)
        return DFloat11Model.from_pretrained(
            str(folder), device=str(device), bfloat16_model=model, cpu_offload=cpu_offload
        )


def _write(
    model: nn.Module, patterns: dict[str, list[str]], folder: Path, device: torch.device
) -> None:
    from safetensors.torch import save_file

    for pattern, linears in patterns.items():
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                parts = [module.get_submodule(linear) for linear in linears] or [module]
                tensors = _tensors([part.weight for part in parts], device)
                file = folder / f"{name.replace('.', '_')}.safetensors"
                save_file({f"{name}.{key}": value for key, value in tensors.items()}, file)
    config = {
        "version": "0.5.0", "threads_per_block": [_THREADS],
        "bytes_per_thread": _BYTES_A_THREAD, "pattern_dict": patterns,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": config}))


def _tensors(weights: list[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """What the package keeps of one compressed module."""
    sizes = torch.tensor([weight.numel() for weight in weights])
    bits = torch.cat([w.detach().to(device).flatten().view(torch.int16) for w in weights])
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
    code = huffman(torch.bincount(exponents.flatten().int(), minlength=256).tolist())
    coded = encode(exponents, code)
    return {
        "luts": code.luts,
        "encoded_exponent": coded.encoded,
        "sign_mantissa": (((bits >> 8) & 0x80) | (bits & 0x7F)).to(torch.uint8).cpu(),
        "output_positions": coded.positions.view(torch.uint8),
        "gaps": coded.gaps,
        "split_positions": sizes.cumsum(0)[:-1].contiguous(),
    }


def huffman(counts: list[int]) -> Code:
    """The package's code for these frequencies."""
    _with_pkg_resources()
    from dfloat11 import dfloat11_utils as package

    with contextlib.redirect_stdout(io.StringIO()):
        counter = {value: count for value, count in enumerate(counts) if count}
        _, _, table = package.get_32bit_codec(counter)
        luts = package.get_luts(table)
    values, lengths = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.int64)
    for symbol, (length, value) in table.items():
        if isinstance(symbol, int):
            values[symbol], lengths[symbol] = value, length
    end = next(entry for symbol, entry in table.items() if not isinstance(symbol, int))
    return Code(values, lengths, end, luts)


def encode(exponents: torch.Tensor, code: Code) -> Encoded:
    """The bit stream of `exponents`, on their device; slices of it are placed side by side."""
    device = exponents.device
    values, lengths = code.values.to(device), code.lengths.to(device)
    total = int((lengths * torch.bincount(exponents.int(), minlength=256)).sum())
    stream = torch.zeros(total // 8 + 6, dtype=torch.int32, device=device)
    gaps = torch.full((total // _BITS_A_THREAD + 1,), -1, dtype=torch.int64, device=device)
    positions = torch.full((total // _BITS_A_BLOCK + 1,), -1, dtype=torch.int64, device=device)
    begin = 0
    for first in range(0, exponents.numel(), _SLICE):
        part = exponents[first : first + _SLICE].long()
        length = lengths[part]
        starts = length.cumsum(0) - length + begin
        _place(stream, starts, values[part], length)
        _note_first(gaps, starts // _BITS_A_THREAD, starts % _BITS_A_THREAD)
        indices = torch.arange(first, first + part.numel(), device=device)
        _note_first(positions, starts // _BITS_A_BLOCK, indices)
        begin = int(starts[-1] + length[-1])
    return _finish(stream, gaps, positions, code, (total, exponents.numel()))


def _place(
    stream: torch.Tensor, starts: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> None:
    """Adds each value's bits to the (at most five) bytes of the stream that they fall in."""
    words = values << (40 - starts % 8 - lengths)
    for byte in range(5):
        stream.scatter_add_(
            0, starts // 8 + byte, ((words >> (32 - 8 * byte)) & 0xFF).to(torch.int32)
        )


def _note_first(noted: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> None:
    """The value of the first element in each place, where none is noted yet."""
    is_first = torch.ones_like(places, dtype=torch.bool)
    is_first[1:] = places[1:] != places[:-1]
    places, values = places[is_first], values[is_first]
    unknown = noted[places] < 0
    noted[places[unknown]] = values[unknown]


def _finish(
    stream: torch.Tensor, gaps: torch.Tensor, positions: torch.Tensor, code: Code,
    sizes: tuple[int, int],
) -> Encoded:  # fmt: skip
    total, num_elements = sizes
    left = total % 8
    if left:  # the last byte is filled with the first bits of the end's code
        length, value = code.end
        missing = 8 - left
        stream[total // 8] += value >> max(0, length - missing) << max(0, missing - length)
        for noted, end in ((gaps, total % _BITS_A_THREAD), (positions, num_elements)):
            if noted[-1] < 0:
                noted[-1] = end
    encoded = stream[: -(-total // 8)].to(torch.uint8).cpu()
    gaps, positions = gaps[gaps >= 0], positions[positions >= 0].cpu()
    num_blocks = -(-encoded.numel() // (_BYTES_A_THREAD * _THREADS))
    gaps = nn.functional.pad(gaps, (0, num_blocks * _THREADS - gaps.numel()))
    five, eight = (torch.arange(n - 1, -1, -1, device=gaps.device) for n in (5, 8))
    bits = ((gaps[:, None] >> five) & 1).reshape(-1, 8)
    packed = (bits << eight).sum(1).to(torch.uint8).cpu()
    ends = torch.cat([positions, torch.tensor([num_elements])]).to(torch.uint32)
    return Encoded(encoded, packed, ends)


def _check_encoder(num_elements: int = 50_000) -> None:
    """Raises AssertionError if a byte differs from what the package's own encoder gives."""
    from dfloat11 import dfloat11_utils as package

    weight = torch.randn(num_elements).bfloat16()
    ours = _tensors([weight], torch.device("cpu"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        codec, _, _ = package.get_32bit_codec(package.get_codec(weight)[1])
        theirs = package.encode_weights([weight], codec, _BYTES_A_THREAD, _THREADS)
    names = ("encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")
    for name, expected in zip(names, theirs, strict=True):
        got = ours[name] if name != "output_positions" else ours[name].view(torch.uint32)
        assert torch.equal(got, expected), f"{name} differs from the package's own encoding"


def _linears(model: nn.Module, pattern: str) -> list[str]:
    """The linear layers within a module that matches; none if it is one leaf itself."""
    found = next(module for name, module in model.named_modules() if re.fullmatch(pattern, name))
    return [n for n, m in found.named_modules() if n and isinstance(m, nn.Linear)]


def _with_pkg_resources() -> None:
    """The package asks `pkg_resources`, which setuptools no longer has, for a file's path."""
    if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        stand_in: Any = ModuleType("pkg_resources")
        stand_in.resource_filename = lambda package, name: str(
            Path(importlib.util.find_spec(package).origin or "").parent / name
        )
        sys.modules["pkg_resources"] = stand_in
