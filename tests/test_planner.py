"""What is true of every plan, on random workloads; and residency and bounds worked by hand."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from superpipeline.errors import BudgetError, InputError
from superpipeline.plan import Plan, Workload, check, turns
from superpipeline.planner import (
    check_k,
    group_neighbours,
    least_bytes,
    least_overlapping_bytes,
    place_in_ring,
    place_one_at_a_time,
    place_two_ended,
    plan_for_bound,
    plan_for_k,
)
from superpipeline.simulate import play, predict
from workloads import blocks_of, workloads

quickly = settings(deadline=None, max_examples=200)


@st.composite
def bounded(draw, *, ties=True, timed=False):
    """A workload and a bound that works for it, most often below the weights' bytes."""
    work = draw(workloads(ties=ties, timed=timed))
    least = least_bytes(work)
    return work, draw(st.integers(least, max(least, work.weight_bytes + 8)))


@st.composite
def plans(draw):
    """Plans of both kinds, of those with a bound also for timed passes."""
    if draw(st.booleans()):
        return plan_for_bound(*draw(bounded(timed=draw(st.booleans()))))
    k_prime = draw(st.integers(1, 4))
    return plan_for_k(draw(workloads()), draw(st.integers(k_prime, 12)), k_prime)


def sizes_of(plan):
    return {block: place.num_bytes for block, place in plan.places.items()}


def bytes_of(work, weights):
    return sum(work.weights[weight].num_bytes for weight in weights)


def streamed_sizes(work, resident):
    """For each block with streamed weights, their bytes."""
    sizes = {
        index: bytes_of(work, set(block.weights) - resident)
        for index, block in enumerate(work.blocks)
    }
    return {index: size for index, size in sizes.items() if size}


def placing_of(plan):
    """The way `plan` places its blocks."""
    placed = place_two_ended(plan.workload, sizes_of(plan))
    same = placed == (dict(plan.places), plan.window_bytes)
    return place_two_ended if same else place_one_at_a_time


# ---- what is true of every plan ---------------------------------------------------------------


@quickly
@given(plans())
def test_every_plan_passes_the_check(plan: Plan):
    check(plan)


@quickly
@given(plans())
def test_every_weight_can_be_had(plan: Plan):
    in_slots = {weight for slots in plan.slots.values() for weight in slots}
    every = set(range(len(plan.workload.weights)))
    assert every == plan.resident | in_slots | plan.workload.rows
    assert not plan.resident & in_slots


@quickly
@given(plans())
def test_a_played_plan_never_holds_more_than_it_says(plan: Plan):
    on_device: set[int] = set()
    for action, block in (step for taken in play(plan, 3) for step in taken):
        if action == "F":
            assert block not in on_device
            on_device.add(block)
        elif action == "E":
            on_device.remove(block)
        held = sorted(plan.places[other] for other in on_device)
        assert not any(a.overlaps(b) for a, b in pairwise(held))
        assert sum(place.num_bytes for place in held) <= plan.window_bytes
        assert all(0 <= place.offset and place.end <= plan.window_bytes for place in held)
    assert plan.device_bytes == bytes_of(plan.workload, plan.resident) + plan.window_bytes
    assert plan.bound_bytes is None or plan.device_bytes <= plan.bound_bytes


@quickly
@given(plans())
def test_every_visit_finds_its_bytes(plan: Plan):
    """The bytes themselves are played, not the set of blocks that the player keeps."""
    window: list[int | None] = [None] * plan.window_bytes
    computed = []
    for action, block in (step for taken in play(plan, 3) for step in taken):
        if block not in plan.places:
            assert action == "C"
        elif action == "F":
            place = plan.places[block]
            window[place.offset : place.end] = [block] * place.num_bytes
        elif action == "C":
            place = plan.places[block]
            assert set(window[place.offset : place.end]) == {block}
        computed += [block] if action == "C" else []
    assert tuple(computed) == 3 * turns(plan.workload.order, range(len(plan.workload.blocks)))


