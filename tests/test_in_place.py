"""Weights that are computed with where they lie in files: no copy to overlap, so one place, and
whole blocks resident; until they are edited."""

import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import superpipeline
from superpipeline.advice import can_bring
from superpipeline.cpu_streams import CpuStreams
from superpipeline.disk import DiskFile
from superpipeline.edits import generation
from superpipeline.errors import BudgetError
from superpipeline.pagemap import CAN_SEE_EDITS
from superpipeline.planner import least_bytes, plan_for_bound
from test_paged import model_of, plain_of
from workloads import blocks_of, workloads
from zoo import assert_bit_equal

WIDTH, DEPTH = 256, 8


def whole(plan) -> list[int]:
    """The blocks of which nothing streams."""
    return [index for index in range(len(plan.workload.blocks)) if index not in plan.places]


# ---- plans ------------------------------------------------------------------------------------


def test_blocks_take_turns_in_one_place():
    plan = plan_for_bound(blocks_of(10, 10, 10, 10, in_place=True), 25)
    assert {tuple(place) for place in plan.places.values()} == {(0, 10)}
    assert plan.schedule() == "E3 F1 C0 C1 E1 F2 C2 E2 F3 C3"


@pytest.mark.parametrize("bound", range(10, 50))
def test_of_blocks_that_stream_only_what_is_left_over_is_resident(bound):
    plan = plan_for_bound(blocks_of(*[[1] * 10] * 5, in_place=True), bound)
    num_whole, left = divmod(bound - 10, 10)
    assert len(whole(plan)) == num_whole
    parts = sorted(10 - place.num_bytes for place in plan.places.values())
    # One block gets it. Where two are left, both do: then the place is smaller by as much.
    assert parts == ([left, left] if num_whole == 3 else [*[0] * (4 - num_whole), left])


@pytest.mark.parametrize(
    ("num_blocks", "num_resident"), [(8, 2), (8, 3), (8, 4), *((24, n) for n in range(2, 9))]
)
def test_alike_blocks_that_are_resident_are_spread_and_no_neighbours(num_blocks, num_resident):
    work = blocks_of(*[10] * num_blocks, in_place=True)
    chosen = whole(plan_for_bound(work, 10 * num_resident + 10))
    gaps = [after - before for before, after in pairwise([*chosen, chosen[0] + num_blocks])]
    assert len(chosen) == num_resident
    assert min(gaps[:-1]) > 1  # the last is from one pass to the next
    assert max(gaps) <= 2 * num_blocks / num_resident


def test_the_most_visited_come_first_then_the_largest():
    work = blocks_of(20, 8, 6, order=[0, 1, 2, 1, 2], in_place=True)
    assert whole(plan_for_bound(work, 28)) == [1]
    assert whole(plan_for_bound(work, 27)) == [2]  # only it fits


def test_a_smaller_block_that_fits_whole_comes_before_a_part_of_a_larger():
    # 3 are left beside one place of 10 and one whole block: a part of 3 would save no fetch.
    plan = plan_for_bound(blocks_of([7, 3], [7, 3], [7, 3], 3, in_place=True), 23)
    assert 3 in whole(plan)
    assert len(whole(plan)) == 2


@settings(deadline=None, max_examples=200)
@given(workloads(), st.integers(0, 100))
def test_the_least_bound_works_and_so_does_any_larger(work, more):
    work = replace(work, in_place=True)
    least = least_bytes(work)
    plan = plan_for_bound(work, least + more)
    assert all(place.offset == 0 for place in plan.places.values())
    if least:
        with pytest.raises(BudgetError):
            plan_for_bound(work, least - 1)


@pytest.mark.parametrize(
    ("in_place", "rest"), [(True, ""), (False, "; from 20 (20 B) on, copies overlap compute.")]
)
def test_a_refusal_names_no_bound_for_an_overlap_that_never_comes(in_place, rest):
    with pytest.raises(BudgetError) as caught:
        plan_for_bound(blocks_of(10, 10, in_place=in_place), 9)
    assert str(caught.value).partition(" The least is ")[2] == f"weights=10 (10 B){rest}"


# ---- models -----------------------------------------------------------------------------------


