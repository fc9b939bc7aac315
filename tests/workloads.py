"""Workloads for the tests of the planner: small ones by hand, and random ones."""

from hypothesis import strategies as st

from superpipeline.plan import BlockSpec, WeightSpec, Workload


def blocks_of(*sizes, order=None, **rest):
    """One block for each of `sizes`: a number is one weight, a list several.

    Example:
        >>> blocks_of(3, [1, 2]).blocks[1].weights
        (1, 2)
    """
    weights, blocks = [], []
    for index, size in enumerate(sizes):
        parts = size if isinstance(size, list) else [size]
        members = range(len(weights), len(weights) + len(parts))
        weights += [WeightSpec(f"w{len(weights) + i}", part) for i, part in enumerate(parts)]
        blocks.append(BlockSpec(f"block{index}", tuple(members)))
    visits = tuple(range(len(blocks))) if order is None else tuple(order)
    return Workload(weights=tuple(weights), blocks=tuple(blocks), order=visits, **rest)


@st.composite
def orders(draw, num_blocks):
    """Visit orders: straight, with skips, with repeats, nested (a b a c a), random."""
    indices = list(range(num_blocks))
    kind = draw(st.sampled_from(["straight", "skips", "repeats", "nested", "random"]))
    if kind == "straight":
        return tuple(indices)
    if kind == "skips":
        return tuple(draw(st.lists(st.sampled_from(indices), unique=True)))
    if kind == "repeats":
        once, times = draw(st.integers(0, num_blocks)), draw(st.integers(1, 4))
        return tuple(indices[:once] + indices[once:] * times)
    if kind == "nested":
        parent, *children = indices
        return (parent, *(step for child in children for step in (child, parent)))
    return tuple(draw(st.lists(st.sampled_from(indices), max_size=3 * num_blocks)))


@st.composite
def _blocks(draw, *, size, ties):
    """Blocks of 1 to 6 weights of their own, and now and then up to 2 of earlier blocks."""
    weights, blocks = [], []
    for index in range(draw(st.integers(1, 12))):
        sizes = draw(st.lists(size, min_size=1, max_size=6))
        members = list(range(len(weights), len(weights) + len(sizes)))
        if ties and weights and draw(st.integers(0, 3)) == 0:
            members += draw(st.sets(st.integers(0, len(weights) - 1), max_size=2))
        weights += [WeightSpec(f"{index}.{i}", num_bytes) for i, num_bytes in enumerate(sizes)]
        blocks.append(BlockSpec(f"block{index}", tuple(members)))
    return weights, blocks


@st.composite
def workloads(draw, *, ties=True, timed=False):
    """1 to 12 blocks. Weights outside blocks reside or are looked up by rows; others may too.

    `timed`: with seconds of compute for each block.
    """
    size = draw(st.sampled_from([st.just(7), st.integers(1, 64)]))
    weights, blocks = draw(_blocks(size=size, ties=ties))
    inside = st.integers(0, len(weights) - 1)
    outside = range(len(weights), len(weights) + draw(st.integers(0, 3)))
    weights += [WeightSpec(f"outside{i}", draw(size)) for i in outside]
    rows = {weight for weight in outside if draw(st.booleans())}
    stay = set(outside) - rows
    if draw(st.booleans()):
        stay |= draw(st.sets(inside, max_size=6))
        rows |= draw(st.sets(inside, max_size=2))
    return Workload(
        weights=tuple(weights),
        blocks=tuple(blocks),
        order=draw(orders(len(blocks))),
        must_reside=frozenset(stay),
        rows=frozenset(rows - stay),
        busy=tuple(draw(st.floats(0, 100)) for _ in blocks) if timed else (),
    )
