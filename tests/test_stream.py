"""stream(), streaming() and handle(): arguments, errors, and the words on standard error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import (
    BudgetError,
    InputError,
    UnsupportedError,
)
from tiny import (
    bare,
    build,
    expect_plain,
    ids,
    same_weights,
    stream,
    streamed,
)
from zoo import assert_bit_equal


def test_streaming_again_plans_anew() -> None:
    model, pipe, inputs = streamed()
    before = pipe.plan.device_bytes
    assert superpipeline.stream(model, "75%", quiet=True) is model
    assert superpipeline.handle(model) is pipe
    assert pipe.plan.device_bytes > before
    expect_plain(model, inputs)
    for k, k_prime in ((2, 1), (4, 2), (3, 1)):
        superpipeline.stream(model, k=k, k_prime=k_prime, quiet=True)
        expect_plain(model, inputs)
        expect_plain(model, inputs)
    pipe.close()
    assert same_weights(model, build())


def test_streaming_again_can_fail_and_then_changes_nothing() -> None:
    model, pipe, inputs = streamed()
    plan = pipe.plan
    with pytest.raises(BudgetError):
        superpipeline.stream(model, "1KiB", quiet=True)
    with pytest.raises(InputError):
        superpipeline.stream(model)
    with pytest.raises((InputError, UnsupportedError)):
        superpipeline.stream(model, "50%", device="meta")
    assert pipe.plan is plan
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("error")
def test_the_context_manager_restores_everything() -> None:
    model, inputs = build(), ids()
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    before = bare(model)
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    with superpipeline.streaming(model, "50%", device="cpu", quiet=True) as pipe:
        expect_plain(model, inputs)
        assert pipe.stats().streamed_bytes > 0
    after = bare(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert [pair[:2] for pair in after[1]] == [pair[:2] for pair in before[1]]
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    assert same_weights(model, build())
    handle.remove()
    with (
        pytest.raises(KeyError),
        superpipeline.streaming(model, "50%", device="cpu", quiet=True),
    ):
        raise KeyError
    assert bare(model)[0] == before[0]
    expect_plain(model, inputs)


def test_a_handle_needs_a_streamed_model() -> None:
    with pytest.raises(InputError, match="not streamed"):
        superpipeline.handle(build())
    model, _, _ = streamed()
    with pytest.raises(InputError, match="part of a streamed TinyLM"):
        superpipeline.handle(model.layers[0])


def test_without_a_number_the_message_holds_a_line_that_works() -> None:
    model = build()
    before = bare(model)
    with pytest.raises(InputError) as caught:
        superpipeline.stream(model)
    text = str(caught.value)
    total = sum(p.nbytes for p in model.parameters())
    stated, least = map(int, re.findall(r"\((\d+) bytes\)", text))
    assert total <= stated <= 1.1 * total
    assert bare(model) == before
    argument = text.rpartition("give for example ")[2]
    assert argument.startswith("weights=")
    with pytest.raises(BudgetError) as refused:
        superpipeline.stream(model, least - 1, device="cpu", quiet=True)
    assert refused.value.least_bytes == least
    assert bare(model) == before
    exec(f"stream(model, {argument})", {"stream": superpipeline.stream, "model": model})
    superpipeline.handle(model).close()
    stream(model, least)
    expect_plain(model, ids())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"weights": "50%", "k": 2}, InputError, "not both"),
        ({"weights": "50%", "k_prime": 1}, InputError, "not both"),
        ({"weights": "lots"}, InputError, "lots"),
        ({"weights": -1}, InputError, "negative"),
        ({"weights": "1KiB"}, BudgetError, "least"),
        ({"k": 0}, InputError, "k"),
        ({"k": 1, "k_prime": 2}, InputError, "k_prime"),
        ({"weights": "50%", "device": "meta"}, UnsupportedError, "meta"),
    ],
    ids=str,
)
def test_every_error_leaves_the_model_alone(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = build()
    before = bare(model)
    with pytest.raises(error, match=words):
        superpipeline.stream(model, **({"device": "cpu"} | options))
    assert bare(model) == before


def sparse() -> nn.Module:
    model = build()
    model.head.weight = nn.Parameter(torch.eye(4).to_sparse())
    return model


def inference_born() -> nn.Module:
    with torch.inference_mode():
        return build()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)), InputError),
        (lambda: build().to("meta"), InputError),
        (lambda: "gpt2", InputError),
        (sparse, UnsupportedError),
        (inference_born, UnsupportedError),
    ],
    ids=["lazy", "meta", "no_module", "sparse", "inference_born"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_models_that_cannot_stream_are_refused_untouched(
    make: Callable[[], Any], error: type[Exception]
) -> None:
    model = make()
    classes = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error):
        superpipeline.stream(model, "50%", device="cpu", quiet=True)
    if classes:
        assert [type(m) for m in model.modules()] == classes


def test_parts_and_wholes_of_streamed_models_are_refused() -> None:
    model, _, inputs = streamed()
    wrapped = nn.Sequential(model, nn.Linear(1024, 8))
    for other in (model.layers[0], model.layers, wrapped):
        with pytest.raises(InputError, match=r"close\(\)"):
            superpipeline.stream(other, "50%", device="cpu", quiet=True)
    expect_plain(model, inputs)
    with torch.no_grad():  # using it inside another, unstreamed model is fine
        assert_bit_equal(wrapped(inputs), wrapped[1](build()(inputs)))


def test_the_headline_and_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    model = superpipeline.stream(build(), "50%", device="cpu")
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    for word in ("superpipeline: ", "for cpu", "resident", "window", "streamed each pass", "host"):
        assert word in said.err
    superpipeline.stream(model, "60%")
    assert capfd.readouterr().err.count("\n") == 1
    superpipeline.stream(model, "75%", quiet=True)
    assert capfd.readouterr().err == ""
    stream(build())
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("device", ["gpu", "cuda:x", 1.5])
def test_no_such_device(device: object) -> None:
    with pytest.raises(superpipeline.InputError, match="is no device"):
        superpipeline.stream(torch.nn.Linear(4, 4), weights="100%", device=device, quiet=True)


def test_the_peak_is_that_of_the_present_plan() -> None:
    """A peak of an earlier, larger bound looked as if the present one were broken."""
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    for bound in ("100%", "40%"):
        superpipeline.stream(model, weights=bound, device="cpu", quiet=True)
        model(torch.ones(1, 64))
        pipe = superpipeline.handle(model)
        assert pipe.stats().peak_device_bytes == pipe.plan.device_bytes


class Registered(nn.Linear):
    """A plugin base that accepts no further subclasses."""

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("no subclasses")


def test_a_set_up_that_fails_leaves_the_plain_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Registered(64, 64))
    kinds, x = [type(module) for module in model.modules()], torch.ones(1, 64)
    expected = model(x)
    with pytest.raises(TypeError, match="no subclasses"):
        superpipeline.stream(model, k=2, device="cpu", quiet=True)
    assert [type(module) for module in model.modules()] == kinds
    assert not any("_superpipeline" in vars(module) for module in model.modules())
    assert_bit_equal(model(x), expected)
    model[2] = nn.Linear(64, 64)
    expected = model(x)
    superpipeline.stream(model, k=2, device="cpu", quiet=True)
    with torch.no_grad():
        assert_bit_equal(model(x), expected.detach())
