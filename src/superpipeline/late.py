"""The user's hooks on accumulated gradients, run once these are where the user expects them.

PyTorch runs `register_post_accumulate_grad_hook`s as each gradient is made. Where it then still has
to leave the device, or to become the gradient of a master, the hooks wait until backward ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Hook = Callable[[Any], None]


class LateHooks:
    """Puts hooks off while a backward runs, in the order in which they would have run."""

    def __init__(self) -> None:
        self.is_waiting = False
        self._late: list[tuple[Hook, torch.Tensor]] = []

    def put_off(self, parameters: Iterable[torch.Tensor], ours: Callable[[Hook], bool]) -> None:
        """Makes the hooks of these wait from now on, but for `ours`."""
        self.is_waiting = True
        for parameter in parameters:
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
            for key, hook in hooks.items():
                if not ours(hook) and not isinstance(hook, _Late):
                    hooks[key] = _Late(self, hook)

    def add(self, hook: Hook, parameter: torch.Tensor) -> None:
        self._late.append((hook, parameter))

    def run(self) -> None:
        """The backward has ended."""
        self.is_waiting = False
        late, self._late = self._late, []
        for hook, parameter in late:
            hook(parameter)

    def drop(self) -> None:
        """The backward failed."""
        self.is_waiting = False
        self._late.clear()


class _Late:
    """A user's hook."""

    def __init__(self, late: LateHooks, hook: Hook) -> None:
        self._late = late
        self._hook = hook

    def __call__(self, parameter: torch.Tensor) -> None:
        if self._late.is_waiting:
            self._late.add(self._hook, parameter)
        else:
            self._hook(parameter)
