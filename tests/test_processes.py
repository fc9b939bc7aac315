"""Threads take turns; forked processes share the memory and cannot use the model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import superpipeline
from superpipeline import (
    UnsupportedError,
)
from tiny import (
    build,
    expect_plain,
    stream,
    streamed,
)
from zoo import assert_bit_equal


def test_calls_from_four_threads_are_serialised_and_right() -> None:
    model, plain = build(), build()
    pipe = stream(model)
    inputs = [torch.randint(10, 1000, (1, 3 + n)) for n in range(4)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def call(index: int) -> None:
        start.wait()
        with torch.no_grad():
            results[index] += [model(inputs[index]) for _ in range(8)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, right in zip(results, expected, strict=True):
        assert len(mine) == 8
        for result in mine:
            assert_bit_equal(result, right)
    assert pipe.stats().passes == 4 * 8


class Tokens(Dataset[torch.Tensor]):
    """Rows of token ids; keeps the model, as a careless dataset does."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), 10 + index)


def test_forked_loader_workers_beside_a_streamed_model() -> None:
    model, _, _ = streamed()
    plain = build()
    loader = DataLoader(Tokens(model), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        num_batches = 0
        with torch.no_grad():
            for batch in loader:
                assert_bit_equal(model(batch), plain(batch))
                num_batches += 1
        assert num_batches == 4


def in_child(work: Callable[[], str]) -> str:
    """Runs `work` in a forked child and returns what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("use", ["call", "close", "stream", "verify"])
def test_a_forked_child_cannot_use_the_streamed_model(use: str) -> None:
    """close() and stream() in a child once waited forever for a thread that fork had not copied."""
    model, pipe, inputs = streamed()
    uses: dict[str, Callable[[], Any]] = {
        "call": lambda: model(inputs),
        "close": pipe.close,
        "stream": lambda: superpipeline.stream(model, "60%", quiet=True),
        "verify": lambda: pipe.verify(inputs),
    }

    def work() -> str:
        try:
            uses[use]()
        except UnsupportedError as error:
            return str(error)
        return "it ran"

    assert "forked process" in in_child(work)
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_shares_the_weights_memory() -> None:
    """Neither reading nor writing copies the weights into each worker."""
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)])  # 16 MiB
    pipe = stream(model, "50%")

    def work() -> str:
        process = psutil.Process()
        before = process.memory_full_info().uss
        for p in model.parameters():
            p.data.mul_(1.0)  # in a private mapping this would copy every page
        return str(process.memory_full_info().uss - before)

    grown = int(in_child(work))
    assert grown < pipe.host_bytes // 4
