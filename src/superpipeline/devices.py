"""Which streams a device has."""

import torch

from superpipeline.cpu_streams import CpuStreams
from superpipeline.errors import UnsupportedError
from superpipeline.streams import CudaStreams, Streams


def streams_for(device: torch.device) -> Streams:
    """The implementation for `device`.

    Raises:
        UnsupportedError: neither the CPU nor a device that torch.cuda drives (CUDA, ROCm).
    """
    if device.type == "cpu":
        return CpuStreams()
    if device.type == "cuda":
        return CudaStreams(device)
    raise UnsupportedError(
        f"streaming to {device} is not supported; use device='cuda' or device='cpu'"
    )
