"""Sizes as people write them, accepted and refused, exact to the byte."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superpipeline.errors import InputError, SuperpipelineError
from superpipeline.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (0, 0), (7, 7), (2**70, 2**70),
        ("0", 0), ("7", 7), ("7b", 7), ("7 B", 7), ("7B", 7),
        ("1kb", 1000), ("1KB", 1000), ("1MB", 10**6), ("1GB", 10**9), ("1TB", 10**12),
        ("1kib", 1024), ("1KiB", 1024), ("1MiB", 2**20), ("1GiB", 2**30), ("1TiB", 2**40),
        ("6GIB", 6 * 2**30), ("6gib", 6 * 2**30), ("1.5 GB", 1_500_000_000),
        ("  6 \t GiB \n", 6 * 2**30), (".5KiB", 512), ("2.KiB", 2048), ("0.5", 0), ("1.9", 1),
        ("007", 7),
    ],
)  # fmt: skip
def test_accepted(size, num_bytes):
    assert parse_bytes(size) == num_bytes
    assert parse_bytes(size, 123) == num_bytes
    assert type(parse_bytes(size)) is int


@pytest.mark.parametrize(
    ("size", "total", "num_bytes"),
    [
        ("40%", 1000, 400), ("40 %", 1000, 400), ("0%", 1000, 0), ("100%", 1001, 1001),
        ("150%", 100, 150), ("33.3%", 1000, 333), (".5%", 1000, 5), ("40%", 0, 0), ("1%", 99, 0),
    ],
)  # fmt: skip
def test_percentages(size, total, num_bytes):
    assert parse_bytes(size, total) == num_bytes


@pytest.mark.parametrize(
    ("size", "total", "num_bytes"),
    [
        ("29%", 100, 29),
        ("57%", 100, 57),
        ("4.35kb", None, 4350),
        ("1.001 GB", None, 1_001_000_000),
        ("9007199254740993", None, 9_007_199_254_740_993),
        ("9" * 400, None, int("9" * 400)),
    ],
)
def test_sizes_are_exact(size, total, num_bytes):
    """Once sizes were floats: 29% of 100 was 28, and 400 digits an OverflowError."""
    assert parse_bytes(size, total) == num_bytes


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(0, 2**60))
def test_every_percentage_is_exact(hundredths, total):
    text = f"{hundredths // 100}.{hundredths % 100:02}%"
    assert parse_bytes(text, total) == int(Fraction(hundredths, 10_000) * total)


@pytest.mark.parametrize(
    "size",
    [
        "", " ", "GiB", "%", "six GiB", "6 GiBs", "6G", "6 g", "6K", "6Gib/s", "1e9", "0x10",
        "-1", "-1GiB", "+1", "1,5 GB", "1_000", "1 000", "1.2.3 GB", ".", ". GB", "6GiB%", "40%%",
        "nan", "inf", "6PB", "6 GiB 5", "٣ GB",
    ],
)  # fmt: skip
def test_text_refused(size):
    with pytest.raises(InputError, match="write it like '6GiB'") as caught:
        parse_bytes(size, 100)
    assert repr(size) in str(caught.value)


@pytest.mark.parametrize("size", [None, True, False, 1.5, 6.0, b"6GiB", [6], (6,), object])
def test_other_types_refused(size):
    with pytest.raises(InputError, match="a size is a number of bytes or text"):
        parse_bytes(size, 100)


def test_negative_numbers_refused():
    with pytest.raises(InputError, match="cannot be negative, got -1"):
        parse_bytes(-1)


def test_a_percentage_needs_a_total():
    with pytest.raises(InputError, match="'40%' is a percentage, and here there is nothing"):
        parse_bytes("40%")


def test_a_refused_size_is_also_a_value_error():
    with pytest.raises(ValueError, match="cannot read the size"):
        parse_bytes("six")
    assert issubclass(InputError, SuperpipelineError)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (12, "12 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
        (999 * 1024, "999.0 KiB"), (1000 * 1024, "1.0 MiB"), (6 * 2**30, "6.0 GiB"),
        (512 * 2**20, "512.0 MiB"), (5 * 2**40, "5120.0 GiB"), (-5, "-5 B"), (-1536, "-1.5 KiB"),
    ],
)  # fmt: skip
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**60))
def test_what_is_formatted_can_be_read_and_is_near(num_bytes):
    back = parse_bytes(format_bytes(num_bytes))
    assert abs(back - num_bytes) <= 0.051 * max(num_bytes, 1)
