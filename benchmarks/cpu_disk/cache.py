"""The page cache of some files: emptied, filled, and how fast the disk fills it."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 16 * 2**20


def drop(files: Iterable[Path]) -> None:
    """Forgets what is cached of these files, except pages that a process has mapped and used."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Iterable[Path], *, num_threads: int = 1) -> int:
    """Reads the files, each thread every n-th chunk; returns the bytes."""
    chunks = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _CHUNK)]
    done = [0] * num_threads

    def work(number: int) -> None:
        memory = bytearray(_CHUNK)
        for path, offset in chunks[number::num_threads]:
            descriptor = os.open(path, os.O_RDONLY)
            done[number] += os.preadv(descriptor, [memory], offset)
            os.close(descriptor)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def cold_rate(files: list[Path]) -> float:
    """Bytes a second that the disk gives of these files: the better of one and of two readers."""
    rates = []
    for num_threads in (1, 2):
        drop(files)
        begin = time.perf_counter()
        num_bytes = read(files, num_threads=num_threads)
        rates.append(num_bytes / (time.perf_counter() - begin))
    return max(rates)
