"""Recipes: images in, classes, boxes, masks or depths out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tiny.nested import recipe
from tiny.recipe import Inputs, Recipe


def image(side: int) -> Callable[[nn.Module], Inputs]:
    """Two square images of this many pixels a side, for configs that state no image size."""

    def make(_model: nn.Module) -> Inputs:
        generator = torch.Generator().manual_seed(7)
        return {"pixel_values": torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)}

    return make


def image_and_noise(model: nn.Module) -> Inputs:
    """Which patches are hidden is drawn anew by each forward pass, unless the draws are given."""
    inputs = image(24)(model)
    return {
        **inputs,
        "noise": torch.rand(2, 9, generator=torch.Generator().manual_seed(8), dtype=torch.float64),
    }


def vision(name: str, model: str, /, side: int = 0, kind: str = "", **overrides: Any) -> Recipe:
    """A class that takes images: of the size its config states, or of ``side`` pixels."""
    return recipe(name, model, "vision", image(side) if side else None, kind=kind, **overrides)


SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [3, 6],
    "window_size": 4,
}
PYRAMID = {"depths": [1, 1], "hidden_sizes": [12, 20], "num_attention_heads": [2, 5], "num_encoder_blocks": 2,
           "patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 3]}  # fmt: skip
CVT: dict[str, Any] = {
    "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "kernel_qkv": [3, 3],
    "padding_kv": [1, 1], "stride_q": [1, 1], "padding_q": [1, 1], "stride_kv": [2, 2], "qkv_bias": [True, True],
    "qkv_projection_method": ["dw_bn", "dw_bn"],
}  # fmt: skip
STAGES = {"depths": [2, 1], "hidden_sizes": [12, 22], "embedding_size": 10}

RECIPES: tuple[Recipe, ...] = (
    # Vision transformers
    vision("beit", "BeitForImageClassification", use_relative_position_bias=True),
    vision("data2vec-vision", "Data2VecVisionForImageClassification"),
    vision("deit", "DeiTForImageClassification"),
    vision("dinov2", "Dinov2ForImageClassification", mlp_ratio=2),
    vision("dinov2-swiglu", "Dinov2ForImageClassification", kind="dinov2", mlp_ratio=2, use_swiglu_ffn=True),
    vision("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", mlp_ratio=2, num_register_tokens=3),
    vision("dinov3_vit", "DINOv3ViTModel", num_register_tokens=3),
    vision("ijepa", "IJepaForImageClassification"),
    vision("vit", "ViTForImageClassification"),
    vision("vit_msn", "ViTMSNForImageClassification"),
    recipe("vit_mae", "ViTMAEForPreTraining", "vision", image_and_noise, image_size=24, patch_size=8,
           decoder_hidden_size=36, decoder_num_attention_heads=4,
           decoder_num_hidden_layers=1, decoder_intermediate_size=42, mask_ratio=0.5),
    vision("vitdet", "VitDetModel", mlp_ratio=2, window_size=2, window_block_indices=[0],
           use_relative_position_embeddings=True),
    vision("clip_vision_model", "CLIPVisionModel"),
    vision("siglip_vision_model", "SiglipVisionModel"),
    vision("imagegpt", "ImageGPTForImageClassification"),
    # Windows and pyramids
    vision("swin", "SwinForImageClassification", **SWIN),
    vision("swinv2", "Swinv2ForImageClassification", **SWIN),
    vision("donut-swin", "DonutSwinModel", **SWIN),
    vision("swin2sr", "Swin2SRForImageSuperResolution", image_size=16, patch_size=1, embed_dim=12, depths=[1, 1],
           num_heads=[3, 2], window_size=4, upscale=2, img_range=1.0),
    vision("focalnet", "FocalNetForImageClassification", image_size=32, patch_size=4, embed_dim=12,
           hidden_sizes=[12, 24], depths=[1, 1], focal_levels=[2, 1], focal_windows=[3, 3]),
    vision("hiera", "HieraForImageClassification", image_size=[32, 32], patch_size=[7, 7], embed_dim=12, depths=[1, 2],
           num_heads=[1, 2], num_query_pool=1, masked_unit_size=[4, 4], masked_unit_attention=[True, False]),
    vision("pvt", "PvtForImageClassification", **PYRAMID, image_size=32, sequence_reduction_ratios=[2, 1]),
    vision("pvt_v2", "PvtV2ForImageClassification", **PYRAMID, image_size=32, sr_ratios=[2, 1]),
    vision("segformer", "SegformerForSemanticSegmentation", side=32, **PYRAMID, sr_ratios=[2, 1],
           decoder_hidden_size=26),
    vision("glpn", "GLPNForDepthEstimation", side=64, depths=[1, 1, 1, 1], hidden_sizes=[12, 20, 24, 28],
           num_attention_heads=[2, 5, 3, 4], sr_ratios=[8, 4, 2, 1], mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=26),
    vision("cvt", "CvtForImageClassification", side=32, embed_dim=[12, 20], num_heads=[2, 5], depth=[1, 2],
           mlp_ratio=[2.0, 2.0], **CVT, cls_token=[False, True],
           patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1]),
    vision("levit", "LevitForImageClassification", image_size=64, patch_size=16, hidden_sizes=[12, 20, 24],
           num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[6, 6, 6], mlp_ratio=[2, 2, 2],
           attention_ratio=[2, 2, 2],
           down_ops=[["Subsample", 6, 2, 4, 2, 2], ["Subsample", 6, 3, 4, 2, 2]]),
    vision("poolformer", "PoolFormerForImageClassification", side=32, depths=[1, 1], hidden_sizes=[12, 20],
           patch_sizes=[4, 2], strides=[4, 2], padding=[0, 0], num_encoder_blocks=2, mlp_ratio=2.0),
    vision("swiftformer", "SwiftFormerForImageClassification", image_size=64, depths=[2, 1], embed_dims=[12, 20],
           downsamples=[True, True], mlp_ratio=2),
    # Convolutions
    vision("bit", "BitForImageClassification", side=32, depths=[2, 1], hidden_sizes=[16, 24], embedding_size=8,
           num_groups=2),
    vision("convnext", "ConvNextForImageClassification", image_size=32, hidden_sizes=[10, 22], depths=[1, 1],
           num_stages=2, patch_size=4),
    vision("convnextv2", "ConvNextV2ForImageClassification", image_size=32, hidden_sizes=[10, 22], depths=[1, 1],
           num_stages=2, patch_size=4),
    vision("dinov3_convnext", "DINOv3ConvNextModel", image_size=32, hidden_sizes=[10, 22, 26, 30],
           depths=[1, 1, 1, 1]),
    vision("efficientnet", "EfficientNetForImageClassification", image_size=32, width_coefficient=1.0,
           depth_coefficient=1.0, depth_divisor=2, kernel_sizes=[3, 3], in_channels=[32, 10], out_channels=[10, 14],
           strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 3], hidden_dim=1280, dropout_rate=0.0),
    vision("mobilenet_v1", "MobileNetV1ForImageClassification", image_size=32, depth_multiplier=0.25),
    vision("mobilenet_v2", "MobileNetV2ForImageClassification", image_size=32, depth_multiplier=0.25),
    vision("mobilevit", "MobileViTForImageClassification", image_size=64, patch_size=2, hidden_sizes=[24, 36, 40],
           num_attention_heads=4, neck_hidden_sizes=[8, 12, 16, 20, 28, 32, 34]),
    vision("mobilevitv2", "MobileViTV2ForImageClassification", image_size=64, patch_size=2, width_multiplier=0.25,
           n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[64, 80, 96]),
    vision("pp_lcnet", "PPLCNetForImageClassification", side=64, scale=0.25),
    vision("regnet", "RegNetForImageClassification", side=32, **STAGES, groups_width=2),
    vision("resnet", "ResNetForImageClassification", side=32, **STAGES),
    vision("resnet-basic", "ResNetForImageClassification", kind="resnet", side=32, **STAGES, layer_type="basic"),
    vision("textnet", "TextNetForImageClassification", image_size=64, stem_out_channels=8,
           hidden_sizes=[8, 10, 12, 14, 18]),
    # Boxes, masks, depths
    vision("yolos", "YolosForObjectDetection", image_size=[24, 32], num_detection_tokens=6),
    vision("dpt", "DPTForDepthEstimation", image_size=32, patch_size=8, num_hidden_layers=4,
           backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[10, 14, 18, 22], fusion_hidden_size=26,
           is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5]),
)  # fmt: skip
