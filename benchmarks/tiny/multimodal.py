"""Recipes: images or sound beside text."""

from __future__ import annotations

from typing import Any

from tiny.nested import recipe
from tiny.recipe import Recipe


def pair(name: str, model: str, /, kind: str = "", **overrides: Any) -> Recipe:
    """A class of several parts; the inputs are llmprune's own."""
    return recipe(name, model, "multimodal", kind=kind, **overrides)


JOINT: dict[str, Any] = {
    "text_config": {"projection_dim": 22}, "vision_config": {"projection_dim": 22}, "projection_dim": 22
}  # fmt: skip
"""Two towers whose vectors are compared."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
"""Rotary pairs shared out over time, height and width."""

QFORMER: dict[str, Any] = {
    "vision_config": {"image_size": 24, "patch_size": 8},
    "qformer_config": {"hidden_size": 44, "num_attention_heads": 4, "intermediate_size": 38, "encoder_hidden_size": 40,
                       "cross_attention_frequency": 1},
    "num_query_tokens": 5, "image_token_index": 99, "image_text_hidden_size": 26,
}  # fmt: skip
"""Queries that read an image and are read by a language model."""

GRID = [[24, 48]]

T5GEMMA2: dict[str, Any] = {"text_config": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3,
                                            "head_dim": 8, "intermediate_size": 56}, "mm_tokens_per_image": 4,
                            "vision_config": {"image_size": 32}}  # fmt: skip

RECIPES: tuple[Recipe, ...] = (
    # Two towers
    pair("clip", "CLIPModel", **JOINT),
    pair("altclip", "AltCLIPModel", text_config={"project_dim": 22}, vision_config={"projection_dim": 22},
         projection_dim=22),
    pair("chinese_clip", "ChineseCLIPModel", vision_config={"projection_dim": 22}, projection_dim=22),
    pair("clipseg", "CLIPSegModel", **JOINT),
    pair("metaclip_2", "MetaClip2Model", **JOINT),
    pair("siglip", "SiglipModel", text_config={"projection_size": 40}),
    pair("siglip2", "Siglip2Model", text_config={"projection_size": 40}, vision_config={"num_patches": 16}),
    pair("blip-itm", "BlipModel", kind="blip", text_config={"encoder_hidden_size": 40, "is_decoder": False,
                                                            "projection_dim": 22}, projection_dim=22),
    pair("flava", "FlavaModel", multimodal_config={"hidden_size": 44, "num_attention_heads": 4}),
    # An image read by a language model: projected into its embeddings
    pair("llava", "LlavaForConditionalGeneration", vision_feature_layer=-1),
    pair("llava_next", "LlavaNextForConditionalGeneration", image_grid_pinpoints=GRID, vision_feature_layer=-1),
    pair("llava_next_video", "LlavaNextVideoForConditionalGeneration", image_grid_pinpoints=GRID,
         vision_feature_layer=-1),
    pair("llava_onevision", "LlavaOnevisionForConditionalGeneration", image_grid_pinpoints=GRID),
    pair("vipllava", "VipLlavaForConditionalGeneration", vision_feature_layers=[-1, -2]),
    pair("paligemma", "PaliGemmaForConditionalGeneration", projection_dim=48, hidden_size=48,
         vision_config={"projection_dim": 48, "vision_use_head": False}),
    pair("gemma3", "Gemma3ForConditionalGeneration", mm_tokens_per_image=4, vision_config={"image_size": 32},
         text_config={"query_pre_attn_scalar": 8}),
    pair("internvl", "InternVLForConditionalGeneration", vision_config={"image_size": [32, 32]}),
    pair("mistral3", "Mistral3ForConditionalGeneration", text_config={"head_dim": 8}),
    pair("aya_vision", "AyaVisionForConditionalGeneration", vision_config={"image_size": 32, "vision_use_head": False}),
    pair("cohere2_vision", "Cohere2VisionForConditionalGeneration", alignment_intermediate_size=160,
         vision_config={"image_size": 32}),
    pair("got_ocr2", "GotOcr2ForConditionalGeneration"),
    pair("idefics2", "Idefics2ForConditionalGeneration", perceiver_config={
        "hidden_size": 48, "resampler_n_latents": 5, "resampler_depth": 1, "resampler_n_heads": 4,
        "resampler_head_dim": 10, "num_key_value_heads": 2}),
    pair("idefics3", "Idefics3ForConditionalGeneration", vision_config={"image_size": 32}),
    pair("smolvlm", "SmolVLMForConditionalGeneration", vision_config={"image_size": 32}),
    pair("llama4", "Llama4ForConditionalGeneration", vision_config={
        "image_size": 32, "vision_output_dim": 36, "projector_input_dim": 36, "projector_output_dim": 36,
        "intermediate_size": 160},
         text_config={"head_dim": 8, "intermediate_size_mlp": 58, "num_local_experts": 5, "moe_layers": [1]}),
    pair("janus", "JanusForConditionalGeneration", vision_config={"projection_dim": 48},
         vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "embed_dim": 8, "num_embeddings": 17}),
    pair("deepseek_vl", "DeepseekVLForConditionalGeneration"),
    pair("lfm2_vl", "Lfm2VlForConditionalGeneration"),
    pair("qwen2_vl", "Qwen2VLForConditionalGeneration", text_config={"rope_parameters": MROPE}, vision_config={
        "hidden_size": 48, "mlp_ratio": 2, "patch_size": 4}),
    pair("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", text_config={"rope_parameters": MROPE}, vision_config={
        "out_hidden_size": 48, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}),
    pair("qwen3_vl", "Qwen3VLForConditionalGeneration", text_config={"rope_parameters": MROPE}, vision_config={
        "out_hidden_size": 48, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    pair("glm4v", "Glm4vForConditionalGeneration", vision_config={"out_hidden_size": 48, "image_size": 32},
         text_config={"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}),
    pair("fuyu", "FuyuForCausalLM"),
    # Read through queries or cross attention
    pair("blip", "BlipForConditionalGeneration", text_config={"encoder_hidden_size": 40}),
    pair("blip-2", "Blip2ForConditionalGeneration", **QFORMER),
    pair("instructblip", "InstructBlipForConditionalGeneration", **QFORMER),
    pair("git", "GitForCausalLM"),
    pair("idefics", "IdeficsForVisionText2Text", additional_vocab_size=0, cross_layer_interval=1, use_resampler=True,
         qk_layer_norms=False, perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1,
                                                 "resampler_n_heads": 3, "resampler_head_dim": 10}),
    pair("idefics-no-resampler", "IdeficsForVisionText2Text", kind="idefics", additional_vocab_size=2,
         cross_layer_interval=2, use_resampler=False, qk_layer_norms=True),
    pair("mllama", "MllamaForConditionalGeneration",
         text_config={"cross_attention_layers": [1], "num_hidden_layers": 3},
         vision_config={"attention_heads": 5, "max_num_tiles": 2, "num_global_layers": 1,
                        "intermediate_layers_indices": [0, 1], "vision_output_dim": 120,
                        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}),
    pair("t5gemma2", "T5Gemma2ForConditionalGeneration", encoder=T5GEMMA2),
    pair("vision-encoder-decoder", "VisionEncoderDecoderModel", decoder={"is_decoder": True,
                                                                          "add_cross_attention": True}),
    pair("vilt", "ViltForQuestionAnswering"),
    # Sound read by a language model
    pair("qwen2_audio", "Qwen2AudioForConditionalGeneration", audio_config={"d_model": 40,
                                                                           "encoder_attention_heads": 5}),
    pair("voxtral", "VoxtralForConditionalGeneration", audio_token_id=99,
         audio_config={"intermediate_size": 160, "max_source_positions": 32}),
    pair("audioflamingo3", "AudioFlamingo3ForConditionalGeneration"),
)  # fmt: skip
