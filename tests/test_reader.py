"""The reader: what it reads, how much memory at a time, and how it ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from superpipeline.disk import DiskFile, Source, locate
from superpipeline.errors import ClosedError, DiskError
from superpipeline.reader import Reader

SOON = 60  # seconds that something may take before it counts as never


class Counted:
    """A source that fills with one number and says what is going on. Cannot be cut."""

    def __init__(
        self,
        value: int = 7,
        *,
        num_bytes: int = 100,
        working_bytes: int = 0,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> None:
        self.value, self.num_bytes, self.working_bytes = value, num_bytes, working_bytes
        self._meanwhile = meanwhile
        self.num_reads = 0

    def read_into(self, destination: torch.Tensor) -> None:
        self._meanwhile()
        destination.fill_(self.value)
        self.num_reads += 1

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        yield 0, self


def memory(num_bytes: int = 100) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def fail() -> None:
    raise DiskError("it broke")


def reader_threads() -> int:
    return sum(thread.name == "superpipeline-read" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    gc.collect()
    before = reader_threads()
    yield
    gc.collect()
    give_up = time.monotonic() + SOON
    while reader_threads() > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert reader_threads() <= before


SIZES = {"a": 1, "b": 99_999, "c": 4096, "d": 300_000}


def pairs_of(file: DiskFile) -> dict[str, tuple[torch.Tensor, Source]]:
    """Memory for each tensor of the file, and where it is to come from."""
    found = {}
    for name, tensor in file.tensors.items():
        stored = locate(tensor)
        assert stored is not None
        found[name] = (memory(tensor.nbytes), stored.sources[0])
    return found


@pytest.mark.parametrize("num_threads", [1, 5])
@pytest.mark.parametrize("chunk_bytes", [1000, 4096, 2**30])
@pytest.mark.parametrize("little", [0, 2**30])
def test_everything_is_read_from_files(
    tmp_path: Path, num_threads, chunk_bytes, little, monkeypatch
) -> None:
    monkeypatch.setattr("superpipeline.reader._LITTLE", little)
    values = {n: torch.randint(256, (size,), dtype=torch.uint8) for n, size in SIZES.items()}
    save_file(values, tmp_path / "x.safetensors")
    pairs = [*pairs_of(DiskFile(tmp_path / "x.safetensors")).values()]
    reader = Reader(num_threads=num_threads, chunk_bytes=chunk_bytes)
    for _ in range(3):
        reader.read(pairs)
        for (destination, _), value in zip(pairs, values.values(), strict=True):
            assert torch.equal(destination, value)
            destination.zero_()
    assert len(reader._threads) <= num_threads
    reader.read([])
    reader.close()


def test_neighbours_in_a_file_are_one_read(tmp_path: Path, monkeypatch) -> None:
    """Wherever each goes, and in whatever order they are asked for."""
    values = {n: torch.randint(256, (s,), dtype=torch.uint8) for n, s in SIZES.items()}
    save_file(values, tmp_path / "x.safetensors")
    pairs = pairs_of(DiskFile(tmp_path / "x.safetensors"))
    read, asked = os.preadv, []

    def preadv(descriptor: int, memories: list[memoryview], offset: int) -> int:
        asked.append([len(memory) for memory in memories])
        return read(descriptor, memories, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reader = Reader()
    for chosen, expected in (
        (["c", "a", "d", "b"], [[1, 99_999, 4096, 300_000]]),
        (["d", "a", "b"], [[1, 99_999], [300_000]]),
        (["c"], [[4096]]),
    ):
        asked.clear()
        reader.read([pairs[name] for name in chosen])
        assert sorted(asked) == expected
        for name in chosen:
            destination = pairs[name][0]
            assert torch.equal(destination, values[name])
            destination.zero_()
    reader.close()
    monkeypatch.setattr("superpipeline.reader._LONGEST", 3)
    asked.clear()
    reader = Reader(chunk_bytes=2**30)
    reader.read(pairs.values())
    assert sorted(asked) == [[1, 99_999, 4096], [300_000]]
    reader.close()


def test_what_is_little_is_read_by_the_caller(tmp_path: Path) -> None:
    values = {"a": memory(2**20), "b": memory(1), "c": memory(8 * 2**20)}
    save_file(values, tmp_path / "x.safetensors")
    pairs = pairs_of(DiskFile(tmp_path / "x.safetensors"))
    reader = Reader(chunk_bytes=2**20)
    reader.read([pairs["a"], pairs["b"]])
    assert reader_threads() == 0
    reader.read([pairs["a"], pairs["c"]])
    assert reader_threads() > 0
    reader.close()


def test_one_chunk_is_read_by_the_caller() -> None:
    reader = Reader()
    reader.read([(memory(), Counted())])
    assert reader_threads() == 0
    with pytest.raises(DiskError, match="it broke"):
        reader.read([(memory(), Counted(meanwhile=fail))])
    reader.close()
    with pytest.raises(ClosedError):
        reader.read([(memory(), Counted())])


def test_threads_read_at_the_same_time_and_begin_when_needed() -> None:
    meet = threading.Barrier(3)
    reader = Reader(num_threads=3)
    assert reader_threads() == 0
    reader.read([(memory(), Counted(meanwhile=lambda: meet.wait(SOON))) for _ in range(3)])
    assert reader_threads() == 3
    reader.close()


class Meter:
    """How much working memory is in use at a time, and by how many."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.used = self.most = 0
        self.together: set[int] = set()

    def source(self, working_bytes: int) -> Counted:
        def use() -> None:
            with self._lock:
                self.used += working_bytes
                self.most = max(self.most, self.used)
                if working_bytes > 100:
                    self.together.add(self.used)
            time.sleep(0.001)
            with self._lock:
                self.used -= working_bytes

        return Counted(working_bytes=working_bytes, meanwhile=use)


