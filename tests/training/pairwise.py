"""All pairs: rows in which any two choices meet at least once; the same rows every time.

A full product of the choices would be tens of thousands of rows. Most faults need at most two of
them to meet (a model whose backward does this, an optimizer that does that).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

Choices = Mapping[str, Sequence[str]]
Choice = tuple[str, str]  # the name of a dimension, and one of its values
Pair = tuple[Choice, Choice]  # in the order of the dimensions
Row = dict[str, str]  # in the order of the dimensions


def impossible(choices: Choices, reason: Callable[[Choice, Choice], str | None]) -> dict[Pair, str]:
    """The pairs that cannot be, each with its reason."""
    reasons = {pair: reason(*pair) for pair in all_pairs(choices)}
    return {pair: text for pair, text in reasons.items() if text is not None}


def all_pairs(choices: Choices) -> Iterator[Pair]:
    """Every two values of different dimensions, in a fixed order."""
    for one, other in combinations(choices, 2):
        for a in choices[one]:
            for b in choices[other]:
                yield (one, a), (other, b)


def pairs_of(row: Row) -> set[Pair]:
    """The pairs that meet in one row."""
    return set(combinations(row.items(), 2))


def rows(choices: Choices, excluded: Mapping[Pair, str]) -> list[Row]:
    """Few rows that hold every pair which is not excluded, and none that is.

    Greedy: a row starts with a pair that is still missing, and takes in each further dimension the
    value that brings in most missing pairs, of equal ones the least used.

    Example:
        >>> table = rows({"a": "12", "b": "xy", "c": "+-"}, {})
        >>> len(table), table[0]
        (4, {'a': '1', 'b': 'x', 'c': '+'})
    """
    missing = dict.fromkeys(pair for pair in all_pairs(choices) if pair not in excluded)
    used: Counter[Choice] = Counter()
    table = []
    while missing:
        row = dict(next(iter(missing)))
        for name in sorted(choices, key=lambda name: -len(choices[name])):
            if name not in row:
                row = _extended(row, name, choices, excluded, missing, used)
        used.update(row.items())
        for pair in pairs_of(row):
            missing.pop(pair, None)
        table.append(row)
    return table


def _extended(
    row: Row,
    name: str,
    choices: Choices,
    excluded: Mapping[Pair, str],
    missing: Mapping[Pair, None],
    used: Counter[Choice],
) -> Row:
    """`row` with the best value of dimension `name`."""
    found = []
    for value in choices[name]:
        longer = row | {name: value}
        longer = {key: longer[key] for key in choices if key in longer}
        pairs = pairs_of(longer)
        if not any(pair in excluded for pair in pairs):
            gain = sum(pair in missing for pair in pairs)
            found.append((gain, -used[name, value], longer))
    assert found, f"{row} goes with no {name}"
    return max(found, key=lambda item: item[:2])[2]
