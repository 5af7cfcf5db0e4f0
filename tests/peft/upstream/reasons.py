"""Why tests of PEFT's two matrices are left out or skipped: each with its reason. A test that is neither run on S²FT
nor named here fails the run, so that what a new PEFT brings is seen."""

TOKENS = "of trainable tokens, which S²FT doesn't train: its units are a layer's outputs and inputs"
EMBEDDING = "of embeddings, which S²FT doesn't train"
LORA = "of LoRA's own options (ranks, scaling, DoRA, VeLoRA, layers in the place of LoRA's)"
BIAS = "of training biases along, which S²FT doesn't: a bias is outside its units"
PROMPT = "of prompt learning"
MHA = "of nn.MultiheadAttention, whose weights S²FT has no projection in"
OTHER = "of another method by name"
MIXED = "of PeftMixedModel, which takes PEFT's own methods alone"
DEFAULTS = "of a method's list of default modules: S²FT's modules follow from the ratios"

LEFT_OUT = {
    # custom models
    "test_trainable_tokens_random_init_unmerge_restores_base_weights": TOKENS,
    "test_ia3_grouped_conv_feedforward_merge": OTHER,
    "test_ia3_safe_merge_does_not_mutate_base_layer_on_non_finite_bias": OTHER,
    "test_glora_safe_merge_does_not_corrupt_base_layer_on_non_finite_adapter": OTHER,
    "test_lora_safe_merge_does_not_mutate_base_layer_on_non_finite_bias": BIAS,
    "test_merge_with_lora_bias_when_base_layer_has_no_bias_warns_and_raises": BIAS,
    "test_disable_adapter_with_bias_warns": BIAS,
    "test_adding_multiple_adapters_with_bias_raises": BIAS,
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": BIAS,
    "test_add_adapter_rejects_duplicate_name_without_mutation[True]": MIXED,
    "test_set_adapter_non_overlapping_trainable_token_indices": TOKENS,
    "test_multiple_active_adapters_with_same_trainable_token_indices_raises": TOKENS,
    "test_multiple_active_adapters_with_different_trainable_token_indices_works": TOKENS,
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices": TOKENS,
    "test_set_requires_grad_trainable_tokens": TOKENS,
    "test_add_weighted_adapter_cat_with_rank_pattern": LORA,
    "test_add_weighted_adapter_with_different_scaling": LORA,
    "test_save_pretrained_targeting_lora_to_embedding_layer": EMBEDDING,
    "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers": EMBEDDING,
    "test_load_resized_embedding_ignore_mismatched_sizes": EMBEDDING,
    "test_gpt2_dora_merge_and_unload": LORA,
    "test_gpt2_dora_merge_and_unload_safe_merge": LORA,
    "test_unload_adapter_multihead_attention": MHA,
    "test_mha_gradients_set_correctly": MHA,
    "test_dora_save_and_load_remapping": LORA,
    "test_gralora_and_hybrid_gralora_parameter_count": OTHER,
    "test_monteclora_variational_loss_computation": OTHER,
    "test_monteclora_variational_loss_computation_eval_mode": OTHER,
    "test_pvera_reproducible": OTHER,
    "test_pvera_generator_is_per_adapter": OTHER,
    "test_pvera_no_generator_seed_means_no_generator": OTHER,
    "test_multirank": LORA,
    "test_multirank_2": LORA,
    "test_repr_lora_linear": LORA,
    "test_repr_lora_embedding": LORA,
    "test_repr_lora_conv1d": LORA,
    "test_repr_lora_conv2d": LORA,
    "test_repr_lora_paramwrapper": LORA,
    "test_multiple_active_dora_adapters_merge_matches_forward": LORA,
    "test_plain_lora_and_dora_adapters_merge_matches_forward": LORA,
    "test_multiple_active_dora_adapters_safe_and_unsafe_merge_agree": LORA,
    "test_requires_grad_follows_inference_mode_trainable_token_indices": TOKENS,
    "test_requires_grad_lora_emb_conv1d": EMBEDDING,
    # asks for lora_A by name; the same is in test_peft_plain.py
    "test_loading_adapter_preserves_custom_requires_grad": LORA,
    "test_loading_model_with_trainble_tokens_requires_grad_set_correctly": TOKENS,
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": EMBEDDING,
    "test_mixed_adapter_batches_mha_raises": MHA,
    "test_mixed_adapter_batches_lora_with_dora_raises": LORA,
    "test_mixed_adapter_batches_lora_with_dora_but_dora_not_included_works": LORA,
    "test_custom_lora_layer_used": LORA,
    "test_training_works": LORA,
    "test_saving_and_loading": LORA,
    "test_override_lora_linear": LORA,
    "test_custom_lora_layer_issues_warning": LORA,
    "test_target_layer_without_in_features_out_features": LORA,
    "test_default_target_modules_not_set_raises": DEFAULTS,
    "test_default_target_modules_not_set_model_type_set_raises": DEFAULTS,
    "test_default_target_modules_list_of_str": DEFAULTS,
    "test_default_target_modules_str": DEFAULTS,
    "test_default_target_modules_osf": DEFAULTS,
    # decoder models
    "test_prompt_tuning_text_prepare_for_training": PROMPT,
    "test_prompt_tuning_text_tokenizer_kwargs": PROMPT,
    "test_prompt_tuning_trust_remote_code": PROMPT,
    "test_prompt_tuning_sample_vocab_prepare_for_training": PROMPT,
    "test_prompt_tuning_config_invalid_args": PROMPT,
    "test_training_prompt_learning_tasks": PROMPT,
    "test_generate_adalora_no_dropout": OTHER,
    "test_lora_layer_replication": LORA,
    "test_prefix_tuning_qwen2_with_grouped_query_attention": PROMPT,
    "test_prefix_tuning_qwen3_with_grouped_query_attention": PROMPT,
    "test_prefix_tuning_offsets_position_ids_in_forward": PROMPT,
    "test_prefix_tuning_mistral": PROMPT,
    "test_prompt_tuning_prepare_inputs_for_generation_4d_attention_mask": PROMPT,
    "test_prompt_learning_with_gradient_checkpointing": PROMPT,
    "test_lora_embed_scale_is_applied": EMBEDDING,
    "test_lora_embed_scale_is_applied_mixed_batch": EMBEDDING,
    "test_set_requires_grad_prompt_learning_raises": PROMPT,
    "test_merge_and_unload_fixes_tie_word_embeddings_config": EMBEDDING,
    "test_prefix_tuning_gemma4_works": PROMPT,
    "test_prefix_tuning_gemma4_warns_if_some_layers_skipped": PROMPT,
    "test_prefix_tuning_gemma4_raises_if_all_layers_skipped": PROMPT,
}
# of a class: requires_grad of each of PEFT's methods by name, of which LoRA's stand for all
OTHER_METHODS = tuple(
    f"test_requires_grad_{method}_"
    for method in (
        "ia3",
        "adalora",
        "loha",
        "lokr",
        "oft",
        "hra",
        "miss",
        "boft",
        "lntuning",
        "vera",
        "pvera",
        "randlora",
        "vblora",
        "fourierft",
    )
)


def reason_for(name: str):
    """Of a test with its parameters in brackets; None where it has to run."""
    plain = name.partition("[")[0]
    return LEFT_OUT.get(name) or LEFT_OUT.get(plain) or (OTHER if plain.startswith(OTHER_METHODS) else None)


WEIGHTED_SUMS = (
    "PEFT leaves this model out of weighted sums because of LoRA's SVD; S²FT's is tested on nine models in "
    "test_peft_method.py"
)

# What PEFT's tests skip by themselves, whatever the method, by the words they give for it.
SKIPPED = {
    "Combining Gemma adapters with SVD is currently failing": WEIGHTED_SUMS,
    "Test does not work with model peft-internal-testing/tiny-dummy-qwen2": WEIGHTED_SUMS,
    "Multiple active adapters with modules_to_save/trainable_token_indices is not supported.": "PEFT allows one adapter at a time in a module of modules_to_save",
    "test requires a hardware accelerator": "needs a GPU: mixed batches against separate ones, timed",
}
