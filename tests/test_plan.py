"""Plans as data: what the words mean, worked examples as text, and what `check` refuses."""

from dataclasses import replace

import pytest

from superpipeline.plan import Place, check, neighbours, turns
from superpipeline.planner import group_neighbours, plan_for_bound, plan_for_k
from workloads import blocks_of


def places(plan):
    return {block: tuple(place) for block, place in plan.places.items()}


# ---- the words ------------------------------------------------------------------------------


def test_places_overlap_only_where_they_share_bytes():
    assert Place(0, 10).overlaps(Place(9, 1))
    assert Place(9, 1).overlaps(Place(0, 10))
    assert not Place(0, 10).overlaps(Place(10, 5))
    assert not Place(10, 5).overlaps(Place(0, 10))
    assert Place(4, 3).end == 7


@pytest.mark.parametrize(
    ("order", "placed", "expected"),
    [
        ((), {0}, ()),
        ((0,), {0}, (0,)),
        ((0, 0, 0), {0}, (0,)),
        ((0, 1, 2), {0, 2}, (0, 2)),
        ((0, 1, 1, 2), {0, 1, 2}, (0, 1, 2)),
        ((0, 1, 0), {0, 1}, (0, 1)),  # the circle closes: 0 follows 0
        ((0, 1, 0, 2, 0), {0, 1, 2}, (0, 1, 0, 2)),
        ((0, 1, 2, 1, 0), {0, 2}, (0, 2)),
        ((3, 4), {0}, ()),
    ],
)
def test_turns(order, placed, expected):
    assert turns(order, placed) == expected


@pytest.mark.parametrize(
    ("circle", "pairs"),
    [
        ((), set()),
        ((5,), set()),
        ((0, 1), {(0, 1)}),
        ((2, 1, 0), {(1, 2), (0, 1), (0, 2)}),
        ((0, 1, 0, 2), {(0, 1), (0, 2)}),
    ],
)
def test_neighbours(circle, pairs):
    assert neighbours(circle) == pairs


# ---- worked examples ------------------------------------------------------------------------


def test_three_blocks_two_places():
    # The places are 0 1 0: block 1 has its own, so it stays; 2 and 0 take turns in the other, and
    # each waits for the other at the wrap-around.
    plan = plan_for_k(blocks_of(10, 10, 10), 2, 1)
    assert places(plan) == {0: (0, 10), 1: (10, 10), 2: (0, 10)}
    assert plan.schedule() == "E2 F0 C0 E0 F2 C1 C2"
    assert plan.collisions == ((0, 2),)
    assert (plan.window_bytes, plan.streamed_bytes) == (20, 20)


def test_one_place_never_overlaps():
    plan = plan_for_k(blocks_of(10, 10, 10), 1, 1)
    assert plan.schedule() == "E2 F0 C0 E0 F1 C1 E1 F2 C2"
    assert plan.collisions == ((0, 1), (0, 2), (1, 2))


def test_four_equal_blocks_in_the_bytes_of_two_and_a_half():
    # Two places of 10, and 5 bytes more: one half block resident narrows the window to 15 if its
    # neighbours are narrow too, so a second half fits: 10 resident, 15 window.
    plan = plan_for_bound(blocks_of([5, 5], [5, 5], [5, 5], [5, 5]), 25)
    assert places(plan) == {0: (0, 5), 1: (5, 10), 2: (0, 5), 3: (5, 10)}
    assert plan.resident == {0, 4}
    assert plan.schedule() == "E3 F1 C0 E0 F2 C1 E1 F3 C2 E2 F0 C3"
    assert (plan.device_bytes, plan.streamed_bytes, plan.collisions) == (25, 30, ())


def test_a_weight_cannot_be_split():
    plan = plan_for_bound(blocks_of(10, 10, 10, 10), 25)
    assert (plan.device_bytes, plan.resident) == (20, frozenset())
    assert plan.schedule() == "E3 F1 C0 E0 F2 C1 E1 F3 C2 E2 F0 C3"


def test_an_odd_circle_is_made_even_by_one_resident_block():
    # By water-filling alone each of the six large blocks would have one byte resident, and blocks 0
    # and 1 the same end. Four residents less, the small block is resident and nothing collides.
    plan = plan_for_bound(blocks_of(*[[1] * 10] * 6, [1, 1]), 24)
    assert {60, 61} <= plan.resident
    assert 6 not in plan.places
    assert plan.collisions == ()
    assert plan.schedule() == "C0 E0 F2 C1 E1 F3 C2 E2 F4 C3 E3 F5 C4 E4 F0 C5 E5 F1 C6"
    assert (plan.device_bytes, plan.streamed_bytes) == (24, 58)


