"""Sizes as people write them: "6GiB", "1.5 GB", "40%", or a number of bytes."""

import re
from fractions import Fraction

from superpipeline.errors import InputError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000**i for i, p in enumerate("kmgt", start=1)},
    **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", start=1)},
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(%|[a-z]*)\s*", re.IGNORECASE)

Size = int | str


def parse_bytes(size: Size, total_bytes: int | None = None) -> int:
    """The number of bytes that `size` stands for; a percentage is of `total_bytes`.

    Raises:
        InputError: not a size, negative, or a percentage where there is nothing to take it of.

    Example:
        >>> parse_bytes("1.5 KiB"), parse_bytes("40%", 1000), parse_bytes(7)
        (1536, 400, 7)
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise InputError(f"a size is a number of bytes or text like '6GiB' or '40%', got {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise InputError(f"a size cannot be negative, got {size}")
        return size
    match = _PATTERN.fullmatch(size)
    unit = match.group(2).lower() if match else None
    if match is None or (unit != "%" and unit not in _UNITS):
        raise InputError(f"cannot read the size {size!r}; write it like '6GiB', '800MB' or '40%'")
    number = Fraction(match.group(1))  # exact: as a float, 29% of 100 would be 28
    if unit != "%":
        return int(number * _UNITS[unit or ""])
    if total_bytes is None:
        raise InputError(f"{size!r} is a percentage, and here there is nothing to take it of")
    return int(number / 100 * total_bytes)


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` with a binary unit and one decimal.

    Example:
        >>> format_bytes(6 * 2**30), format_bytes(1536), format_bytes(12)
        ('6.0 GiB', '1.5 KiB', '12 B')
    """
    if abs(num_bytes) < 1024:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 1000 or unit == "GiB":
            return f"{value:.1f} {unit}"
    raise AssertionError("unreachable")
