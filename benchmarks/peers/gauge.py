"""What a run measures of its device and its host: time, memory, link rate, the bits of a result.

The only file of these benchmarks that tells a GPU from a CPU. On a CPU there is no device memory to
measure, and a rehearsal there reports None for it.
"""

import contextlib
import ctypes
import gc
import hashlib
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

GIB = 2**30
_PROBE_BYTES = 256 * 2**20
_PROBE_COPIES = 4  # in one go, so that waiting for the end weighs little


class Peaks(NamedTuple):
    """Most bytes of the device at once: in tensors, and held by the allocator."""

    allocated: int | None
    reserved: int | None


def make_deterministic() -> None:
    """As far as PyTorch can: without cuDNN's attention, whose results differ from run to run."""
    torch.use_deterministic_algorithms(mode=True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)


def device_named(text: str) -> torch.device:
    """The device, with its index: some of torch.cuda asks for one."""
    device = torch.device(text)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def settle(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mark(device: torch.device) -> Any:
    """A moment of the device's time line: an event on the current stream, or the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(marks: list[Any]) -> list[float]:
    """Milliseconds from each mark to the next, once the device is idle."""
    if marks and isinstance(marks[0], float):
        return [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)]


def begin_peaks(device: torch.device) -> None:
    """Frees what nothing refers to and what the allocator kept of it; forgets earlier peaks."""
    gc.collect()
    if device.type == "cuda":
        settle(device)
        torch.cuda.empty_cache()
    forget_peaks(device)


def forget_peaks(device: torch.device) -> None:
    """The peaks begin anew at what is held now, the allocator's stock included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> Peaks:
    if device.type != "cuda":
        return Peaks(None, None)
    return Peaks(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def cap(device: torch.device, num_bytes: int) -> None:
    """From now on this process gets at most `num_bytes` of device memory; 0 lifts that."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, num_bytes / total) if num_bytes else 1.0
        torch.cuda.set_per_process_memory_fraction(share, device)


def begin_host_peak() -> int:
    """Forgets the earlier peak of host memory; returns the bytes resident now.

    What was freed goes back to the system first: glibc would keep it.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def host_peak() -> int:
    """Most bytes of host memory that were resident at once since `begin_host_peak`."""
    return _status_bytes("VmHWM")


def system_used() -> int:
    """Bytes of host memory in use by everything, charged to a process or not."""
    fields = _fields(Path("/proc/meminfo"))
    return fields["MemTotal"] - fields["MemAvailable"]


def link_rate(device: torch.device) -> float:
    """Host-to-device bytes a second: pinned copies of 256 MiB, the best of five times four."""
    on_gpu = device.type == "cuda"
    source = torch.ones(_PROBE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(5):
        settle(device)
        begin = mark(device)
        for _ in range(_PROBE_COPIES):
            target.copy_(source, non_blocking=True)
        end = mark(device)
        settle(device)
        best = min(best, between_ms([begin, end])[0])
    return _PROBE_COPIES * _PROBE_BYTES / best * 1e3


def digest(tensor: torch.Tensor) -> str:
    """A hash of every bit of `tensor`."""
    plain = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def _status_bytes(name: str) -> int:
    return _fields(Path("/proc/self/status")).get(name, 0)


def _fields(path: Path) -> dict[str, int]:
    """The fields of a /proc file that are given in kB, as bytes."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}
