"""The host tier: packing keeps values, views, identity; costs no second copy; is let go of."""

import gc
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import cgroup
from superpipeline.host import HostBuffer, free_host_memory, pack
from superpipeline.weights import find_weights

CPU = torch.device("cpu")


def test_packing_keeps_values_strides_and_identity() -> None:
    layer = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    strides = {name: p.stride() for name, p in layer.named_parameters()}
    identity = {name: id(p) for name, p in layer.named_parameters()}
    weights = find_weights(layer, CPU)
    buffer = pack(weights)
    for name, parameter in layer.named_parameters():
        assert id(parameter) == identity[name]
        assert parameter.stride() == strides[name]
        assert torch.equal(parameter, before[name])
        begin = buffer.bytes.data_ptr()
        assert begin <= parameter.data_ptr() < begin + buffer.num_bytes


def test_addresses_stay_the_same_modulo_64() -> None:
    """DESIGN 3.10: on the CPU a GEMM's bits depend on the address of its operands."""
    raw = torch.zeros(4096)
    for offset in range(1, 16):
        layer = nn.Linear(8, 8, bias=False)
        layer.weight.data = raw[offset : offset + 64].view(8, 8)
        phase = layer.weight.data_ptr() % 64
        pack(find_weights(layer, CPU))
        assert layer.weight.data_ptr() % 64 == phase


def test_tensors_that_share_bytes_stay_shared() -> None:
    module = nn.Module()
    base = torch.arange(12.0)
    module.low, module.high = nn.Parameter(base[:8]), nn.Parameter(base[4:])
    (weight,) = find_weights(module, CPU)
    assert weight.num_bytes == 12 * 4
    pack([weight])
    with torch.no_grad():
        module.low[5] = 100.0
    assert module.high[1] == 100.0


def test_a_sample_sees_each_whole_tensor_edit() -> None:
    module = nn.Linear(300, 300)
    weights = find_weights(module, CPU)
    buffer = pack(weights)
    before = [buffer.sample(weight) for weight in weights]
    module.weight.data.mul_(1.0 + 2**-7)
    after = [buffer.sample(weight) for weight in weights]
    assert before[0] != after[0]
    assert before[1] == after[1]
    module.bias.data[-1] += 1  # small weights are compared whole
    assert buffer.sample(weights[1]) != after[1]


def test_buffers_are_exactly_sized() -> None:
    """FIELD 9: power-of-two allocation took up to 1.9 times the weights."""
    model = nn.Sequential(*[nn.Linear(257, 257) for _ in range(10)])
    num_bytes = sum(p.numel() * 4 for p in model.parameters())
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    assert num_bytes <= superpipeline.handle(model).host_bytes <= num_bytes * 1.01


def test_too_little_host_memory_is_said_before_anything_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    addresses = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(superpipeline.HostMemoryError, match="more of host memory"):
        superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert type(model) is nn.Sequential


GROUPS = {  # version: (membership, folder, names of limit and use, statistics)
    1: ("4:memory:/box", "memory", "limit_in_bytes", "usage_in_bytes",
        "cache 7\nshmem 3\ntotal_cache 300\ntotal_shmem 100\n"),
    2: ("0::/box", "", "max", "current", "anon 300\nfile 300\nshmem 100\n"),
}  # fmt: skip


@pytest.mark.parametrize("version", GROUPS)
def test_a_control_group_limits_what_is_free(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership, base, limit, used, stat = GROUPS[version]
    group = tmp_path / base / "box"
    group.mkdir(parents=True)
    (tmp_path / "self").write_text(membership)
    (group / f"memory.{limit}").write_text("1000\n")
    (group / f"memory.{used}").write_text("600\n")
    (group / "memory.stat").write_text(stat)
    groups = cgroup.groups
    monkeypatch.setattr(cgroup, "groups", lambda: groups(tmp_path, tmp_path / "self"))
    assert free_host_memory() == 1000 - 600 + 300 - 100
    (group / f"memory.{limit}").write_text({1: str(2**63 - 4096), 2: "max"}[version])
    assert free_host_memory() > 10**6


def test_nothing_is_held_after_close_and_del() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    superpipeline.stream(model, weights="50%", device="cpu", quiet=True)
    buffers = [weakref.ref(buffer) for buffer in superpipeline.handle(model)._pack.buffers]
    model(torch.ones(1, 64))
    del model
    gc.collect()
    assert not any(buffer() for buffer in buffers)


def test_a_mapping_outlives_its_buffer_while_views_do() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    buffer: HostBuffer | None = pack(find_weights(layer, CPU))
    assert buffer is not None
    del buffer
    gc.collect()
    assert torch.equal(layer.weight, before)


PEAK = """
    import gc, psutil, sys, torch
    from torch import nn
    import superpipeline
    superpipeline.profile.link_rate(torch.device("cpu"))
    model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(32)])  # 16 MiB each
    weights = 32 * 2**24
    gc.collect()
    other = psutil.Process().memory_info().rss - weights
    open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
    superpipeline.stream(model, weights=2**25, device="cpu", quiet=True)
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print(int(line.split()[1]) * 1024 - other - weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_host_memory_is_the_weights_and_one_block() -> None:
    """FIELD 14: host memory must not double while the weights are packed.

    Allowed beside the weights: one block (16 MiB), the window (32 MiB), and 100 MiB for whatever
    the allocator keeps.
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK)], check=True, capture_output=True, text=True
    )
    assert int(run.stdout) <= 2**24 + 2**25 + 100 * 2**20
