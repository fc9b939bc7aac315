"""Sources made of other sources: consecutive ones, ranges, and results computed from them.

Nothing here is read before somebody asks for the bytes, and then in parts where that is possible.
"""

from __future__ import annotations

import ctypes
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch

from superpipeline.disk import Piece, Source

Shape = tuple[int, ...]

_LANES = 64  # parts begin at multiples, so that vectorised loops begin where the whole's do
# Of a result. What a thread computes with lies in caches then; and what it gave back stays in its
# malloc arena after it has ended, where `malloc_trim` does not reach.
_AT_A_TIME = 2 * 2**20


class Held(NamedTuple):
    """Bytes in memory: a loader joined them to others that are on disk."""

    bytes: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.bytes.numel()

    @property
    def working_bytes(self) -> int:
        return 0

    def read_into(self, destination: torch.Tensor) -> None:
        ctypes.memmove(destination.data_ptr(), self.bytes.data_ptr(), self.num_bytes)

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        for begin in range(0, self.num_bytes, most):
            yield begin, Held(self.bytes[begin : begin + most])


class Slice(NamedTuple):
    """A range of a source that can only be made whole."""

    whole: Source
    begin: int
    num_bytes: int

    @property
    def working_bytes(self) -> int:
        return self.whole.num_bytes + self.whole.working_bytes

    def read_into(self, destination: torch.Tensor) -> None:
        with _no_modes():
            memory = torch.empty(self.whole.num_bytes, dtype=torch.uint8, device="cpu")
            self.whole.read_into(memory)
            ctypes.memmove(destination.data_ptr(), memory.data_ptr() + self.begin, self.num_bytes)

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        del most  # each part would make the whole again
        yield 0, self


class Gather(NamedTuple):
    """Consecutive sources.

    Attributes:
        ends: where each ends.
    """

    sources: tuple[Source, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, sources: Iterable[Source]) -> Gather:
        """Joins neighbours in a file."""
        joined: list[Source] = []
        for source in sources:
            last = joined[-1] if joined else None
            if isinstance(last, Piece) and isinstance(source, Piece) and _adjoin(last, source):
                joined[-1] = last._replace(num_bytes=last.num_bytes + source.num_bytes)
            else:
                joined.append(source)
        return cls(tuple(joined), tuple(accumulate(source.num_bytes for source in joined)))

    @property
    def num_bytes(self) -> int:
        return self.ends[-1]

    @property
    def is_divisible(self) -> bool:
        """Whether a range of it costs no more than its share of the whole."""
        return not any(
            isinstance(source, Slice) or (isinstance(source, Computed) and not source.is_divisible)
            for source in self.sources
        )

    def cut(self, begin: int, num_bytes: int) -> Gather:
        """A range of it."""
        return Gather.of(self._within(begin, begin + num_bytes))

    def _within(self, begin: int, end: int) -> Iterator[Source]:
        at = bisect_right(self.ends, begin)
        while begin < end:
            source, last = self.sources[at], self.ends[at]
            length = min(end, last) - begin
            yield _cut(source, begin - (last - source.num_bytes), length)
            begin, at = begin + length, at + 1

    def read(self) -> torch.Tensor:
        """The bytes, in new memory."""
        memory = torch.empty(self.num_bytes, dtype=torch.uint8, device="cpu")
        self.read_into(memory)
        return memory

    def read_into(self, memory: torch.Tensor) -> None:
        """Fills `memory`, of as many bytes."""
        for source, end in zip(self.sources, self.ends, strict=True):
            source.read_into(memory[end - source.num_bytes : end])


def _adjoin(left: Piece, right: Piece) -> bool:
    return left.file is right.file and left.offset + left.num_bytes == right.offset


def _cut(source: Source, begin: int, num_bytes: int) -> Source:
    if num_bytes == source.num_bytes:
        return source
    match source:
        case Piece():
            return source._replace(offset=source.offset + begin, num_bytes=num_bytes)
        case Held():
            return Held(source.bytes[begin : begin + num_bytes])
        case Slice():
            return source._replace(begin=source.begin + begin, num_bytes=num_bytes)
        case Computed(by_rows=True):
            row = source.num_bytes // source.size[0]
            first, last = begin // row, -(-(begin + num_bytes) // row)
            rows, skip = source.rows(first, last), begin - first * row
            return rows if num_bytes == rows.num_bytes else Slice(rows, skip, num_bytes)
    return Slice(source, begin, num_bytes)


