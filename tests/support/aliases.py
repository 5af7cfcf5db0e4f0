"""The smallest config of each model type that has a declaration of another type's family, one row a type.

Heads can move in every row: an error in a coupling changes the output only if its units move. Rows with key/value heads
are also run with grouped queries, where heads stay.
"""

import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

from s2ft.model.families import is_too_old
from support.models import BERT, DEEPSEEK, GPT2, IDS, IMAGE, MOE, ODD, SHAPE, T5, TOWERS, WHISPER, randomized

HEADS = {**SHAPE, **IDS, "num_key_value_heads": 4}
BIASED = {**HEADS, "attention_bias": True, "mlp_bias": True}
EXPERTS = {**HEADS, **MOE, "num_local_experts": 4}
LATENT = {**SHAPE, **DEEPSEEK, "q_lora_rank": 9}  # low-rank queries, keys and values
ENCODER = {**BERT, **IDS}
IMAGES = {**ODD, **IMAGE, "num_labels": 5}
SPEECH = {**WHISPER, **IDS, "input_feat_per_channel": 5, "conv_channels": 16}
TRANSLATION = {**WHISPER, **IDS, "max_position_embeddings": 32}

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
    # deepseek
    "axk1": LATENT,
    "glm4_moe_lite": LATENT,
    "minicpm3": {**LATENT, "attention_bias": True},
    "mistral4": LATENT,
    "sarvam_mla": LATENT,
    "youtu": LATENT,
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
    "vaultgemma": {**BIASED, "head_dim": 10, "sliding_window": 4},
    # mixtral
    "mellum": {**EXPERTS, "head_dim": 10, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    "phimoe": {**EXPERTS, "attention_bias": True},
    # olmo2
    "esmc": {**SHAPE, **IDS, "mask_token_id": 3},
    "olmo3": {**BIASED, "sliding_window": 4},
    # t5
    "mt5": {**T5, **IDS},
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
    "speech_to_text": SPEECH,
}
GROUPED = tuple(
    model_type for model_type, options in ROWS.items() if "num_key_value_heads" in options and "q_lora_rank" not in options
)  # fmt: skip
AUTO = (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForImageClassification,
    AutoModelForCausalLM,
    AutoModel,
)  # the first that has the type


def missing(model_type: str) -> bool:
    """Whether this release of transformers lacks the model type, or the modules that its family describes."""
    return model_type not in CONFIG_MAPPING or is_too_old(transformers.__version__, model_type)


def alias_of(model_type: str, **options) -> PreTrainedModel:
    """A random model of the row, in evaluation mode, with `options` in place of the row's."""
    config = AutoConfig.for_model(model_type, **{**ROWS[model_type], **options})
    towers = hasattr(config, "vision_config")
    auto = AutoModel if towers else next(auto for auto in AUTO if type(config) in auto._model_mapping)
    return randomized(auto, config)


def with_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same type in training mode, with a dropout of 0.5 wherever the config has one."""
    options = model.config.to_dict()
    dropouts = [key for key, value in options.items() if "drop" in key and isinstance(value, (int, float))]
    return alias_of(model.config.model_type, **dict.fromkeys(dropouts, 0.5)).train()