@quickly
@given(plans())
def test_nothing_is_fetched_in_vain(plan: Plan):
    """Between its fetch and its visit a block is not evicted."""
    waiting: set[int] = set()
    for action, block in (step for taken in play(plan, 4) for step in taken):
        if action == "F":
            waiting.add(block)
        elif action == "C":
            waiting.discard(block)
        else:
            assert block not in waiting


@quickly
@given(plans())
def test_fetches_made_at_a_turn_spare_the_block_whose_turn_it_is(plan: Plan):
    """A fetch that stands before a C is carried out while that C runs: both need their bytes."""
    for taken in play(plan, 3):
        fetches: list[int] = []
        for action, block in taken:
            if action == "F":
                fetches.append(block)
            elif action == "C":
                ahead = [other for other in fetches if other != block]
                assert block not in plan.places or not plan.overlaps[block] & set(ahead)
                fetches = []


@quickly
@given(plans())
def test_the_third_pass_is_steady(plan: Plan):
    passes = play(plan, 6)
    assert passes[2] == passes[3] == passes[4] == passes[5]


@quickly
@given(plans())
def test_streamed_bytes_are_those_of_a_steady_pass(plan: Plan):
    last = play(plan, 3)[-1]
    fetched = sum(plan.places[block].num_bytes for action, block in last if action == "F")
    assert plan.streamed_bytes == fetched
    assert plan.is_at_rest == (fetched == 0)
    assert predict(plan, link_rate=1.0, compute_s={}).link_s == fetched


# ---- with a bound -----------------------------------------------------------------------------


@quickly
@given(workloads(), st.integers(0, 100))
def test_a_bound_for_everything_makes_everything_resident(work: Workload, more: int):
    plan = plan_for_bound(work, work.weight_bytes + more)
    assert plan.resident == set(range(len(work.weights)))
    assert (plan.window_bytes, plan.streamed_bytes) == (0, 0)


@quickly
@given(workloads())
def test_the_least_bound_works_and_one_byte_less_does_not(work: Workload):
    least = least_bytes(work)
    assert plan_for_bound(work, least).device_bytes <= least
    if least == 0:
        return
    with pytest.raises(BudgetError) as caught:
        plan_for_bound(work, least - 1)
    assert caught.value.least_bytes == least
    assert f"weights={least}" in str(caught.value)
    sizes = streamed_sizes(work, work.must_reside)
    if sizes:
        largest = max(sizes, key=sizes.__getitem__)
        assert (
            f"block {work.blocks[largest].name} alone needs {sizes[largest]} B" in str(caught.value)
            or sizes[largest] >= 1024
        )
        assert str(least_overlapping_bytes(work)) in str(caught.value)


@quickly
@given(workloads())
def test_copies_overlap_compute_from_the_bound_that_the_error_names(work: Workload):
    plan = plan_for_bound(work, least_overlapping_bytes(work))
    assert placing_of(plan) is place_two_ended


@quickly
@given(bounded())
def test_no_further_weight_fits(given_work: tuple[Workload, int]):
    """Unused bytes are fewer than any streamed weight, unless the window would grow by them.

    Making a block wholly resident changes the circle: others become neighbours, and the window may
    grow (or shrink, where an odd circle is coloured anew, which the planner does not look for).
    """
    work, bound = given_work
    plan = plan_for_bound(work, bound)
    placing, circle = placing_of(plan), plan.circle
    for weight in set(range(len(work.weights))) - plan.resident:
        more = plan.resident | {weight}
        sizes = streamed_sizes(work, more)
        window = placing(work, sizes)[1]
        if bytes_of(work, more) + window <= bound:
            assert turns(work.order, sizes) != circle
            assert window < plan.window_bytes
        if work.weights[weight].num_bytes <= bound - plan.device_bytes:
            assert turns(work.order, sizes) != circle
            assert window > plan.window_bytes


