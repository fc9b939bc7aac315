"""Every model of the zoo on CUDA: streamed from pinned host memory, it gives the plain bits."""

from typing import Any

import pytest
import torch

import superpipeline
from test_equality import MODES, bound_for
from zoo import CASE_CALL_IDS, CASE_CALLS, CASES, Call, ZooCase, assert_bit_equal, flatten

# cuDNN wants an RNN's weights in one piece, which a window of 512-byte aligned tensors is not: it
# says so and compacts them at every call. The result is the same.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single")


def run(
    case: ZooCase, call: Call, mode: str, options: dict[str, Any] | None, device: torch.device
) -> list[list[torch.Tensor]]:
    model = case.build()
    if options is None:
        model = model.to(device)
    else:
        model = superpipeline.stream(model, **options, device=device, quiet=True)
    with MODES[mode]():
        results = [[t.detach().clone() for t in flatten(call.run(model, device))] for _ in range(2)]
    if options is not None:
        pipe = superpipeline.handle(model)
        assert pipe.pinned
        assert pipe.stats().streamed_bytes > 0, "nothing was streamed"
        pipe.close()
    return results


@pytest.mark.parametrize("bound", ["least", "40%", "75%", "k2", "k4"])
@pytest.mark.parametrize(("case", "call"), CASE_CALLS, ids=CASE_CALL_IDS)
def test_streamed_is_bit_equal(case: ZooCase, call: Call, bound: str, device: torch.device) -> None:
    options = bound_for(case.build(), bound, device)
    plain = run(case, call, "no_grad", None, device)
    streamed = run(case, call, "no_grad", options, device)
    for a, b in zip(streamed, plain, strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("mode", ["inference", "grad"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_grad_modes(case: ZooCase, mode: str, device: torch.device) -> None:
    options = bound_for(case.build(), "40%", device)
    plain = run(case, case.calls[0], mode, None, device)
    for a, b in zip(run(case, case.calls[0], mode, options, device), plain, strict=True):
        assert_bit_equal(a, b)


def test_without_pinned_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pinning is refused: one warning, the same bits."""
    monkeypatch.setattr("superpipeline.host.register", lambda *_: False)
    case = next(case for case in CASES if case.name == "gpt2")
    plain = case.build().to(device)
    model = case.build()
    with pytest.warns(RuntimeWarning, match="refused to pin"):
        superpipeline.stream(model, weights="50%", device=device, quiet=True)
    with torch.no_grad():
        for _ in range(2):
            expected = [t.clone() for t in flatten(case.calls[0].run(plain, device))]
            assert_bit_equal(flatten(case.calls[0].run(model, device)), expected)


@pytest.mark.parametrize("fits", [True, False])
def test_verify(fits: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is the plain model where it fits, else one block at a time."""
    if not fits:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    case = next(case for case in CASES if case.name == "llama")
    model = superpipeline.stream(case.build(), weights="50%", device=device, quiet=True)
    inputs = case.inputs().to(device)
    with torch.no_grad():
        report = superpipeline.handle(model).verify(*inputs.args, **inputs.kwargs)
    assert report.equal
    assert report.streamed_bytes > 0
