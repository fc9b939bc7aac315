"""Puts a model's parameters on disk, mapped or with a stand-in, without changing the model else."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from superpipeline.disk import DiskFile, Piece, locate, stand_in
from superpipeline.errors import BudgetError, UnsupportedError
from test_simulated import READ_FROM_ELSEWHERE
from zoo import ZooCase

MOST_IN_A_SHARD = 256 * 1024


def _movable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a file can hold: dense, in storage of their own, not scripted."""
    found = {}
    storages: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        address = tensor.untyped_storage().data_ptr()
        storages[address] = storages.get(address, 0) + 1
    for name, parameter in model.named_parameters():
        alone = storages[parameter.untyped_storage().data_ptr()] == 1
        if alone and parameter.is_contiguous() and parameter.numel():
            found[name] = parameter
    return found


def _files(tensors: dict[str, torch.Tensor], folder: Path, sharded: bool) -> list[DiskFile]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        used = sum(other.nbytes for other in shards[-1].values())
        if sharded and shards[-1] and used + tensor.nbytes > MOST_IN_A_SHARD:
            shards.append({})
        shards[-1][name] = tensor.detach()
    files = []
    for number, shard in enumerate(shards):
        path = folder / f"{number}.safetensors"
        save_file(shard, path)
        files.append(DiskFile(path))
    return files


def map_parameters(model: nn.Module, folder: Path, *, sharded: bool = False) -> int:
    """Points the parameters at their bytes in files; returns how many bytes those are."""
    movable = _movable(model)
    num_bytes = 0
    with torch.no_grad():
        for file in _files(movable, folder, sharded):
            for name, tensor in file.tensors.items():
                movable[name].data = tensor
                num_bytes += tensor.nbytes
    return num_bytes


def stand_in_parameters(model: nn.Module, folder: Path) -> int:
    """The same with stand-ins: each parameter's bytes lie in two files."""
    movable = _movable(model)
    whole = {name: parameter.detach().clone() for name, parameter in movable.items()}
    flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in whole.items()}
    halves = {}
    for part, (begin, end) in {"a": (0, 0.5), "b": (0.5, 1)}.items():
        (folder / part).mkdir()
        cut = {
            name: bytes_[int(begin * len(bytes_)) : int(end * len(bytes_))].clone()
            for name, bytes_ in flat.items()
        }
        (halves[part],) = _files(cut, folder / part, sharded=False)
    for name, parameter in movable.items():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        sources = []
        for part in ("a", "b"):
            stored = locate(halves[part].tensors[name])
            assert stored is not None
            sources += [s for s in stored.sources if isinstance(s, Piece)]
        stand_in(parameter, tuple(sources))
    return sum(tensor.nbytes for tensor in whole.values())


def align_parameters(model: nn.Module) -> None:
    """Fresh memory for every movable parameter, as a loader that converts gives it."""
    for parameter in _movable(model).values():
        parameter.data = parameter.detach().clone()


@contextmanager
def refused_at_most(case: ZooCase) -> Iterator[None]:
    """Lets a clear refusal pass, of a model whose weights are known to be read elsewhere."""
    refusals = (BudgetError, UnsupportedError)
    try:
        yield
    except refusals:
        if case.name not in READ_FROM_ELSEWHERE | {"expanding_token"}:
            raise