@quickly
@given(bounded(ties=False))
def test_streamed_bytes_lie_between_two_formulas(given_work: tuple[Workload, int]):
    """What is true of bigger bounds where each block is visited once.

    No plan streams less than the bytes that exceed the bound; ours streams at most the window and
    the unused bytes more. So a bigger bound streams at most those more than a smaller one does. It
    may stream more: `test_a_bigger_bound_may_stream_more`.
    """
    work, bound = given_work
    if work.rows or len(set(work.order)) < len(work.blocks) or len(work.order) > len(work.blocks):
        work = Workload(
            weights=work.weights,
            blocks=work.blocks,
            order=tuple(range(len(work.blocks))),
            must_reside=work.must_reside | work.rows,
        )
        bound = max(bound, least_bytes(work))
    plan = plan_for_bound(work, bound)
    unused = bound - plan.device_bytes
    exceeding = work.weight_bytes - bound
    assert max(0, exceeding) <= plan.streamed_bytes
    assert plan.streamed_bytes <= max(0, exceeding + plan.window_bytes + unused)


def test_a_bigger_bound_may_stream_more():
    # In 19 bytes there is one place of 7, and 12 resident: 28 bytes are streamed, one after the
    # other. From 20 on there are two places, so that copies overlap compute, and nothing is left
    # for residents.
    work = blocks_of(*[[1] * 10] * 4)
    serial, overlapping = plan_for_bound(work, 19), plan_for_bound(work, 20)
    assert (serial.streamed_bytes, overlapping.streamed_bytes) == (28, 40)
    busy = dict.fromkeys(range(4), 10.0)
    assert predict(serial, link_rate=1, compute_s=busy).time_s == 28 + 40
    assert predict(overlapping, link_rate=1, compute_s=busy).time_s == 40


@pytest.mark.parametrize("bound", range(20, 41))
def test_within_one_kind_of_plan_a_bigger_bound_streams_less(bound):
    work = blocks_of(*[[1] * 10] * 4)
    before, after = plan_for_bound(work, bound), plan_for_bound(work, bound + 1)
    assert after.streamed_bytes <= before.streamed_bytes


# ---- residency --------------------------------------------------------------------------------


def resident_bytes_of_blocks(plan):
    work = plan.workload
    return [bytes_of(work, plan.resident & set(block.weights)) for block in work.blocks]


def test_residents_are_spread_evenly():
    # Two places of 10 - r and six residents of r in 40: 20 - 2r + 6r = 40, so r = 5.
    plan = plan_for_bound(blocks_of(*[[1] * 10] * 6), 40)
    assert resident_bytes_of_blocks(plan) == [5] * 6
    assert plan.window_bytes == 10


def test_the_largest_block_comes_first():
    # The head is brought down to the size of the others before any of them gives a byte.
    plan = plan_for_bound(blocks_of(*[[1] * 10] * 4, [1] * 30), 40)
    assert resident_bytes_of_blocks(plan) == [0, 0, 0, 0, 20]
    assert plan.window_bytes == 20


def test_a_block_visited_often_comes_before_a_larger_one_visited_once():
    # A tower of 100 visited once, and four decoder blocks of 100 visited a hundred times.
    work = blocks_of([10] * 10, *[[10] * 10] * 4, order=[0, *[1, 2, 3, 4] * 100])
    plan = plan_for_bound(work, 300)
    tower, *decoder = resident_bytes_of_blocks(plan)
    assert tower == 0
    assert min(decoder) >= 30


def test_a_tower_beside_the_decoder_sets_the_window():
    """Once bytes were left where the next weight did not fit, though the window would have shrunk.

    The tower (100, visited once) lies opposite block 4. Each byte of block 4 that becomes resident
    narrows the window by itself, so it costs nothing.
    """
    work = blocks_of([10] * 10, *[[10] * 10] * 4, order=[0, *[1, 2, 3, 4] * 100])
    plan = plan_for_bound(work, 300)
    assert resident_bytes_of_blocks(plan) == [0, 40, 30, 30, 60]
    assert (plan.window_bytes, plan.device_bytes) == (140, 300)


def test_a_tied_weight_is_freed_in_both_blocks():
    # Blocks 0 and 1 share weight 0 (20 bytes): as a resident it takes 20 and frees 40.
    work = blocks_of([20, 1], [1], [10], [10])
    tied = [
        block._replace(weights=(0, 2)) if i == 1 else block for i, block in enumerate(work.blocks)
    ]
    work = Workload(weights=work.weights, blocks=tuple(tied), order=work.order)
    plan = plan_for_bound(work, 40)
    assert 0 in plan.resident
    assert placing_of(plan) is place_two_ended


