"""What keeps a weight that stays on disk: its truth is in files, its tensor shows them.

The counterpart of `HostBuffer`, for one weight. It takes no memory until its values are changed:
then a mapped weight has private pages (see `disk.py`), and any other becomes ordinary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from superpipeline.computed import Held
from superpipeline.disk import DiskFile, Piece, Source
from superpipeline.errors import DiskError, UnsupportedError
from superpipeline.host import HostBuffer
from superpipeline.progress import progress
from superpipeline.streams import Run
from superpipeline.weights import Alias, Weight

_SAMPLES = 64  # bytes looked at in a weight that was edited
_CHUNK = 16 * 2**20  # compared at a time when a resident returns


class OnDisk:
    """Keeps one weight on disk. Is itself the source of the weight's bytes, as they are now.

    Attributes:
        mapped: None: no device reads a file by itself.
    """

    mapped: torch.Tensor | None = None

    def __init__(self, weight: Weight) -> None:
        assert weight.stored is not None
        (self._alias,) = weight.aliases
        self._stored = weight.stored
        self.num_bytes = weight.num_bytes
        self._memory: torch.Tensor | None = None
        with torch.inference_mode(False):
            self._shown = self._alias.tensor.detach()

    @property
    def is_readable(self) -> bool:
        """Whether the tensor shows the values; if not, a NaN stands in for them."""
        return self._stored.is_mapped or self._memory is not None

    def view(self, alias: Alias, weight: Weight) -> torch.Tensor:
        """What users see between passes."""
        assert weight.num_bytes == self.num_bytes
        return self._shown if self._memory is None else alias.view(self._memory, 0)

    def span(self, weight: Weight) -> tuple[int, int]:
        """The first address at which the tensor shows the weight, and how many bytes it shows."""
        shown = self.view(self._alias, weight)
        return shown.data_ptr(), weight.num_bytes if self.is_readable else shown.itemsize

    def shown_piece(self) -> Piece | None:
        """What of a file the tensor shows; None if it shows none."""
        source = self._sources()[0]
        return source if self._stored.is_mapped and isinstance(source, Piece) else None

    def whole_piece(self) -> Piece | None:
        """The one range of a file whose bytes are the weight's; None if there is none."""
        return self.shown_piece() if len(self._stored.sources) == 1 else None

    # ---- the source -----------------------------------------------------------------------------

    @property
    def working_bytes(self) -> int:
        return max(source.working_bytes for source in self._sources())

    def read_into(self, destination: torch.Tensor) -> None:
        for begin, source in self.parts(self.num_bytes):
            source.read_into(destination[begin : begin + source.num_bytes])

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        start = 0
        for source in self._sources():
            for begin, part in source.parts(most):
                yield start + begin, part
            start += source.num_bytes

    def _sources(self) -> tuple[Source, ...]:
        return self._stored.sources if self._memory is None else (Held(self._memory),)

    def bytes_of(self, weight: Weight) -> torch.Tensor:
        """The weight's bytes (uint8) in new memory, at its phase. Reads them."""
        memory = torch.empty(weight.num_bytes + 2 * weight.alignment, dtype=torch.uint8)
        skip = (weight.phase - memory.data_ptr()) % weight.alignment
        held = memory[skip : skip + weight.num_bytes]
        self.read_into(held)
        return held

    def real(self, weight: Weight, shown: torch.Tensor) -> torch.Tensor:
        """The values that `shown`, the stand-in, stands for.

        Raises:
            UnsupportedError: it is a part of the weight, and a NaN does not say which.
        """
        if shown.size() != self._alias.size or any(shown.stride()):
            raise UnsupportedError(
                f"{weight.name} is on disk in another form than it is computed with, and a part "
                f"of it is read outside its block; load the model with plain from_pretrained and "
                f"give it to superpipeline.stream"
            )
        return self._alias.view(self.bytes_of(weight), 0)

    # ---- edits ----------------------------------------------------------------------------------

    def sample(self, weight: Weight) -> bytes:
        """Says whether the values may have been changed, and samples them if so.

        Costs a look at the page table: 2 ms for each GiB.
        """
        pages = sum(
            source.file.private_pages(source.offset, source.num_bytes)
            for source in self._sources()
            if isinstance(source, Piece)
        )
        if not pages and self._memory is None:
            return b""
        shown = _bytes_of(self.view(self._alias, weight), weight.num_bytes)
        return pages.to_bytes(8) + shown[:: (weight.num_bytes // _SAMPLES) | 1].numpy().tobytes()

    def keep(self, weight: Weight, value: torch.Tensor) -> None:
        """Takes `value` (like the weight's tensor, on any device) for the weight's values.

        Costs the weight's bytes of host memory.
        """
        if not self.is_readable:
            self._leave_disk()
        self.view(self._alias, weight).copy_(value)

    def keep_if_changed(self, weight: Weight, value: torch.Tensor) -> None:
        """The same, unless these are the bytes on disk. Costs reading them once."""
        try:
            differs = self._differs(_bytes_of(value, weight.num_bytes))
        except DiskError:  # the file no longer has them
            self._leave_disk()
            differs = True
        if differs:
            self.keep(weight, value)

    def _leave_disk(self) -> None:
        self._memory = torch.empty(self.num_bytes, dtype=torch.uint8)  # 64-byte aligned

    def _differs(self, held: torch.Tensor) -> bool:
        spare = torch.empty(min(_CHUNK, self.num_bytes), dtype=torch.uint8)
        for begin, source in self.parts(_CHUNK):
            if source.num_bytes > spare.numel():
                spare = torch.empty(source.num_bytes, dtype=torch.uint8)
            read = spare[: source.num_bytes]
            source.read_into(read)
            if not torch.equal(read, held[begin : begin + source.num_bytes].cpu()):
                return True
        return False


Keeper = HostBuffer | OnDisk


def shown(keepers: Iterable[Keeper]) -> list[Piece]:
    """The first piece of each file that a tensor shows.

    To read the mapping of a file that was cut kills the process: let each piece's file
    `check_unchanged` before anybody may read it.
    """
    first: dict[DiskFile, Piece] = {}
    for keeper in keepers:
        piece = keeper.shown_piece() if isinstance(keeper, OnDisk) else None
        if piece is not None:
            first.setdefault(piece.file, piece)
    return list(first.values())


class _Counted(NamedTuple):
    """A source that tells how much of it was read."""

    source: Source
    advance: Callable[[int], object]

    @property
    def num_bytes(self) -> int:
        return self.source.num_bytes

    @property
    def working_bytes(self) -> int:
        return self.source.working_bytes

    def read_into(self, destination: torch.Tensor) -> None:
        self.source.read_into(destination)
        self.advance(self.num_bytes)

    def parts(self, most: int) -> Iterator[tuple[int, Source]]:
        for begin, part in self.source.parts(most):
            yield begin, _Counted(part, self.advance)


@contextmanager
def with_progress(runs: Sequence[Run], text: str) -> Iterator[list[Run]]:
    """The same copies, and for the length of the block a bar that says how much of them is read."""
    total = sum(run.source.num_bytes for run in runs if not isinstance(run.source, torch.Tensor))
    with progress(total, text) as advance:
        yield [
            run
            if isinstance(source := run.source, torch.Tensor)
            else run._replace(source=_Counted(source, advance))
            for run in runs
        ]


def _bytes_of(tensor: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """The bytes of a dense tensor, from its first element on."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    start = tensor.storage_offset() * tensor.itemsize
    return flat.set_(tensor.untyped_storage(), start, (num_bytes,), (1,))
