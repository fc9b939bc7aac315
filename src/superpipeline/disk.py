"""Disk as a tier: safetensors files that are mapped to be looked at and read to be computed with.

A mapping is private and writable: reading it shows the file's bytes (page by page, on demand), and
an edit lands in private pages of this process, never in the file. The engine does not compute
through the mapping (that would count as memory of this process, and is slow): it reads ranges of
the file into memory of its own, except for ranges with private pages, which it copies from there.

    file      [ header ][ w0 ][ w1 ]...          pread ──> window, or pinned staging
    mapping   [ header ][ w0 ][ w1'(edited) ]    what `param.data` shows

[Note: the page cache]
    Reads go through the system's page cache. Direct reads were measured too, on one virtual disk:
    cold 0.8 to 1.4 GiB/s against 0.7 to 2.2 through the cache, for less than half of the CPU time;
    warm no faster, against 8 to 18. Where all files together are more than memory holds, what is
    cached is gone before it is wanted again; then each range is dropped as soon as it was read,
    which takes 6 ms for each GiB.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from superpipeline import header
from superpipeline.advice import bring, can_bring, is_in_memory, let_go, want_large_pages
from superpipeline.errors import DiskError
from superpipeline.pagemap import private_pages

NO_RESERVE = 0x4000  # MAP_NORESERVE of x86 and Arm; Python 3.11 has no name for it
_LARGE_PAGE = 2 * 2**20
_AT_A_TIME = 16 * 2**20
_COMFORTABLE = 0.75  # of the free memory, what files may fill as cache
_seeking = threading.Lock()  # only where the system cannot read at an offset


class Source(Protocol):
    """Bytes that can be read from disk into memory, by any thread.

    Attributes:
        num_bytes: how many.
        working_bytes: memory beyond the destination that reading takes meanwhile.
    """

    @property
    def num_bytes(self) -> int: ...
    @property
    def working_bytes(self) -> int: ...

    def read_into(self, destination: torch.Tensor) -> None:
        """Fills `destination` (uint8, contiguous, of `num_bytes`).

        Raises:
            DiskError: the file cannot be read, or is not the one that was opened.
        """

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        """The same bytes in pieces of at most `most`, where that can be, each with its start."""


class Piece(NamedTuple):
    """A range of a file."""

    file: DiskFile
    offset: int
    num_bytes: int

    @property
    def working_bytes(self) -> int:
        return 0

    def read_into(self, destination: torch.Tensor) -> None:
        self.file.read_into([destination], self.offset)

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        # Cut at multiples of `most` in the file: no page is read, or dropped, by two of them.
        begin = 0
        while begin < self.num_bytes:
            at = self.offset + begin
            length = min(most - at % most, self.num_bytes - begin)
            yield begin, Piece(self.file, at, length)
            begin += length


def joined_pieces(
    pieces: Iterable[Piece], *, gap: int, others: Mapping[DiskFile, Sequence[int]]
) -> Iterator[Piece]:
    """The same ranges in the files' order, put together where at most `gap` bytes lie between.

    Args:
        others: by file, where ranges begin that must not lie between; in order.
    """
    last: Piece | None = None
    for piece in sorted(pieces, key=lambda piece: (id(piece.file), piece.offset)):
        if last is None:
            last = piece
        elif _adjoin(last, piece, gap, others.get(piece.file, ())):
            last = last._replace(num_bytes=piece.offset + piece.num_bytes - last.offset)
        else:
            yield last
            last = piece
    if last is not None:
        yield last


def _adjoin(last: Piece, piece: Piece, gap: int, others: Sequence[int]) -> bool:
    end = last.offset + last.num_bytes
    if last.file is not piece.file or not 0 <= piece.offset - end <= gap:
        return False
    return bisect_left(others, end) == bisect_left(others, piece.offset)


class _Mapping(mmap.mmap):
    """Keeps its file open for as long as any tensor looks at it."""

    file: DiskFile


class _Tensors(Mapping[str, torch.Tensor]):
    """The tensors of a mapping, each made when it is asked for.

    None is kept: a tensor keeps the mapping in a way that the collector of cycles does not see, so
    a file that kept its tensors would stay open for good.
    """

    def __init__(self, mapping: _Mapping, entries: dict[str, header.Entry]) -> None:
        self._mapping, self._entries = mapping, entries

    def __getitem__(self, name: str) -> torch.Tensor:
        dtype, shape, begin, end = self._entries[name]
        with torch.inference_mode(False):
            if begin == end:
                return torch.empty(shape, dtype=dtype)
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(self._mapping, dtype=dtype, offset=begin, count=count)
            return flat.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class DiskFile:
    """One open safetensors file. If another takes its name, this one is still read.

    Attributes:
        tensors: every tensor of the file by name, in the file's order, over the mapping.
        fd: the open file, to be read from.
        keep_cached: whether what was read stays in the page cache; see `is_worth_caching`.

    Raises:
        DiskError: it cannot be opened, is damaged, or is no safetensors file.
    """

    def __init__(self, path: Path, *, keep_cached: bool = True) -> None:
        self.path, self.keep_cached = path, keep_cached
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DiskError(f"{path} cannot be opened: {error.strerror}") from error
        self._close = weakref.finalize(self, os.close, self.fd)
        self._close.atexit = False  # a thread may be reading; the system closes it
        self.num_bytes, self._modified = self._status(0)
        self.address = 0  # not mapped yet
        entries = self._read_header()
        with torch.inference_mode(False):
            mapping = self._map()
            self.address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self.tensors: Mapping[str, torch.Tensor] = _Tensors(mapping, entries)
        _files[self.address] = self

    def read_into(self, destinations: Sequence[torch.Tensor], offset: int) -> None:
        """Fills one after the other with the bytes from `offset` on, as the mapping shows them.

        Costs beside the reading itself some 30 µs, and 1 to 8 ms for each GiB.

        Raises:
            DiskError: the file cannot be read there, or was changed since it was opened.
        """
        num_bytes = sum(destination.numel() for destination in destinations)
        if self.private_pages(offset, num_bytes):
            # Before: to touch a page beyond the end of a file that was cut kills the process.
            self.check_unchanged(offset)
            self._copy_shown(destinations, offset)
            return
        self.cache(offset, num_bytes)
        self._read([destination.numpy().data for destination in destinations], offset)
        # After: what was read of a changed file must not pass for the weights.
        self.check_unchanged(offset)
        if not self.keep_cached:
            self.drop(offset, num_bytes)

    def _copy_shown(self, destinations: Sequence[torch.Tensor], offset: int) -> None:
        for destination in destinations:
            ctypes.memmove(destination.data_ptr(), self.address + offset, destination.numel())
            offset += destination.numel()

    def map(self) -> torch.Tensor:
        """The file's bytes (uint8) in another private mapping, which goes with its last tensor."""
        with torch.inference_mode(False):
            return torch.frombuffer(self._map(), dtype=torch.uint8)

    def private_pages(self, offset: int, num_bytes: int) -> int:
        """How many pages of the range were edited through the mapping, as far as can be seen."""
        return private_pages(self.address + offset, num_bytes)

    def _map(self) -> _Mapping:
        try:
            if sys.platform == "linux":
                # Without NO_RESERVE a file larger than all memory is refused (ENOMEM).
                flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                mapping = _Mapping(self.fd, 0, flags=flags, prot=prot)
            else:
                mapping = _Mapping(self.fd, 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be mapped: {error}") from error
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        want_large_pages(address, address + self.num_bytes)
        mapping.file = self
        return mapping

    def _read_header(self) -> dict[str, header.Entry]:
        start = self._bytes(0, min(8, self.num_bytes))
        length = header.header_length(start, self.path, self.num_bytes)
        return header.parse(self._bytes(8, length), self.path, self.num_bytes)

    def _bytes(self, offset: int, num_bytes: int) -> bytes:
        held = bytearray(num_bytes)
        self.cache(offset, num_bytes)
        self._read([memoryview(held)], offset)
        return bytes(held)

    def _read(self, memories: list[memoryview], at: int) -> None:
        while memories := [memory for memory in memories if len(memory)]:
            try:
                got = _read_at(self.fd, memories, at)
            except OSError as error:
                raise DiskError(f"{self.path} cannot be read at byte {at}: {error}") from error
            if got <= 0:
                self.check_unchanged(at)
                more = sum(map(len, memories))
                raise DiskError(f"{self.path} ends at byte {at}; {more} more needed")
            at += got
            for number, memory in enumerate(memories):
                done = min(got, len(memory))
                memories[number], got = memory[done:], got - done

    def is_cached(self, offset: int, num_bytes: int) -> bool:
        """Whether the page cache has the range, judged by its ends. Costs 2 µs."""
        ends = (offset, offset + num_bytes - 1)
        return self.address != 0 and all(is_in_memory(self.address + at) for at in ends)

    def cache(self, offset: int, num_bytes: int) -> None:
        """Reads the range into the page cache, unless it is there: in large pages (`advice.py`).

        And what is around it: a small part that is there keeps large pages from being made.
        Costs 0.02 s of CPU time for each GiB. What cannot be read shows when it is used.
        """
        if self.num_bytes < _LARGE_PAGE or not can_bring() or self.is_cached(offset, num_bytes):
            return
        # A mapping for this read alone: letting go of its pages is nobody else's loss.
        whole = self.map()
        begin = offset - offset % _LARGE_PAGE
        end = -(-(offset + num_bytes) // _LARGE_PAGE) * _LARGE_PAGE
        for part in whole[begin:end].split(_AT_A_TIME):
            bring(part.data_ptr(), part.data_ptr() + part.numel())
            let_go(part.data_ptr(), part.data_ptr() + part.numel())

    def drop(self, offset: int, num_bytes: int) -> None:
        """Takes the range out of the page cache, except what somebody has mapped."""
        if hasattr(os, "posix_fadvise"):
            # Only what lies in the range as a whole goes. The page (of up to 2 MiB) in which the
            # range begins has its other part before it, which was read already, if at all.
            before = offset % _LARGE_PAGE
            os.posix_fadvise(self.fd, offset - before, num_bytes + before, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self, offset: int) -> None:
        """Costs 2 µs; what is read at `offset` through the mapping is then what was opened.

        Raises:
            DiskError: the file was changed in place.
        """
        num_bytes, modified = self._status(offset)
        if num_bytes != self.num_bytes:
            how = f"it had {self.num_bytes} bytes and has {num_bytes}"
        elif modified != self._modified:
            how = f"modified {(modified - self._modified) / 1e9:+.3f} s from then"
        else:
            return
        raise DiskError(
            f"{self.path} was changed in place since it was opened ({how}), noticed at byte "
            f"{offset}; load the model again, and write files under another name, then rename them"
        )

    def _status(self, offset: int) -> tuple[int, int]:
        try:
            status = os.fstat(self.fd)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be read at byte {offset}: {error}") from error
        return status.st_size, status.st_mtime_ns


_files: weakref.WeakValueDictionary[int, DiskFile] = weakref.WeakValueDictionary()


def is_worth_caching(path: Path, free_bytes: int) -> bool:
    """Whether the files of weights beside `path`, itself included, fit in memory comfortably.

    If not, open them with `keep_cached=False`: each would push out what is wanted before it is.
    """
    siblings = path.parent.glob(f"*{path.suffix}")
    return sum(each.stat().st_size for each in siblings) <= _COMFORTABLE * free_bytes


def _read_at(fd: int, memories: list[memoryview], offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, memories, offset)
    with _seeking:
        os.lseek(fd, offset, os.SEEK_SET)
        got = os.read(fd, len(memories[0]))
    memories[0][: len(got)] = got
    return len(got)


class Stored(NamedTuple):
    """Where the bytes of a tensor are on disk.

    Attributes:
        sources: in order; together the tensor's bytes.
        stride: how they are laid out.
        is_mapped: whether the tensor shows them; if not, it is a stand-in (see `stand_in`).
    """

    sources: tuple[Source, ...]
    stride: tuple[int, ...]
    is_mapped: bool


def locate(tensor: torch.Tensor) -> Stored | None:
    """Where `tensor` is on disk: mapped there, or a stand-in for what is."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    address = tensor.data_ptr()
    if address in _stand_ins:
        return _stand_ins[address]
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    for begin, file in _files.items():
        if begin <= address and address + reach * tensor.itemsize <= begin + file.num_bytes:
            piece = Piece(file, address - begin, reach * tensor.itemsize)
            return Stored((piece,), tensor.stride(), is_mapped=True)
    return None


_stand_ins: dict[int, Stored] = {}


def stand_in(parameter: torch.Tensor, sources: tuple[Source, ...]) -> None:
    """Points `parameter` at one NaN expanded to its shape: its bytes lie in no one place on disk.

    So an unforeseen read shows, and a write raises. (Integers have no NaN: they get their largest.)
    The engine reads `sources`, which together are the parameter's bytes, dense. Costs one element.
    """
    with torch.inference_mode(False), torch.no_grad():
        one = torch.full((1,), _odd_value(parameter.dtype), dtype=parameter.dtype)
        dense = torch.empty(parameter.shape, device="meta").stride()
        parameter.data = one.expand(parameter.shape)
    _stand_ins[one.data_ptr()] = Stored(sources, dense, is_mapped=False)
    weakref.finalize(parameter, _forget, one)


def _odd_value(dtype: torch.dtype) -> float:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.nan
    return 1 if dtype is torch.bool else torch.iinfo(dtype).max


def _forget(one: torch.Tensor) -> None:
    _stand_ins.pop(one.data_ptr(), None)  # `one` is held until here: nobody else has its address
