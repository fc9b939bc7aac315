"""Compiling, tracing and functional transforms: refused in words, never run silently inlined."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import superpipeline
from superpipeline import (
    UnsupportedError,
)
from tiny import (
    bare,
    build,
    expect_plain,
    ids,
    stream,
    streamed,
)

quiet_dynamo = pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")


def compile_method(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@quiet_dynamo
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiling_a_streamed_model_is_refused(fullgraph: bool) -> None:
    model, pipe, inputs = streamed()
    torch._dynamo.reset()

    def around(x: torch.Tensor) -> torch.Tensor:
        return model(x + 0) * 2

    for compiled in (model, around, model.forward, model.layers[0]):
        x = torch.randn(1, 2, 64) if compiled is model.layers[0] else inputs
        fast = torch.compile(compiled, backend="eager", fullgraph=fullgraph)
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be compiled") as caught:
            fast(x)
        assert fullgraph or caught.type is UnsupportedError
    expect_plain(model, inputs)
    pipe.close()
    with torch.no_grad():
        torch.compile(model, backend="eager")(inputs)


@quiet_dynamo
@pytest.mark.parametrize("part", ["", "layers.0"])
def test_compile_method_on_a_streamed_model_is_refused(part: str) -> None:
    model, _, inputs = streamed()
    torch._dynamo.reset()
    model.get_submodule(part).compile(backend="eager")
    with torch.no_grad(), pytest.raises(UnsupportedError, match="cannot be compiled"):
        model(inputs)
    model.get_submodule(part)._compiled_call_impl = None
    expect_plain(model, inputs)


@quiet_dynamo
def test_a_model_compiled_before_it_streams() -> None:
    torch._dynamo.reset()
    model, inputs = build(), ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(inputs)
    before = bare(model)
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        superpipeline.stream(compiled, "50%", device="cpu")
    assert bare(model) == before
    stream(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="cannot be compiled"):
        compiled(inputs)
    expect_plain(model, inputs)
    superpipeline.handle(model).close()
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        superpipeline.stream(compile_method(build()), "50%", device="cpu")


@quiet_dynamo
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_export_trace_and_script_are_refused() -> None:
    model, _, inputs = streamed()
    torch._dynamo.reset()
    with torch.no_grad():
        for strict in (False, True):
            with pytest.raises(RuntimeError, match=r"cannot be (compiled|traced)"):
                torch.export.export(model, (inputs,), strict=strict)
        with pytest.raises(UnsupportedError, match="cannot be traced"):
            torch.jit.trace(model, (inputs,))
    expect_plain(model, inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_functional_transforms_are_refused() -> None:
    model, _, inputs = streamed()
    params = dict(model.named_parameters())
    doubled = {name: p.detach() * 2 for name, p in params.items()}
    before = bare(model)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="functional_call"):
        torch.func.functional_call(model, doubled, (inputs,))
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(model)(inputs)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (inputs,)).sum())(params)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.jvp(model.head, (torch.randn(2, 64),), (torch.randn(2, 64),))
    assert bare(model) == before
    expect_plain(model, inputs)
    expect_plain(model, inputs)
