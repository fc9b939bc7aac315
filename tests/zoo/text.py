"""Language models: decoders, encoders, encoder-decoders, mixtures of experts, state spaces."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from .case import VOCAB, Inputs, ZooCase, case, generate_calls, kwargs_only, token_ids

HIDDEN = 64


def llama_config(**changes: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaConfig(**(sizes | changes))


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config())


def _llama_bfloat16() -> LlamaForCausalLM:
    config = llama_config(num_hidden_layers=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=HIDDEN,
        n_layer=4,
        n_head=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def _mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=None,
    )
    return MixtralForCausalLM(config)


def _mamba() -> MambaForCausalLM:
    config = MambaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        state_size=8,
        num_hidden_layers=4,
        conv_kernel=4,
        expand=2,
        time_step_rank=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return MambaForCausalLM(config)


def _bert() -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    return BertForMaskedLM(config)


def _albert() -> AlbertForMaskedLM:
    """One group of weights, visited by all six layers."""
    config = AlbertConfig(
        vocab_size=VOCAB,
        embedding_size=48,
        hidden_size=96,
        num_hidden_layers=6,
        num_hidden_groups=1,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
    )
    return AlbertForMaskedLM(config)


def _t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=128,
        num_layers=5,
        num_heads=4,
        relative_attention_num_buckets=8,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _bart() -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def _left_padded() -> Inputs:
    """Two rows, the second shorter and padded on the left, as ``generate`` wants it."""
    ids, mask = token_ids(), torch.ones(2, 9, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return kwargs_only(input_ids=ids, attention_mask=mask)


def _routed() -> Inputs:
    args, kwargs = _left_padded()
    return Inputs(args, kwargs | {"output_router_logits": True})


def _right_padded() -> Inputs:
    ids, mask = token_ids(), torch.ones(2, 9, dtype=torch.long)
    ids[1, -3:], mask[1, -3:] = 0, 0
    return kwargs_only(input_ids=ids, attention_mask=mask)


def _source_and_target() -> Inputs:
    args, kwargs = _right_padded()
    return Inputs(args, kwargs | {"decoder_input_ids": token_ids(2, 5)})


CASES: tuple[ZooCase, ...] = (
    case("llama", _llama, _left_padded, *generate_calls(_left_padded)),
    case("llama_bfloat16", _llama_bfloat16, _left_padded, *generate_calls(_left_padded)),
    case("gpt2", _gpt2, _left_padded, *generate_calls(_left_padded)),
    case("mixtral", _mixtral, _routed, *generate_calls(_left_padded)),
    case("mamba", _mamba, _left_padded, *generate_calls(_left_padded)),
    case("bert", _bert, _right_padded),
    case("albert", _albert, _right_padded),
    case("t5", _t5, _source_and_target, *generate_calls(_right_padded)),
    case("bart", _bart, _source_and_target, *generate_calls(_right_padded)),
)
