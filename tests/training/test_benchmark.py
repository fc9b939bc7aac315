"""benchmarks/training: its arithmetic, and a rehearsal whose rows have the plain run's bits."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.training import bound
from benchmarks.training.terms import link_s

ROOT = Path(__file__).resolve().parents[2]


def test_the_bounds() -> None:
    assert doctest.testmod(bound).failed == 0
    assert doctest.testmod(bound).attempted == 3
    terms = bound.Terms(1.0, 2.0, 0.25, 0.5, 4.0)
    assert bound.bound_s(terms, clips=False) == 4.0
    assert bound.bound_s(terms._replace(optimizer=1.5), clips=True) == 3.5
    one = terms._replace(first_forward=1.0)
    assert bound.first_forward_bound_s(one, clips=True) == bound.bound_s(one, clips=True)
    rates = {"to device": 50.0, "to host": 25.0}
    assert link_s(100, 40, 3, rates) == 12.0  # gradients back
    assert link_s(100, 40, 3, rates | {"to host": 100.0}) == 2 * 3 * 60 / 50


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.training", "--tiny", "--device", "cpu", "--parts", "1b",
        "--only", "terms,plain,lazy", "--steps", "1", "--threads", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "training-cpu-tiny.json").read_text())["figures"]
    assert not [row["error"] for row in rows if "error" in row]
    lazy = [row for row in rows if row["contender"] == "lazy"]
    assert [(row["tokens"], row["clips"]) for row in lazy] == [
        (tokens, clips) for tokens in (8, 64, 256) for clips in (True, False)
    ]
    for row in lazy:
        assert row["equal"], row
        assert row["streamed bytes"] > 0
        assert len(set(row["digests"])) == len(row["digests"]) == 3
        assert 0 < row["bound s"] <= row["first forward bound s"]
