"""Streams: copies in order, from memory and from disk; events carry errors; closing ends threads.

What the thread does that fetches from disk on CUDA is in test_staging.py.
"""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from superpipeline.cpu_streams import CpuStreams
from superpipeline.devices import streams_for
from superpipeline.disk import DiskFile, Source, locate
from superpipeline.errors import ClosedError, DiskError, UnsupportedError
from superpipeline.staging import RING_BYTES, Fetcher
from superpipeline.streams import (
    COMPUTE,
    FETCH,
    CudaStreams,
    Run,
    _CudaFetch,
)
from test_reader import SOON, Counted, fail


def thread_count() -> int:
    return sum(thread.name == "superpipeline-fetch" for thread in threading.enumerate())


def on_disk(path: Path, num_bytes: int) -> tuple[Source, torch.Tensor]:
    """A source of so many bytes, and these bytes."""
    values = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    save_file({"w": values}, path)
    stored = locate(DiskFile(path).tensors["w"])
    assert stored is not None
    return stored.sources[0], values


def test_copies_are_done_when_their_event_has_happened() -> None:
    streams = CpuStreams()
    source = torch.arange(256, dtype=torch.uint8)
    target = streams.allocate(256)
    streams.copy([Run(target[:128], source[:128]), Run(target[128:], source[128:])])
    streams.wait(COMPUTE, streams.record(FETCH))
    assert torch.equal(target, source)
    streams.close()


def test_copies_run_in_order() -> None:
    streams = CpuStreams()
    target = streams.allocate(1 << 20)
    for value in range(50):
        streams.copy([Run(target, torch.full((1 << 20,), value, dtype=torch.uint8))])
    streams.synchronize()
    assert bool((target == 49).all())
    streams.close()


def test_memory_is_page_aligned() -> None:
    for num_bytes in (0, 1, 5000):
        assert CpuStreams().allocate(num_bytes).data_ptr() % 4096 == 0 or num_bytes == 0


def test_a_failed_copy_is_raised_where_it_is_waited_for() -> None:
    streams = CpuStreams()
    unreadable: Any = object()
    streams.copy([Run(torch.empty(1, dtype=torch.uint8), unreadable)])
    with pytest.raises(AttributeError):
        streams.wait(COMPUTE, streams.record(FETCH))
    streams.synchronize()  # later copies are right again
    streams.close()


def test_closing_ends_the_thread_and_so_does_forgetting() -> None:
    before = thread_count()
    for forget in (False, True):
        streams = CpuStreams()
        streams.copy([])
        streams.synchronize()
        assert thread_count() == before + 1
        thread = streams._thread
        assert thread is not None
        if forget:
            del streams
            gc.collect()
        else:
            streams.close()
            streams.close()
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_other_devices_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="use device="):
        streams_for(torch.device("meta"))


# ---- from disk -------------------------------------------------------------------------------


def test_copies_from_disk_and_from_memory_run_in_order(tmp_path) -> None:
    streams = CpuStreams()
    source, values = on_disk(tmp_path / "x.safetensors", 10**7)
    target = streams.allocate(2 * 10**7)
    low, high = target[: 10**7], target[10**7 :]
    streams.copy([Run(low, torch.zeros_like(values))])
    streams.copy([Run(low, source), Run(high, values)])
    streams.copy([Run(low[500:700], torch.ones(200, dtype=torch.uint8))])
    streams.wait(COMPUTE, streams.record(FETCH))
    assert torch.equal(high, values)
    values[500:700] = 1
    assert torch.equal(low, values)
    streams.close()


def test_a_failed_read_is_raised_by_its_event_alone(tmp_path) -> None:
    streams = CpuStreams()
    first, values = on_disk(tmp_path / "first.safetensors", 50_000)
    second, _ = on_disk(tmp_path / "second.safetensors", 50_000)
    os.truncate(tmp_path / "second.safetensors", 20_000)
    targets = [streams.allocate(50_000) for _ in range(3)]
    events = []
    for target, source in zip(targets, (first, second, first), strict=True):
        streams.copy([Run(target, source)])
        events.append(streams.record(FETCH))
    streams.synchronize()
    streams.wait(COMPUTE, events[0])
    with pytest.raises(DiskError, match=r"second.safetensors .*has 20000"):
        streams.wait(COMPUTE, events[1])
    streams.wait(COMPUTE, events[2])
    assert torch.equal(targets[0], values)
    assert torch.equal(targets[2], values)
    streams.close()


