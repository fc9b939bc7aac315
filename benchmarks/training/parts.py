"""What is trained: models, batches, and how much of them the device may hold."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

GIB = 2**30


class Part(NamedTuple):
    """One model and the steps that it is trained for.

    Attributes:
        shapes: of a Llama, by size.
        length: tokens a row; `rows` of them are one micro-batch.
        tokens: of one optimizer step, for each workload; micro-batches add up to it.
        weights: the bound that `stream` is given, by size.
        activations: as `stream` takes it; others recompute if this does.
        stored: dtype of the parameters that are stepped, and of AdamW's states.
        computes: dtype of forward and backward.
        cap_bytes: device memory that Superpipeline's process may have; 0 for all.
    """

    shapes: dict[str, dict[str, Any]]
    length: int
    rows: int
    tokens: tuple[int, ...]
    weights: dict[str, str]
    activations: str
    stored: torch.dtype
    computes: torch.dtype
    cap_bytes: int = 0

    def micro_batches(self, tokens: int) -> int:
        return max(1, tokens // (self.length * self.rows))


_TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip

PARTS = {
    "cpu": Part(  # 110M parameters
        shapes={"tiny": _TINY | {"tie_word_embeddings": True}, "full": {
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
            "tie_word_embeddings": True,
        }},
        length=256, rows=2, tokens=(512,), weights={"tiny": "50%", "full": "50%"},
        activations="keep", stored=torch.float32, computes=torch.float32,
    ),
    "1b": Part(
        shapes={"tiny": _TINY | {"tie_word_embeddings": True}, "full": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": True, "rope_theta": 500000.0,
        }},
        length=2048, rows=4, tokens=(2048, 16384, 65536), weights={"tiny": "50%", "full": "40%"},
        activations="keep", stored=torch.float32, computes=torch.bfloat16,
    ),
    "8b": Part(
        shapes={"tiny": _TINY | {"tie_word_embeddings": False}, "full": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": False, "rope_theta": 500000.0,
        }},
        length=2048, rows=2, tokens=(16384,), weights={"tiny": "50%", "full": "8GiB"},
        activations="recompute+offload", stored=torch.bfloat16, computes=torch.bfloat16,
        cap_bytes=24 * GIB,
    ),
}  # fmt: skip


def part_of(name: str, size: str) -> Part:
    """The part; a rehearsal has rows of 8 tokens."""
    part = PARTS[name]
    if size == "full":
        return part
    shorter = tuple(tokens // (part.length // 8) for tokens in part.tokens)
    return part._replace(length=8, tokens=shorter, cap_bytes=0)


def build(part: Part, size: str, device: torch.device) -> nn.Module:
    """The model in host memory, its weights drawn on `device`: the same every time.

    Norms are ones, the rest normal.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**part.shapes[size], max_position_embeddings=8192, pad_token_id=0)
    config.use_cache = False
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.ones(parameter.shape, device=device)
            if value.dim() > 1:
                value.normal_(std=0.02)
            module.register_parameter(name, nn.Parameter(value.to("cpu", part.stored)))
    model.tie_weights()
    if "recompute" in part.activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batches(part: Part, size: str, tokens: int, step: int) -> Iterator[torch.Tensor]:
    """The micro-batches of one step, the same for everybody."""
    generator = torch.Generator().manual_seed(step)
    vocab = part.shapes[size]["vocab_size"]
    rows = min(part.rows, tokens // part.length)
    for _ in range(part.micro_batches(tokens)):
        yield torch.randint(1, vocab, (rows, part.length), generator=generator)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_a_token(model: nn.Module) -> float:
    """6 for each parameter that multiplies: an embedding table of its own does not."""
    head = model.get_output_embeddings().weight
    table = model.get_input_embeddings().weight
    return 6.0 * (num_parameters(model) - (0 if head is table else table.numel()))
