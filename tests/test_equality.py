"""Every model of the zoo, streamed, gives the plain model's bits; and bytes were streamed."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import superpipeline
from superpipeline.build import lay_out
from superpipeline.planner import least_bytes
from zoo import CASE_CALL_IDS, CASE_CALLS, CASES, Call, ZooCase, assert_bit_equal, flatten

BOUNDS: dict[str, dict[str, Any]] = {
    "least": {"weights": "15%"},
    "40%": {"weights": "40%"},
    "75%": {"weights": "75%"},
    "k2": {"k": 2, "k_prime": 1},
    "k4": {"k": 4, "k_prime": 2},
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}


def bound_for(
    model: torch.nn.Module, name: str, device: torch.device = torch.device("cpu")
) -> dict[str, Any]:
    """max(what `name` says, the least that works).

    The share is of what can stream: tables that are looked up by rows never take device memory.
    """
    options = BOUNDS[name]
    if "k" in options:
        return options
    work = lay_out(model, device, 1, ()).workload()
    by_rows = work.rows - {weight for block in work.blocks for weight in block.weights}
    streamable = work.weight_bytes - sum(work.weights[weight].num_bytes for weight in by_rows)
    share = int(options["weights"].rstrip("%")) * streamable // 100
    return {"weights": max(share, least_bytes(work))}


def _pointers(model: torch.nn.Module) -> list[Any]:
    engine = superpipeline.handle(model).engine
    assert engine is not None
    return [pointer for block in engine.blocks for pointer in block.pointers]


def run(case: ZooCase, call: Call, mode: str, bound: str | None) -> list[list[torch.Tensor]]:
    """Two runs in a row: the second meets the learned order, and copies from the first."""
    model = case.build()
    if bound is not None:
        model = superpipeline.stream(model, **bound_for(model, bound), device="cpu", quiet=True)
    with MODES[mode]():
        results = [[t.detach().clone() for t in flatten(call.run(model))] for _ in range(2)]
    if bound is not None:
        stats = superpipeline.handle(model).stats()
        assert stats.streamed_bytes > 0, "nothing was streamed"
        # DESIGN 3.12: born in inference mode, a window poisons parameters for a later backward.
        assert not any(parameter.is_inference() for parameter in model.parameters())
        assert not any(view.here.is_inference() for view in _pointers(model))
        superpipeline.handle(model).close()
    return results


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("case", "call"), CASE_CALLS, ids=CASE_CALL_IDS)
def test_streamed_is_bit_equal(case: ZooCase, call: Call, bound: str) -> None:
    mode = "no_grad"
    for plain, streamed in zip(
        run(case, call, mode, None), run(case, call, mode, bound), strict=True
    ):
        assert_bit_equal(plain, streamed)


@pytest.mark.parametrize("mode", ["inference", "grad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_streamed_is_bit_equal_in_other_grad_modes(case: ZooCase, mode: str) -> None:
    call = case.calls[0]
    for plain, streamed in zip(
        run(case, call, mode, None), run(case, call, mode, "40%"), strict=True
    ):
        assert_bit_equal(plain, streamed)
