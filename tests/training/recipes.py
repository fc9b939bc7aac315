"""What people do around a step: the optimizer; accumulation, clipping, scaling and the like."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

if TYPE_CHECKING:
    from training.cases import TrainCase

Parameters = list[nn.Parameter]


# ---- optimizers ---------------------------------------------------------------------------------


def _muon(parameters: Parameters) -> list[Optimizer]:
    """Muon takes matrices only; the others go to AdamW, as its documentation says."""
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    found: list[Optimizer] = [torch.optim.Muon(matrices, lr=2e-3)] if matrices else []
    return [*found, torch.optim.AdamW(others, lr=2e-3)] if others else found


OPTIMIZERS: dict[str, Callable[[Parameters], list[Optimizer]]] = {
    "adamw": lambda ps: [torch.optim.AdamW(two_groups(ps), lr=2e-3)],
    "adamw_foreach": lambda ps: [torch.optim.AdamW(ps, lr=2e-3, foreach=True)],
    "adamw_fused": lambda ps: [torch.optim.AdamW(ps, lr=2e-3, fused=True)],
    "sgd": lambda ps: [torch.optim.SGD(ps, lr=1e-2, momentum=0.9, weight_decay=0.01)],
    "adafactor": lambda ps: [torch.optim.Adafactor(ps, lr=2e-3)],
    "muon": _muon,
}


def two_groups(parameters: Parameters) -> list[dict[str, Any]]:
    """Weight decay for matrices only: one block's parameters are in different groups."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trained(model: nn.Module) -> Parameters:
    return [p for p in model.parameters() if p.requires_grad]


# ---- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a loop does beside forward, backward and step.

    Attributes:
        micro_batches: backwards to a step.
        clip: the norm that gradients are clipped to, or None.
        bfloat16: forwards run under autocast.
        scales: a GradScaler; two steps have infinite gradients and must be left out.
        schedules: a learning rate (and momentum) that changes with every step.
        keeps_zeros: gradients are zeroed in place, not set to None.
        checkpoint: None, or `use_reentrant` of activation checkpointing.
        freezes: the first half of the parameters does not train.
        adapts: only a LoRA trains.
    """

    micro_batches: int = 1
    clip: float | None = None
    bfloat16: bool = False
    scales: bool = False
    schedules: bool = False
    keeps_zeros: bool = False
    checkpoint: bool | None = None
    freezes: bool = False
    adapts: bool = False

    def forward(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext()

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(
            "cpu", init_scale=1024.0, growth_interval=2, enabled=self.scales
        )

    def schedulers(self, optimizers: list[Optimizer]) -> list[LRScheduler]:
        """One cycle: learning rate and momentum change with every step, up and down."""
        if not self.schedules:
            return []
        return [
            OneCycleLR(
                optimizer, max_lr=5e-3, total_steps=12,
                cycle_momentum=not {"betas", "momentum"}.isdisjoint(optimizer.defaults),
            )
            for optimizer in optimizers
        ]  # fmt: skip


RECIPES: dict[str, Recipe] = {
    "plain": Recipe(),
    "accumulate": Recipe(micro_batches=4),
    "clip": Recipe(clip=0.1, schedules=True),
    "checkpoint": Recipe(checkpoint=False),
    "checkpoint_reentrant": Recipe(checkpoint=True),
    "autocast": Recipe(bfloat16=True),
    "scaler": Recipe(scales=True, clip=0.1),
    "frozen_half": Recipe(freezes=True),
    "lora": Recipe(adapts=True),
    "everything": Recipe(
        micro_batches=2, clip=0.1, bfloat16=True, schedules=True, keeps_zeros=True
    ),
}

# Steps whose loss a GradScaler finds infinite.
INFINITE_STEPS = (1, 6)


def prepare(model: nn.Module, recipe: Recipe, case: TrainCase) -> nn.Module:
    """What a recipe does to a model before training, and before it is streamed."""
    if recipe.checkpoint is not None:
        checkpoint_layers(model, use_reentrant=recipe.checkpoint)
    if recipe.freezes:
        freeze_bottom(model)
    return adapt(model, case) if recipe.adapts else model


def checkpoint_layers(model: nn.Module, *, use_reentrant: bool) -> None:
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    else:
        model.checkpointing = use_reentrant


def freeze_bottom(model: nn.Module) -> None:
    """The first half of the bytes, in order of registration; the cut may go through a layer."""
    parameters = list(model.parameters())
    half, seen = sum(p.nbytes for p in parameters) // 2, 0
    for parameter in parameters:
        seen += parameter.nbytes
        parameter.requires_grad_(seen > half)


def adapt(model: nn.Module, case: TrainCase) -> nn.Module:
    """A LoRA with dropout through PEFT, seeded."""
    from peft import LoraConfig, get_peft_model

    targets = case.lora if isinstance(case.lora, str) else list(case.lora)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets,
        fan_in_fan_out=case.name == "gpt2",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zeros would leave every lora_A without a gradient
                    parameter.normal_(0, 0.02)
    return adapted.train()
