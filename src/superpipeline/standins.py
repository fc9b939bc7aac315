"""A state dict holds values, also of weights that a NaN stands in for (see `disk.stand_in`).

PyTorch's hooks on state dicts are used: unlike hooks on calls they change no code path.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from superpipeline.blocks import is_scripted
from superpipeline.host import check_host_memory
from superpipeline.ondisk import OnDisk
from superpipeline.weights import Weight

Keepers = dict[int, tuple[Weight, OnDisk]]  # by id of the parameter


def show_in_state_dicts(
    model: nn.Module, keepers: Iterable[tuple[Weight, OnDisk]]
) -> list[RemovableHandle]:
    """Makes `model.state_dict()`, and so `save_pretrained`, read the values of stand-ins.

    Costs, for as long as the state dict lives, their bytes of host memory.
    """
    stood_in = {
        id(alias.tensor): (weight, keeper) for weight, keeper in keepers for alias in weight.aliases
    }
    handles = []
    for module in model.modules():
        if is_scripted(module):
            continue  # it has no such hooks
        own = {k: p for k, p in module._parameters.items() if p is not None and id(p) in stood_in}
        if own:
            handles.append(module.register_state_dict_post_hook(_Read(own, stood_in)))
    return handles


class _Read:
    def __init__(self, own: dict[str, nn.Parameter], stood_in: Keepers) -> None:
        self._own = own
        self._stood_in = stood_in

    def __call__(self, _: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        """Puts values where stand-ins are.

        Raises:
            HostMemoryError: they do not fit into host memory.
        """
        for name, parameter in self._own.items():
            weight, keeper = self._stood_in[id(parameter)]
            (alias,) = weight.aliases
            shown = keeper.view(alias, weight)
            is_here = prefix + name in state and parameter.data_ptr() == shown.data_ptr()
            if not is_here or keeper.is_readable:
                continue
            check_host_memory(weight.num_bytes, f"reading {weight.name} for a state dict")
            with torch.inference_mode(False), torch.no_grad():
                state[prefix + name] = keeper.real(weight, shown)
