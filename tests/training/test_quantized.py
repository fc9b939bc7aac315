"""A base of 4 bits with LoRA on top: what people with 12 to 24 GB train.

bitsandbytes keeps the packed weight on the `ctx` of its product, where hooks of saved tensors do
not see it: a backward that found another block's bytes there would go on with wrong gradients.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import superpipeline
from training.tables import ACTIVATIONS

STEPS = 10


def packed(layer: nn.Linear) -> nn.Module:
    """The same in NF4."""
    linear = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False,
        compute_dtype=torch.float32, quant_type="nf4",
    )  # fmt: skip
    linear.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data.clone(), requires_grad=False, quant_type="nf4"
    )
    return linear.to("cpu")  # that quantizes


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=256, pad_token_id=0,
        )
    )  # fmt: skip
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, packed(child))
    return model


def with_lora(model: nn.Module) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each step's loss, and its gradients in one row."""
    seen = []
    for step in range(STEPS):
        ids = torch.randint(1, 256, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert gradients
        seen.append((loss.detach(), torch.cat(gradients)))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """In the order of the parameters: a lazy step makes them in another."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [value for p in parameters for value in optimizer.state[p].values()]


def same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [v for v in model.state_dict().values() if isinstance(v, torch.Tensor)]


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], list[torch.Tensor], list[torch.Tensor]]:
    model = with_lora(base())
    optimizer = adamw(model)
    seen = train(model, optimizer)
    return seen, copy.deepcopy(weights(model)), states(optimizer)


@pytest.mark.parametrize("bound", ["45%", "60%"])
@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_lora_on_four_bits(plain: Any, activations: str, lazy: bool, bound: str) -> None:
    seen, expected, expected_states = plain
    streamed = superpipeline.stream(
        base(), bound, device="cpu", quiet=True, activations=activations
    )
    pipe = superpipeline.handle(streamed)
    model = with_lora(streamed)
    optimizer = adamw(model)
    found = train(model, pipe.optimizer(optimizer) if lazy else optimizer)
    for one, other in zip(found, seen, strict=True):
        assert same(list(one), list(other))
    with pipe.weights():
        assert same(weights(model), expected)
    assert same(states(optimizer), expected_states)
    stats = pipe.stats()
    assert stats.streamed_bytes > stats.backward_streamed_bytes > 0
    assert pipe.plan.device_bytes <= pipe.plan.bound_bytes


def test_packed_weights_are_what_is_streamed() -> None:
    model = superpipeline.stream(base(), "45%", device="cpu", quiet=True)
    plan = superpipeline.handle(model).plan
    names = {
        plan.workload.weights[weight].name for slots in plan.slots.values() for weight in slots
    }
    assert any(name.endswith("mlp.gate_proj.weight") for name in names)
    assert model.model.layers[0].mlp.gate_proj.weight.dtype is torch.uint8
