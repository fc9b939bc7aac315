"""The CPU's streams: a thread copies in order; events carry errors; closing ends the thread."""

import gc
import threading

import pytest
import torch

from superpipeline.errors import UnsupportedError
from superpipeline.streams import COMPUTE, FETCH, CpuStreams, Run, streams_for


def thread_count() -> int:
    return sum(thread.name == "superpipeline-fetch" for thread in threading.enumerate())


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
    streams.copy([None])  # type: ignore[list-item]  # cannot be copied
    with pytest.raises(TypeError):
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
