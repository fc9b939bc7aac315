"""The fetch thread and its ring, before a device whose copies are as late as events permit."""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from superpipeline.errors import ClosedError, DiskError
from superpipeline.ring import Ring
from superpipeline.staging import Fetcher
from test_reader import SOON, Counted, fail, memory

CHUNK = 2048
RING = 4 * CHUNK


class OverwrittenError(AssertionError):
    """Bytes changed between the issue of their copy and the copy."""


class LateEvent:
    """What is behind it happens when somebody waits for it."""

    def __init__(self, device: LateDevice, position: int) -> None:
        self._device, self._position = device, position

    def synchronize(self) -> None:
        self._device.run(self._position)


class LateDevice:
    """One stream. Copies happen at the last moment; what they copy from must be as it was.

    Attributes:
        log: what was issued, in order.
    """

    def __init__(self) -> None:
        self.log: list[object] = []
        self.entered: threading.Thread | None = None
        self.is_dead = False
        self.overwritten = 0
        self._copies: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._done = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        self.entered = threading.current_thread()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        assert threading.current_thread() is self.entered
        self._check_alive()
        with self._lock:
            self._copies.append((destination, source, source.clone()))
            self.log.append(int(source[0]))

    def record(self) -> LateEvent:
        assert threading.current_thread() is self.entered
        self._check_alive()
        return LateEvent(self, len(self._copies))

    def wait(self, event: object) -> None:
        assert threading.current_thread() is self.entered
        self._check_alive()
        self.log.append(event)

    def run(self, until: int) -> None:
        with self._lock:
            while self._done < until:
                destination, source, as_issued = self._copies[self._done]
                self.overwritten += not torch.equal(source, as_issued)
                ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.numel())
                self._done += 1

    def _check_alive(self) -> None:
        if self.is_dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Cut(Counted):
    """A source that can be cut; its bytes count up, so that each is known."""

    def __init__(self, start: int, *, num_bytes: int, gate: threading.Event | None = None) -> None:
        super().__init__(start % 256, num_bytes=num_bytes)
        self._start, self._gate = start, gate

    def expected(self) -> torch.Tensor:
        return (torch.arange(self._start, self._start + self.num_bytes) % 256).to(torch.uint8)

    def read_into(self, destination: torch.Tensor) -> None:
        if self._gate is not None:
            assert self._gate.wait(SOON)
        destination.copy_(self.expected())
        self.num_reads += 1

    def parts(self, most: int) -> Iterator[tuple[int, Cut]]:
        for begin in range(0, self.num_bytes, most):
            length = min(most, self.num_bytes - begin)
            yield begin, Cut(self._start + begin, num_bytes=length, gate=self._gate)


@pytest.fixture
def device():
    device = LateDevice()
    yield device
    assert not device.overwritten


@pytest.fixture
def fetcher(device):
    fetcher = Fetcher(device, memory(RING), num_threads=3, chunk_bytes=CHUNK)
    yield fetcher
    fetcher.close()


def eventually(condition) -> None:
    give_up = time.monotonic() + SOON
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.001)
    assert condition()


# ---- bytes and order -------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, CHUNK, CHUNK + 1, RING, 7 * RING + 5])
def test_bytes_arrive_when_the_event_behind_them_happens(device, fetcher, num_bytes) -> None:
    source, target = Cut(3, num_bytes=num_bytes), memory(num_bytes)
    fetcher.copy([(target, source)])
    fetcher.record().event().synchronize()
    assert torch.equal(target, source.expected())


def test_operations_are_issued_in_order(device, fetcher) -> None:
    fetcher.copy([(memory(), Cut(1, num_bytes=100)), (memory(), torch.full_like(memory(), 2))])
    fetcher.wait("drained")
    fetcher.copy([(memory(2 * CHUNK), Cut(3, num_bytes=2 * CHUNK))])
    fetcher.wait("drained too")
    fetcher.copy([(memory(3 * RING), Counted(5, num_bytes=3 * RING))])
    fetcher.copy([(memory(), Cut(6, num_bytes=100))])
    fetcher.synchronize()
    assert device.log == [1, 2, "drained", 3, 3, "drained too", 5, 6]


