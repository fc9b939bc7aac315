"""close(), use after it, and that nothing stays behind when models go."""

from __future__ import annotations

import gc
import threading
import weakref

import psutil
import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import (
    ClosedError,
    UnsupportedError,
)
from tiny import (
    build,
    expect_plain,
    stream,
    streamed,
)
from zoo import assert_bit_equal
from zoo.layers import WIDTH, Layer, layer_list


def fetch_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "superpipeline-fetch"}


def test_close_and_plan_during_a_pass_are_refused() -> None:
    model, pipe, inputs = streamed()
    for use in (
        pipe.close,
        lambda: superpipeline.stream(model, "60%", quiet=True),
        lambda: pipe.verify(inputs),
    ):
        hook = model.layers[2].register_forward_hook(lambda *_, use=use: use() and None)
        with torch.no_grad(), pytest.raises(UnsupportedError, match="within a forward"):
            model(inputs)
        hook.remove()
        expect_plain(model, inputs)
    pipe.close()


def test_after_close() -> None:
    others = fetch_threads()
    model, pipe, inputs = streamed()
    pipe.close()
    assert fetch_threads() <= others
    pipe.close()
    expect_plain(model, inputs)
    for use in (
        lambda: pipe.plan,
        lambda: pipe.host_bytes,
        pipe.explain,
        lambda: pipe.verify(inputs),
        lambda: pipe.verify_call(model, inputs),
    ):
        with pytest.raises(ClosedError):
            use()
    again = stream(model)
    assert again is not pipe
    expect_plain(model, inputs)
    again.close()
    loss = model(inputs).square().sum()
    loss.backward()
    plain = build()
    plain(inputs).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert_bit_equal(ours.grad, theirs.grad)


def test_a_dropped_model_frees_everything() -> None:
    gc.collect()
    others = fetch_threads()
    model, pipe, _inputs = streamed()
    (thread,) = fetch_threads() - others
    alive = [weakref.ref(thing) for thing in (model, pipe, pipe.engine, *pipe._pack.buffers)]
    alive += [weakref.ref(type(model)), weakref.ref(pipe._streams)]
    del model, pipe
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    thread.join(60)
    assert not thread.is_alive()


def test_a_dropped_model_with_a_handle_frees_the_model() -> None:
    model, pipe, inputs = streamed()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(ClosedError, match="no longer exists"):
        pipe.verify(inputs)
    pipe.close()


def test_nothing_leaks_over_fifty_cycles() -> None:
    model, inputs = nn.Sequential(*layer_list(40)), torch.randn(1, 3, WIDTH)  # 4 MiB
    process = psutil.Process()
    num_bytes = sum(p.nbytes for p in model.parameters())

    def cycles(count: int) -> None:
        for _ in range(count):
            with superpipeline.streaming(model, "30%", device="cpu", quiet=True), torch.no_grad():
                model(inputs)
                model(inputs)
        gc.collect()

    cycles(50)  # the allocator takes what it will keep
    threads, classes, before = fetch_threads(), len(Layer.__subclasses__()), process.memory_info()
    cycles(50)
    assert fetch_threads() == threads
    assert len(Layer.__subclasses__()) == classes
    # Fifty leaks of the window alone would be fifteen times the model.
    assert process.memory_info().rss - before.rss < 2 * num_bytes