def test_rows_become_resident_last():
    work = blocks_of([5, 5], [5, 5], [5, 5], [5, 5], [3], order=[0, 1, 2, 3], rows=frozenset({8}))
    work = Workload(weights=work.weights, blocks=work.blocks[:4], order=work.order, rows=work.rows)
    assert plan_for_bound(work, 20).resident == frozenset()
    assert plan_for_bound(work, 24).resident == {8}
    assert 8 not in plan_for_bound(work, 30).resident
    assert 8 in plan_for_bound(work, 43).resident


def test_a_weight_of_a_block_comes_before_one_looked_up_by_rows():
    # Two bytes are left, and the table needs two. But a part of 2 of a block saves a transfer; and
    # with it resident in block 0, that of block 2 narrows the window as much as it takes.
    work = blocks_of([8, 2], [8, 2], [8, 2], [8, 2], 2, rows=frozenset({8}))
    work = Workload(
        weights=work.weights, blocks=work.blocks[:4], order=(0, 1, 2, 3), rows=work.rows
    )
    assert plan_for_bound(work, 22).resident == {1, 5}


def test_what_must_reside_counts_as_its_blocks_share():
    # As in the even spread above, but five bytes of block 0 reside already.
    work = blocks_of(*[[1] * 10] * 6, must_reside=frozenset({5, 6, 7, 8, 9}))
    assert resident_bytes_of_blocks(plan_for_bound(work, 40)) == [5] * 6


def test_every_plan_is_checked(monkeypatch):
    checked = []
    monkeypatch.setattr("superpipeline.planner.check", checked.append)
    work = blocks_of(10, 10, 10)
    made = [plan_for_bound(work, 10), plan_for_bound(work, 20), plan_for_bound(work, 30)]
    made.append(plan_for_k(work, 2, 1))
    assert all(any(plan is other for other in checked) for plan in made)


def test_a_block_leaving_the_circle_may_widen_the_window():
    # Block 1 keeps 0 and 2 apart. Two bytes are left, and it needs two; but without it 0 and 2
    # would be neighbours, in a window of 40.
    plan = plan_for_bound(blocks_of(20, 2, 20, order=[0, 1, 2, 1]), 24)
    assert (plan.resident, plan.window_bytes) == (frozenset(), 22)


# ---- errors -----------------------------------------------------------------------------------


def test_the_error_names_the_block_and_the_numbers():
    work = blocks_of([5, 5], [5, 5], [5, 7], must_reside=frozenset({0}))
    with pytest.raises(BudgetError) as caught:
        plan_for_bound(work, 14)
    assert caught.value.least_bytes == 17
    assert str(caught.value) == (
        "weights=14 B is too little: block block2 alone needs 12 B, and 5 B must stay resident. "
        "The least is weights=17 (17 B); from 27 (27 B) on, copies overlap compute."
    )


def test_the_error_where_no_block_streams():
    work = blocks_of(5, 7, must_reside=frozenset({0, 1}))
    with pytest.raises(BudgetError) as caught:
        plan_for_bound(work, 11)
    assert caught.value.least_bytes == 12
    assert "12 B must stay resident" in str(caught.value)
    assert "weights=12" in str(caught.value)


# ---- with k and k' ----------------------------------------------------------------------------


@quickly
@given(workloads(), st.integers(1, 4), st.integers(0, 12))
def test_never_more_groups_than_k_allows(work: Workload, k_prime: int, more: int):
    k = k_prime + more
    plan = plan_for_k(work, k, k_prime)
    assert plan.resident == work.must_reside
    assert plan.bound_bytes is None
    on_device: set[int] = set()
    for action, block in (step for taken in play(plan, 3) for step in taken):
        if action == "F":
            on_device.add(block)
        elif action == "E":
            on_device.discard(block)
        assert len(on_device) <= k // k_prime


