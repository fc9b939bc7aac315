"""An 8B language model, a vision-language model of that size with an image, a 1.8B vision model.

Random bf16 weights; the shapes are those of Llama 3 8B, Qwen2.5-VL 7B and ViT-bigG/14.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.peers.gauge import mark
from benchmarks.peers.workloads import Make, Steps, Workload, decode, llama, prefill, tokens

VLM = {
    "full": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    },
}  # fmt: skip
VLM_VISION = {
    "full": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tiny": {
        "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 128, "fullatt_block_indexes": [1, 3],
    },
}  # fmt: skip
BIGG = {
    "full": {
        "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 224,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 56,
    },
}  # fmt: skip
_IMAGE, _VISION_START, _VISION_END = 1001, 1002, 1003  # token ids that no prompt has


class Case(NamedTuple):
    """A workload and how many `unit`s one of its steps does, in the full size."""

    workload: Workload
    amount: int
    unit: str


def vlm(size: str) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    heads = VLM[size]["num_attention_heads"]
    half = VLM[size]["hidden_size"] // heads // 2
    rope["mrope_section"] = [half // 4, (half - half // 4) // 2, (half - half // 4) // 2]
    config = Qwen2_5_VLConfig(
        text_config={**VLM[size], "rope_parameters": rope, "max_position_embeddings": 32768},
        vision_config=VLM_VISION[size], tie_word_embeddings=False,
        image_token_id=_IMAGE, vision_start_token_id=_VISION_START,
        vision_end_token_id=_VISION_END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def bigg(size: str) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**BIGG[size], hidden_act="gelu"))


def image_prompt(device: torch.device, size: str) -> dict[str, torch.Tensor]:
    """One image of 1344x1008 pixels (1728 tokens) and 64 tokens of text."""
    high, wide = (72, 96) if size == "full" else (8, 8)
    num_tokens = high * wide // 4
    torch.manual_seed(3)
    pixels = torch.randn(high * wide, 3 * 2 * 14 * 14, device="cpu")
    text = tokens(torch.device("cpu"), 1, 64)[0].tolist()
    ids = [*text[:16], _VISION_START, *[_IMAGE] * num_tokens, _VISION_END, *text[16:]]
    row = torch.tensor([ids], device="cpu")
    return {
        "input_ids": row.to(device),
        "mm_token_type_ids": (row == _IMAGE).int().to(device),
        "pixel_values": pixels.to(device, torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, high, wide]], device=device),
    }


@torch.no_grad()
def look(model: nn.Module, device: torch.device, size: str, steps: int) -> Steps:
    """The pass over the image and the text, several times."""
    prompt = image_prompt(device, size)
    done = Steps([], [mark(device)])
    for _ in range(steps):
        out = model(**prompt, use_cache=False, logits_to_keep=1)
        done.marks.append(mark(device))
        done.results.append(out.logits)
    return done


def describe(model: nn.Module, device: torch.device, size: str, steps: int) -> Steps:
    """Decoding after the image and the text."""
    return decode(model, device, size, steps, **image_prompt(device, size))


@torch.no_grad()
def see(model: nn.Module, device: torch.device, size: str, steps: int, *, rows: int) -> Steps:
    """A batch of images, several times."""
    side = BIGG[size]["image_size"]
    torch.manual_seed(4)
    pixels = torch.randn(rows, 3, side, side, device="cpu").to(device, torch.bfloat16)
    done = Steps([], [mark(device)])
    for _ in range(steps):
        out = model(pixel_values=pixels).pooler_output
        done.marks.append(mark(device))
        done.results.append(out)
    return done


def _runs(run: Callable[..., Steps], model: str, steps: int, **options: int) -> Workload:
    return Workload(model, partial(run, **options), steps)


MODELS: dict[str, Make] = {"llm": llama, "vlm": vlm, "vit": bigg}
NAMES = {"llm": "Llama 8B", "vlm": "Qwen2.5-VL 7B", "vit": "ViT-bigG 1.8B"}
CASES: dict[str, dict[str, Case]] = {
    "llm": {
        "prefill 1x2048": Case(_runs(prefill, "llm", 4), 2048, "tokens"),
        "prefill 8x2048": Case(_runs(prefill, "llm", 3, rows=8), 16384, "tokens"),
        "decode, batch 1": Case(_runs(decode, "llm", 8), 1, "tokens"),
        "decode, batch 64": Case(_runs(decode, "llm", 8, rows=64), 64, "tokens"),
    },
    "vlm": {
        "image and question": Case(_runs(look, "vlm", 4), 64 + 1728 + 2, "tokens"),
        "answer": Case(_runs(describe, "vlm", 8), 1, "tokens"),
    },
    "vit": {
        "1 image": Case(_runs(see, "vit", 4, rows=1), 1, "images"),
        "64 images": Case(_runs(see, "vit", 4, rows=64), 64, "images"),
        "512 images": Case(_runs(see, "vit", 3, rows=512), 512, "images"),
    },
}  # fmt: skip
