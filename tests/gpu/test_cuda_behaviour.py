"""What only a GPU shows: memory at its peak, overlap, stream order, pinning, devices of inputs."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline.streams import CudaStreams
from zoo import by_name, flatten

WIDTH = 1024
ROUNDING = 512  # the caching allocator's unit


class Layer(nn.Module):
    def __init__(self, cycles: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.cycles = cycles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cycles and x.is_cuda:
            torch.cuda._sleep(self.cycles)
        return x + torch.relu(self.linear(x))


def stack(num_layers: int = 8, cycles: int = 0, width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(cycles, width) for _ in range(num_layers)])


def plain_result(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model.to("cuda")(x).clone()
    model.to("cpu")
    return result


def test_peak_device_memory_is_a_formula(device: torch.device) -> None:
    """Peak = residents + window (each rounded by the allocator) + the plain model's activations."""
    model, x = stack(), torch.randn(64, WIDTH, device=device)
    plain = model.to(device)
    weights = torch.cuda.memory_allocated()
    with torch.no_grad():
        plain(x)  # libraries take their workspaces
        torch.cuda.reset_peak_memory_stats()
        plain(x)
    activations = torch.cuda.max_memory_allocated() - weights
    plain.to("cpu")
    gc.collect()
    before = torch.cuda.memory_allocated()
    for bound in ("30%", "60%", "100%"):
        superpipeline.stream(model, weights=bound, device=device, quiet=True)
        plan = superpipeline.handle(model).plan
        held = torch.cuda.memory_allocated() - before
        assert plan.device_bytes <= held <= plan.device_bytes + 2 * ROUNDING
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for _ in range(3):
                model(x)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= plan.device_bytes + activations + 2 * ROUNDING
    superpipeline.handle(model).close()
    assert torch.cuda.memory_allocated() - before <= 2 * ROUNDING


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)  # other tests share the device


def test_copies_overlap_compute(device: torch.device) -> None:
    """With compute longer than the copies, streaming costs next to nothing; serially it costs both.

    Everything is measured in this run: no constant is assumed. Copies of 0.1 ms, beside compute of
    1.3, were lost in what other processes did on the same device; these take 1.2.
    """
    model, x = stack(cycles=3_000_000, width=4096), torch.randn(64, 4096, device=device)
    with torch.no_grad():
        plain_ms = milliseconds(lambda: model.to(device)(x))
        superpipeline.stream(model, k=2, device=device, quiet=True)
        model(x)
        overlapped_ms = milliseconds(lambda: model(x))
        with pytest.warns(RuntimeWarning, match="no copy overlaps"):
            superpipeline.stream(model, k=1, device=device)
        model(x)
        serial_ms = milliseconds(lambda: model(x))
    streamed = superpipeline.handle(model).plan.streamed_bytes
    copies_ms = streamed / superpipeline.handle(model).link_rate * 1e3
    assert overlapped_ms < plain_ms + copies_ms / 2
    assert serial_ms > overlapped_ms


