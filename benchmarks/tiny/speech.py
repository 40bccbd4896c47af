"""Recipes: sound in, text or classes out."""

from __future__ import annotations

from typing import Any

from tiny.nested import recipe
from tiny.recipe import Recipe

WAVE: dict[str, Any] = {
    "conv_dim": [10, 14, 18], "conv_stride": [3, 2, 2], "conv_kernel": [5, 3, 2], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 3, "classifier_proj_size": 26,
    "apply_spec_augment": False, "tdnn_dim": [20, 22], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1],
    "xvector_output_dim": 28,
}  # fmt: skip
"""Waveforms through strided convolutions, then a transformer."""

CONFORMER: dict[str, Any] = {
    "conv_depthwise_kernel_size": 5,
    "conv_kernel_size": 5,
    "apply_spec_augment": False,
}


def wave(name: str, model: str, /, **overrides: Any) -> Recipe:
    """A class of the wav2vec 2.0 kind."""
    return recipe(name, model, "speech", **{**WAVE, **overrides})


def speech(name: str, model: str, /, kind: str = "", **overrides: Any) -> Recipe:
    """Any other class."""
    return recipe(name, model, "speech", kind=kind, **overrides)


RECIPES: tuple[Recipe, ...] = (
    wave("data2vec-audio", "Data2VecAudioForCTC", conv_pos_kernel_size=5, num_conv_pos_embeddings=2),
    wave("hubert", "HubertForCTC"),
    wave("sew", "SEWForCTC", squeeze_factor=2),
    wave("sew-d", "SEWDForCTC", squeeze_factor=2, position_buckets=16, max_position_embeddings=64),
    wave("unispeech", "UniSpeechForCTC"),
    wave("unispeech-sat", "UniSpeechSatForCTC"),
    wave("wav2vec2", "Wav2Vec2ForCTC"),
    wave("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", **CONFORMER),
    wave("wavlm", "WavLMForCTC", num_buckets=16, max_bucket_distance=32),
    speech("wav2vec2-bert", "Wav2Vec2BertForCTC", feature_projection_input_dim=20, **CONFORMER),
    speech("audio-spectrogram-transformer", "ASTForAudioClassification", max_length=24, num_mel_bins=16, patch_size=8,
           frequency_stride=8, time_stride=8),
    speech("whisper", "WhisperForConditionalGeneration", pad_token_id=0, decoder_start_token_id=1,
           begin_suppress_tokens=None),
    speech("whisper-classes", "WhisperForAudioClassification", kind="whisper", classifier_proj_size=26,
           pad_token_id=0, decoder_start_token_id=1, begin_suppress_tokens=None),
    speech("speech_to_text", "Speech2TextForConditionalGeneration", num_conv_layers=2, conv_kernel_sizes=[3, 3],
           conv_channels=26, input_feat_per_channel=20),
    speech("speecht5", "SpeechT5ForSpeechToText", **WAVE, max_speech_positions=64, max_text_positions=62,
           encoder_max_relative_position=16),
    speech("moonshine", "MoonshineForConditionalGeneration", encoder_num_hidden_layers=2, decoder_num_hidden_layers=2),
    speech("seamless_m4t-speech", "SeamlessM4TForSpeechToText", kind="seamless_m4t", speech_encoder_layers=2,
           speech_encoder_attention_heads=4, speech_encoder_intermediate_size=34, feature_projection_input_dim=20,
           num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **CONFORMER),
    speech("seamless_m4t_v2-speech", "SeamlessM4Tv2ForSpeechToText", kind="seamless_m4t_v2", speech_encoder_layers=2,
           speech_encoder_attention_heads=4, speech_encoder_intermediate_size=34, feature_projection_input_dim=20,
           **CONFORMER),
    speech("pop2piano", "Pop2PianoForConditionalGeneration"),
    speech("parakeet_ctc", "ParakeetForCTC", encoder_config={"num_mel_bins": 24, "conv_kernel_size": 5}),
    speech("lasr_ctc", "LasrForCTC"),
)  # fmt: skip
