"""Tiny models of the transformers library, with their dropout, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from training.models import HIDDEN, VOCAB, WIDTH
from zoo.case import Inputs, kwargs_only
from zoo.multimodal import CLIP_VISION, IMAGE_TOKEN, NUM_IMAGE_TOKENS, TEXT
from zoo.text import llama_config

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(llama_config(**SMALL, num_hidden_layers=4, attention_dropout=0.1))


def llama_tied() -> nn.Module:
    return LlamaForCausalLM(llama_config(**SMALL, num_hidden_layers=4, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    """Dropout in three places, tied embeddings, and linear layers that are stored transposed."""
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_inner=HIDDEN, n_layer=4, n_head=4,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def mixtral() -> nn.Module:
    config = MixtralConfig(
        **SMALL | {"intermediate_size": WIDTH}, num_hidden_layers=3, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def t5() -> nn.Module:
    """Encoder and decoder, one table of position biases for all layers of each."""
    config = T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=32, d_ff=HIDDEN, num_layers=3, num_heads=4,
        relative_attention_num_buckets=8, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def albert() -> nn.Module:
    """Six layers that share three groups of weights."""
    config = AlbertConfig(
        **SMALL, embedding_size=64, num_hidden_layers=6, num_hidden_groups=3,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return AlbertForMaskedLM(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=5, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def llava() -> nn.Module:
    """A vision tower, a projector, a decoder."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": 3}
    config = LlavaConfig(
        vision_config=CLIP_VISION | sizes | {"model_type": "clip_vision_model"},
        text_config=TEXT | sizes | {"vocab_size": VOCAB, "model_type": "llama"},
        image_token_index=IMAGE_TOKEN, image_seq_length=NUM_IMAGE_TOKENS,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def resnet() -> nn.Module:
    """BatchNorm in training mode: every forward writes its statistics."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 96, 128], depths=[2, 2, 2], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    return ResNetForImageClassification(config)


# ---- inputs -------------------------------------------------------------------------------------


def _ids(length: int) -> torch.Tensor:
    return torch.randint(10, VOCAB, (2, length))


def masked() -> Inputs:
    ids = _ids(8)
    return kwargs_only(input_ids=ids, labels=ids)


def sentence() -> Inputs:
    return kwargs_only(**masked().kwargs, use_cache=False)


def sentence_with_cache() -> Inputs:
    """What people write: in training mode too, each layer then adds to a cache that is passed on.

    A block that is called again for a recompute finds its own keys and values in it.
    """
    return masked()


def translation() -> Inputs:
    return kwargs_only(input_ids=_ids(8), labels=_ids(6), use_cache=False)


def photo() -> Inputs:
    return kwargs_only(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([3, 8]))


def captioned() -> Inputs:
    ids = _ids(6 + NUM_IMAGE_TOKENS)
    ids[:, 2 : 2 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    return kwargs_only(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(2, 3, 28, 28),
        labels=ids,
    )
