"""transformers.Trainer on a streamed model: the plain one's losses, weights and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import superpipeline
from training.cases import CASES
from training.recipes import adapt
from training.reference import Tensors, assert_same_tensors, stream_within, streamed_bytes
from training.side_by_side import everything

MODEL = CASES["gpt2"]


class Sentences(Dataset):
    """Twelve sentences, the same every time."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(10, 256, (8,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def trainer(model: nn.Module, folder: Path, optimizers: Any = None, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 6,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no",
        "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, "learning_rate": 1e-3,
        "logging_nan_inf_filter": False,
    }  # fmt: skip
    arguments = TrainingArguments(**settings | changes)
    return Trainer(
        model=model, args=arguments, train_dataset=Sentences(),
        optimizers=optimizers or (None, None),
    )  # fmt: skip


def results(model: nn.Module, made: Any, **options: Any) -> Tensors:
    """Trains; every logged loss and gradient norm, and the weights."""
    made.train(**options)
    logged = {
        f"{entry['step']} {key}": torch.tensor(entry[key])
        for entry in made.state.log_history
        for key in ("loss", "grad_norm")
        if key in entry
    }
    assert len(logged) >= 6
    return everything(model, logged)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"gradient_accumulation_steps": 2, "max_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "adafactor": {"optim": "adafactor"},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trainer(variant: str, tmp_path: Path, *, adapted: bool) -> None:
    """Trainer calls `.to(device)`, wraps the forward and the optimizer, and clips."""
    found = []
    for streams in (False, True):
        model = MODEL.build()
        if adapted:
            model = adapt(model, MODEL)
        if streams:
            model = stream_within(model, "50%")
        made = trainer(model, tmp_path / str(streams), **VARIANTS[variant])
        found.append(results(model, made))
    assert_same_tensors("result", found[1], found[0])
    assert all(streamed_bytes(superpipeline.handle(model)))


def test_trainer_with_the_lazy_optimizer(tmp_path: Path) -> None:
    found = []
    for streams in (False, True):
        model = MODEL.build()
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if streams:
            model = stream_within(model, "50%")
            optimizer = superpipeline.handle(model).optimizer(optimizer)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
        made = trainer(model, tmp_path / str(streams), optimizers=(optimizer, schedule))
        found.append(results(model, made))
    assert_same_tensors("result", found[1], found[0])


def test_trainer_with_a_lora_added_after_streaming(tmp_path: Path) -> None:
    found = []
    for streams in (False, True):
        model = MODEL.build()
        if streams:
            model = stream_within(model, "50%")
        adapted = adapt(model, MODEL)
        found.append(results(model, trainer(adapted, tmp_path / str(streams))))
    assert_same_tensors("result", found[1], found[0])
    assert all(streamed_bytes(superpipeline.handle(model)))


def test_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    """Saved by Trainer at step 3 of a streamed run, gone on with in a fresh streamed model."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(stream_within(MODEL.build(), "50%"), tmp_path, **saving)
    expected = results(whole.model, whole)
    fresh = trainer(stream_within(MODEL.build(), "50%"), tmp_path, **saving)
    resumed = results(fresh.model, fresh, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_tensors("resumed", resumed, expected)
    plain = trainer(MODEL.build(), tmp_path / "plain", **saving)
    assert_same_tensors("result", expected, results(plain.model, plain))