@pytest.mark.parametrize("seed", range(10))
def test_any_program_leaves_the_bytes_that_it_would_in_order(device, seed) -> None:
    """Rings of odd sizes, sources of all kinds and sizes, places written again and again."""
    rng = random.Random(seed)
    size = rng.randrange(2 * CHUNK, 9 * CHUNK)
    fetcher = Fetcher(device, memory(size), num_threads=rng.randrange(1, 5), chunk_bytes=CHUNK)
    window, expected = memory(1 << 16), memory(1 << 16)
    for number in range(150):
        num_bytes = rng.choice([1, 30, 511, 512, 513, CHUNK, 3 * CHUNK, rng.randrange(1, 20_000)])
        begin = rng.randrange(len(window) - num_bytes)
        kind = rng.randrange(4)
        if kind == 0:
            source = torch.full((num_bytes,), number, dtype=torch.uint8)
            expected[begin : begin + num_bytes] = source
        elif kind == 1:
            source = Counted(number, num_bytes=num_bytes)  # cannot be cut
            expected[begin : begin + num_bytes] = number
        else:
            source = Cut(number, num_bytes=num_bytes)
            expected[begin : begin + num_bytes] = source.expected()
        fetcher.copy([(window[begin : begin + num_bytes], source)])
        if rng.random() < 0.2:
            event = fetcher.record().event()
            if rng.random() < 0.5:
                event.synchronize()
                assert torch.equal(window, expected)
    fetcher.record().event().synchronize()
    assert torch.equal(window, expected)
    fetcher.close()


def test_readers_are_ahead_of_the_copies_over_the_ends_of_blocks(device, fetcher) -> None:
    gate = threading.Event()
    held, later = Cut(1, num_bytes=100, gate=gate), Cut(2, num_bytes=100)
    fetcher.copy([(memory(), held)])
    fetcher.record()
    fetcher.wait("drained")
    read = Counted(2)
    fetcher.copy([(memory(), read)])
    eventually(lambda: read.num_reads)
    assert device.log == []
    gate.set()
    fetcher.synchronize()
    assert device.log == [1, "drained", 2]
    del later


def test_recording_does_not_wait_and_waiting_waits_for_the_issue_only(device, fetcher) -> None:
    gate, target = threading.Event(), memory()
    fetcher.copy([(target, Cut(1, num_bytes=100, gate=gate))])
    ticket = fetcher.record()
    waited = threading.Event()
    thread = threading.Thread(target=lambda: (ticket.event(), waited.set()))
    thread.start()
    assert not waited.wait(0.1)  # CUDA would take an event that is not recorded for done
    gate.set()
    assert waited.wait(SOON)
    thread.join()
    assert int(target.sum()) == 0  # not done, but it will be before whatever waits for the event
    ticket.event().synchronize()
    assert int(target.sum()) > 0


def test_what_cannot_be_cut_and_is_large_has_memory_of_its_own_alone(device, fetcher) -> None:
    together, lock = [0, 0], threading.Lock()

    def use() -> None:
        with lock:
            together[0] += 1
            together[1] = max(together)
        time.sleep(0.01)
        with lock:
            together[0] -= 1

    targets = [memory(3 * RING) for _ in range(4)]
    for number, target in enumerate(targets):
        fetcher.copy([(target, Counted(number + 1, num_bytes=3 * RING, meanwhile=use))])
        fetcher.copy([(memory(CHUNK), Cut(9, num_bytes=CHUNK))])
    fetcher.synchronize()
    assert together == [0, 1]
    for number, target in enumerate(targets):
        assert bool((target == number + 1).all())


def test_a_ring_waits_for_the_copy_before_it_is_used_again() -> None:
    device = LateDevice()
    device.enter()
    ring = Ring(memory(1024))
    first, second = ring.take(512), ring.take(100)
    assert first is not None and second is not None
    assert (first.begin, second.begin) == (0, 512)
    assert ring.take(1) is None  # full, and nothing was issued
    ring.memory[:512] = 1
    target = memory(512)
    device.copy(target, ring.memory[:512])
    first.copied = device.record()
    third = ring.take(1)
    assert third is not None and third.begin == 0
    assert int(target.sum()) == 512
    assert ring.take(1) is None
    ring.untake()
    assert ring.take(512) is not None


# ---- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [100, 3 * RING], ids=["small", "large"])
def test_an_error_is_its_blocks_alone(device, fetcher, num_bytes) -> None:
    """The readers are ahead: the error is there long before its block's turn has come."""
    gate = threading.Event()
    before, after = memory(), memory(5 * CHUNK)
    fetcher.copy([(before, Cut(1, num_bytes=100, gate=gate))])
    first = fetcher.record()
    broken = Counted(num_bytes=num_bytes, meanwhile=fail)
    fetcher.copy([(memory(num_bytes), broken), (memory(), Cut(2, num_bytes=100))])
    second = fetcher.record()
    fetcher.copy([(after, Cut(3, num_bytes=5 * CHUNK))])
    third = fetcher.record()
    gate.set()
    first.event().synchronize()
    assert torch.equal(before, Cut(1, num_bytes=100).expected())
    for _ in range(2):
        with pytest.raises(DiskError, match="it broke"):
            second.event()
    third.event().synchronize()
    assert torch.equal(after, Cut(3, num_bytes=5 * CHUNK).expected())


