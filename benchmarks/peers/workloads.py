"""The models and what is run on them: the same bits in every process.

Weights are drawn on the device from one seed and then moved to the host, where a user's model is
after loading; that takes seconds. A workload runs a number of steps and returns what each of them
gave and a mark before the first and after every one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.peers.gauge import mark

SIZES = ("full", "tiny")


class Steps(NamedTuple):
    """What the steps gave, and the moments before the first and after each."""

    results: list[torch.Tensor]
    marks: list[Any]


class Workload(NamedTuple):
    """`run(model, device, size, steps)` on the model of this name; `steps` are the most."""

    model: str
    run: Callable[[nn.Module, torch.device, str, int], Steps]
    steps: int


def build(make: Callable[[str], nn.Module], device: torch.device, size: str) -> nn.Module:
    """The model that `make(size)` shapes, with random bf16 weights, on `device`.

    Norms are ones, biases zeros, the rest normal. Buffers keep the values that `make` gave them.
    """
    with torch.device("meta"):
        model = make(size)
    if any(True for _ in model.buffers()):  # whose values are needed; this takes longer
        from accelerate import init_empty_weights

        with init_empty_weights():
            model = make(size)
    torch.manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if value.dim() > 1:
                nn.init.normal_(value, std=0.02)
            else:
                nn.init.constant_(value, 0.0 if name.endswith("bias") else 1.0)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()


def to_host(model: nn.Module) -> nn.Module:
    """Moves the model to ordinary host memory, several tensors at a time: one thread's page faults
    would take most of the time."""
    tensors = [*model.parameters(), *model.buffers()]

    def move(tensor: torch.Tensor) -> None:
        tensor.data = tensor.data.to("cpu")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(move, tensors))
    return model


def weight_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def bytes_to_visit(model: nn.Module) -> int:
    """Bytes that one pass has to have on the device at some time: all but embedding tables of their
    own, from which a pass needs a few rows."""
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    others = {
        id(p)
        for m in model.modules()
        if not isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    return weight_bytes(model) - sum(t.nbytes for i, t in tables.items() if i not in others)


# ---- an 8B Llama --------------------------------------------------------------------------------

LLAMA = {
    "full": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip


def llama(size: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **LLAMA[size], max_position_embeddings=131072, rope_theta=500000.0,
        tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(device: torch.device, rows: int, length: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 1000, (rows, length), device="cpu").to(device)


def scaled(length: int, size: str) -> int:
    """A sequence's length; a rehearsal takes an eighth."""
    return length if size == "full" else max(1, length // 8)


@torch.no_grad()
def prefill(
    model: nn.Module, device: torch.device, size: str, steps: int,
    *, rows: int = 1, length: int = 2048,
) -> Steps:  # fmt: skip
    """The same pass over rows x length tokens, several times."""
    ids = tokens(device, rows, scaled(length, size))
    done = Steps([], [mark(device)])
    for _ in range(steps):
        out = model(input_ids=ids, use_cache=False, logits_to_keep=1)
        done.marks.append(mark(device))
        done.results.append(out.logits)
    return done


@torch.no_grad()
def decode(
    model: nn.Module, device: torch.device, size: str, steps: int,
    *, rows: int = 1, length: int = 128, **prompt: torch.Tensor,
) -> Steps:  # fmt: skip
    """Decoding after a prompt, whose pass is not timed.

    The tokens are given, not chosen: a step that differs is seen at that step, and at no other.
    """
    prompt = prompt or {"input_ids": tokens(device, rows, scaled(length, size))}
    rows = prompt["input_ids"].shape[0]
    given = tokens(device, rows, steps)
    out = model(**prompt, use_cache=True, logits_to_keep=1)
    done = Steps([], [mark(device)])
    for step in range(steps):
        out = model(
            input_ids=given[:, step : step + 1],
            past_key_values=out.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )
        done.marks.append(mark(device))
        done.results.append(out.logits)
    return done


# ---- a denoiser like Flux (12B) -----------------------------------------------------------------

FLUX = {
    "full": {"guidance_embeds": True},  # diffusers' defaults are FLUX.1's shapes
    "tiny": {
        "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 32,
        "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 32,
        "axes_dims_rope": (8, 12, 12), "guidance_embeds": True,
    },
}  # fmt: skip


def flux(size: str) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**FLUX[size])


def flux_inputs(device: torch.device, size: str) -> dict[str, torch.Tensor]:
    """1024x1024 pixels (4096 patches) and 512 text tokens."""
    side, text = (64, 512) if size == "full" else (8, 16)
    shapes, dtype = FLUX[size], torch.bfloat16
    torch.manual_seed(2)
    with torch.device("cpu"):  # whatever default a contender has set: the numbers depend on it
        inputs = {
            "hidden_states": torch.randn(1, side * side, 64),
            "encoder_hidden_states": torch.randn(1, text, shapes.get("joint_attention_dim", 4096)),
            "pooled_projections": torch.randn(1, shapes.get("pooled_projection_dim", 768)),
            "guidance": torch.full((1,), 3.5),
            "img_ids": torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(side))] * 2),
            "txt_ids": torch.zeros(text, 3),
        }
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


@torch.no_grad()
def denoise(model: nn.Module, device: torch.device, size: str, steps: int) -> Steps:
    """Euler steps from noise, as a sampler takes them."""
    inputs = flux_inputs(device, size)
    sigmas = torch.linspace(1.0, 0.0, 5, device="cpu")
    latents = inputs.pop("hidden_states")
    done = Steps([], [mark(device)])
    for now, then in pairwise(sigmas[: steps + 1]):
        time = now.to(device, torch.bfloat16).reshape(1)
        out = model(hidden_states=latents, timestep=time, return_dict=False, **inputs)[0]
        latents = latents + (then - now).item() * out
        done.marks.append(mark(device))
        done.results.append(latents)
    return done


Make = Callable[[str], nn.Module]
MODELS: dict[str, Make] = {"llama": llama, "flux": flux}
WORKLOADS = {
    "prefill": Workload("llama", prefill, 5),
    "decode": Workload("llama", decode, 16),
    "flux": Workload("flux", denoise, 4),
}
# Where each model keeps its blocks, for the tools that have to be told.
BLOCK_LISTS = {
    "llama": ("model.layers",),
    "flux": ("transformer_blocks", "single_transformer_blocks"),
}
