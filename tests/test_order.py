"""The learned order: what is expected next, from the circle at first, then from what was seen."""

from itertools import islice

import pytest

from superpipeline.order import Order, Phase

NO_GRAD, GRAD = Phase.NO_GRAD, Phase.GRAD


def expected(order, count):
    return list(islice(order.upcoming(), count))


def run(order, visits, *, mode=NO_GRAD, placed=None):
    order.begin_pass(mode)
    for block in visits:
        order.visit(block, placed=placed is None or block in placed)


def hits(order, visits, *, mode=NO_GRAD):
    """How many visits of a pass are the first block that was expected."""
    order.begin_pass(mode)
    right = 0
    for block in visits:
        right += expected(order, 1) == [block]
        order.visit(block, placed=True)
    return right


def test_before_the_first_pass_the_circle_is_expected():
    assert expected(Order([3, 1, 2]), 7) == [3, 1, 2, 3, 1, 2, 3]


def test_the_first_pass_falls_back_on_the_circle():
    order = Order([0, 1, 2, 3])
    assert hits(order, [0, 1, 2, 3]) == 4
    assert expected(order, 4) == [0, 1, 2, 3]


def test_nothing_is_expected_where_nothing_is_placed():
    order = Order([])
    assert expected(order, 3) == []
    run(order, [0, 1], placed=set())
    assert expected(order, 3) == []


def test_one_block_follows_itself():
    assert expected(Order([5]), 3) == [5, 5, 5]


def test_in_a_circle_with_repeats_the_first_successor_is_expected():
    assert expected(Order([0, 1, 0, 2]), 4) == [0, 1, 0, 1]


def test_an_order_against_the_circle_is_learned():
    order = Order([0, 1, 2, 3])
    assert hits(order, [3, 2, 1, 0]) < 4
    # The first two visits have the end of another pass before them: that is still to be seen.
    assert hits(order, [3, 2, 1, 0]) == 2
    assert hits(order, [3, 2, 1, 0]) == 4


def test_the_end_of_a_pass_expects_the_start_of_the_next():
    order = Order([0, 1, 2])
    for _ in range(3):
        run(order, [2, 1, 0])
    assert expected(order, 3) == [2, 1, 0]


def test_nested_visits_are_told_apart_by_the_last_two():
    # a b a c a: what follows a depends on what was before it. One block of memory would not do.
    order = Order([0, 1, 0, 2])
    for _ in range(2):
        run(order, [0, 1, 0, 2])
    assert hits(order, [0, 1, 0, 2]) == 4
    run(order, [0, 1, 0])
    assert expected(order, 2) == [2, 0]


def test_gradients_on_and_off_are_learned_apart():
    order = Order([0, 1, 2])
    for _ in range(2):
        run(order, [0, 2, 1], mode=GRAD)
    assert hits(order, [0, 2, 1], mode=GRAD) == 3
    order.begin_pass(NO_GRAD)
    order.visit(0, placed=True)
    assert expected(order, 2) == [1, 2]  # the circle: nothing was learned in this mode
    run(order, [1, 2], mode=NO_GRAD)
    assert hits(order, [0, 2, 1], mode=GRAD) >= 1
    order.begin_pass(GRAD)
    order.visit(0, placed=True)
    assert expected(order, 1) == [2]  # as learned, whatever passes of the other mode did


def test_a_wrong_guess_is_corrected():
    order = Order([0, 1, 2, 3])
    run(order, [0, 1, 2, 3])
    run(order, [0, 1, 3])
    order.begin_pass(NO_GRAD)
    order.visit(0, placed=True)
    order.visit(1, placed=True)
    assert expected(order, 1) == [3]
    run(order, [0, 1, 2, 3])
    order.begin_pass(NO_GRAD)
    order.visit(0, placed=True)
    order.visit(1, placed=True)
    assert expected(order, 1) == [2]


def test_an_encoder_outside_the_forward_is_learned():
    # generate(): the encoder once, then the decoder for each token, each a pass of its own.
    encoder, decoder = [0, 1], [2, 3]
    order = Order([0, 1, 2, 3])
    for _ in range(2):
        for visits in (encoder, decoder, decoder, decoder):
            run(order, visits)
    run(order, encoder)
    assert expected(order, 2) == [2, 3]
    run(order, decoder)
    assert expected(order, 2) == [0, 1]  # as it was last time: the one wrong guess
    run(order, decoder)
    assert expected(order, 4) == [2, 3, 2, 3]


def test_blocks_without_a_place_are_traced_and_not_expected():
    order = Order([0, 2])
    for _ in range(2):
        run(order, [0, 1, 2, 1], placed={0, 2})
    assert order.trace == [0, 1, 2, 1]
    assert expected(order, 4) == [0, 2, 0, 2]


def test_a_block_after_itself_is_traced_and_not_expected():
    order = Order([0, 1])
    for _ in range(2):
        run(order, [0, 0, 1])
    assert order.trace == [0, 0, 1]
    assert expected(order, 4) == [0, 1, 0, 1]


def test_the_trace_is_of_this_pass():
    order = Order([0, 1])
    run(order, [0, 1])
    order.begin_pass(NO_GRAD)
    assert order.trace == []


def test_a_long_pass_is_remembered_by_its_beginning(monkeypatch):
    monkeypatch.setattr("superpipeline.order._LONGEST_TRACE", 3)
    order = Order([0, 1, 2, 3])
    for _ in range(2):
        run(order, [0, 1, 3, 2, 1])
    assert order.trace == [0, 1, 3]
    order.begin_pass(NO_GRAD)
    order.visit(0, placed=True)
    order.visit(1, placed=True)
    assert expected(order, 2) == [3, 2]  # learned beyond the trace


def test_follow_replaces_the_circle_and_keeps_what_was_learned():
    order = Order([0, 1, 2])
    for _ in range(2):
        run(order, [0, 2, 1])
    order.follow([2, 1, 0])
    assert expected(order, 3) == [0, 2, 1]
    fresh = Order([0, 1, 2])
    fresh.follow([2, 1, 0])
    assert expected(fresh, 3) == [2, 1, 0]


@pytest.mark.parametrize("circle", [[0, 1, 0, 2], [0, 1, 2, 1]])
def test_a_circle_with_repeats_never_ends(circle):
    assert len(expected(Order(circle), 50)) == 50
