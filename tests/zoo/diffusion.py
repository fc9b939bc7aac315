"""Denoisers and an image decoder from diffusers, with a short sampling loop."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from .case import CALL_SEED, INPUT_SEED, Call, Inputs, ZooCase, case, kwargs_only, seeded


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        norm_num_groups=8,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def _flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )


def _unet_inputs() -> Inputs:
    return kwargs_only(
        sample=torch.randn(2, 4, 16, 16),
        timestep=torch.tensor([10, 500]),
        encoder_hidden_states=torch.randn(2, 7, 32),
    )


def _dit_inputs() -> Inputs:
    return kwargs_only(
        hidden_states=torch.randn(2, 4, 8, 8),
        timestep=torch.tensor([10, 500]),
        class_labels=torch.tensor([1, 3]),
    )


def _flux_inputs() -> Inputs:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image_ids = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=-1)
    return kwargs_only(
        hidden_states=torch.randn(2, 16, 16),
        encoder_hidden_states=torch.randn(2, 5, 32),
        pooled_projections=torch.randn(2, 32),
        timestep=torch.tensor([0.1, 0.7]),
        img_ids=image_ids,
        txt_ids=torch.zeros(5, 3),
    )


def _picture() -> Inputs:
    return kwargs_only(sample=torch.randn(2, 3, 16, 16))


def _run_denoise(model: nn.Module, device: torch.device | str = "cpu") -> Any:
    """Four steps of DDIM: the forward is called in a loop that the model knows nothing of."""
    kwargs = seeded(_unet_inputs, INPUT_SEED)().to(device).kwargs
    torch.manual_seed(CALL_SEED)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(4)
    sample = kwargs.pop("sample")
    for step in scheduler.timesteps:
        noise = model(**kwargs | {"sample": sample, "timestep": step.to(device)}).sample
        sample = scheduler.step(noise, step, sample).prev_sample
    return sample


def _run_encode_and_decode(model: Any, device: torch.device | str = "cpu") -> Any:
    """The model's parts used by method, as pipelines do: never through its forward."""
    picture = seeded(_picture, INPUT_SEED)().to(device).kwargs["sample"]
    torch.manual_seed(CALL_SEED)
    latent = model.encode(picture).latent_dist.mode()
    return {"latent": latent, "decoded": model.decode(latent).sample}


CASES: tuple[ZooCase, ...] = (
    case("unet", _unet, _unet_inputs, Call("denoise", _run_denoise)),
    case("dit", _dit, _dit_inputs),
    case("flux", _flux, _flux_inputs),
    case("autoencoder", _autoencoder, _picture, Call("by_method", _run_encode_and_decode)),
)
