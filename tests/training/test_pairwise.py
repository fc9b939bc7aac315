"""The rows are what they say: every allowed pair, no excluded one, and the same ones every time."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

from training import pairwise
from training.pairwise import Choices, Pair, all_pairs, impossible, pairs_of, rows
from training.tables import CHOICES, EXCLUDED, MIXED_CHOICES, MIXED_EXCLUDED, MIXED_ROWS, ROWS

TABLES = {
    "training": (CHOICES, EXCLUDED, [row._asdict() for row in ROWS]),
    "mixed": (
        MIXED_CHOICES,
        MIXED_EXCLUDED,
        [row._asdict() | {"grad_dtype": dtype} for row, dtype in MIXED_ROWS],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_pair_at_least_once(name: str) -> None:
    choices, excluded, table = TABLES[name]
    met: set[Pair] = set().union(*map(pairs_of, table))
    missing = [pair for pair in all_pairs(choices) if pair not in met and pair not in excluded]
    assert missing == []
    assert not met & excluded.keys()


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_small_and_repeats_nothing(name: str) -> None:
    """No table can have fewer rows than its two largest dimensions have pairs."""
    choices, excluded, table = TABLES[name]
    one, other, *_ = sorted((len(values) for values in choices.values()), reverse=True)
    assert len(table) <= 1.1 * one * other
    assert len({tuple(row.items()) for row in table}) == len(table)
    assert all(reason for reason in excluded.values())


def test_the_same_rows_in_every_process() -> None:
    """They once depended on the order of a set of strings, which differs from run to run."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from training.pairwise import rows\n"
        "print(rows({'a': 'stuvw', 'b': 'xyz', 'c': '+-', 'd': '01'}, {}))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parents[1])],
            env={"PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(4)
    }  # fmt: skip
    assert len(printed) == 1 and printed != {""}


def test_what_is_excluded_is_left_out() -> None:
    choices: Choices = {"a": ("1", "2", "3"), "b": ("x", "y"), "c": ("+", "-")}
    excluded = impossible(
        choices, lambda one, other: "why" if {one[1], other[1]} == {"1", "x"} else None
    )
    assert list(excluded.values()) == ["why"]
    table = rows(choices, excluded)
    met: set[Pair] = set().union(*map(pairs_of, table))
    assert {*all_pairs(choices)} - met == excluded.keys()


def test_a_choice_that_goes_with_nothing_is_an_error() -> None:
    choices: Choices = {"a": ("1", "2"), "b": ("x", "y"), "c": ("+", "-")}
    excluded = impossible(
        choices, lambda one, other: "why" if one == ("a", "1") and other[0] == "b" else None
    )
    with pytest.raises(AssertionError, match="goes with no b"):
        rows(choices, excluded)


def test_the_example_is_true() -> None:
    assert doctest.testmod(pairwise).failed == 0
