"""Models of two modalities: CLIP, vision-language models that generate, and Whisper."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from .case import VOCAB, Inputs, ZooCase, case, generate_calls, kwargs_only, token_ids

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 3, 4, 5, 6
NUM_IMAGE_TOKENS = 4

CLIP_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
QWEN_TEXT: dict[str, Any] = TEXT | {
    "num_key_value_heads": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
    },
}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _clip() -> CLIPModel:
    text = TEXT | {"eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=CLIP_VISION, projection_dim=32)
    return CLIPModel(config)


def _llava() -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIP_VISION | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama"},
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_IMAGE_TOKENS,
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> Qwen2VLForConditionalGeneration:
    vision = {
        "depth": 5,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _whisper() -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=VOCAB,
        num_mel_bins=16,
        d_model=64,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=30,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config)


def _captions_and_images() -> Inputs:
    ids = token_ids(3, 7)
    ids[:, -1] = 2  # the end token, where CLIP pools
    pixels = torch.randn(2, 3, 28, 28)
    return kwargs_only(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def _prompt_with_image(batch: int) -> torch.Tensor:
    """Two text tokens, start, the image's tokens, end, three text tokens."""
    ids = token_ids(batch, 7 + NUM_IMAGE_TOKENS)
    ids[:, 2], ids[:, 3 + NUM_IMAGE_TOKENS] = VISION_START, VISION_END
    ids[:, 3 : 3 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    return ids


def _llava_prompt() -> Inputs:
    ids = _prompt_with_image(2)
    pixels = torch.randn(2, 3, 28, 28)
    return kwargs_only(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)


def _qwen_prompt() -> Inputs:
    """Two images of 4 by 4 patches, which merge to 2 by 2 tokens; a patch is 3*2*14*14 values."""
    ids = _prompt_with_image(2)
    return kwargs_only(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == IMAGE_TOKEN).int(),
        pixel_values=torch.randn(2 * 16, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]),
    )


def _speech() -> Inputs:
    return kwargs_only(
        input_features=torch.randn(2, 16, 60),
        attention_mask=torch.ones(2, 60, dtype=torch.long),
    )


def _speech_and_transcript() -> Inputs:
    args, kwargs = _speech()
    return Inputs(args, kwargs | {"decoder_input_ids": token_ids(2, 5)})


CASES: tuple[ZooCase, ...] = (
    case("clip", _clip, _captions_and_images),
    case("llava", _llava, _llava_prompt, *generate_calls(_llava_prompt)),
    case("qwen2_vl", _qwen2_vl, _qwen_prompt, *generate_calls(_qwen_prompt)),
    case("qwen2_5_vl", _qwen2_5_vl, _qwen_prompt, *generate_calls(_qwen_prompt)),
    case("whisper", _whisper, _speech_and_transcript, *generate_calls(_speech)),
)
