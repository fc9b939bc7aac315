"""What is packed, what stays on disk, and what keeps it there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from on_disk import map_parameters, stand_in_parameters
from superpipeline import build, pack
from superpipeline.build import Layout, lay_out
from superpipeline.disk import DiskFile, Source
from superpipeline.errors import DiskError
from superpipeline.ondisk import OnDisk, shown, with_progress
from superpipeline.pack import on_disk
from superpipeline.streams import Run

GPU = torch.device("cuda")  # only asked about: nothing here computes
RING = 20_000


@pytest.fixture(autouse=True)
def small_reads(monkeypatch) -> None:
    """The weights here are small: let all of them stay on disk."""
    monkeypatch.setattr(build, "LEAST_READ", 1)


def layers(num: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(num)])


def keeper_of(model: nn.Module, index: int = 0) -> OnDisk:
    return OnDisk(lay_out(model, torch.device("cpu"), 1, ()).weights[index])


# ---- the host's bound ---------------------------------------------------------------------------


def test_the_ring_is_a_part_of_host_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "RING_BYTES", RING)
    model = layers()
    total = map_parameters(model, tmp_path)
    layout = lay_out(model, GPU, 1, ())
    plan = Layout.plan_for_bound(layout.workload(), total // 2)
    for bound in range(0, 2 * total, total // 7):
        stays = on_disk(layout, plan, GPU, bound)
        held = sum(w.num_bytes for w in layout.weights if w.index not in stays)
        assert plan.resident <= stays  # they need no host copy
        assert not held or held + RING <= bound
    assert held == sum(w.num_bytes for w in layout.weights if w.index not in plan.resident)


def test_what_is_in_memory_as_a_whole_needs_no_ring(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "RING_BYTES", 1 << 60)
    model = layers()
    total = map_parameters(model, tmp_path)
    layout = lay_out(model, GPU, 1, ())
    plan = Layout.plan_for_k(layout.workload(), _two_blocks())
    assert not plan.resident
    assert on_disk(layout, plan, GPU, 2 * total) == frozenset()
    assert on_disk(layout, plan, GPU, total // 2) == layout.stored()


def _two_blocks() -> object:
    from superpipeline.options import Options

    return Options(device=GPU, k=2)


# ---- a weight on disk ---------------------------------------------------------------------------


def test_values_that_came_back_to_memory_are_cut_like_any_source(tmp_path):
    """One copy of all of it would not fit in the ring that copies to a device go through."""
    model = layers(1)
    stand_in_parameters(model, tmp_path)
    keeper = keeper_of(model)
    weight = lay_out(model, torch.device("cpu"), 1, ()).weights[0]
    value = torch.randn(64, 64)
    keeper.keep(weight, value)
    parts = list(keeper.parts(5000))
    assert [begin for begin, _ in parts] == [0, 5000, 10000, 15000]
    assert max(part.num_bytes for _, part in parts) == 5000
    assert torch.equal(keeper.bytes_of(weight).view(torch.float32).view(64, 64), value)


def test_each_file_that_is_shown_is_looked_at_once(tmp_path):
    """A stand-in shows nothing of its files; an edited weight goes on showing its own."""
    model, other = layers(2), layers(1)
    map_parameters(model, tmp_path, sharded=False)
    (tmp_path / "other").mkdir()
    stand_in_parameters(other, tmp_path / "other")
    keepers = [keeper_of(model, index) for index in range(4)] + [keeper_of(other)]
    with torch.no_grad():
        model[0].weight.add_(1)
    (piece,) = shown(keepers)
    assert piece.file.path == tmp_path / "0.safetensors"
    piece.file.check_unchanged(piece.offset)
    os.truncate(piece.file.path, 100)
    with pytest.raises(DiskError, match=rf"and has 100\), noticed at byte {piece.offset};"):
        piece.file.check_unchanged(piece.offset)


# ---- how far it is ------------------------------------------------------------------------------


def test_progress_tells_every_byte_from_disk_once(tmp_path, monkeypatch):
    told: list[int] = []

    class Bar:
        def __init__(self, total: int, text: str) -> None:
            told.append(total)

        def __enter__(self) -> object:
            return told.append

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("superpipeline.ondisk.progress", Bar)
    source = source_of(tmp_path)
    here, there = torch.zeros(8, dtype=torch.uint8), torch.empty(40_000, dtype=torch.uint8)
    runs = [Run(there, source), Run(torch.empty(8, dtype=torch.uint8), here)]
    with with_progress(runs, "reading") as counted:
        assert counted[1] is runs[1]
        found = counted[0].source
        assert (found.num_bytes, found.working_bytes) == (40_000, 0)
        for begin, part in found.parts(16_384):
            part.read_into(there[begin : begin + part.num_bytes])
    assert told[0] == sum(told[1:]) == 40_000
    assert len(told) > 3
    assert torch.equal(there.view(torch.float32), torch.arange(10_000.0))


def source_of(folder: Path) -> Source:
    save_file({"a": torch.arange(10_000.0)}, folder / "a.safetensors")
    parameter = nn.Linear(1, 1)
    parameter.weight.data = DiskFile(folder / "a.safetensors").tensors["a"]
    return keeper_of(parameter)
