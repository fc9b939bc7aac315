"""Superpipeline: run any PyTorch model in the device memory you have, bit for bit.

model = superpipeline.stream(model, weights="6GiB")
"""

from superpipeline.api import handle, stream, streaming
from superpipeline.clip import clip_grad_norm_
from superpipeline.errors import (
    BackwardError,
    BudgetError,
    ClosedError,
    DiskError,
    HostMemoryError,
    InputError,
    SuperpipelineError,
    UnsupportedError,
    UpdateError,
    VerificationError,
)
from superpipeline.load import load
from superpipeline.pipeline import Pipeline
from superpipeline.plan import Plan
from superpipeline.resume import load_checkpoint, save_checkpoint
from superpipeline.trace import Stats
from superpipeline.verify import Verification

__version__ = "0.1.0"

__all__ = [
    "BackwardError",
    "BudgetError",
    "ClosedError",
    "DiskError",
    "HostMemoryError",
    "InputError",
    "Pipeline",
    "Plan",
    "Stats",
    "SuperpipelineError",
    "UnsupportedError",
    "UpdateError",
    "Verification",
    "VerificationError",
    "clip_grad_norm_",
    "handle",
    "load",
    "load_checkpoint",
    "save_checkpoint",
    "stream",
    "streaming",
]
