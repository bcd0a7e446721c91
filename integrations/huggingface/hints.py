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
    "blip-2": {"image_token_index": 120},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "depth_pro": {"patch_size": 32},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "efficientloftr": {"out_features": [8, 8, 16, 32]},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, **{f"<|visual token {n:06d}|>": 7 + n for n in range(8)}}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "fun_asr_nano_adaptor": {"intermediate_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"index_topk": 4, "index_kpool": 2},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[1, 0]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 4},
    "hrm_text": {"num_layers_per_stack": None},
    "lara_mini": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "lw_detr_vit": {"num_windows": 4},
    "mimi": {"upsample_groups": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dbrx_attention": {"rope_theta": 1e4},
    "inkling_vision_model": {"hidden_size": 32, "text_hidden_size": 32, "patch_size": 8},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    "sapiens2_head": {"upsample_out_channels": [8, 8], "conv_out_channels": [8], "scale_conv_out_channels": [8], "scale_final_hidden_sizes": [8]},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_encoder": {"dropout_rate": 0.0},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "vibevoice_acoustic_tokenizer": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8},
    "vibevoice_acoustic_tokenizer_encoder": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8},
    "vibevoice_acoustic_tokenizer_decoder": {"downsampling_ratios": [2, 2], "depths": [1, 1, 1], "num_filters": 8},
    "wavtokenizer": {"codebook_dim": 32, "decoder_attention_num_groups": 8},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": [*["linear_attention", "linear_attention", "hybrid"] * 2], "attention_hidden_size": 64, "attention_head_dim": 16},
}

#: Model class -> arguments of its configuration, inner ones by the name of the inner configuration.
OF_CLASSES: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "Blip2ForImageTextRetrieval": {"qformer_config": {"use_qformer_text_input": True}},
    "Blip2TextModelWithProjection": {"qformer_config": {"use_qformer_text_input": True}},
    "BridgeTowerForContrastiveLearning": {"logit_scale_init_value": 2.6},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "T5ForSequenceClassification": {"decoder_start_token_id": 0},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
}