@pytest.mark.parametrize("slow", ["fetch", "compute", "neither"])
@pytest.mark.parametrize("k", [2, 3])
def test_no_race_when_one_stream_is_slow(
    slow: str, k: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIELD 1: a buffer reused while it is read, or read before the copy has landed."""
    model, x = (
        stack(cycles=3_000_000 if slow == "compute" else 0),
        torch.randn(64, WIDTH, device=device),
    )
    expected = plain_result(model, x)
    if slow == "fetch":
        copy = CudaStreams.copy

        def slow_copy(self, runs):
            with torch.cuda.stream(self._fetch):
                torch.cuda._sleep(3_000_000)
            copy(self, runs)

        monkeypatch.setattr(CudaStreams, "copy", slow_copy)
    superpipeline.stream(model, k=k, device=device, quiet=True)
    with torch.no_grad():
        results = [model(x) for _ in range(4)]
    assert all(torch.equal(result, expected) for result in results)


def test_streams_of_the_user(device: torch.device) -> None:
    """From a stream that is not the default one, and from another in every pass."""
    model, x = stack(num_layers=5, cycles=1_000_000), torch.randn(64, WIDTH, device=device)
    expected = plain_result(model, x)
    superpipeline.stream(model, k=2, device=device, quiet=True)
    torch.cuda.synchronize()
    results = []
    with torch.no_grad():
        for _ in range(6):
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append(model(x))
        results.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_inputs_are_moved_and_the_device_is_named(device: torch.device) -> None:
    """The first line of every model page works: `.to(model.device)`."""
    case = by_name("llama")
    model = superpipeline.stream(case.build(), weights="50%", device=device, quiet=True)
    inputs = case.inputs()
    assert model.device == device
    assert type(model).__name__ == type(case.build()).__name__
    with torch.no_grad():
        here = flatten(model(**inputs.kwargs))
        there = flatten(model(**inputs.to(model.device).kwargs))
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert here[0].device == device
    assert model.to(device) is model
    assert model.cuda() is model
    with pytest.raises(superpipeline.UnsupportedError, match="close"):
        model.to("cpu")
    with pytest.raises(superpipeline.UnsupportedError, match="close"):
        model.half()


def test_a_model_that_was_on_the_gpu_goes_back_there(device: torch.device) -> None:
    model, x = stack().to(device), torch.randn(4, WIDTH, device=device)
    with torch.no_grad():
        expected = model(x)
        with superpipeline.streaming(model, weights="40%", device=device, quiet=True) as pipe:
            assert torch.equal(model(x), expected)
            assert pipe.stats().streamed_bytes > 0
        assert all(p.device == device for p in model.parameters())
        assert torch.equal(model(x), expected)


def test_out_of_memory_says_what_weights_hold(device: torch.device) -> None:
    model = superpipeline.stream(stack(), weights="40%", device=device, quiet=True)
    x = torch.randn(64, WIDTH, device=device)
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            model(torch.empty(1, WIDTH, device=device).expand(10**9, WIDTH))
        assert "weights hold" in "".join(caught.value.__notes__)
        assert torch.equal(model(x), expected)


def test_everything_pinned_is_given_back(device: torch.device) -> None:
    model = superpipeline.stream(stack(), weights="40%", device=device, quiet=True)
    pipe = superpipeline.handle(model)
    with torch.no_grad():
        model(torch.randn(4, WIDTH))
    buffers = [weakref.ref(buffer) for buffer in pipe._pack.buffers]
    before = torch.cuda.memory_allocated()
    del model, pipe
    gc.collect()
    assert all(buffer() is None for buffer in buffers)
    assert torch.cuda.memory_allocated() < before


def test_an_edit_right_after_a_pass_is_seen(device: torch.device) -> None:
    """The start of the next pass is on the device already when the weight is edited."""
    model, plain = stack(), stack().to(device)
    x = torch.randn(4, WIDTH, device=device)
    superpipeline.stream(model, k=2, device=device, quiet=True)
    with torch.no_grad():
        model(x)
        for layer, reference in zip(model, plain, strict=True):
            layer.linear.weight.data.mul_(0.5)
            reference.linear.weight.data.mul_(0.5)
        assert torch.equal(model(x), plain(x))


def test_autocast_keeps_no_cast_copies(device: torch.device) -> None:
    """FIELD 13: a bf16 copy of every streamed fp32 weight must not stay until the context ends."""
    model, x = stack(num_layers=12), torch.randn(4, WIDTH, device=device)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = plain_result(model, x)
    superpipeline.stream(model, k=2, device=device, quiet=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert torch.equal(model(x), expected)
        one_cast = WIDTH * WIDTH * 2
        assert torch.cuda.max_memory_allocated() - before < 3 * one_cast


def test_the_plan_follows_what_timed_passes_show(device: torch.device) -> None:
    """Every third layer takes as long as three copies: a deeper window keeps the link at work."""
    torch.manual_seed(0)
    layers = [Layer(0 if index % 3 else 400_000, 2 * WIDTH) for index in range(18)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 2 * WIDTH, device=device)
    expected = plain_result(model, x)
    superpipeline.stream(model, weights="50%", device=device, quiet=True)
    pipe = superpipeline.handle(model)
    bound = pipe.plan.bound_bytes
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(model(x), expected)
            torch.cuda.synchronize()  # so that what was timed can be read
    assert pipe.plan.workload.busy
    assert max(pipe.plan.workload.busy) > 2 * min(pipe.plan.workload.busy)
    assert bound is not None
    assert pipe.stats().peak_device_bytes <= bound


def test_a_change_of_plan_gives_its_memory_back(device: torch.device) -> None:
    """What the allocator holds is what the bound allows, not the old plan's memory beside it."""
    model, x = stack(24, width=2 * WIDTH), torch.randn(4, 2 * WIDTH, device=device)
    superpipeline.stream(model, weights="30%", device=device, quiet=True)
    with torch.no_grad():
        model(x)
        for bound in ("60%", "45%", "75%"):
            superpipeline.stream(model, weights=bound, device=device, quiet=True)
            model(x)
            held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            assert held < 40 * 2**20, f"{held} bytes are held for nothing at {bound}"
