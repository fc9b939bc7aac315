"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from superpipeline.sizes import Size

Activations = Literal["keep", "recompute", "offload", "recompute+offload"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


@dataclass(frozen=True, kw_only=True)
class Options:
    """`k` counts blocks, `weights` bytes; one of them is None.

    `host_memory` bounds the weights in host memory, where others may stay on disk. `param_dtype` is
    what parameters compute in, `grad_dtype` what their gradients are added up in.
    """

    device: torch.device
    weights: Size | None = None
    k: int | None = None
    k_prime: int = 1
    host_memory: Size | None = None
    activations: Activations = "keep"
    param_dtype: torch.dtype | None = None
    grad_dtype: torch.dtype | None = None
    quiet: bool = False

    @property
    def cutting_bound(self) -> Size | None:
        """The bound for whose sake large blocks may be cut.

        Not where activations are recomputed or leave: that is done by block, and what lies between
        the parts of a layer would stay on the device.
        """
        return self.weights if self.activations == "keep" else None


def lies_otherwise(options: Options, before: Options) -> bool:
    """Whether other blocks, or another choice of what stays on disk, are asked for."""
    return (options.k_prime, options.host_memory) != (before.k_prime, before.host_memory)
