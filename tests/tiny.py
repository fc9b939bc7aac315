"""A small language model that streams within half its bytes, for tests that edit and attack it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import superpipeline
from superpipeline import Pipeline
from zoo import assert_bit_equal
from zoo.case import BUILD_SEED, VOCAB, scatter_weights, seeded, token_ids
from zoo.layers import WIDTH, layer_list

BOUND = "50%"


class TinyLM(nn.Module):
    """Embedding, residual layers, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = layer_list(5)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


def _build() -> TinyLM:
    model = TinyLM()
    scatter_weights(model)
    return model.eval()


build = seeded(_build, BUILD_SEED)
ids = seeded(token_ids, 99)


def stream(model: nn.Module, weights: Any = BOUND, **options: Any) -> Pipeline:
    """Streams `model` on the CPU, quietly, and returns the handle."""
    options = {"quiet": True, "device": "cpu"} | options
    return superpipeline.handle(superpipeline.stream(model, weights, **options))


def name_of(pipe: Pipeline, residence: str) -> str:
    """A weight that the plan makes "resident", looks up by "rows", or streams.

    The streamed one has a copy in the window already, fetched for the next pass.
    """
    assert pipe.engine is not None
    layout, resident = pipe._layout, pipe.plan.resident
    if residence == "streamed":
        ahead = [pipe.engine.blocks[index] for index in pipe.engine._here]
        found = [w for block in ahead for w in block.weights if w.index not in resident]
    else:
        indices = {"resident": resident, "rows": layout.rows - resident}[residence]
        found = [w for w in layout.weights if w.index in indices]
    return max(found, key=lambda weight: weight.num_bytes).aliases[0].homes[0].name


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Same names in the same order, same bits."""
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


def streamed() -> tuple[TinyLM, Pipeline, torch.Tensor]:
    """A streamed model after its first pass, its handle, and inputs."""
    model, inputs = build(), ids()
    pipe = stream(model)
    with torch.no_grad():
        model(inputs)
    return model, pipe, inputs


def expect_plain(model: nn.Module, inputs: torch.Tensor) -> None:
    """Two calls of `model` give what an untouched plain model gives."""
    with torch.no_grad():
        expected = build()(inputs)
        for _ in range(2):
            assert_bit_equal(model(inputs), expected)


def bare(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when an error is raised: classes, addresses, attributes."""
    return (
        [type(module) for module in model.modules()],
        [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()],
        [list(vars(module)) for module in model.modules()],
    )


def expect_like(plain: nn.Module, model: nn.Module, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = plain(inputs)
        assert_bit_equal(model(inputs), expected)
        assert_bit_equal(model(inputs), expected)