def test_an_odd_circle_stays_odd_where_that_is_faster():
    plan = plan_for_bound(blocks_of([5, 5], [5, 5], [5, 5], [5, 5], [2, 2]), 22)
    assert plan.collisions == ((0, 1),)
    assert plan.schedule() == "C0 E0 F1 E4 F2 C1 E1 F3 C2 E2 F4 C3 E3 F0 C4"


def test_an_odd_circle_without_the_bytes_to_mend_it():
    plan = plan_for_bound(blocks_of(10, 10, 10, 10, 10), 25)
    assert plan.collisions == ((0, 1),)
    assert plan.schedule() == "C0 E0 F1 E4 F2 C1 E1 F3 C2 E2 F4 C3 E3 F0 C4"


def test_a_resident_block_leaves_time_for_fetches():
    plan = plan_for_bound(blocks_of(10, 10, 10, 10, 10), 30)
    assert plan.resident == {0}
    assert plan.schedule() == "E4 F2 C0 C1 E1 F3 C2 E2 F4 C3 E3 F1 C4"


def test_encoder_once_decoder_twice():
    work = blocks_of(*[10] * 6, order=[0, 1, 2, 3, 4, 5, 2, 3, 4, 5])
    plan = plan_for_bound(work, 20)
    assert plan.collisions == ()
    assert plan.streamed_bytes == 100
    assert plan.schedule() == (
        "E5 F1 C0 E0 F2 C1 E1 F3 C2 E2 F4 C3 E3 F5 C4 E4 F2 C5 E5 F3 C2 E2 F4 C3 E3 F5 C4 E4 F0 C5"
    )


def test_a_parent_stays_while_its_children_take_turns():
    plan = plan_for_bound(blocks_of(4, 10, 10, 10, order=[0, 1, 0, 2, 0, 3, 0]), 14)
    assert places(plan) == {0: (0, 4), 1: (4, 10), 2: (4, 10), 3: (4, 10)}
    assert plan.schedule() == "E3 F1 C0 C1 E1 F2 C0 C2 E2 F3 C0 C3"
    assert plan.streamed_bytes == 30


def test_a_parent_in_a_ring_is_fetched_again():
    plan = plan_for_k(blocks_of(4, 10, 10, 10, order=[0, 1, 0, 2, 0, 3, 0]), 2, 1)
    assert plan.schedule() == "E3 F1 C0 C1 C0 E0 F2 C2 E2 F0 E1 F3 C0 C3"


def test_k_4_in_groups_of_2():
    # Eight layers of 5 move two by two: four blocks of 10 in 4 // 2 = 2 places.
    groups = group_neighbours([5] * 8, [False] * 8, least=10, most=10)
    assert groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    plan = plan_for_k(blocks_of(*[[5] * len(group) for group in groups]), 4, 2)
    assert places(plan) == {0: (0, 10), 1: (10, 10), 2: (0, 10), 3: (10, 10)}
    assert plan.slots == {
        0: {0: 0, 1: 5}, 1: {2: 10, 3: 15}, 2: {4: 0, 5: 5}, 3: {6: 10, 7: 15},
    }  # fmt: skip
    assert plan.schedule() == "E3 F1 C0 E0 F2 C1 E1 F3 C2 E2 F0 C3"


def test_blocks_of_different_sizes_share_a_place_of_the_ring():
    plan = plan_for_k(blocks_of(6, 9, 8, 2), 2, 1)
    assert places(plan) == {0: (0, 6), 1: (8, 9), 2: (0, 8), 3: (8, 2)}
    assert plan.window_bytes == 17


def test_places_of_a_ring_are_taken_in_the_order_of_the_visits():
    plan = plan_for_k(blocks_of(10, 10, 10, 10, order=[3, 1, 0, 2]), 2, 1)
    assert places(plan) == {3: (0, 10), 1: (10, 10), 0: (0, 10), 2: (10, 10)}
    assert plan.collisions == ()


def test_more_places_than_blocks_is_at_rest():
    plan = plan_for_k(blocks_of(6, 9, 8), 5, 1)
    assert plan.is_at_rest
    assert plan.schedule() == "C0 C1 C2"
    assert (plan.window_bytes, plan.streamed_bytes) == (23, 0)


def test_everything_resident():
    plan = plan_for_bound(blocks_of(3, 4), 7)
    assert (plan.resident, plan.places, plan.window_bytes) == ({0, 1}, {}, 0)
    assert (plan.schedule(), plan.streamed_bytes, plan.is_at_rest) == ("C0 C1", 0, True)


def test_nothing_to_stream_and_nothing_to_visit():
    plan = plan_for_bound(blocks_of(), 0)
    assert (plan.device_bytes, plan.schedule(), plan.circle) == (0, "", ())