def test_working_memory_stays_within_the_budget() -> None:
    meter = Meter()
    sizes = [30, 40, 50, 20, 100, 10] * 20
    reader = Reader(num_threads=6, budget_bytes=100)
    reader.read([(memory(), meter.source(size)) for size in sizes])
    assert 50 < meter.most <= 100
    reader.close()


def test_a_chunk_larger_than_the_budget_runs_alone() -> None:
    meter = Meter()
    sizes = [30, 500, 40, 30, 700, 50] * 10
    reader = Reader(num_threads=6, budget_bytes=100)
    reader.read([(memory(), meter.source(size)) for size in sizes])
    assert meter.together == {500, 700}
    reader.close()


def test_a_large_chunk_is_not_overtaken_for_ever() -> None:
    """It waits until it is alone; small ones that come meanwhile wait behind it."""
    gate = threading.Event()
    order: list[str] = []
    reader = Reader(num_threads=3, budget_bytes=100)
    held = Counted(working_bytes=40, meanwhile=lambda: gate.wait(SOON))
    large = Counted(working_bytes=1000, meanwhile=lambda: order.append("large"))
    small = Counted(working_bytes=40, meanwhile=lambda: order.append("small"))
    readings = [reader.submit(memory(), held), reader.submit(memory(), large)]
    give_up = time.monotonic() + SOON
    while not reader._work.budget._turn.locked() and time.monotonic() < give_up:
        time.sleep(0.001)
    readings.append(reader.submit(memory(), small))
    time.sleep(0.1)
    assert order == []
    gate.set()
    for reading in readings:
        reading.wait()
    assert order == ["large", "small"]
    reader.close()


def test_the_first_error_is_raised_when_nobody_writes_any_more() -> None:
    """The caller is about to use the memory for something else."""
    slow_began, failed = threading.Event(), threading.Event()

    def be_slow() -> None:
        slow_began.set()
        assert failed.wait(SOON)
        time.sleep(0.2)

    def fail_then() -> None:
        assert slow_began.wait(SOON)
        failed.set()
        fail()

    slow = Counted(meanwhile=be_slow)
    reader = Reader(num_threads=2)
    with pytest.raises(DiskError, match="it broke"):
        reader.read([(memory(), Counted(meanwhile=fail_then)), (memory(), slow)])
    assert slow.num_reads == 1
    reader.close()


def test_after_an_error_the_rest_is_not_read_and_the_next_reading_is_right() -> None:
    rest = [Counted(meanwhile=lambda: time.sleep(0.001)) for _ in range(1000)]
    reader = Reader(num_threads=1)
    with pytest.raises(DiskError, match="it broke"):
        reader.read([(memory(), each) for each in (Counted(meanwhile=fail), *rest)])
    assert sum(each.num_reads for each in rest) < 1000
    destination = memory()
    reader.read([(destination, Counted(9))])
    assert bool((destination == 9).all())
    reader.close()


def test_an_error_among_sources_that_cannot_even_be_listed() -> None:
    class Broken(Counted):
        def parts(self, most: int) -> Iterator[tuple[int, Source]]:
            raise DiskError("no parts")

    good = Counted()
    reader = Reader()
    with pytest.raises(DiskError, match="no parts"):
        reader.read([(memory(), good), (memory(), Broken())])
    reader.close()


def test_ctrl_c_waits_for_whoever_is_writing() -> None:
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert gate.wait(SOON)

    def interrupt() -> None:
        assert began.wait(SOON)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)
        gate.set()

    held, later = Counted(meanwhile=hold), Counted()
    user = threading.Thread(target=interrupt)
    user.start()
    reader = Reader(num_threads=1)
    with pytest.raises(KeyboardInterrupt):
        reader.read([(memory(), held), (memory(), later)])
    assert held.num_reads == 1
    assert later.num_reads == 0
    user.join()
    reader.close()


def test_closing_abandons_what_has_not_begun() -> None:
    began, gate = threading.Event(), threading.Event()

    def hold() -> None:
        began.set()
        assert gate.wait(SOON)

    reader = Reader(num_threads=1)
    held, later = Counted(meanwhile=hold), Counted()
    first, second = reader.submit(memory(), held), reader.submit(memory(), later)
    assert began.wait(SOON)
    threading.Timer(0.1, gate.set).start()
    reader.close()
    first.wait()
    with pytest.raises(ClosedError):
        second.wait()
    assert (held.num_reads, later.num_reads) == (1, 0)
    with pytest.raises(ClosedError):
        reader.submit(memory(), later)
    reader.close()


def test_forgetting_ends_the_threads() -> None:
    reader = Reader(num_threads=3)
    reader.read([(memory(), Counted()) for _ in range(30)])
    threads = list(reader._threads)
    assert len(threads) == 3
    del reader
    gc.collect()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_memory_is_let_go_of_when_it_was_read() -> None:
    """The thread, waiting for its next chunk, once had the last one's memory."""
    reader = Reader(num_threads=1)
    array, released = np.zeros(100, np.uint8), threading.Event()
    weakref.finalize(array, released.set)
    destination = torch.from_numpy(array)
    del array
    reader.read([(destination, Counted())])
    del destination
    gc.collect()
    assert released.wait(1)
    reader.close()
