"""Plans once a pass was timed: windows of another depth, residents chosen by time."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superpipeline.placing import place_in_turn
from superpipeline.plan import Plan, check
from superpipeline.planner import faster, least_bytes, plan_for_bound, time_of
from superpipeline.residency import paced, promotions
from superpipeline.simulate import predict
from workloads import blocks_of, workloads


def times_of(plan: Plan, busy) -> float:
    return predict(plan, link_rate=1.0, compute_s=dict(enumerate(busy))).time_s


def denoiser(num_pairs=6):
    """Blocks that take no time (a modulation of one row), and small ones that take all of it."""
    sizes = [part for _ in range(num_pairs) for part in ([60, 60], [30, 30], [30, 30])]
    return blocks_of(*sizes), tuple([0.0, 30.0, 150.0] * num_pairs)


def test_alike_residents_are_spread_over_the_pass():
    # 12 blocks of one weight: a place of two and six residents. They were the first six once.
    plan = plan_for_bound(blocks_of(*[10] * 12), 80)
    resident = sorted(plan.resident)
    assert len(resident) == 6
    gaps = [b - a for a, b in zip(resident, [*resident[1:], resident[0] + 12], strict=True)]
    assert set(gaps) <= {1, 2, 3}


def test_alike_residents_are_spread_among_their_kind():
    # Every fourth block is large. By its index alone the first residents would be neighbours there.
    sizes = [part for _ in range(12) for part in (40, 10, 10, 10)]
    picks = promotions(blocks_of(*sizes), frozenset())[:4]
    large = sorted(weight // 4 for weight in picks)
    assert all(weight % 4 == 0 for weight in picks)
    assert min(b - a for a, b in zip(large, [*large[1:], large[0] + 12], strict=True)) > 1


def test_spread_residents_keep_the_link_at_work():
    work = blocks_of(*[10] * 12)
    spread = plan_for_bound(work, 80)
    in_a_row = plan_for_bound(replace(work, must_reside=frozenset(range(6))), 80)
    assert in_a_row.resident == frozenset(range(6))
    busy = [5.0] * 12  # as much as the copies: six blocks of ten
    assert times_of(spread, busy) <= 66.0
    assert times_of(in_a_row, busy) >= 80.0


def test_a_deeper_window_where_compute_comes_in_lumps():
    work, busy = denoiser()
    before = plan_for_bound(work, 700)
    after = plan_for_bound(replace(work, busy=busy), 700)
    check(after)
    assert after.window_bytes > before.window_bytes
    assert after.device_bytes <= 700
    assert times_of(after, busy) < 0.9 * times_of(before, busy)


def test_alike_blocks_keep_the_least_window():
    work = blocks_of(*[[10] * 10] * 8)
    timed = plan_for_bound(replace(work, busy=(40.0,) * 8), 400)
    assert timed.window_bytes == plan_for_bound(work, 400).window_bytes


def test_residents_are_taken_where_the_link_has_least_time():
    # The blocks after long ones can stream whole: their copies have all that time.
    work = replace(blocks_of(*[[10] * 10] * 8), busy=(10.0,) * 4 + (200.0,) * 4)
    order = paced(work, frozenset())
    first = {weight // 10 for weight in order[:20]}
    assert {1, 2, 3, 4} <= first <= {0, 1, 2, 3, 4}
    assert sorted(order) == sorted(promotions(work, frozenset()))


def test_blocks_that_no_pass_visits_come_last():
    work = replace(blocks_of(10, 20, 30, order=[0, 1]), busy=(1.0, 1.0, 0.0))
    assert paced(work, frozenset())[-1] == 2


def test_without_any_time_all_stretches_are_alike():
    work = replace(blocks_of(10, 20, 30), busy=(0.0,) * 3)
    assert sorted(paced(work, frozenset())) == [0, 1, 2]


def test_places_follow_each_other_around_the_window():
    work = blocks_of(4, 3, 5, 2)
    places, window = place_in_turn(work, {0: 4, 1: 3, 2: 5, 3: 2}, window=12)
    assert window == 12
    assert [places[block].offset for block in range(4)] == [0, 4, 7, 0]


@pytest.mark.parametrize(("asked", "got"), [(1, 8), (100, 14)])
def test_a_window_holds_two_neighbours_and_no_more_than_all(asked, got):
    work = blocks_of(4, 3, 5, 2)
    assert place_in_turn(work, {0: 4, 1: 3, 2: 5, 3: 2}, window=asked)[1] == got


def test_no_other_plan_where_compute_or_the_link_is_always_at_work():
    work = blocks_of(*[[10] * 10] * 8)
    plan = plan_for_bound(work, 400)
    assert faster(plan, replace(work, busy=(1000.0,) * 8)) is None
    assert faster(plan, replace(work, busy=(0.0,) * 8)) is None


def test_another_plan_where_one_is_faster():
    work, busy = denoiser()
    before = plan_for_bound(work, 700)
    after = faster(before, replace(work, busy=busy))
    assert after is not None
    assert times_of(after, busy) < times_of(before, busy)
    assert faster(after, replace(work, busy=busy)) is None


@settings(deadline=None, max_examples=150)
@given(workloads(timed=True), st.integers(0, 400))
def test_a_timed_plan_is_never_slower(work, more):
    bound = least_bytes(work) + more
    timed, untimed = plan_for_bound(work, bound), plan_for_bound(replace(work, busy=()), bound)
    check(timed)
    assert time_of(timed) <= times_of(untimed, work.busy) * (1 + 1e-9) + 1e-9
