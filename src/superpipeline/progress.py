"""A progress bar with bytes and rate, on standard error, where somebody waits and can see it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_somebody_waits: ContextVar[bool] = ContextVar("somebody_waits", default=False)


@contextmanager
def bars(*, quiet: bool) -> Iterator[None]:
    """In the block somebody waits, unless `quiet`: what takes its time shows how far it is."""
    before = _somebody_waits.set(not quiet)
    try:
        yield
    finally:
        _somebody_waits.reset(before)


@contextmanager
def progress(total_bytes: int, text: str) -> Iterator[Callable[[int], None]]:
    """A bar for the length of the block; what it gives is called with bytes that are done.

    Any thread may call it. The bar goes when the block ends, however it ends. There is none outside
    of `bars`, none for nothing, and none where standard error is not a terminal.

    Example:
        >>> with bars(quiet=True), progress(3000, "reading weights") as advance:
        ...     advance(1000)
    """
    if not _somebody_waits.get() or not total_bytes or not sys.stderr.isatty():
        yield _ignore
        return
    # Imported here: most processes never show a bar, and rich takes a tenth of a second.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    bar = Progress(
        TextColumn("superpipeline: {task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(text, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def _ignore(num_bytes: int) -> None:
    del num_bytes
