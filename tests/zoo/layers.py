"""The plain residual layer that the hand-written models are made of."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from .case import Inputs, args_only, token_ids

WIDTH = 64
NUM_POSITIONS = 512


class Layer(nn.Module):
    """``x + down(gelu(up(norm(x))))``: about 100 KB."""

    def __init__(self, width: int = WIDTH, hidden: int = 192) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(functional.gelu(self.up(self.norm(x))))
        return x + hidden


def layer_list(num_layers: int = 5) -> nn.ModuleList:
    return nn.ModuleList(Layer() for _ in range(num_layers))


def hidden_input() -> Inputs:
    return args_only(torch.randn(2, 9, WIDTH))


def token_input() -> Inputs:
    return args_only(token_ids())