class Stack(nn.Module):
    """Its forward makes a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:DEPTH]:
            x = torch.tanh(layer(x))
        return x


@pytest.fixture
def path(tmp_path) -> Path:
    """A file with the weights of a Stack."""
    if not (can_bring() and CAN_SEE_EDITS):
        pytest.skip("no pages to bring: not Linux")
    torch.manual_seed(0)
    save_file(Stack().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def load(path, weights="60%", **options):
    with torch.device("meta"):
        model = Stack()
    superpipeline.load(path, weights, model=model, device="cpu", **{"quiet": True} | options)
    return model, superpipeline.handle(model)


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 3 * WIDTH, dtype=dtype).view(3, WIDTH))


def test_a_fetch_of_pages_is_right_and_never_late(path):
    (model, pipe), plain = load(path), plain_of(DiskFile(path), Stack)
    assert pipe.plan.workload.in_place
    assert_bit_equal(run(model), run(plain))
    before = pipe.stats().fetches
    assert_bit_equal(run(model), run(plain))
    assert pipe.stats().fetches == before + len(pipe.plan.places)
    assert pipe.stats().late_fetches == 0


def test_where_nothing_is_copied_no_overlap_is_no_reason_to_warn(path, monkeypatch):
    expected = "pages of files: a fetch copies nothing that compute could overlap"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _, pipe = load(path, "30%", quiet=False)
    assert not seen
    assert pipe.plan.workload.in_place
    assert expected in pipe.explain()
    monkeypatch.setattr(CpuStreams, "maps_files", False)
    with pytest.warns(RuntimeWarning, match="no copy overlaps compute"):
        _, pipe = load(path, "20%", quiet=False)
    assert not pipe.plan.workload.in_place
    assert expected not in pipe.explain()


def test_what_is_converted_is_copied(path):
    model, pipe = load(path, dtype=torch.bfloat16)
    assert not pipe.plan.workload.in_place
    assert "  copies overlap compute" in pipe.explain()
    plain = plain_of(DiskFile(path), Stack).bfloat16()
    assert_bit_equal(run(model, torch.bfloat16), run(plain, torch.bfloat16))


@pytest.mark.parametrize(("copied", "in_place"), [("bias", True), ("3.weight", False)])
def test_a_small_share_may_be_copied(path, copied, in_place):
    model, plain = (make(DiskFile(path), Stack) for make in (model_of, plain_of))
    for name, parameter in [*model.named_parameters(), *plain.named_parameters()]:
        parameter.data = parameter.data.clone() if name.endswith(copied) else parameter.data
    superpipeline.stream(model, "60%", device="cpu", quiet=True)
    assert_bit_equal(run(model), run(plain))
    assert superpipeline.handle(model).plan.workload.in_place == in_place


def test_a_tied_weight_is_copied_to_a_place_for_each_of_its_blocks(path):
    model = model_of(DiskFile(path), Stack)
    model.layers[3].weight = model.layers[1].weight
    superpipeline.stream(model, "60%", device="cpu", quiet=True)
    assert not superpipeline.handle(model).plan.workload.in_place


class Table(nn.Module):
    """A weight kept as integers in a buffer, as quantizers do."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(start, start + 2**17, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table[:8].sum()


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Table(start) for start in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_buffers_are_kept_in_host_memory_and_copied(tmp_path):
    save_file(Tables().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Tables()
    superpipeline.load(tmp_path / "model.safetensors", "60%", model=model, device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    assert_bit_equal(model(torch.ones(8)), Tables()(torch.ones(8)))
    assert pipe.plan.places
    assert not pipe.plan.workload.in_place


def test_what_lies_at_an_odd_offset_is_copied(path):
    """The header is padded with spaces, which safetensors allows, by two bytes."""
    plain, whole_file = plain_of(DiskFile(path), Stack), path.read_bytes()
    length = int.from_bytes(whole_file[:8], "little")
    header, data = whole_file[8 : 8 + length] + b"  ", whole_file[8 + length :]
    path.write_bytes((length + 2).to_bytes(8, "little") + header + data)
    model, pipe = load(path)
    assert not pipe.plan.workload.in_place
    assert_bit_equal(run(model), run(plain))


@torch.no_grad()
def test_weights_edited_before_are_copied(path):
    (model, pipe), plain = load(path), plain_of(DiskFile(path), Stack)
    for parameter in [*model.parameters(), *plain.parameters()]:
        parameter.mul_(2)
    pipe.close()
    superpipeline.stream(model, "60%", device="cpu", quiet=True)
    assert not superpipeline.handle(model).plan.workload.in_place
    assert_bit_equal(run(model), run(plain))


@pytest.mark.parametrize(("trained", "in_place"), [("weight", False), ("bias", True)])
def test_what_trains_is_no_longer_in_its_file_and_trains_bit_for_bit(path, trained, in_place):
    (model, pipe), plain = load(path), plain_of(DiskFile(path), Stack)
    for each in (model, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name.endswith(trained))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    assert_bit_equal(run(model), run(plain))
    assert pipe.plan.workload.in_place
    for step in range(3):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(torch.full((2, WIDTH), step + 1.0)).square().sum().backward()
            optimizer.step()
        assert pipe.plan.workload.in_place == in_place
        assert_bit_equal(list(model.parameters()), list(plain.parameters()))
    assert_bit_equal(run(model), run(plain))


# ---- what a forward registers -----------------------------------------------------------------


def test_a_list_that_a_forward_makes_is_no_edit():
    model = superpipeline.stream(Stack(), "60%", device="cpu", quiet=True)
    before = generation.registrations
    run(model)
    assert generation.registrations == before


EDITS = {
    "module": lambda model: model.layers[2].add_module("more", nn.Linear(WIDTH, WIDTH)),
    "parameter": lambda model: setattr(model.layers[2], "bias", nn.Parameter(torch.ones(WIDTH))),
    "below": lambda model: setattr(model.layers[2].act, "scale", nn.Parameter(torch.ones(WIDTH))),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_is_registered_in_the_model_is_an_edit(edit):
    model = superpipeline.stream(Stack(), "60%", device="cpu", quiet=True)
    pipe = superpipeline.handle(model)
    model.layers[2].act = nn.Identity()  # of no weights: nothing is packed anew
    run(model)
    before, engine = generation.registrations, pipe.engine
    edit(model)
    assert generation.registrations > before
    run(model)
    assert pipe.engine is not engine
    packed = {id(alias.tensor) for weight in pipe._layout.weights for alias in weight.aliases}
    assert packed == {id(parameter) for parameter in model.parameters()}
