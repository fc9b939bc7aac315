"""Every model of the zoo on CUDA with its weights on disk: all, half or none of them."""

from pathlib import Path

import pytest
import torch

import superpipeline
from on_disk import map_parameters, refused_at_most, stand_in_parameters
from superpipeline import build, pack
from superpipeline.staging import RING_BYTES
from test_equality import bound_for
from zoo import CASES, ZooCase, assert_bit_equal, flatten

pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The zoo's weights: all but the smallest may stay on disk; no part of the bound is the ring's.

    It alone is more than any of them.
    """
    monkeypatch.setattr(build, "LEAST_READ", 1024)
    monkeypatch.setattr(pack, "RING_BYTES", 0)


def expect_equal(case: ZooCase, model: torch.nn.Module, options: object, where: object) -> None:
    device = torch.device(str(where))
    plain = case.build().to(device)
    superpipeline.stream(model, **options, device=device, quiet=True)  # type: ignore[arg-type]
    pipe = superpipeline.handle(model)
    with torch.no_grad():
        for _ in range(2):
            expected = [t.clone() for t in flatten(case.calls[0].run(plain, device))]
            assert_bit_equal(flatten(case.calls[0].run(model, device)), expected)
    assert pipe.stats().streamed_bytes > 0
    pipe.close()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("host_memory", ["0%", "50%", "100%"])
@pytest.mark.parametrize("bound", ["40%", "k2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_tiers(
    case: ZooCase, bound: str, host_memory: str, device: torch.device, tmp_path: Path
) -> None:
    model = case.build()
    map_parameters(model, tmp_path)
    options = bound_for(model, bound, device) | {"host_memory": host_memory}
    # What the device cannot read where it is has to be resident.
    with refused_at_most(case):
        expect_equal(case, model, options, device)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stand_ins(case: ZooCase, device: torch.device, tmp_path: Path) -> None:
    model = case.build()
    stand_in_parameters(model, tmp_path)
    options = bound_for(model, "40%", device) | {"host_memory": "30%"}
    with refused_at_most(case):
        expect_equal(case, model, options, device)


def test_most_of_a_model_on_disk(device: torch.device, tmp_path: Path) -> None:
    """64 layers of 16 MiB; host memory holds a quarter. Staging is used again and again."""
    model = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(64)])
    map_parameters(model, tmp_path)
    x = torch.randn(4, 2048, device=device)
    with torch.no_grad():
        hidden = x
        for layer in model:
            hidden = torch.nn.functional.linear(hidden, layer.weight.to(device))
        superpipeline.stream(model, "20%", host_memory="25%", device=device, quiet=True)
        for _ in range(3):
            assert torch.equal(model(x), hidden)
    pipe = superpipeline.handle(model)
    assert 0 < pipe.host_bytes <= 16 * 2**24 - RING_BYTES
    assert pipe.disk_bytes > 16 * 2**24
    assert pipe.stats().disk_bytes > 3 * 2**28
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    pipe.close()
    assert before - torch.cuda.memory_allocated(device) >= pipe_bytes(model) // 8


def pipe_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
