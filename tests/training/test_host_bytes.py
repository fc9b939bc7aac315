"""Host memory for each parameter: what docs/training.md says, measured in processes of their own.

    trained, fp32 AdamW            4 weight + 4 gradient + 8 state           = 16
    trained, param_dtype bfloat16  4 weight + 2 copy + 4 gradient + 8 state  = 18
    frozen, bfloat16               2

Where the device is the CPU, its gradients are host memory as well: until a backward of bfloat16
copies ends these take 2 bytes more.
"""

from __future__ import annotations

import json

import pytest

from training.saving import python

SMALL = 0.25  # of a byte; a second copy of anything would be 2 or more


@pytest.mark.parametrize(
    ("kind", "lazy", "expected"),
    [
        ("float32", False, 16),
        ("float32", True, 16),
        ("bfloat16", True, 18 + 2),
        ("frozen", False, 2),
    ],
)
def test_host_bytes_for_each_parameter(kind: str, lazy: bool, expected: int) -> None:
    call = f"host_memory.bytes_per_parameter({kind!r}, lazy={lazy})"
    # glibc keeps what is freed, of plain models too, unless it may not take it from its heap.
    code = f"from training import host_memory; {call}"
    found = json.loads(python(code, MALLOC_MMAP_THRESHOLD_="65536"))
    # Below, something would be wrong with the way this looks.
    assert expected - 0.1 <= found["peak"] <= expected + SMALL, found
