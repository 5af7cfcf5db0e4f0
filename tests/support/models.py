"""Small random models, one row for each case. The cases cover every model family and its unusual features."""

import functools
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
import transformers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
    ViTConfig,
    WhisperConfig,
)
from transformers.pytorch_utils import Conv1D

from support.inside import couplings_of, is_too_old, projections_of

LAYOUTS = ("permuted", "indexed")
SHAPE = dict(hidden_size=24, intermediate_size=52, num_hidden_layers=3, num_attention_heads=4, vocab_size=67)
ODD = {**SHAPE, "hidden_size": 30, "intermediate_size": 41, "num_attention_heads": 3}
ROTARY = {**SHAPE, "hidden_size": 32}  # only a part of each head is rotated, and its size must be even
IDS = dict(
    pad_token_id=0, bos_token_id=1, eos_token_id=2
)  # the defaults of the families are outside the small vocabulary
WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])

OPT = dict(
    hidden_size=24,
    ffn_dim=41,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=67,
    dropout=0.0,
    max_position_embeddings=32,
)
GPT2 = dict(
    n_embd=24,
    n_layer=3,
    n_head=4,
    vocab_size=67,
    n_positions=32,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    **IDS,
)
NEOX = dict(**ROTARY, **IDS, hidden_dropout=0.0, attention_dropout=0.0)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
DEEPSEEK = dict(
    **IDS,
    num_key_value_heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=7,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_shared_experts=2,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    norm_topk_prob=True,
)
BERT = dict(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32)
IMAGE = dict(image_size=12, patch_size=4)
T5 = dict(
    d_model=24,
    d_kv=10,
    d_ff=41,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    vocab_size=67,
    dropout_rate=0.0,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
    decoder_start_token_id=0,
)
WHISPER = dict(
    d_model=24,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=41,
    decoder_layers=3,
    decoder_attention_heads=3,
    decoder_ffn_dim=52,
    vocab_size=67,
    num_mel_bins=5,
    max_source_positions=7,
    max_target_positions=16,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
# The text and the vision tower have different widths, depths and numbers of heads.
TOWERS = dict(
    text_config=dict(**SHAPE, **IDS, max_position_embeddings=16, hidden_act="gelu"),
    vision_config=dict(hidden_size=30, intermediate_size=41, num_hidden_layers=2, num_attention_heads=3, **IMAGE),
)

CASES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4),
    "llama-grouped": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2),
    "llama-multi-query": lambda: LlamaConfig(**SHAPE, num_key_value_heads=1),
    "llama-biased": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, head_dim=10),
    "llama-odd": lambda: LlamaConfig(
        **{**SHAPE, "hidden_size": 27, "intermediate_size": 41, "num_attention_heads": 3},
        num_key_value_heads=3,
        head_dim=14,
    ),
    "llama-gelu": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, hidden_act="gelu"),
    "llama-gelu-tanh": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh"),
    "llama-relu": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, hidden_act="relu"),
    "mistral": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, head_dim=8),
    "qwen2": lambda: Qwen2Config(**SHAPE, num_key_value_heads=4),
    "qwen2-grouped-tied": lambda: Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "qwen3-per-head": lambda: Qwen3Config(**SHAPE, num_key_value_heads=4, head_dim=10),
    "gemma": lambda: GemmaConfig(**SHAPE, num_key_value_heads=4, head_dim=10, attention_bias=True),
    "gemma-multi-query": lambda: GemmaConfig(**SHAPE, num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, num_key_value_heads=4, head_dim=10, **WINDOW),
    "gemma2-grouped": lambda: Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, num_key_value_heads=4, head_dim=10, **WINDOW),
    "gemma3-grouped": lambda: Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8),
    "granite": lambda: GraniteConfig(
        **ODD,
        num_key_value_heads=3,
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "granite-grouped": lambda: GraniteConfig(**SHAPE, num_key_value_heads=2),
    "smollm3": lambda: SmolLM3Config(
        **SHAPE, **IDS, num_key_value_heads=4, attention_bias=True, mlp_bias=True, no_rope_layers=[1, 0, 1]
    ),
    "smollm3-grouped": lambda: SmolLM3Config(**SHAPE, **IDS, num_key_value_heads=2),
    "cohere": lambda: CohereConfig(**SHAPE, **IDS, num_key_value_heads=4, attention_bias=True),
    "cohere-normed": lambda: CohereConfig(**ODD, **IDS, num_key_value_heads=3, use_qk_norm=True),
    "cohere-normed-grouped": lambda: CohereConfig(**SHAPE, **IDS, num_key_value_heads=2, use_qk_norm=True),
    "cohere2": lambda: Cohere2Config(**SHAPE, **IDS, num_key_value_heads=4, head_dim=10, **WINDOW),
    "olmo2": lambda: Olmo2Config(**ODD, **IDS, num_key_value_heads=3, attention_bias=True),
    "olmo2-grouped": lambda: Olmo2Config(**SHAPE, **IDS, num_key_value_heads=2),
    "stablelm": lambda: StableLmConfig(**ROTARY, **IDS, num_key_value_heads=4, use_qkv_bias=True),
    "stablelm-parallel": lambda: StableLmConfig(**ROTARY, **IDS, num_key_value_heads=2, use_parallel_residual=True),
    "stablelm-normed": lambda: StableLmConfig(**ROTARY, **IDS, num_key_value_heads=4, qk_layernorm=True),
    "phi": lambda: PhiConfig(**{**ODD, "hidden_size": 36}, **IDS, num_key_value_heads=3),
    "phi-normed": lambda: PhiConfig(**ROTARY, **IDS, num_key_value_heads=4, qk_layernorm=True),
    "phi-multi-query": lambda: PhiConfig(**ROTARY, **IDS, num_key_value_heads=1),
    "starcoder2": lambda: Starcoder2Config(**SHAPE, **IDS, num_key_value_heads=4, sliding_window=4),
    "starcoder2-grouped": lambda: Starcoder2Config(**SHAPE, **IDS, num_key_value_heads=2, use_bias=False),
    "phi3": lambda: Phi3Config(**ODD, **IDS, num_key_value_heads=3),
    "phi3-grouped": lambda: Phi3Config(**SHAPE, **IDS, num_key_value_heads=2),
    "phi3-multi-query": lambda: Phi3Config(**SHAPE, **IDS, num_key_value_heads=1),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-odd": lambda: GPT2Config(**{**GPT2, "n_embd": 30, "n_head": 3}, n_inner=41, activation_function="relu"),
    "gpt2-cross-attention": lambda: GPT2Config(**GPT2, add_cross_attention=True),
    "gptj": lambda: GPTJConfig(**{**GPT2, "n_embd": 32}, rotary_dim=4),
    "gpt-neox": lambda: GPTNeoXConfig(**NEOX),
    "gpt-neox-sequential": lambda: GPTNeoXConfig(
        **{**NEOX, "hidden_size": 36, "num_attention_heads": 3}, use_parallel_residual=False, attention_bias=False
    ),
    "mixtral": lambda: MixtralConfig(
        **{**SHAPE, "intermediate_size": 56}, num_key_value_heads=4, num_local_experts=3, num_experts_per_tok=2
    ),
    "mixtral-odd-multi-query": lambda: MixtralConfig(
        **ODD,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        hidden_act="gelu",
        experts_implementation="eager",
    ),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **SHAPE, **MOE, num_key_value_heads=4, shared_expert_intermediate_size=21, decoder_sparse_step=2
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **MOE, num_key_value_heads=2, head_dim=10, mlp_only_layers=[1]),
    "deepseek-v2": lambda: DeepseekV2Config(**SHAPE, **DEEPSEEK, q_lora_rank=None, topk_method="greedy"),
    "deepseek-v3": lambda: DeepseekV3Config(**SHAPE, **DEEPSEEK, q_lora_rank=9),
    "opt": lambda: OPTConfig(**OPT),
    "opt-post-norm": lambda: OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=16),
    "bert": lambda: BertConfig(**BERT),
    "bert-cross-attention": lambda: BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
    "roberta": lambda: RobertaConfig(**BERT, hidden_act="relu"),
    "vit": lambda: ViTConfig(**ODD, **IMAGE, num_labels=5),
    "vit-unbiased": lambda: ViTConfig(**SHAPE, **IMAGE, num_labels=5, qkv_bias=False),
    "clip": lambda: CLIPConfig(**TOWERS, projection_dim=16),
    "clip-text": lambda: CLIPTextConfig(**TOWERS["text_config"]),
    "clip-vision": lambda: CLIPVisionConfig(**TOWERS["vision_config"]),
    "t5": lambda: T5Config(**T5),
    "t5-gated": lambda: T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "whisper": lambda: WhisperConfig(**WHISPER, **IDS),
}
# Older releases of transformers lack the modules of some cases.
CASES = {case: make for case, make in CASES.items() if not is_too_old(transformers.__version__, make().model_type)}
# the first case of each kind of config; the others differ in numbers of heads, activations and biases
FIRST = tuple({type(CASES[case]()): case for case in reversed(CASES)}.values())
AUTO = {
    BertConfig: AutoModelForMaskedLM,
    RobertaConfig: AutoModelForMaskedLM,
    CLIPConfig: AutoModel,
    CLIPTextConfig: AutoModel,
    CLIPVisionConfig: AutoModel,
    ViTConfig: AutoModelForImageClassification,
    T5Config: AutoModelForSeq2SeqLM,
    WhisperConfig: AutoModelForSpeechSeq2Seq,
}  # all other configs use AutoModelForCausalLM

