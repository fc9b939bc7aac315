"""verify() proves equality, and fails where it must: on a wrong bit, and where nothing streamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from superpipeline import BudgetError, Pipeline, VerificationError, cpu_streams
from superpipeline.streams import Run
from tiny import build, ids, stream
from zoo import CASES, ZooCase, assert_bit_equal, by_name
from zoo.layers import WIDTH, Layer, layer_list

NAMES = [
    "llama",
    "llama_bfloat16",
    "mixtral",
    "t5",
    "bert",
    "nn_transformer_train",
    "tiny_unet",
    "lstm_lm",
    "module_list_moe",
]


def stream_in_half(model: nn.Module) -> Pipeline:
    try:
        return stream(model, "45%")
    except BudgetError as error:
        return stream(model, error.least_bytes)


def state_of(model: nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_verify_passes_and_changes_nothing(name: str, warm: bool) -> None:
    case = by_name(name)
    model, plain = case.build(), case.build()
    args, kwargs = case.inputs()
    pipe = stream_in_half(model)
    if warm:
        with torch.no_grad():
            case.calls[0].run(model)
    random, before = torch.get_rng_state(), state_of(model)
    given = [t.clone() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        result = pipe.verify(*args, **kwargs)
    assert result.equal and result.deterministic
    assert result.num_tensors > 0 and result.streamed_bytes > 0
    assert str(result).startswith(f"verified: {result.num_tensors} tensors bit-equal")
    assert torch.equal(torch.get_rng_state(), random)
    assert_bit_equal([t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)], given)
    assert_bit_equal(state_of(model), before)
    with torch.no_grad():
        assert_bit_equal(case.calls[0].run(model), case.calls[0].run(plain))


@pytest.mark.parametrize("call", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_verify_generate(name: str, call: str) -> None:
    case = by_name(name)
    model = case.build()
    pipe = stream_in_half(model)
    options: dict[str, Any] = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "top_k": 50},
        "beam": {"do_sample": False, "num_beams": 3},
    }[call]
    kwargs = {"input_ids": case.inputs().kwargs["input_ids"], "pad_token_id": 0}
    result = pipe.verify_call(model.generate, **kwargs, max_new_tokens=5, **options)
    assert result.equal and result.streamed_bytes > 0


def test_verify_with_gradients_on() -> None:
    model, inputs = build(), ids()
    pipe = stream(model)
    assert pipe.verify(inputs).equal
    x = torch.randn(1, 2, WIDTH, requires_grad=True)
    blocks = nn.Sequential(*layer_list(5))
    assert stream(blocks, "45%").verify(x * 2).equal


class Statistics(nn.Module):
    """BatchNorm, dropout and a counter: train mode changes all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(4)
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(4))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.dropout(norm(layer(x)), 0.3, self.training)
        return x * self.num_calls


def test_verify_in_train_mode_leaves_statistics_and_random_numbers() -> None:
    torch.manual_seed(0)
    model, x = Statistics().train(), torch.randn(8, WIDTH)
    pipe = stream(model, "45%")
    random, before = torch.get_rng_state(), state_of(model)
    with torch.no_grad():
        assert pipe.verify(x).equal
        assert_bit_equal(state_of(model), before)
        assert torch.equal(torch.get_rng_state(), random)
        model(x)
        assert int(model.num_calls) == 1 and not torch.equal(
            model.norms[0].running_mean, before[-1]
        )
        before = state_of(model)
        assert pipe.verify(x).equal
    assert_bit_equal(state_of(model), before)