def test_a_block_that_is_never_visited_is_no_reason_to_fetch_again():
    # Block 1 lies on block 0, but no pass comes to it.
    plan = plan_for_bound(blocks_of([4, 4], 8, order=[0]), 8)
    assert plan.overlaps[0] == {0, 1}
    assert plan.schedule() == "C0"
    assert plan.is_at_rest
    assert plan.streamed_bytes == 0


def test_streamed_bytes_leave_out_what_stays():
    """Once the sum over the circle was reported: 40 here, although two blocks stay in place."""
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 3, 1)
    assert plan.schedule() == "E3 F0 C0 E0 F3 C1 C2 C3"
    assert plan.streamed_bytes == 20


def test_the_words_of_a_plan():
    assert str(plan_for_k(blocks_of(10, 10), 1, 1)) == (
        "plan: 20 B in k, k': 0 B resident, 10 B window, 20 B streamed each pass; E1 F0 C0 E0 F1 C1"
    )
    assert str(plan_for_bound(blocks_of(2048), 4096)) == (
        "plan: 2.0 KiB in 4.0 KiB: 2.0 KiB resident, 0 B window, 0 B streamed each pass; C0"
    )


# ---- what may be fetched now ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("current", "upcoming", "on_device", "fetches"),
    [
        (0, [1, 2, 3, 0], {0}, [1]),  # 2 needs the place of 0
        (0, [1, 2, 3, 0], {0, 1}, []),
        (None, [0, 1, 2, 3], set(), [0, 1]),
        (1, [2, 3, 0, 1], {0, 1}, [2]),
        (0, [0, 1, 2], {0}, [1]),  # a block that follows itself
        (0, [2, 1], {0}, []),  # nothing overtakes a block that has to wait
        (0, [7, 1], {0}, []),  # nothing is known of what follows a block without a place
        (0, [], {0}, []),
    ],
)
def test_fetches_ahead(current, upcoming, on_device, fetches):
    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert plan.fetches_ahead(current, upcoming, on_device) == fetches


def test_fetches_ahead_reads_an_endless_order():
    def for_ever():
        while True:
            yield 1

    plan = plan_for_k(blocks_of(10, 10, 10, 10), 2, 1)
    assert plan.fetches_ahead(0, for_ever(), {0}) == [1]


# ---- check ----------------------------------------------------------------------------------


def example():
    """Four blocks of two halves; 0 and 4 are resident, blocks 1 and 3 lie at 5 to 15."""
    plan = plan_for_bound(blocks_of([5, 5], [5, 5], [5, 5], [5, 5], must_reside=frozenset({0})), 25)
    check(plan)
    return plan


def shifted(plan, block, *, by):
    place = plan.places[block]
    return replace(plan, places={**plan.places, block: Place(place.offset + by, place.num_bytes)})


def with_slots(plan, block, slots):
    return replace(plan, slots={**plan.slots, block: slots})


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


@pytest.mark.parametrize(
    ("mutilate", "complaint"),
    [
        (lambda p: replace(p, bound_bytes=p.device_bytes - 1), "over the bound"),
        (lambda p: replace(p, resident=p.resident - {0}), "must reside"),
        (lambda p: replace(p, window_bytes=p.window_bytes - 1), "block1 outside"),
        (lambda p: shifted(p, 0, by=-1), "block0 outside"),
        (lambda p: shifted(p, 0, by=1), "block0 spills"),
        (lambda p: shifted(p, 1, by=-1), "block1 spills"),
        (lambda p: with_slots(p, 1, without(p.slots[1], 2)), "block1 misses a slot"),
        (lambda p: with_slots(p, 1, {**p.slots[1], 7: 5}), "block1 misses a slot"),
        (lambda p: with_slots(p, 1, {2: 10, 3: 10}), "block1 overlaps itself"),
        (lambda p: with_slots(p, 1, {2: 5, 3: 9}), "block1 overlaps itself"),
        (lambda p: with_slots(p, 1, {2: 5, 3: 11}), "block1 spills"),
        (lambda p: replace(p, places=without(p.places, 1)), "block1 has no place"),
        (lambda p: replace(p, slots=without(p.slots, 1)), "block1 has no place"),
        (lambda p: replace(p, resident=p.resident | {2, 3}), "block1 needs no place"),
    ],
)
def test_check_refuses(mutilate, complaint):
    plan = replace(example(), bound_bytes=None)
    assert places(plan)[1] == (5, 10)
    assert plan.slots[1] == {2: 5, 3: 10}
    with pytest.raises(AssertionError, match=complaint):
        check(mutilate(plan))
