"""The zoo's models from `transformers`, unchanged: its classes, small configurations, no download.

Knows torch and transformers. Weights are drawn by ``tools.zoo.randomise``.
"""

from __future__ import annotations

import importlib
from typing import Any

# Untyped on purpose: its configurations take more keywords than their signatures say.
transformers: Any = importlib.import_module("transformers")

CLASSES = 10
PIXEL_CLASSES = 5


def _resnet(layer_type: str, depths: list[int]) -> Any:
    wide = 4 if layer_type == "bottleneck" else 1
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8 * wide, 12 * wide, 16 * wide, 24 * wide],
            depths=depths,
            layer_type=layer_type,
            num_labels=CLASSES,
        )
    )


def resnet18() -> Any:
    """ResNet-18's blocks, narrow."""
    return _resnet("basic", [2, 2, 2, 2])


def resnet34() -> Any:
    """ResNet-34's blocks, narrow."""
    return _resnet("basic", [3, 4, 6, 3])


def resnet50() -> Any:
    """ResNet-50's bottleneck blocks, narrow."""
    return _resnet("bottleneck", [3, 4, 6, 3])


def mobilenet_v2() -> Any:
    """MobileNetV2 at a quarter of its width."""
    config = transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=CLASSES)
    return transformers.MobileNetV2ForImageClassification(config)


def efficientnet() -> Any:
    """EfficientNet: B0's blocks (kernels 3 and 5, squeeze and excitation) at a quarter of its width, one per stage."""
    config = transformers.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        hidden_dim=320,
        num_labels=CLASSES,
    )
    return transformers.EfficientNetForImageClassification(config)


def vit() -> Any:
    """A vision transformer of three layers."""
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def swin() -> Any:
    """Swin: two stages of two layers; windows of 4, the second layer of the first stage with shifted ones."""
    return transformers.SwinForImageClassification(_swin_config())


def _swin_config(**more: object) -> Any:
    return transformers.SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
        **more,
    )


def convnext() -> Any:
    """ConvNeXt: kernels of 7, LayerNorm over channels, layer scale."""
    config = transformers.ConvNextConfig(
        image_size=32, hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 2, 1], num_labels=CLASSES
    )
    return transformers.ConvNextForImageClassification(config)


def segformer() -> Any:
    """SegFormer: attention over reduced sequences, an MLP head over four scales. Output at a quarter of the extent."""
    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 12, 16, 24],
        num_attention_heads=[1, 1, 2, 3],
        sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        num_labels=PIXEL_CLASSES,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def upernet_convnext() -> Any:
    """UPerNet (pyramid pooling and a feature pyramid) on ConvNeXt."""
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return _upernet(backbone)


def upernet_swin() -> Any:
    """UPerNet on Swin, two stages."""
    return _upernet(_swin_config(out_features=["stage1", "stage2"]))


def _upernet(backbone: object) -> Any:
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=12,
        pool_scales=[1, 2, 3, 6],
        use_auxiliary_head=False,
        num_labels=PIXEL_CLASSES,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mobilenet_v2_deeplab() -> Any:
    """MobileNetV2 with the head of DeepLabV3+."""
    config = transformers.MobileNetV2Config(
        image_size=48, depth_multiplier=0.25, output_stride=16, finegrained_output=True, num_labels=PIXEL_CLASSES
    )
    return transformers.MobileNetV2ForSemanticSegmentation(config)


def mobilevit_deeplab() -> Any:
    """MobileViT with the head of DeepLabV3."""
    config = transformers.MobileViTConfig(
        image_size=48,
        hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 16, 16, 20, 32],
        num_attention_heads=2,
        aspp_out_channels=12,
        num_labels=PIXEL_CLASSES,
    )
    return transformers.MobileViTForSemanticSegmentation(config)


def dpt() -> Any:
    """DPT: a vision transformer read at four depths and fused from coarse to fine."""
    config = transformers.DPTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 12, 12],
        fusion_hidden_size=8,
        use_auxiliary_head=False,
        num_labels=PIXEL_CLASSES,
    )
    return transformers.DPTForSemanticSegmentation(config)
