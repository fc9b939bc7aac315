"""Every ordering call in the package matters: without any one of them, the adversary sees it."""

import sys
from typing import Any, NamedTuple

import pytest
import torch

import superpipeline
from mutants import Mutant, all_mutants
from odd_scenarios import ODD, ODD_READS
from scenarios import FORWARDS, WIDTH, Scenario, Stack
from simulator import simulated
from superpipeline import build, offload
from training_scenarios import BACKWARDS, WITH_OPTIMIZERS

REAL_WEIGHTS = [*WITH_OPTIMIZERS, *ODD_READS]
SCENARIOS = [*FORWARDS, *BACKWARDS, *ODD, *REAL_WEIGHTS]


class Run(NamedTuple):
    """A scenario, with so many blocks in the window."""

    scenario: Scenario
    k: int


def play(scenario: Scenario, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Raises if the adversary sees a race, or bits differ from the plain model's."""
    torch.manual_seed(0)
    model, x = Stack(), torch.randn(2, WIDTH)
    ignored: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(build, "LEAST_READ", 0)
        monkeypatch.setattr(offload, "LEAST_BYTES", {"cpu": 1})
        with simulated(monkeypatch, poison_idle=scenario not in REAL_WEIGHTS) as streams:
            superpipeline.stream(model, k=k, device="cpu", quiet=True)
            for result in scenario(model, x, streams):
                assert torch.equal(result, expected), "other bits than the plain model's"
    # A backward that a node ends ends where nothing can be raised.
    assert not [args.exc_value for args in ignored]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_scenarios_run_clean(scenario: Scenario, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play(scenario, monkeypatch, k)


def is_killed(mutant: Mutant, runs: list[Run]) -> bool:
    """Whether one of `runs` shows it; that one is tried first from then on."""
    for run in runs:
        with pytest.MonkeyPatch.context() as monkeypatch:
            mutant.install(monkeypatch)
            try:
                play(run.scenario, monkeypatch, run.k)
            except Exception:  # noqa: BLE001  (whatever a user would see)
                runs.remove(run)
                runs.insert(0, run)
                return True
    return False


def test_every_mutant_is_killed(capsys: pytest.CaptureFixture[str]) -> None:
    mutants = all_mutants()
    runs = [Run(scenario, k) for scenario in SCENARIOS for k in (2, 3)]
    survivors = [mutant.name for mutant in mutants if not is_killed(mutant, runs)]
    with capsys.disabled():
        print(f"\nordering calls: {len(mutants) - len(survivors)}/{len(mutants)} killed")
    assert len(mutants) >= 40
    assert not survivors
