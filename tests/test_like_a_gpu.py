"""The accelerator paths on the CPU: residents in a pool, transfers of 4 MiB, copies as operations.

What only a GPU does (other devices, streams) stays with tests/gpu; this finds the rest here.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import superpipeline
from superpipeline import assembly, build, pack, window
from superpipeline.cpu_streams import CpuStreams
from superpipeline.streams import Run
from test_equality import bound_for, run
from zoo import CASE_CALL_IDS, CASE_CALLS, Call, ZooCase, assert_bit_equal, by_name


class Elsewhere:
    """Streams whose device is not the host's, as far as residents are concerned."""

    def __init__(self, streams: Any) -> None:
        self._streams = streams
        self.device = torch.device("meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streams, name)


def copy_by_operations(_: CpuStreams, runs: Sequence[Run]) -> None:
    for destination, source in runs:
        destination.copy_(source)


@pytest.fixture(params=["pinned", "not pinned"])
def like_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    make = pack.Pack.__init__

    def place_in_pool(weights: Any, home: Any, streams: Any) -> Any:
        return window.Residents(weights, home, Elsewhere(streams))

    def make_mapped(made: Any, *args: Any) -> None:
        make(made, *args)
        for buffer in made.buffers:
            buffer.mapped = buffer.bytes

    monkeypatch.setattr(CpuStreams, "copy", copy_by_operations)
    monkeypatch.setattr(assembly, "Residents", place_in_pool)
    monkeypatch.setattr(build, "LEAST_TRANSFER", {"cpu": 4 * 2**20})
    if request.param == "pinned":
        monkeypatch.setattr(pack.Pack, "__init__", make_mapped)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("bound", ["least", "40%", "k2"])
@pytest.mark.parametrize(("case", "call"), CASE_CALLS, ids=CASE_CALL_IDS)
def test_streamed_is_bit_equal(case: ZooCase, call: Call, bound: str) -> None:
    options = bound_for(case.build(), bound)
    assert options
    plain = run(case, call, "no_grad", None)
    for a, b in zip(run(case, call, "no_grad", bound), plain, strict=True):
        assert_bit_equal(a, b)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("name", ["llama", "gpt2", "residual_stack", "late_written_buffers"])
def test_fetches_are_not_taken_for_reads_of_the_model(name: str) -> None:
    """A GPU's copies are operations too. Discovery once took every fetch for a read by the block
    whose turn it was, and its weight for one that had better be resident."""
    case = by_name(name)
    model = superpipeline.stream(case.build(), k=2, device="cpu", quiet=True)
    with torch.no_grad():
        case.calls[0].run(model)
        case.calls[0].run(model)
    assert not superpipeline.handle(model)._layout.noted
