"""The accelerator's paths on the CPU: residents in a pool, transfers of 4 MiB, idle views of one's own.

What only a GPU does (other devices, streams) stays with tests/gpu; this finds the rest here.
"""

from typing import Any

import pytest
import torch
from test_equality import bound_for, run
from zoo import CASE_CALL_IDS, CASE_CALLS, Call, ZooCase, assert_bit_equal

from superpipeline import build, pipeline, window


@pytest.fixture(params=["pinned", "not pinned"])
def like_a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    place, make = window.place_residents, build.Pack.__init__

    class Elsewhere:
        """Streams whose device is not the host's, as far as residents are concerned."""

        def __init__(self, streams: Any) -> None:
            self._streams = streams
            self.device = torch.device("meta")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._streams, name)

    def place_in_pool(weights: Any, home: Any, streams: Any) -> Any:
        return place(weights, home, Elsewhere(streams))

    def make_mapped(pack: Any, *args: Any) -> None:
        make(pack, *args)
        for buffer in pack.buffers:
            buffer.mapped = buffer.bytes

    monkeypatch.setattr(pipeline, "place_residents", place_in_pool)
    monkeypatch.setattr(build, "LEAST_TRANSFER", {"cpu": 4 * 2**20})
    if request.param == "pinned":
        monkeypatch.setattr(build.Pack, "__init__", make_mapped)


@pytest.mark.usefixtures("like_a_gpu")
@pytest.mark.parametrize("bound", ["least", "40%", "k2"])
@pytest.mark.parametrize(("case", "call"), CASE_CALLS, ids=CASE_CALL_IDS)
def test_streamed_is_bit_equal(case: ZooCase, call: Call, bound: str) -> None:
    options = bound_for(case.build(), bound)
    assert options
    plain = run(case, call, "no_grad", None)
    for a, b in zip(run(case, call, "no_grad", bound), plain, strict=True):
        assert_bit_equal(a, b)
