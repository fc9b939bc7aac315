"""Models that are odd in when blocks run and in what leaves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .case import ZooCase, case, passes_call
from .layers import WIDTH, Layer, hidden_input, layer_list


class RevisitedLayers(nn.Module):
    """Odd: layers are visited several times in a pass, one twice in a row, one never."""

    order = (0, 1, 2, 1, 2, 2, 3, 0, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = self.layers[index](x)
        return x


class ReversedPasses(nn.Module):
    """Odd: odd passes run the layers backwards; the counter lives on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(5)
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = list(self.layers)
        if self.num_passes % 2 == 1:
            layers.reverse()
        self.num_passes += 1
        for layer in layers:
            x = layer(x)
        return x


class SkippedLayers(nn.Module):
    """Odd: which layers are skipped depends on the input and on the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(7)
        self.num_passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        for index, layer in enumerate(self.layers):
            positive = int((x.sum() > 0).item())
            if (index + self.num_passes + positive) % 3 != 0:
                x = layer(x)
        return x


class Stage(nn.Module):
    """A block with weights of its own around an inner list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.layers = layer_list(2)
        self.after = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = layer(x) * self.after
        return x


class NestedStages(nn.Module):
    """Odd: a ModuleList of blocks that hold ModuleLists of blocks, and weights between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Link(nn.Module):
    """Runs a layer, then the rest of the chain, then uses its own weight again."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.layer = Layer()
        self.rest = rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.rest(self.layer(x)) + self.layer.norm(x)
        return output


def _chained_layers() -> nn.Module:
    """Odd: each layer calls the next from inside itself, so visits nest five deep."""
    chain: nn.Module = nn.Identity()
    for _ in range(5):
        chain = Link(chain)
    return chain


class CheckpointedLayers(nn.Module):
    """Odd: layers run under both kinds of activation checkpointing (where a grad is wanted)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layer_list(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            reentrant = index % 2 == 1 and x.requires_grad
            if torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=reentrant)
            else:
                x = layer(x)
        return x


class ClassToken(nn.Module):
    """Returns a view of its weight, ``self.cls.expand(b, -1, -1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.table = nn.Parameter(torch.randn(256, WIDTH))

    def forward(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cls.expand(batch, -1, -1), self.table[:length]


class ExpandingToken(nn.Module):
    """Odd: a block's output is a view of its weight, which is used after other blocks ran."""

    def __init__(self) -> None:
        super().__init__()
        self.token = ClassToken()
        self.layers = layer_list(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cls, positions = self.token(x.shape[0], x.shape[1])
        for layer in self.layers:
            x = layer(x)
        return torch.cat([cls, x + positions], dim=1)


class GenerousLayer(Layer):
    """Returns its hidden state and a Parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.gain


class ReturnedParameters(nn.Module):
    """Odd: blocks return a Parameter itself; the root uses all of them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GenerousLayer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        gains: list[torch.Tensor] = []
        for layer in self.layers:
            x, gain = layer(x)
            gains.append(gain)
        return {"hidden": x * torch.stack(gains).prod(dim=0), "gains": gains}


@dataclass
class Report:
    """What a DataclassLayer returns beside its hidden state."""

    norm: torch.Tensor
    history: dict[str, list[torch.Tensor]]
    label: str
    nothing: None = None


class DataclassLayer(Layer):
    """Takes and returns nested containers."""

    def forward(self, state: dict[str, Any]) -> Any:  # type: ignore[override]
        hidden = super().forward(state["hidden"])
        history = {"means": [*state["history"], hidden.mean(dim=-1)]}
        report = Report(hidden.norm(), history, label="layer")
        return {"hidden": hidden, "history": history["means"], "reports": (report, 3)}


class NestedOutputs(nn.Module):
    """Odd: dataclasses in tuples in dicts go in and out of blocks, with a complex tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DataclassLayer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"hidden": x, "history": []}
        for layer in self.layers:
            state = layer(state)
        return state | {"spectrum": torch.fft.rfft(state["hidden"], dim=1), "flag": True}


class InPlaceLayer(Layer):
    """Adds to its input in place and returns the input object itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(super().forward(x.clone()), alpha=0.5)


class InPlaceLayers(nn.Module):
    """Odd: every block returns the very tensor that it was given, changed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InPlaceLayer() for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.0
        for layer in self.layers:
            layer(x)
        return x


def _changing(name: str, factory: type[nn.Module]) -> ZooCase:
    return case(name, factory, hidden_input, passes_call(hidden_input), stateful=True)


CASES: tuple[ZooCase, ...] = (
    case("revisited_layers", RevisitedLayers, hidden_input, passes_call(hidden_input)),
    _changing("reversed_passes", ReversedPasses),
    _changing("skipped_layers", SkippedLayers),
    case("nested_stages", NestedStages, hidden_input),
    case("chained_layers", _chained_layers, hidden_input),
    case("checkpointed_layers", CheckpointedLayers, hidden_input),
    case("expanding_token", ExpandingToken, hidden_input),
    case("returned_parameters", ReturnedParameters, hidden_input),
    case("nested_outputs", NestedOutputs, hidden_input),
    case("in_place_layers", InPlaceLayers, hidden_input),
)