class Operand(NamedTuple):
    """A strided tensor whose bytes have not been read. `gather` is all that it reaches over."""

    gather: Gather
    dtype: torch.dtype
    size: Shape
    stride: Shape

    @property
    def is_contiguous(self) -> bool:
        return same_layout(self.size, self.stride, contiguous(self.size))

    @property
    def rows_lie_apart(self) -> bool:
        """Whether no row reaches into the next, so that reading some leaves the others alone."""
        return self.stride[0] >= reach(self.size[1:], self.stride[1:])

    def read(self) -> torch.Tensor:
        """The tensor, in new memory."""
        return self.gather.read().view(self.dtype).as_strided(self.size, self.stride)

    def row(self) -> Operand:
        """The only index of the first dimension."""
        return self._replace(size=self.size[1:], stride=self.stride[1:])

    def rows(self, begin: int, end: int) -> Operand:
        """A range of the first dimension."""
        size, itemsize = (end - begin, *self.size[1:]), self.dtype.itemsize
        first, length = begin * self.stride[0], reach(size, self.stride)
        return self._replace(gather=self.gather.cut(first * itemsize, length * itemsize), size=size)


@dataclass(frozen=True, eq=False)
class Computed:
    """The bytes of an operation's result, computed from its operands whenever they are read.

    Attributes:
        make: the operation.
        dtype: of the result; so are `size` and `stride`, in which it has no gaps.
        by_rows: whether a row of the result (one index of its first dimension) needs only the same
            row of each operand with as many rows.
    """

    make: Callable[..., torch.Tensor]
    operands: tuple[Operand, ...]
    dtype: torch.dtype
    size: Shape
    stride: Shape
    by_rows: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        """The operands, what one of them takes to be read, and the result unless it is a copy."""
        first = self.rows(0, self._step(_AT_A_TIME)) if self.is_divisible else self
        inner = (s.working_bytes for operand in first.operands for s in operand.gather.sources)
        held = sum(operand.gather.num_bytes for operand in first.operands)
        return held + max(inner, default=0) + (0 if self.make is itself else first.num_bytes)

    @property
    def is_divisible(self) -> bool:
        """Whether parts of it read only parts of what it reads."""
        rows = [operand for operand in self.operands if self._has_rows(operand)]
        return self.by_rows and all(o.rows_lie_apart and o.gather.is_divisible for o in rows)

    def read_into(self, destination: torch.Tensor) -> None:
        """Computes on this thread; a part at a time, where that can be."""
        with _no_modes():
            memory = torch.frombuffer(destination.numpy(), dtype=self.dtype)
            result = memory.as_strided(self.size, self.stride)
            if not self.is_divisible:
                result.copy_(self.make(*[operand.read() for operand in self.operands]))
                return
            shared = {id(o): o.read() for o in self.operands if not self._has_rows(o)}
            for begin, end in self._steps(_AT_A_TIME):
                # Nothing of one part is still there when the next is read.
                result[begin:end].copy_(self._make_rows(begin, end, shared))

    def _make_rows(self, begin: int, end: int, shared: dict[int, torch.Tensor]) -> torch.Tensor:
        return self.make(
            *(
                shared[id(operand)] if id(operand) in shared else operand.rows(begin, end).read()
                for operand in self.operands
            )
        )

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        if not self.is_divisible:
            yield 0, self
            return
        row = self.num_bytes // self.size[0]
        for begin, end in self._steps(most):
            yield begin * row, self.rows(begin, end)

    def _steps(self, most: int) -> Iterator[tuple[int, int]]:
        """Rows of at most `most` bytes of the result, where one has no more."""
        step = self._step(most)
        for begin in range(0, self.size[0], step):
            yield begin, min(begin + step, self.size[0])

    def _step(self, most: int) -> int:
        step = max(1, most // (self.num_bytes // self.size[0]))
        return min(step - step % _LANES if step > _LANES else step, self.size[0])

    def rows(self, begin: int, end: int) -> Computed:
        """A range of the result's first dimension."""
        operands = tuple(o.rows(begin, end) if self._has_rows(o) else o for o in self.operands)
        return replace(self, operands=operands, size=(end - begin, *self.size[1:]))

    def _has_rows(self, operand: Operand) -> bool:
        return len(operand.size) == len(self.size) and operand.size[0] == self.size[0]


@contextmanager
def _no_modes() -> Iterator[None]:
    """A reader's thread may be in the middle of anything: its modes are not meant for this."""
    with (
        torch._C.DisableTorchFunction(),
        torch._C._DisableTorchDispatch(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        yield


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """The operation of a copy: writing the result down converts it and puts it in order."""
    return tensor


# ---- shapes -------------------------------------------------------------------------------------


def reach(size: Shape, stride: Shape) -> int:
    """From the first element to the last, in elements."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def contiguous(size: Shape) -> Shape:
    """The strides of a tensor whose elements lie in order."""
    return tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))


def same_layout(size: Shape, one: Shape, other: Shape) -> bool:
    """Whether two strides mean the same for this size."""
    return all(n == 1 or a == b for n, a, b in zip(size, one, other, strict=True))


def is_dense(size: Shape, stride: Shape) -> bool:
    """Whether there are no gaps and no overlaps, in whatever order the elements are."""
    expected = 1
    for step, n in sorted(zip(stride, size, strict=True)):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True