ALL_RATIOS = dict(q_ratio=0.5, k_ratio=0.5, v_ratio=0.7, o_ratio=0.5, u_ratio=0.2, g_ratio=0.1, d_ratio=0.15)
WHOLE_KEYS = {**ALL_RATIOS, "k_ratio": 1.0, "v_ratio": 1.0}  # all key and value heads


def model_of(case: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a case, as :func:`randomized` makes it."""
    config = CASES[case]()
    decoder = getattr(config, "is_decoder", False)
    auto = AutoModelForCausalLM if decoder else AUTO.get(type(config), AutoModelForCausalLM)
    return randomized(auto, config).to(dtype)


@torch.no_grad()
def randomized(auto: type, config: PretrainedConfig) -> PreTrainedModel:
    """A model in evaluation mode. Its biases and norms are random too, so that an error in them changes the output."""
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(mean=0.5, std=0.3)
        elif parameter.dim() > 1:
            parameter.normal_(std=0.1)  # with the usual 0.02 every block is almost an identity
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.normal_(mean=0.5, std=0.3)  # norms of single heads have weights with two dims
    return model


@functools.cache
def ratios_of(case: str) -> frozenset[str]:
    """The ratio options of S2FTConfig whose projections the case has."""
    with torch.random.fork_rng(devices=[]):  # the result is cached, so no call may change the random state
        return frozenset(f"{projection.key}_ratio" for projection in projections_of(couplings_of(model_of(case))))


def ratios_for(case: str, ratios: dict[str, float]) -> dict[str, float]:
    """Restrict `ratios` to projections that the case has. A single KV head can only be trained whole."""
    one_head = ("k_ratio", "v_ratio") if "multi-query" in case else ()
    return {key: 1.0 if key in one_head else ratio for key, ratio in ratios.items() if key in ratios_of(case)}


UNCOUPLED = (
    "q_a_proj",
    "kv_a_proj_with_mqa",
    "shared_expert_gate",
    "router",
    "mlp.gate",
)  # linear layers of no coupling


def block_weights(model: PreTrainedModel, left_out: Iterable[str] = ()) -> set[str]:
    """The paths of all linear layers and stacked experts of the model's blocks, except those of no coupling.

    Args:
        model: The model.
        left_out: Ends of the paths of more layers of no coupling; * stands for any letters.
    """
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    layers = {f"{stack}.{name}": module for stack in stacks for name, module in stacks[stack].named_modules()}
    linear = {name for name, module in layers.items() if isinstance(module, (nn.Linear, Conv1D))}
    patterns = [f"*.{end}" for end in (*UNCOUPLED, *left_out)]
    coupled = {name for name in linear if not any(fnmatchcase(name, pattern) for pattern in patterns)}
    stacked = {name for name, param in model.named_parameters() if param.dim() == 3}
    return coupled | {name for name in stacked if "experts" in name or name.endswith("put_linear.weight")}  # JetMoE


def token_batch(model: PreTrainedModel, batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


MORE_INPUTS = {
    "bros": {"bbox": torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(3))},
    "led": {"global_attention_mask": torch.eye(9, dtype=torch.int64)[:2]},
    "longformer": {"global_attention_mask": torch.eye(9, dtype=torch.int64)[:2]},
    "luke": {
        "entity_ids": torch.tensor([[1, 2], [3, 4]]),
        "entity_position_ids": torch.tensor([[[1, 2], [3, -1]]] * 2),
    },
    "vit_mae": {"noise": torch.rand(2, 9, generator=torch.Generator().manual_seed(3))},
}  # model type → inputs of its model that the config does not tell


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch for any case, without labels."""
    config, generator = model.config, torch.Generator().manual_seed(1)

    def pixels(of):
        frames = [of.num_frames] if hasattr(of, "num_frames") else []
        size = of.image_size if isinstance(of.image_size, (list, tuple)) else [of.image_size] * 2
        return torch.randn(2, *frames, 3, *size, generator=generator).to(model.dtype)

    if hasattr(config, "vision_config"):
        tokens = torch.randint(getattr(config, "text_config", config).vocab_size, (2, 9), generator=generator)
        return {"input_ids": tokens, "pixel_values": pixels(config.vision_config)}
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels(config), **MORE_INPUTS.get(config.model_type, {})}
    if model.main_input_name == "input_values":  # sound, or its spectrogram
        shape = (
            (2, config.max_length, config.num_mel_bins)
            if hasattr(config, "frequency_stride")
            else (2, 400 if hasattr(config, "conv_stride") else 2000)
        )
        inputs = {"input_values": torch.randn(*shape, generator=generator).to(model.dtype)}
        return inputs | ({"decoder_input_ids": token_batch(model, length=7)} if config.is_encoder_decoder else {})
    if hasattr(config, "input_feat_per_channel"):  # Speech2Text: time before the features
        sound = torch.randn(2, 12, config.input_feat_per_channel, generator=generator)
        return {"input_features": sound.to(model.dtype), "decoder_input_ids": token_batch(model)}
    if model.main_input_name == "input_features" and not config.is_encoder_decoder:
        encoder = getattr(config, "encoder_config", config)
        features = getattr(encoder, "num_mel_bins", None) or config.feature_projection_input_dim
        return {"input_features": torch.randn(2, 40, features, generator=generator).to(model.dtype)}
    if model.main_input_name == "input_features":
        sound = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
        return {"input_features": sound.to(model.dtype), "decoder_input_ids": token_batch(model)}
    inputs = {"input_ids": token_batch(model), **MORE_INPUTS.get(config.model_type, {})}
    if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_hidden_size", None):
        inputs["encoder_hidden_states"] = torch.randn(2, 6, config.hidden_size, generator=generator).to(model.dtype)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_batch(model, length=7)
    return inputs


def output_of(model: PreTrainedModel) -> torch.Tensor:
    """The output for :func:`inputs_of`: logits, or the last hidden state if the model has no head."""
    output = model(**inputs_of(model))
    for name in ("logits", "logits_per_text", "last_hidden_state"):
        if name in output:
            return output[name]
    raise KeyError(list(output))


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    """Cross entropy with fixed random targets. The last dim of the output gives the classes."""
    output = output_of(model).float().flatten(0, -2)
    targets = torch.randint(output.shape[-1], (output.shape[0],), generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.cross_entropy(output, targets)


def train(model: nn.Module, steps=3, lr=1e-2, weight_decay=0.1, loss_of=loss_of, optimizer=None) -> list[float]:
    """Run a few steps, of AdamW if no optimizer is given, and return their losses.

    The model is in evaluation mode afterwards.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    model.train()
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def fit(model: nn.Module, *args, **options) -> nn.Module:
    """Train a model as :func:`train` does, and return it."""
    train(model, *args, **options)
    return model
