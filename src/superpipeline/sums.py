"""Sums of gradients on the host, made in one dtype and kept in another.

The system needs longer to give new pages than the host to add (0.25 s/GiB were seen), so the memory
of sums and of what lies between is used again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from superpipeline.gradients import HostPool

_SCRATCH = 2**21  # elements


class Sums:
    """Adds gradients, which were made in `made`, up as if all had `dtype`.

    Costs on the host the sums' bytes, used again once nobody looks at them, and 8 MiB.
    """

    def __init__(self, made: torch.dtype, dtype: torch.dtype) -> None:
        self._made, self._dtype = made, dtype
        self._memory = HostPool(torch.device("cpu"))
        self._scratch = torch.empty(0)

    def add(
        self, made: torch.Tensor, before: torch.Tensor | None, master: torch.Tensor
    ) -> torch.Tensor:
        """`before` plus `made`, in place, as PyTorch accumulates: who holds it sees the sum.

        Without one, new memory of the dtype and the strides of `master`.
        """
        if before is None:
            return self.take(self._memory.like(master).copy_(made), None)
        for part, new in zip(_split(before), _split(made), strict=True):
            self._add(part, new)
        return before

    def take(self, new: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The same, of a gradient in the masters' dtype already; without another it is the sum."""
        if before is not None:
            return self.add(new, before, before)
        is_exact = self._dtype in {self._made, new.dtype}
        return new if is_exact else new.copy_(new.to(self._dtype))

    def _add(self, old: torch.Tensor, new: torch.Tensor) -> None:
        if self._dtype != old.dtype:
            old.copy_(old.to(self._dtype) + new.to(self._dtype))
        elif old.dtype is torch.float32 is not new.dtype and new.numel() <= _SCRATCH:
            # PyTorch would make a tensor to convert it.
            if not self._scratch.numel():
                self._scratch = torch.empty(_SCRATCH, dtype=torch.float32)
            old.add_(self._scratch[: new.numel()].view(new.shape).copy_(new))
        else:
            old.add_(new)


def _split(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """Parts no larger than the scratch memory, where rows are no larger."""
    if not tensor.dim() or tensor.numel() <= _SCRATCH:
        return [tensor]
    return tensor.split(max(1, _SCRATCH * tensor.shape[0] // tensor.numel()))
