"""What is said unasked, and which line it is said of."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch

import superpipeline
from superpipeline import notices


def test_a_line_goes_to_standard_error(capfd):
    notices.say("so it is")
    assert capfd.readouterr() == ("", "superpipeline: so it is\n")


def test_a_warning_names_the_line_of_the_user():
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    with pytest.warns(RuntimeWarning, match="no copy overlaps") as seen:
        superpipeline.stream(model, k=1, device="cpu")
    line = inspect.currentframe().f_lineno - 1
    assert [(Path(w.filename), w.lineno) for w in seen] == [(Path(__file__), line)]


def test_a_warning_through_a_library_names_the_line_of_the_user():
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with superpipeline.streaming(model, k=1, device="cpu"):  # contextlib is between
            pass
    assert {Path(w.filename) for w in seen} == {Path(__file__)}
