"""Vision models: a ViT, and ResNets with BatchNorm that is read (eval) or written (train)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from .case import Inputs, ZooCase, case, kwargs_only, passes_call


def _vit() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def _swin() -> SwinForImageClassification:
    config = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=32,
        depths=[2, 3],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
        drop_path_rate=0.0,
    )
    return SwinForImageClassification(config)


def _resnet() -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32],
        depths=[2, 2, 3],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            _scatter_statistics(module)
    return model


def _scatter_statistics(norm: nn.BatchNorm2d) -> None:
    """Statistics as a trained model would have them, not the zeros and ones of a new one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 1.5)


def _image() -> Inputs:
    return kwargs_only(pixel_values=torch.randn(2, 3, 32, 32))


CASES: tuple[ZooCase, ...] = (
    case("vit", _vit, _image),
    case("swin", _swin, _image),
    case("resnet", _resnet, _image),
    case("resnet_train", _resnet, _image, passes_call(_image, 3), train=True, stateful=True),
)