def test_synchronizing_neither_raises_an_error_nor_takes_it() -> None:
    streams = CpuStreams()
    streams.copy([Run(streams.allocate(100), Counted(meanwhile=fail))])
    streams.synchronize()
    with pytest.raises(DiskError, match="it broke"):
        streams.wait(COMPUTE, streams.record(FETCH))
    streams.wait(COMPUTE, streams.record(FETCH))
    streams.close()


def test_closing_while_reads_are_pending() -> None:
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert gate.wait(SOON)

    streams = CpuStreams()
    later = [Counted() for _ in range(20)]
    streams.copy([Run(streams.allocate(100), Counted(meanwhile=hold))])
    for each in later:
        streams.copy([Run(streams.allocate(100), each)])
    event = streams.record(FETCH)
    assert began.wait(SOON)
    threading.Timer(0.1, gate.set).start()
    streams.close()
    assert not any(each.num_reads for each in later)
    with pytest.raises(ClosedError):
        streams.wait(COMPUTE, event)
    streams.synchronize()


def test_threads_that_read_end_with_the_streams() -> None:
    for forget in (False, True):
        streams = CpuStreams()
        streams.copy([Run(streams.allocate(100), Counted()) for _ in range(9)])
        streams.synchronize()
        assert streams._reader is not None
        assert streams._thread is not None
        threads = [streams._thread, *streams._reader._threads]
        assert len(threads) > 1
        if forget:
            del streams
        else:
            streams.close()
        for thread in threads:
            gc.collect()
            thread.join(SOON)
            assert not thread.is_alive()


@pytest.fixture
def cuda():
    streams = CudaStreams(torch.device("cuda"))
    yield streams
    streams.close()


@pytest.mark.gpu
def test_cuda_reads_from_disk_through_the_ring(cuda, tmp_path) -> None:
    """More bytes than the ring has; from memory before, between and after."""
    num_bytes = 2 * RING_BYTES + 12_345
    source, values = on_disk(tmp_path / "x.safetensors", num_bytes)
    window = cuda.allocate(num_bytes)
    half = num_bytes // 2
    pinned = torch.full((half,), 5, dtype=torch.uint8).pin_memory()
    cuda.copy([Run(window[:half], pinned)])
    early = cuda.record(FETCH)
    for _ in range(3):
        cuda.copy([Run(window, source)])
        filled = cuda.record(FETCH)
        cuda.wait(COMPUTE, filled)
        seen = window.clone()
        cuda.wait(FETCH, cuda.record(COMPUTE))  # protects what is being cloned
        cuda.copy([Run(window[:half], pinned)])
        cuda.wait(COMPUTE, cuda.record(FETCH))
        assert torch.equal(seen.cpu(), values)
        assert bool((window[:half] == 5).all())
        assert torch.equal(window[half:].cpu(), values[half:])
    cuda.wait(COMPUTE, early)
    cuda.synchronize()


@pytest.mark.gpu
def test_cuda_raises_a_failed_read_by_its_event_alone(cuda, tmp_path) -> None:
    source, values = on_disk(tmp_path / "x.safetensors", 10**6)
    window = cuda.allocate(10**6)
    cuda.copy([Run(window[:100], Counted(meanwhile=fail))])
    failed = cuda.record(FETCH)
    cuda.copy([Run(window, source)])
    filled = cuda.record(FETCH)
    cuda.synchronize()
    with pytest.raises(DiskError, match="it broke"):
        cuda.wait(COMPUTE, failed)
    cuda.wait(COMPUTE, filled)
    assert torch.equal(window.cpu(), values)
    cuda.close()
    cuda.synchronize()


@pytest.mark.gpu
def test_cuda_reads_right_where_pinning_is_refused(cuda, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("superpipeline.staging.RING_BYTES", 1 << 60)  # no system pins an exbibyte
    source, values = on_disk(tmp_path / "x.safetensors", 10**6)
    window = cuda.allocate(10**6)
    with pytest.warns(RuntimeWarning, match="refused to pin"), pytest.raises(RuntimeError):
        cuda.copy([Run(window, source)])  # nor has it one unpinned
    assert float(torch.ones(1, device="cuda")) == 1  # the refusal left no error behind
    # Through ordinary memory, as where only pinning is refused:
    fetcher = Fetcher(_CudaFetch(torch.cuda.Stream()), torch.empty(2**17).byte(), num_threads=2)
    fetcher.copy([(window, source)])
    cuda.wait(COMPUTE, fetcher.record())
    assert torch.equal(window.cpu(), values)
    fetcher.close()
