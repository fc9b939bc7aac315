"""Playing a plan, and predicting its time: each example worked by hand.

Times are seconds and bytes at one byte a second, so that a block of 10 bytes takes 10 to fetch.
"""

import pytest

from superpipeline.plan import turns
from superpipeline.planner import plan_for_bound, plan_for_k
from superpipeline.simulate import Prediction, Step, play, predict, steps
from workloads import blocks_of


def each(num_blocks, seconds):
    return dict.fromkeys(range(num_blocks), seconds)


def text(taken):
    return " ".join(f"{step.action}{step.block}" for step in taken)


def test_the_first_pass_starts_from_an_empty_window():
    first, second, third = play(plan_for_k(blocks_of(10, 10, 10, 10), 2, 1), 3)
    assert text(first) == "F0 F1 C0 E0 F2 C1 E1 F3 C2 E2 F0 C3"
    assert text(second) == "E3 F1 C0 E0 F2 C1 E1 F3 C2 E2 F0 C3"
    assert third == second


def test_steps_are_those_of_a_steady_pass():
    plan = plan_for_k(blocks_of(10, 10), 1, 1)
    assert steps(plan) == [
        Step("E", 1), Step("F", 0), Step("C", 0), Step("E", 0), Step("F", 1), Step("C", 1),
    ]  # fmt: skip


def test_resident_blocks_compute_and_are_never_fetched():
    plan = plan_for_bound(blocks_of(10, 10, must_reside=frozenset({0, 1})), 20)
    assert text(steps(plan)) == "C0 C1"


def test_while_a_resident_block_computes_every_place_is_free():
    # One place, and a resident block between its two users: the fetch of 2 is under way during C1.
    plan = plan_for_bound(blocks_of(10, [1], 10, must_reside=frozenset({1})), 11)
    assert text(steps(plan)) == "E2 F0 C0 E0 F2 C1 C2"


def test_link_bound():
    # Two places, four fetches of 10, compute 1: F2 waits for C0, which ended long before F1 did.
    #
    #   FETCH    F0────F1────F2────F3────      40 for each pass
    #   COMPUTE        C0    C1    C2    C3    each ends 1 after its fetch
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert predict(plan, link_rate=1, compute_s=each(4, 1)) == Prediction(40, 40, 4)


def test_the_link_rate_is_in_bytes_a_second():
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert predict(plan, link_rate=4, compute_s=each(4, 1)) == Prediction(10, 10, 4)


def test_compute_bound():
    # Compute 30: while C0 runs, F1 takes 10 of its 30; F2 starts as C0 ends, done at 10 of C1.
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert predict(plan, link_rate=1, compute_s=each(4, 30)) == Prediction(120, 40, 120)


def test_equally_long():
    # F2 starts as C0 ends and is done as C1 ends: neither ever waits.
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert predict(plan, link_rate=1, compute_s=each(4, 10)) == Prediction(40, 40, 40)


def test_one_place_adds_copies_and_compute():
    # Every fetch waits for the compute before it: 3 * (10 + 5).
    plan = plan_for_k(blocks_of(10, 10, 10), 1, 1)
    assert predict(plan, link_rate=1, compute_s=each(3, 5)) == Prediction(45, 30, 15)


def test_a_collision_costs_one_fetch():
    # Three blocks in two places; block 1 stays. From the end of C2 at 0:
    #   F0 0-10 (waited for C2), C0 10-20, F2 20-30 (waited for C0) beside C1 20-30, C2 30-40.
    plan = plan_for_k(blocks_of(10, 10, 10), 2, 1)
    assert predict(plan, link_rate=1, compute_s=each(3, 10)) == Prediction(40, 20, 30)


def test_a_collision_in_an_odd_circle():
    # Five blocks, two ends, 0 and 1 at the same: F1 waits for C0, and C1 for F1. All other copies
    # hide: 5 * 10 of compute and one fetch of 10.
    plan = plan_for_bound(blocks_of(10, 10, 10, 10, 10), 20)
    assert plan.collisions == ((0, 1),)
    assert predict(plan, link_rate=1, compute_s=each(5, 10)) == Prediction(60, 50, 50)


def test_resident_blocks_take_their_time():
    """Once only streamed blocks counted, so a plan with everything resident took no time at all."""
    # Block 0 resident, 1 to 4 take turns without a collision: 5 computes of 10, all copies hidden.
    plan = plan_for_bound(blocks_of(10, 10, 10, 10, 10), 30)
    assert predict(plan, link_rate=1, compute_s=each(5, 10)) == Prediction(50, 40, 50)
    everything = plan_for_bound(blocks_of(10, 10, 10), 30)
    assert predict(everything, link_rate=1, compute_s=each(3, 10)) == Prediction(30, 0, 30)


def test_repeated_visits_count_each_time():
    # 0, then 1 and 2 twice: 1 and 2 are at opposite ends, 0 shares its end with 2 or 1.
    work = blocks_of(10, 10, 10, 10, order=[0, 1, 2, 3, 2, 3])
    prediction = predict(plan_for_bound(work, 20), link_rate=1e9, compute_s=each(4, 10))
    assert prediction.compute_s == 60
    assert prediction.time_s == pytest.approx(60)


def test_blocks_without_a_time_take_none():
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert predict(plan, link_rate=1, compute_s={}) == Prediction(40, 40, 0)


def test_nothing_to_do_takes_no_time():
    assert predict(plan_for_bound(blocks_of(), 0), link_rate=1, compute_s={}) == Prediction(0, 0, 0)


def test_a_long_pass_is_played_in_time_that_grows_with_its_length():
    """Once each step walked the circle from its start: minutes for a loop inside a forward."""
    reads = 0

    class Counting(tuple):
        __slots__ = ()

        def __getitem__(self, key):
            nonlocal reads
            reads += 1
            return super().__getitem__(key)

    work = blocks_of(*[10] * 4, order=[0, 1, 2, 3] * 500)
    plan = plan_for_bound(work, 20)
    visits = Counting(turns(work.order, range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("superpipeline.simulate.turns", lambda *_: visits)
        taken = play(plan, 1)[0]
    assert sum(step.action == "C" for step in taken) == 2000
    assert 0 < reads < 20 * 2000