def test_synchronizing_neither_raises_an_error_nor_takes_it(device, fetcher) -> None:
    fetcher.copy([(memory(), Counted(meanwhile=fail))])
    fetcher.synchronize()
    with pytest.raises(DiskError, match="it broke"):
        fetcher.record().event()
    fetcher.synchronize()
    fetcher.record().event()


def test_a_dead_device_is_reported_and_nobody_waits_for_ever(device, fetcher) -> None:
    fetcher.copy([(memory(), Cut(1, num_bytes=100))])
    fetcher.record().event()
    device.is_dead = True
    for _ in range(20):
        fetcher.copy([(memory(RING), Cut(1, num_bytes=RING))])
        with pytest.raises(RuntimeError):
            fetcher.record().event()
    fetcher.synchronize()


# ---- the end ---------------------------------------------------------------------------------


def test_closing_while_reads_are_pending(device) -> None:
    gate = threading.Event()
    fetcher = Fetcher(device, memory(RING), num_threads=1, chunk_bytes=CHUNK)
    later = [Counted() for _ in range(50)]
    fetcher.copy([(memory(), Cut(1, num_bytes=100, gate=gate))])
    fetcher.copy([(memory(), each) for each in later])
    ticket = fetcher.record()
    fetcher.copy([(memory(3 * RING), Counted(num_bytes=3 * RING))])
    last = fetcher.record()
    threading.Timer(0.1, gate.set).start()
    fetcher.close()
    assert not fetcher._thread.is_alive()
    assert not any(each.num_reads for each in later)
    for each in (ticket, last):
        with pytest.raises(ClosedError):
            each.event()
    with pytest.raises(ClosedError):
        fetcher.copy([(memory(), memory())])
    with pytest.raises(ClosedError):
        fetcher.record()
    fetcher.close()


def test_stopping_alone_abandons_what_has_not_begun(device) -> None:
    """As a program's end does: the readers may be told later, so they do not abandon it."""
    gate = threading.Event()
    fetcher = Fetcher(device, memory(RING), num_threads=1, chunk_bytes=CHUNK)
    fetcher.copy([(memory(), Cut(1, num_bytes=100, gate=gate))])
    eventually(lambda: not fetcher._line.queue.qsize())
    # Too much for the ring: it waits for the first.
    later = [Counted(num_bytes=CHUNK) for _ in range(50)]
    fetcher.copy([(memory(CHUNK), each) for each in later])
    ticket = fetcher.record()
    fetcher._stop()
    gate.set()
    fetcher._thread.join(SOON)
    assert not fetcher._thread.is_alive()
    assert sum(each.num_reads for each in later) <= RING // CHUNK
    with pytest.raises(ClosedError):
        ticket.event()
    fetcher.close()


def test_closing_waits_for_copies_from_the_ring(device) -> None:
    fetcher = Fetcher(device, memory(RING), num_threads=1, chunk_bytes=CHUNK)
    target = memory()
    fetcher.copy([(target, Cut(1, num_bytes=100))])
    fetcher.record().event()
    assert int(target.sum()) == 0
    fetcher.close()
    assert int(target.sum()) > 0


def test_forgetting_ends_the_threads(device) -> None:
    fetcher = Fetcher(device, memory(RING), num_threads=2, chunk_bytes=CHUNK)
    fetcher.copy([(memory(RING), Cut(1, num_bytes=RING))])
    fetcher.record().event()
    threads = [fetcher._thread, *fetcher._reader._threads]
    assert len(threads) == 3
    del fetcher
    gc.collect()
    threads[0].join(SOON)
    gc.collect()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_ctrl_c_while_waiting_for_the_disk(device, fetcher) -> None:
    gate = threading.Event()
    target = memory()
    fetcher.copy([(target, Cut(1, num_bytes=100, gate=gate))])
    ticket = fetcher.record()
    main = threading.main_thread().ident
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ticket.event()
    gate.set()
    fetcher.synchronize()
    ticket.event().synchronize()
    assert torch.equal(target, Cut(1, num_bytes=100).expected())
