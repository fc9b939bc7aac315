"""examples/finetune.py: it trains, its check sees a difference, and what it saved goes on."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import superpipeline

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--tiny", "--length", "32", "--steps", "3", "--device", "cpu")


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the example; gives what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])
        runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(printed: str, kind: str = "streamed") -> list[float]:
    lines = re.findall(rf"^{kind} +step +\d+  loss (\S+)", printed, re.MULTILINE)
    return [float(loss) for loss in lines]


@pytest.mark.parametrize(
    "options",
    [
        ("--lazy",),
        ("--lora", "--activations", "recompute"),
        ("--bf16", "--lazy", "--activations", "offload"),
        ("--lora", "--bf16", "--activations", "recompute+offload"),
    ],
    ids="".join,
)
def test_it_trains_and_is_verified(options: tuple[str, ...], finetune: Any) -> None:
    printed = finetune(*TINY, *options, "--verify")
    assert "verified: 3 losses and all trained weights bit-equal" in printed
    assert len(set(losses(printed))) == 3
    assert losses(printed) == losses(printed, "plain")
    assert not re.search(r"streamed 0 MiB|, 0 of them in the backward", printed)


@pytest.mark.parametrize("what", [("--lora", "--lazy"), ("--bf16",)], ids="".join)
def test_it_goes_on_from_what_it_saved(
    what: tuple[str, ...], finetune: Any, tmp_path: Path
) -> None:
    """The check is against a plain run that was never stopped."""
    folder = str(tmp_path / "run")
    finetune(*TINY, *what, "--save", folder)
    printed = finetune(*TINY, *what, "--steps", "5", "--resume", folder, "--verify")
    assert len(losses(printed)) == 2
    assert losses(printed) == losses(printed, "plain")[3:]
    assert "verified: 2 losses" in printed


def test_a_difference_is_seen(finetune: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    stream = superpipeline.stream

    def wrong(model: Any, **options: Any) -> Any:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-2
        return stream(model, **options)

    monkeypatch.setattr(superpipeline, "stream", wrong)
    with pytest.raises(SystemExit) as end:
        finetune(*TINY, "--verify")
    assert end.value.code == 1
    assert "NOT verified: the loss of step 1 is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "1%"), "The least is weights="),
        (("--weights", "100%"), "nothing was streamed"),
        (("--resume", "nowhere"), "nowhere holds no checkpoint"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    options: tuple[str, ...], message: str, finetune: Any
) -> None:
    with pytest.raises(SystemExit, match=message):
        finetune(*TINY, *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--lazy",), ("--lora",)], ids="".join)
def test_the_demos_model(options: tuple[str, ...], finetune: Any) -> None:
    """SmolLM2-135M on the manual: the loss falls, and is the plain run's."""
    model = ROOT / "demo" / "SmolLM2-135M-Instruct"
    printed = finetune(
        "--model", str(model), "--steps", "4", "--device", "cpu", "--verify", *options
    )
    assert "verified: 4 losses" in printed
    assert losses(printed)[-1] < losses(printed)[0]
