"""A tiny random encoder of sound."""

import pytest

from vidistill.conditioning.audio import AudioConfig


def tiny_wav2vec2(folder, width=16):
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_kernel=(10, 8),
        conv_stride=(20, 16),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    return AudioConfig("wav2vec2", block=4, context=4, lookahead=2, source=str(folder))
