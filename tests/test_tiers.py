"""What stays on disk when host memory may hold only so much."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superpipeline.tiers import weights_on_disk
from workloads import blocks_of, workloads


def on_disk(work, host_bytes, resident=frozenset(), stored=None):
    stored = set(range(len(work.weights))) if stored is None else stored
    return weights_on_disk(work, resident, stored, host_bytes)


def test_nothing_fits_and_everything_fits():
    work = blocks_of([4, 4], [4, 4])
    assert on_disk(work, 0) == {0, 1, 2, 3}
    assert on_disk(work, 16) == set()


def test_reads_are_spread_evenly():
    work = blocks_of(*[[3, 3, 3, 3]] * 4)
    left = on_disk(work, 24)
    assert [sum(w in left for w in block.weights) for block in work.blocks] == [2, 2, 2, 2]


def test_what_is_visited_most_comes_first():
    work = blocks_of([5], [5], order=(0, 1, 1, 1))
    assert on_disk(work, 5) == {0}
    work = blocks_of([5], [5], order=(0, 1, 0, 1, 0))
    assert on_disk(work, 5) == {1}


def test_tables_come_first():
    work = blocks_of([9], [4], rows=frozenset({1}))
    assert on_disk(work, 4) == {0}


def test_residents_need_no_host_copy():
    work = blocks_of([5], [5])
    assert on_disk(work, 5, resident=frozenset({0})) == {0}


def test_what_is_not_stored_takes_its_part_of_host_memory():
    work = blocks_of([5], [5], [5])
    assert on_disk(work, 10, stored={1, 2}) == {1}
    assert on_disk(work, 0, stored={1, 2}) == {1, 2}


@given(workloads(), st.integers(0, 2000), st.data())
def test_never_over_the_bound(work, host_bytes, data):
    stored = data.draw(st.sets(st.integers(0, len(work.weights) - 1)))
    left = on_disk(work, host_bytes, stored=stored)
    assert left <= stored
    held = sum(w.num_bytes for i, w in enumerate(work.weights) if i not in left and i in stored)
    others = sum(w.num_bytes for i, w in enumerate(work.weights) if i not in stored)
    assert held <= max(0, host_bytes - others)


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_more_host_memory_leaves_less_on_disk(bound):
    work = blocks_of([1, 1, 1], [1, 1, 1])
    assert len(on_disk(work, bound)) > len(on_disk(work, bound + 1))
