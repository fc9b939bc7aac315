"""Workloads for the tests of the planner: small ones by hand, and random ones."""


from hypothesis import strategies as st

from superpipeline.plan import BlockSpec, WeightSpec, Workload


def blocks_of(*sizes, order=None, **rest):
    """One block for each of `sizes`: a number is one weight, a list several.

    >>> blocks_of(3, [1, 2]).blocks[1].weights
    (1, 2)
    """
    weights, blocks = [], []
    for index, size in enumerate(sizes):
        parts = size if isinstance(size, list) else [size]
        members = range(len(weights), len(weights) + len(parts))
        weights += [WeightSpec(f"w{member}", part) for member, part in zip(members, parts)]
        blocks.append(BlockSpec(f"block{index}", tuple(members)))
    visits = tuple(range(len(blocks))) if order is None else tuple(order)
    return Workload(weights=tuple(weights), blocks=tuple(blocks), order=visits, **rest)


@st.composite
def orders(draw, num_blocks):
    """Visit orders: straight, with skips, with repeats, nested (a b a c a), at random."""
    indices = list(range(num_blocks))
    kind = draw(st.sampled_from(["straight", "skips", "repeats", "nested", "random"]))
    if kind == "straight":
        return tuple(indices)
    if kind == "skips":
        return tuple(draw(st.lists(st.sampled_from(indices), unique=True)))
    if kind == "repeats":
        once, again = draw(st.integers(0, num_blocks)), draw(st.integers(1, 4))
        return tuple(indices[:once] + indices[once:] * again)
    if kind == "nested":
        parent, *children = indices
        return tuple([parent, *(step for child in children for step in (child, parent))])
    return tuple(draw(st.lists(st.sampled_from(indices), max_size=3 * num_blocks)))


@st.composite
def workloads(draw, *, ties=True):
    """1 to 12 blocks of 1 to 6 weights; weights outside blocks reside or are looked up by rows."""
    num_blocks = draw(st.integers(1, 12))
    size = st.just(draw(st.integers(1, 64))) if draw(st.booleans()) else st.integers(1, 64)
    weights, blocks = [], []
    for index in range(num_blocks):
        own = [
            WeightSpec(f"{index}.{i}", n)
            for i, n in enumerate(draw(st.lists(size, min_size=1, max_size=6)))
        ]
        members = list(range(len(weights), len(weights) + len(own)))
        shared = (
            draw(st.lists(st.integers(0, len(weights) - 1), unique=True, max_size=2))
            if ties and weights and draw(st.integers(0, 3)) == 0
            else []
        )
        weights += own
        blocks.append(BlockSpec(f"block{index}", tuple(members + shared)))
    inside = len(weights)
    outside = draw(st.lists(st.tuples(size, st.booleans()), max_size=3))
    weights += [WeightSpec(f"outside{i}", n) for i, (n, _) in enumerate(outside)]
    rows = {inside + i for i, (_, by_rows) in enumerate(outside) if by_rows}
    if draw(st.booleans()):
        rows |= draw(st.sets(st.integers(0, inside - 1), max_size=2))
    stay = set(range(inside, len(weights))) - rows
    if draw(st.booleans()):
        stay |= draw(st.sets(st.integers(0, inside - 1), max_size=6))
    return Workload(
        weights=tuple(weights),
        blocks=tuple(blocks),
        order=draw(orders(num_blocks)),
        must_reside=frozenset(stay),
        rows=frozenset(rows - stay),
    )