def test_verify_restores_a_streamed_buffer_that_the_forward_writes() -> None:
    class Writing(Layer):
        def __init__(self) -> None:
            super().__init__()
            # 100 KiB of integers: it streams
            self.register_buffer("memory", torch.zeros(400, WIDTH, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.memory += int(100 * x.mean()) + 1
            return super().forward(x) + self.memory.float().mean(0)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[Writing() for _ in range(4)])

    plain, model, x = make(), make(), torch.randn(2, 3, WIDTH)
    pipe = stream(model, "55%")
    with torch.no_grad():
        for _ in range(2):
            before = state_of(model)
            assert pipe.verify(x).equal
            assert_bit_equal(state_of(model), before)
            assert_bit_equal(model(x), plain(x))
    pipe.close()
    assert_bit_equal(state_of(model), state_of(plain))


def corrupt_every(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flips the lowest bit of one byte in every `number`-th copy."""
    land, count = cpu_streams._land, 0

    def corrupting(mapped: Any, runs: list[Run], reader: Any) -> None:
        nonlocal count
        land(mapped, runs, reader)
        count += 1
        if count % number == 0:
            middle = runs[0].destination.numel() // 2 // 4 * 4 + 2
            runs[0].destination[middle] ^= 64

    monkeypatch.setattr(cpu_streams, "_land", corrupting)


@pytest.mark.parametrize("number", [1, 3])
def test_verify_fails_on_one_wrong_bit(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build(), ids()
    pipe = stream(model)
    with monkeypatch.context() as patch, torch.no_grad():
        corrupt_every(number, patch)
        with pytest.raises(VerificationError, match=r"1 of 1 tensors differ .*elements different"):
            pipe.verify(inputs)
        pipe._streams.synchronize()
    pipe._passes.engine.reset()  # what was copied ahead is corrupt
    with torch.no_grad():
        assert pipe.verify(inputs).equal


def test_verify_fails_when_nothing_streams() -> None:
    model = build()
    pipe = stream(model, "100%")
    with pytest.raises(VerificationError, match="nothing was streamed"):
        pipe.verify(ids())


def test_verify_fails_when_the_streamed_call_gives_more() -> None:
    model, inputs = build(), ids()
    pipe = stream(model)
    calls = 0

    def growing() -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        return [model(inputs)] * calls

    with torch.no_grad(), pytest.raises((VerificationError, ValueError)):
        pipe.verify_call(growing)


def test_a_nondeterministic_model_is_reported_not_failed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layer_list(5)
            self.generator = torch.Generator()  # its own: nothing outside can rewind it

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            clean = x
            for layer in self.layers:
                clean = layer(clean)
            return clean, clean + torch.randn(x.shape, generator=self.generator)

    model = Noisy()
    pipe = stream(model, "45%")
    with torch.no_grad():
        result = pipe.verify(torch.randn(2, 3, WIDTH))
    assert not result.equal and not result.deterministic
    assert result.nondeterministic == (1,) and result.num_tensors == 2
    assert str(result).startswith("not decided: tensors [1] of 2")


def test_a_generator_may_be_an_input() -> None:
    """Diffusion pipelines take one; each run must get it in the same state."""

    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layer_list(5)

        def forward(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) + torch.randn(x.shape, generator=generator)
            return x

    torch.manual_seed(0)
    model = Sampling()
    pipe = stream(model, "45%")
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with torch.no_grad():
        assert pipe.verify(torch.randn(2, 3, WIDTH), generator).equal
    assert torch.equal(generator.get_state(), before)


def test_an_exception_in_verify_leaves_a_working_model() -> None:
    model, inputs = build(), ids()
    pipe = stream(model)
    for at in (1, 2, 3):
        calls = 0

        def fail(*_: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        hook = model.layers[2].register_forward_hook(fail)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            pipe.verify(inputs)
        hook.remove()
        with torch.no_grad():
            assert_bit_equal(model(inputs), build()(inputs))
            assert pipe.verify(inputs).equal
    pipe.close()
    assert_bit_equal(state_of(model), state_of(build()))


def test_verify_names_the_first_tensor_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layer_list(5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = x
            for layer in self.layers:
                y = layer(y)
            return {"untouched": x * 2, "result": y}

    model = Two()
    pipe = stream(model, "45%")
    corrupt_every(1, monkeypatch)
    with (
        torch.no_grad(),
        pytest.raises(VerificationError, match=r"1 of 2 .* number 1, \(2, 3, 64\)"),
    ):
        pipe.verify(torch.randn(2, 3, WIDTH))


@pytest.mark.parametrize("case", [c for c in CASES if not c.stateful], ids=lambda case: case.name)
def test_verify_over_the_zoo(case: ZooCase) -> None:
    model = case.build()
    args, kwargs = case.inputs()
    pipe = stream_in_half(model)
    with torch.no_grad():
        case.calls[0].run(model)
        assert pipe.verify(*args, **kwargs).equal


def test_the_model_itself_may_be_an_input() -> None:
    model, inputs = build(), ids()
    pipe = stream(model)

    def call(streamed: nn.Module, x: torch.Tensor) -> torch.Tensor:
        assert streamed is model
        return streamed(x).argmax(-1)

    with torch.no_grad():
        assert pipe.verify_call(call, model, inputs).equal