@quickly
@given(workloads(), st.integers(1, 8))
def test_a_ring_is_as_wide_as_the_widest_of_each_place(work: Workload, num_places: int):
    sizes = streamed_sizes(work, work.must_reside)
    places, window = place_in_ring(work, sizes, num_places)
    by_offset: dict[int, int] = {}
    for place in places.values():
        by_offset[place.offset] = max(by_offset.get(place.offset, 0), place.num_bytes)
    assert window == sum(by_offset.values())
    assert len(by_offset) == min(num_places, len(sizes))


@pytest.mark.parametrize(
    ("k", "k_prime", "expected"),
    [
        (None, None, (2, 1)), (3, None, (3, 1)), (None, 3, (6, 3)), (4, 2, (4, 2)),
        (1, 1, (1, 1)), (3, 3, (3, 3)),
    ],
)  # fmt: skip
def test_k_and_its_defaults(k, k_prime, expected):
    assert check_k(k, k_prime) == expected


@pytest.mark.parametrize(
    ("k", "k_prime", "message"),
    [
        (0, None, "k=2, k_prime=1"), (-1, None, "at least 1"), (None, 0, "at least 1"),
        (2, 3, "write k=6, k_prime=3"), (1.5, None, "k must be a whole number, got 1.5"),
        ("2", None, "got '2'"), (True, None, "got True"), (2, True, "k_prime must be a whole"),
    ],
)  # fmt: skip
def test_k_refused(k, k_prime, message):
    with pytest.raises(InputError, match=message):
        check_k(k, k_prime)


# ---- grouping ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "alone", "least", "most", "expected"),
    [
        ([], "", 2, 5, []),
        ([1, 1, 5, 1], "....", 2, 5, [[0, 1], [2], [3]]),
        ([1, 1, 1, 1], "....", 9, 9, [[0, 1, 2, 3]]),
        ([1, 1, 1, 1], "....", 9, 2, [[0, 1], [2, 3]]),
        ([1, 1, 1, 1], "..A.", 9, 9, [[0, 1], [2], [3]]),
        ([1, 1, 1], "AAA", 9, 9, [[0], [1], [2]]),
        ([3, 3, 3], "...", 3, 9, [[0], [1], [2]]),
        ([2, 9, 2], "...", 4, 9, [[0], [1], [2]]),
    ],
)
def test_grouping(sizes, alone, least, most, expected):
    assert group_neighbours(sizes, [mark == "A" for mark in alone], least, most) == expected


@quickly
@example([0, 0, 1], [False] * 3, 2, 2)
@given(
    st.lists(st.integers(0, 20), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12),
    st.integers(1, 20), st.integers(1, 40),
)  # fmt: skip
def test_groups_are_consecutive_and_within_the_most(sizes, alone, least, most):
    groups = group_neighbours(sizes, alone[: len(sizes)], least, most)
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    for group in groups:
        if len(group) > 1:
            assert sum(sizes[index] for index in group) <= most
            assert not any(alone[index] for index in group)
            assert sum(sizes[index] for index in group[:-1]) < least


# ---- two ends ---------------------------------------------------------------------------------


@quickly
@given(workloads())
def test_two_ends(work: Workload):
    sizes = streamed_sizes(work, frozenset())
    places, window = place_two_ended(work, sizes)
    circle = turns(work.order, sizes)
    assert all(place.offset == 0 or place.end == window for place in places.values())
    assert window <= 2 * max(sizes.values())
    if len(set(circle)) == len(circle) > 1 and len(circle) % 2 == 0:
        pairs = zip(circle, [*circle[1:], circle[0]], strict=True)
        assert not any(places[a].overlaps(places[b]) for a, b in pairs)


@pytest.mark.parametrize("num_blocks", range(1, 9))
def test_only_an_odd_circle_collides_and_only_once(num_blocks):
    plan = plan_for_bound(blocks_of(*[10] * num_blocks), min(20, 10 * num_blocks))
    expected = 1 if num_blocks % 2 and num_blocks > 2 else 0
    assert len(plan.collisions) == expected
