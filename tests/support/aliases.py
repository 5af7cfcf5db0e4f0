"""The smallest config of each model type that has a declaration of another type's family, one row a type.

Heads can move in every row: an error in a coupling changes the output only if its units move. Rows with key/value heads
are also run with grouped queries, where heads stay.
"""

from types import SimpleNamespace

import pytest
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from support.inside import is_too_old
from support.models import BERT, DEEPSEEK, GPT2, IDS, IMAGE, MOE, ODD, SHAPE, T5, TOWERS, WHISPER, randomized

HEADS = {**SHAPE, **IDS, "num_key_value_heads": 4}
BIASED = {**HEADS, "attention_bias": True, "mlp_bias": True}
EXPERTS = {**HEADS, **MOE, "num_local_experts": 4}
LATENT = {**SHAPE, **DEEPSEEK, "q_lora_rank": 9}  # low-rank queries, keys and values
ENCODER = {**BERT, **IDS}
IMAGES = {**ODD, **IMAGE, "num_labels": 5}
TRANSLATION = {**WHISPER, **IDS, "max_position_embeddings": 32}

SHORT = {"num_hidden_layers": 2}
SHARED = {**EXPERTS, **SHORT, "n_routed_experts": 4, "n_shared_experts": 2, "num_shared_experts": 2, "head_dim": 10}
SHARED_ATTENTION_BIAS = {**EXPERTS, **SHORT, "attention_bias": True}
DENSE_FIRST = {**SHARED, "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]}
SPARSE = {
    **LATENT,
    **SHORT,
    "mlp_layer_types": ["dense", "sparse"],
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
}

LINEAR = {
    **SHORT,
    "head_dim": 10,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 3,
}
HYBRID = {
    **HEADS,
    **SHORT,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
    "mamba_dt_rank": 4,
}
PARAKEET = {
    **HEADS,
    **SHORT,
    "num_mel_bins": 16,
    "subsampling_factor": 4,
    "subsampling_conv_channels": 8,
    "conv_kernel_size": 3,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "dropout_positions": 0.0,
}
MAMBA = {**SHAPE, **IDS, **SHORT, "state_size": 8, "expand": 2, "time_step_rank": 4}
ENCODER_2 = {**ENCODER, **SHORT}
PICTURE = {**IMAGES, **SHORT}
BART = {
    **TRANSLATION,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "local_attention": 4}
SOUND = {
    **ENCODER_2,
    "conv_dim": [12, 12],
    "conv_kernel": [4, 4],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "apply_spec_augment": False,
}

# model type → options of its config
ROWS: dict[str, dict] = {
    # bert
    "bert-generation": {**ENCODER, "is_decoder": True, "add_cross_attention": True},
    "camembert": ENCODER,
    "data2vec-text": ENCODER,
    "electra": {**ENCODER, "embedding_size": 12},
    "ernie": ENCODER,
    "layoutlm": {**ENCODER, "max_2d_position_embeddings": 16},
    "megatron-bert": ENCODER,
    "rembert": {**ENCODER, "input_embedding_size": 12, "output_embedding_size": 16, "classifier_dropout_prob": 0.0},
    "roberta-prelayernorm": ENCODER,
    "roc_bert": {**ENCODER, "pronunciation_vocab_size": 11, "shape_vocab_size": 13},
    "roformer": {**ENCODER, "hidden_size": 32, "embedding_size": 12, "rotary_value": True},
    "tapas": ENCODER,
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    # clip
    "metaclip_2": {**TOWERS, "text_config": {**TOWERS["text_config"], "eos_token_id": 47}},  # 47 is in both sequences
    "tipsv2_text_model": {**SHAPE, **IDS, "max_position_embeddings": 16},
    "siglip": {**TOWERS, "text_config": {**TOWERS["text_config"], "projection_size": 30}},
    # deepseek
    "axk1": LATENT,
    "glm4_moe_lite": LATENT,
    "minicpm3": {**LATENT, "attention_bias": True},
    "mistral4": LATENT,
    "sarvam_mla": LATENT,
    "youtu": LATENT,
    "deepseek_v32": SPARSE,
    "hy_v4": {**SPARSE, "head_dim": 4, "indexer_types": ["full", "shared"]},
    "glm_moe_dsa": {**SPARSE, "indexer_types": ["full", "shared"]},
    # gpt2
    "imagegpt": GPT2,
    "openai-gpt": GPT2,
    # llama
    "cwm": HEADS,
    "ernie4_5": {**HEADS, "use_bias": True},
    "eurobert": BIASED,
    "exaone": BIASED,
    "exaone4": {**HEADS, "sliding_window": 4},
    "helium": {**BIASED, "head_dim": 6},
    "hunyuan_v1_dense": {**BIASED, "head_dim": 10},
    "hyperclovax": BIASED,
    "internlm3": BIASED,
    "iquestcoder": BIASED,
    "ministral": {**HEADS, "head_dim": 10, "sliding_window": 4},
    "ministral3": {**HEADS, "head_dim": 10},
    "nomic_bert": ENCODER,
    "ultrabert": {**BIASED, "sliding_window": 4},
    "molmo2_text": {**HEADS, **SHORT},
    "granite_swa": {**BIASED, **SHORT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gte": {**ENCODER, **SHORT},
    "emu3_text_model": {**BIASED, **SHORT},
    "olmo": {**BIASED, **SHORT, "clip_qkv": 0.3},
    "seed_oss": {**BIASED, **SHORT, "head_dim": 10},
    "vaultgemma": {**BIASED, "head_dim": 10, "sliding_window": 4},
    # gpt_oss and jetmoe
    "aria_text": {**BIASED, **SHORT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2, "head_dim": 6},
    "gpt_oss": {**EXPERTS, **SHORT, "head_dim": 8, "sliding_window": 4},
    "jetmoe": {
        **SHAPE,
        **IDS,
        **SHORT,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "kv_channels": 6,
    },
    "llama4_text": {
        **EXPERTS,
        **SHORT,
        "head_dim": 8,
        "intermediate_size_mlp": 41,
        "interleave_moe_layer_step": 2,
        "moe_layers": [1],
    },
    "muse_spark_text": {**DENSE_FIRST, **LOCAL},
    "nemotron_h": {
        **SHARED,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "n_groups": 1,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 21,
    },
    "openai_privacy_filter": {**EXPERTS, **SHORT, "head_dim": 8, "sliding_window": 4},
    # mixtral
    "mellum": {**EXPERTS, "head_dim": 10, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    "phimoe": {**EXPERTS, "attention_bias": True},
    "afmoe": {
        **SHARED,
        "num_dense_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
    },
    "beam": {**DENSE_FIRST, "num_group": 2, "topk_group": 1, "n_group": 2},
    "cohere2_moe": SHARED,
    "flex_olmo": SHARED_ATTENTION_BIAS,
    "laguna": {**DENSE_FIRST, "shared_expert_intermediate_size": 21, "num_attention_heads_per_layer": [4, 4]},
    "mimo_v2_flash": {
        **DENSE_FIRST,
        "num_key_value_heads": 2,
        "v_head_dim": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "minimax_m3_vl_text": {**DENSE_FIRST, "shared_intermediate_size": 21, "dense_intermediate_size": 52},
    "olmoe": SHARED_ATTENTION_BIAS,
    "dots1": {**DENSE_FIRST, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {
        **SHARED,
        "use_bias": True,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**DENSE_FIRST, "n_group": 2, "topk_group": 1},
    "flint": {**DENSE_FIRST, "shared_expert_intermediate_size": 21},
    "glm4_moe": {**DENSE_FIRST, "n_group": 2, "topk_group": 1, "use_qk_norm": True},
    "hunyuan_v1_moe": {**SHARED, "moe_topk": 2},
    "hy_v3": DENSE_FIRST,
    "kolibri1": {**DENSE_FIRST, "shared_expert_intermediate_size": 21},
    "minimax_m2": SHARED,
    "sarvam_moe": {**DENSE_FIRST, "n_group": 2, "topk_group": 1},
    "solar_open": SHARED,
    # conformer
    "lasr_ctc": {"encoder_config": PARAKEET, "vocab_size": 67},
    "parakeet_ctc": {"encoder_config": PARAKEET, "vocab_size": 67, "pad_token_id": 0},
    "wav2vec2-bert": {**SOUND, "feature_projection_input_dim": 10, "position_embeddings_type": "relative"},
    "wav2vec2-conformer": {**SOUND, "position_embeddings_type": "relative"},
    # diffllama
    "diffllama": {**HEADS, **SHORT},
    "doge": {**HEADS, **SHORT},
    # xlm
    **dict.fromkeys(
        ("flaubert", "xlm"),
        {
            **IDS,
            "emb_dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 67,
            "n_words": 67,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "max_position_embeddings": 32,
        },
    ),
    # codegen, falcon, gpt_bigcode
    "codegen": {**GPT2, "n_embd": 32, "n_layer": 2, "rotary_dim": 2, "n_head": 8},
    "falcon": {
        **SHAPE,
        **IDS,
        **SHORT,
        "ffn_hidden_size": 52,
        "alibi": False,
        "bias": True,
        "parallel_attn": False,
        "multi_query": False,
    },
    "gpt_bigcode": {**GPT2, "n_layer": 2, "multi_query": False},
    # hybrid
    "bailing_hybrid": {
        **LATENT,
        **LINEAR,
        "q_lora_rank": None,
        "layer_group_size": 2,
        "num_experts": 4,
        "num_shared_experts": 1,
        "head_dim": 6,
    },
    "bamba": {**HYBRID, "attn_layer_indices": [1]},
    "falcon_h1": {
        **HYBRID,
        "mlp_multipliers": [0.7, 1.3],
        "ssm_multipliers": [0.5, 0.7, 0.9, 1.1, 1.3],
        "mamba_d_ssm": 48,
    },
    "falcon_mamba": MAMBA,
    "granitemoe": {**EXPERTS, **SHORT, "attention_bias": True},
    "granitemoe_swa": {**EXPERTS, **SHORT, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoehybrid": {
        **HYBRID,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 21,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "granitemoeshared": {**EXPERTS, **SHORT, "shared_intermediate_size": 21},
    "jamba": {
        **EXPERTS,
        **HYBRID,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**LATENT, **LINEAR, "q_lora_rank": None, "linear_attn_config": {"head_dim": 6, "num_heads": 4}},
    "lara_mini": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 21},
    "lfm2": {
        **HEADS,
        **SHORT,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "lfm3": {
        **HEADS,
        **SHORT,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
        "conv_bias": True,
    },
    "lfm2_moe": {
        **EXPERTS,
        **SHORT,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 1,
        "conv_bias": True,
    },
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "num_heads": 4, "head_dim": 12, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "minimax": {**EXPERTS, **SHORT, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    "olmo_hybrid": {**HEADS, **LINEAR},
    "qwen3_5_moe_text": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 21},
    "qwen3_5_text": {**HEADS, **LINEAR},
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 21},
    "recurrent_gemma": {
        **HEADS,
        "lru_width": 24,
        "block_types": ["recurrent", "attention"],
        "attention_window_size": 4,
        "num_hidden_layers": 2,
    },
    # named
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"), BART),
    "trocr": {**BART, "cross_attention_hidden_size": 24, "decoder_layers": 2},
    "seamless_m4t": {**BART, "hidden_size": 24},
    "seamless_m4t_v2": {**BART, "hidden_size": 24},
    "moonshine": {**HEADS, **SHORT},
    "biogpt": {**ENCODER, **SHORT},
    "xglm": {**BART, "num_layers": 2, "attention_heads": 4, "ffn_dim": 41},
    "big_bird": {**ENCODER, **SHORT, "attention_type": "original_full"},
    "bros": {**ENCODER_2, "hidden_size": 64, "dim_bbox": 4},
    "esm": {**ENCODER_2, "mask_token_id": 3},
    "layoutlmv3": {
        **ENCODER_2,
        "visual_embed": False,
        "max_2d_position_embeddings": 16,
        "coordinate_size": 4,
        "shape_size": 4,
        "has_relative_attention_bias": True,
        "rel_pos_bins": 8,
        "max_rel_pos": 8,
    },
    "longformer": {**ENCODER_2, "attention_window": 4, "max_position_embeddings": 32},
    "luke": {**ENCODER_2, "entity_vocab_size": 11, "entity_emb_size": 12, "max_entity_position_embeddings": 16},
    "markuplm": ENCODER_2,
    "nystromformer": {**ENCODER_2, "segment_means_seq_len": 9, "num_landmarks": 3},
    "splinter": ENCODER_2,
    "visual_bert": {**ENCODER_2, "visual_embedding_dim": 12},
    "xmod": {**ENCODER_2, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": {**ENCODER_2, "use_expectation": True},
    "git": {**ENCODER_2, "vision_config": {**ODD, **IMAGE, "num_hidden_layers": 1}},
    "deberta-v2": {
        **ENCODER_2,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 4,
        "share_att_key": False,
        "max_relative_positions": 8,
    },
    "mpnet": ENCODER_2,
    "distilbert": {
        **IDS,
        "dim": 24,
        "hidden_dim": 41,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 67,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "jina_embeddings_v3": ENCODER_2,
    "ctrl": {**GPT2, "n_layer": 2, "dff": 41},
    "gpt_neo": {
        **SHAPE,
        **IDS,
        **SHORT,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "apertus": {**BIASED, **SHORT},
    "arcee": {**BIASED, **SHORT},
    "jais2": {**BIASED, **SHORT},
    "nemotron": {**BIASED, **SHORT, "head_dim": 8, "partial_rotary_factor": 0.5},
    "nanochat": {**HEADS, **SHORT},
    "glm": {**HEADS, **SHORT, "head_dim": 8, "attention_bias": True},
    "glm4": {**HEADS, **SHORT, "head_dim": 8, "attention_bias": True},
    "bloom": {**SHAPE, **IDS, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_neox_japanese": {
        **SHAPE,
        **IDS,
        **SHORT,
        "intermediate_multiple_size": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "persimmon": {**SHAPE, "hidden_size": 32, **IDS, **SHORT, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mpt": {
        **IDS,
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": 67,
        "expansion_ratio": 2,
        "max_seq_len": 32,
    },
    "albert": {**ENCODER, "embedding_size": 12, "num_hidden_groups": 2},
    "bitnet": {**HEADS, **SHORT},
    "modernbert": {**ENCODER_2, **LOCAL},
    "modernbert-decoder": {**ENCODER_2, **LOCAL},
    "audio-spectrogram-transformer": {
        **ENCODER_2,
        "num_mel_bins": 8,
        "max_length": 16,
        "patch_size": 4,
        "frequency_stride": 4,
        "time_stride": 4,
    },
    **dict.fromkeys(("pixio", "vit_mae", "beit", "dinov2", "dinov2_with_registers", "data2vec-vision"), PICTURE),
    "dinov3_vit": {**PICTURE, "hidden_size": 36},
    "beit": {**PICTURE, "use_relative_position_bias": True},
    "yolos": {**PICTURE, "image_size": [12, 12], "num_detection_tokens": 3},
    "vivit": {**PICTURE, "num_frames": 2, "tubelet_size": [2, 4, 4]},
    "videomae": {**PICTURE, "num_frames": 2},
    **dict.fromkeys(
        ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2", "wavlm", "sew-d"), SOUND
    ),
    "apertus1p5_text": {**BIASED, **SHORT},
    "bigbird_pegasus": {**BART, "attention_type": "original_full"},
    "convnext": {"num_labels": 5, "hidden_sizes": [12, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "convnextv2": {"num_labels": 5, "hidden_sizes": [12, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
    "deberta": {**ENCODER_2, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    **dict.fromkeys(
        ("donut-swin", "swin", "swinv2"),
        {
            "num_labels": 5,
            "embed_dim": 12,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 2,
            "image_size": 16,
            "patch_size": 4,
            "mlp_ratio": 2.0,
        },
    ),
    "fnet": {**ENCODER_2, "type_vocab_size": 2},
    "funnel": {
        **IDS,
        "d_model": 24,
        "n_head": 4,
        "d_head": 6,
        "d_inner": 41,
        "vocab_size": 67,
        "block_sizes": [1, 1],
        "num_decoder_layers": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "hiera": {
        "num_labels": 5,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "image_size": [32, 32],
        "patch_stride": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool": 1,
        "masked_unit_size": [4, 4],
    },
    "led": {
        **BART,
        "attention_window": 4,
        "max_encoder_position_embeddings": 32,
        "max_decoder_position_embeddings": 32,
    },
    "mobilebert": {**ENCODER_2, "embedding_size": 12, "intra_bottleneck_size": 16, "num_feedforward_networks": 2},
    "prophetnet": {
        **IDS,
        "hidden_size": 24,
        "vocab_size": 67,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 41,
        "decoder_ffn_dim": 41,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    },
    "segformer": {
        "num_labels": 5,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [12, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "image_size": 16,
        "decoder_hidden_size": 12,
    },
    "speecht5": {
        **SOUND,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 41,
        "decoder_ffn_dim": 41,
    },
    "t5gemma": {
        "encoder": {**HEADS, **SHORT, "head_dim": 10},
        "decoder": {**HEADS, **SHORT, "head_dim": 10},
        "vocab_size": 67,
    },
    "xlnet": {**IDS, "d_model": 24, "n_layer": 2, "n_head": 4, "d_inner": 41, "vocab_size": 67, "dropout": 0.0},
    "focalnet": {
        "num_labels": 5,
        "embed_dim": 12,
        "hidden_sizes": [12, 24],
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "image_size": 16,
        "mlp_ratio": 2.0,
    },
    "pvt": {
        "num_labels": 5,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sequence_reduction_ratios": [2, 1],
        "hidden_sizes": [12, 16],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "image_size": 16,
    },
    "pvt_v2": {
        "num_labels": 5,
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [12, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2],
        "image_size": 16,
    },
    # gemma3n, gemma4
    "gemma4_unified_text": {
        **HEADS,
        **SHORT,
        "head_dim": 10,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "global_head_dim": 12,
        "num_global_key_value_heads": 4,
    },
    "gemma3n_text": {
        **HEADS,
        **SHORT,
        "head_dim": 10,
        "intermediate_size": [52, 52],
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 67,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "activation_sparsity_pattern": [0.9, 0.0],
        "altup_num_inputs": 2,
    },
    # olmo2
    "esmc": {**SHAPE, **IDS, "mask_token_id": 3},
    "olmo3": {**BIASED, "sliding_window": 4},
    # t5
    "mt5": {**T5, **IDS},
    "longt5": {**T5, **IDS, "local_radius": 3, "global_block_size": 4},
    "pop2piano": {**T5, **IDS, "num_decoder_layers": 2},
    "umt5": {**T5, **IDS},
    # vit
    "deit": {**IMAGES, "architectures": ["DeiTForImageClassification"]},
    "ijepa": IMAGES,
    "vit_msn": IMAGES,
    # whisper
    "fsmt": {**TRANSLATION, "src_vocab_size": 67, "tgt_vocab_size": 67, "langs": ["en", "de"], "activation": "gelu"},
    "m2m_100": TRANSLATION,
    "pegasus_x": {**TRANSLATION, "num_global_tokens": 2, "block_size": 4},
    "speech_to_text": {**WHISPER, **IDS, "input_feat_per_channel": 5, "conv_channels": 16},
}
GROUPED = tuple(
    model_type for model_type, options in ROWS.items() if "num_key_value_heads" in options and "q_lora_rank" not in options
)  # fmt: skip
FUSED = "kernels read its weight past the layer"
# model type → linear layers of its blocks that are in no coupling, by the end of their path, and why
LEFT_OUT: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "hy_v4"), {"indexer.*": "chooses tokens by topk, which passes no gradient"}
    ),
    "afmoe": {"router.gate": "the router"},
    **dict.fromkeys(("mamba", "falcon_mamba"), {f"{name}_proj": FUSED for name in ("x", "dt", "out")}),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"), {"m*.out_proj": FUSED}),
    "kimi_linear": dict.fromkeys(("f_a_proj", "g_a_proj"), "its outputs are low-rank, and units of no coupling"),
    "jamba": {"dt_proj": "the mixer reads its weight past the layer"},
    "gemma3n_text": {"altup.*": "mixes four streams", "altup_*.*": "mixes four streams"},
    "focalnet": {"modulation.*": "its units are of no coupling"},
    "doge": {"dt_proj": "its inputs are all values, and its outputs are few"},
    "hiera": {"layers.0.proj": "changes the width between stages"},
    "mobilebert": dict.fromkeys(
        ("bottleneck.*", "bottleneck.dense"), "changes the width, and its units are of no coupling"
    ),
    "prophetnet": {"relative_pos_embeddings": "its outputs are those of all heads for each distance"},
    **dict.fromkeys(
        ("donut-swin", "swin", "swinv2"),
        {
            "downsample.reduction": "changes the width between stages",
            "continuous_position_bias_mlp.*": "computes position biases",
        },
    ),
    "hunyuan_v1_moe": {"gate.wg": "the router"},
    "jetmoe": {"router.layer": "the router"},
    "lfm2_moe": {"feed_forward.gate": "the router, a linear layer in older releases of transformers"},
    "wavlm": {"attention.*": "torch.nn.functional.multi_head_attention_forward reads the weights past the layers"},
    "xmod": {"adapter_modules.*": "adapters of languages"},
}
# projections that get no gradient from the batch of the tests, and why
DEAD: dict[str, dict[str, str]] = {
    "luke": {"*.layer.1.attention.self.e2?_query": "the last layer's entities reach no logit"}
}
# Something outside the couplings numbers all heads: a table of biases, or the keys that JetMoE's experts share
NUMBERED = (
    *("beit", "big_bird", "bloom", "diffllama", "doge", "donut-swin", "funnel", "jetmoe", "layoutlmv3", "mpnet", "mpt"),
    *("swin", "swinv2"),
)
AUTO = (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForImageClassification,
    AutoModelForCTC,
    AutoModelForCausalLM,
    AutoModel,
)  # the first that has the type


# types whose structure is that of another row: their tests are slow
RARE = frozenset(
    [
        "apertus1p5_text",
        "arcee",
        "audio-spectrogram-transformer",
        "bailing_hybrid",
        "bamba",
        "beam",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "bros",
        "cohere2_moe",
        "convnext",
        "ctrl",
        "data2vec-audio",
        "data2vec-vision",
        "dinov2_with_registers",
        "dinov3_vit",
        "doge",
        "donut-swin",
        "dots1",
        "emu3_text_model",
        "esm",
        "exaone_moe",
        "falcon_mamba",
        "flaubert",
        "flex_olmo",
        "fnet",
        "focalnet",
        "funnel",
        "glm",
        "glm_moe_dsa",
        "gpt_bigcode",
        "gpt_neox_japanese",
        "granitemoe",
        "granitemoe_swa",
        "granitemoeshared",
        "gte",
        "hiera",
        "hubert",
        "hy_v3",
        "jais2",
        "jina_embeddings_v3",
        "kimi_linear",
        "kolibri1",
        "laguna",
        "lara_mini",
        "lasr_ctc",
        "layoutlmv3",
        "led",
        "lfm2_moe",
        "lfm3",
        "longt5",
        "mamba",
        "marian",
        "markuplm",
        "mbart",
        "mimo_v2_flash",
        "minimax_m3_vl_text",
        "mobilebert",
        "modernbert-decoder",
        "molmo2_text",
        "moonshine",
        "mpt",
        "mvp",
        "nanochat",
        "nemotron",
        "olmoe",
        "pegasus",
        "persimmon",
        "pixio",
        "plbart",
        "prophetnet",
        "pvt",
        "pvt_v2",
        "qwen3_5_moe_text",
        "sarvam_moe",
        "seamless_m4t",
        "seamless_m4t_v2",
        "sew",
        "sew-d",
        "solar_open",
        "speecht5",
        "splinter",
        "swinv2",
        "trocr",
        "unispeech",
        "unispeech-sat",
        "videomae",
        "visual_bert",
        "vit_mae",
        "vivit",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "xglm",
        "xlnet",
        "xmod",
        "yolos",
        "yoso",
    ]
)
# the same with grouped queries
RARELY_GROUPED = frozenset(
    [
        "afmoe",
        "apertus",
        "apertus1p5_text",
        "arcee",
        "bamba",
        "beam",
        "bitnet",
        "cohere2_moe",
        "diffllama",
        "doge",
        "dots1",
        "emu3_text_model",
        "ernie4_5_moe",
        "exaone_moe",
        "falcon_h1",
        "flex_olmo",
        "flint",
        "gemma3n_text",
        "glm",
        "glm4",
        "glm4_moe",
        "granite_swa",
        "granitemoe",
        "granitemoe_swa",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "jais2",
        "jamba",
        "kolibri1",
        "laguna",
        "lara_mini",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "minimax_m3_vl_text",
        "molmo2_text",
        "moonshine",
        "nanochat",
        "nemotron",
        "olmo",
        "olmo_hybrid",
        "olmoe",
        "qwen3_5_moe_text",
        "qwen3_next",
        "recurrent_gemma",
        "sarvam_moe",
        "seed_oss",
        "solar_open",
    ]
)
# name → model type and options of a config with another layout
VARIANTS = {
    "codegen-four-heads": ("codegen", {"n_head": 4}),
    "deberta-v2-shared-keys": ("deberta-v2", {"share_att_key": True}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "falcon-groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True}),
    "falcon-multi-query": ("falcon", {"multi_query": True, "parallel_attn": True}),
    "gpt_bigcode-multi-query": ("gpt_bigcode", {"multi_query": True}),
    "granitemoehybrid-dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "luke-unaware": ("luke", {"use_entity_aware_attention": False}),
    "qwen3_next-per-head": ("qwen3_next", {"linear_num_key_heads": 4}),
}
CLASSES = {"emu3_text_model": "Emu3ForCausalLM"}  # types that no auto class has


def missing(model_type: str) -> bool:
    """Whether this release of transformers lacks the model type, or the modules that its family describes."""
    return model_type not in CONFIG_MAPPING or is_too_old(transformers.__version__, model_type)


def alias_of(model_type: str, **options) -> PreTrainedModel:
    """A random model of the row, in evaluation mode, with `options` in place of the row's, or the test is skipped."""
    if missing(model_type):
        pytest.skip(f"transformers {transformers.__version__} does not have the model type {model_type}")
    return model_with(AutoConfig.for_model(model_type, **{**ROWS[model_type], **options}))


def model_with(config: PretrainedConfig) -> PreTrainedModel:
    """A random model of a config, of the first class that has its type."""
    if config.model_type in CLASSES:
        model_class = getattr(transformers, CLASSES[config.model_type])
        return randomized(SimpleNamespace(from_config=model_class._from_config), config)
    towers = hasattr(config, "text_config")
    auto = AutoModel if towers else next(auto for auto in AUTO if type(config) in auto._model_mapping)
    return randomized(auto, config)


def with_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same type in training mode, with a dropout of 0.5 wherever the config has one, except in attention."""
    dropouts = [
        key
        for key, value in model.config.to_dict().items()
        if "drop" in key and "attention" not in key and type(value) in (int, float)
    ]
    return alias_of(model.config.model_type, **dict.fromkeys(dropouts, 0.5)).train()
