"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from superpipeline.sizes import Size


@dataclass(frozen=True, kw_only=True)
class Options:
    """`k` counts blocks, `weights` bytes; one of them is None.

    `host_memory` bounds the weights in host memory, where others may stay on disk.
    """

    device: torch.device
    weights: Size | None = None
    k: int | None = None
    k_prime: int = 1
    host_memory: Size | None = None
    quiet: bool = False


def lies_otherwise(options: Options, before: Options) -> bool:
    """Whether other blocks, or another choice of what stays on disk, are asked for."""
    return (options.k_prime, options.host_memory) != (before.k_prime, before.host_memory)
