"""Sizes of tiny configurations that hang together in ways that no name tells: by model type, beside what `tiny` does by names."""

from __future__ import annotations

from typing import Any

_ALL_LAYERS = {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}

#: model_type -> arguments of its configuration, at the widths that `tiny` gives by names (32 wide, 4 heads of 8).
HINTS: dict[str, dict[str, Any]] = {
    "bridgetower": {"hidden_size": 128, "contrastive_hidden_size": 32},
    "bridgetower_text_model": {"hidden_size": 128},
    "bridgetower_vision_model": {"hidden_size": 128},
    "bros": {"hidden_size": 128},
    "chameleon": {"vocabulary_map": {"<image>": 5, **{f"IMGIMGBS{c}Z": 6 + n for n, c in enumerate("ABCD")}}},
    "cohere_compass_text": {"rope_parameters": _ALL_LAYERS},
    "cvt": {"depth": [1, 2, 3]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}},
    "glm4v_moe_text": {"head_dim": 16},
    "lilt": {"hidden_size": 48},
    "llama4_vision_model": {"intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    "owlvit_text_model": {"max_position_embeddings": 32},
    "owlv2_text_model": {"max_position_embeddings": 32},
    "perceiver": {"num_self_attention_heads": 1, "num_cross_attention_heads": 1},
    "pvt": {"num_encoder_blocks": 4},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "sam_vision_model": {"num_pos_feats": 16},
    "sam_hq_vision_model": {"num_pos_feats": 16},
    "step3p7_text": {"sliding_window": 8},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": [*["linear_attention", "linear_attention", "hybrid"] * 2]},
}
