"""What the system is told about pages of a mapping: bring them in, let them go, make them large.

[Note: large pages]
    A page cache of 2 MiB pages is mapped in 3 ms for each GiB, one of small pages in 130 (Linux
    6.18, ext4). The system makes large ones where a mapping that asked for them is read first, but
    not for `posix_fadvise`, nor where a part of the 2 MiB is in memory already.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import cast

_HUGE_PAGE = 14  # MADV_HUGEPAGE
# Since Linux 5.14; Python has no names for them.
_POPULATE_READ, _POPULATE_WRITE = 22, 23


@functools.cache
def can_bring() -> bool:
    """Whether this system can be told to bring pages in: Linux from 5.14 on."""
    if sys.platform != "linux":
        return False
    page = mmap.mmap(-1, mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return bring(address, address + mmap.PAGESIZE)


def bring(begin: int, end: int) -> bool:
    """Waits until the pages of these addresses are in memory; False if one cannot be had."""
    return _advise(begin, end, _POPULATE_READ)


def make_real(begin: int, end: int) -> None:
    """Has the system find memory for these addresses now, if it can be told to."""
    if sys.platform == "linux":
        _advise(begin, end, _POPULATE_WRITE)


def let_go(begin: int, end: int) -> None:
    """Lets go of the pages of these addresses, and of what was written to them."""
    _advise(begin, end, mmap.MADV_DONTNEED)


def is_in_memory(address: int) -> bool:
    """Whether the page of a file at `address` is; True too if the file is somebody else's.

    (To try a read that does not wait is no way to know: it starts to read small pages.)
    """
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    found = ctypes.c_ubyte()
    return bool(_mincore()(page, 1, ctypes.byref(found)) == 0 and found.value & 1)


def want_large_pages(begin: int, end: int) -> None:
    """Has what is not in memory yet read in large pages, where the system can."""
    if sys.platform == "linux":
        _advise(begin, end, _HUGE_PAGE)


def _advise(begin: int, end: int, advice: int) -> bool:
    return bool(_madvise()(begin, end - begin, advice) == 0)


@functools.cache
def _mincore() -> Callable[[int, int, object], int]:
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return cast(Callable[[int, int, object], int], mincore)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets go of the interpreter lock
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return cast(Callable[[int, int, int], int], madvise)
