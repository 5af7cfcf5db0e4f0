"""Private names of other packages that s2ft reads, and what happens where a release does not have them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """A name that s2ft reads with a default.

    Attributes:
        package: The package.
        when_gone: refused (by s2ft/foreign.py); closed (the careful case is taken, or the numbers stay the same);
            open (something is skipped: still to be decided).
        what: What happens.
    """

    package: str
    when_gone: str
    what: str


# Names that are read with a default, by getattr or hasattr.
REFUSES = "MissingForeignName"
WITH_DEFAULT = {
    "_name_or_path": Foreign("transformers", "closed", "files do not name the base; its fingerprint is checked"),
    "_apply_gate": Foreign("transformers", "closed", "experts without it raise ValueError"),
    "_attn_implementation": Foreign("transformers", "closed", "the search for couplings fails, which is said"),
    "_default_apply_gate": Foreign("transformers", "closed", "the kernel is left out, the numbers are the same"),
    "_distribute_module_applied": Foreign("torch", "refused", f"{REFUSES}, for a layer whose weight is a DTensor"),
    "_from_config": Foreign("transformers", "closed", "the model is built in another way"),
    "_fsdp_param_groups": Foreign("torch", "closed", "older releases have _fsdp_param_group, read without a default"),
    "_hf_hook": Foreign("accelerate", "refused", f"{REFUSES} at attach"),
    "_hp_mapping": Foreign("deepspeed", "refused", f"{REFUSES} where weights are written"),
    "_init_reduce_scatter_param_order": Foreign("torch", "closed", "from PyTorch 2.15 on; older ones need nothing"),
    "_is_expert_parallel": Foreign("transformers", "closed", "rows of other devices are masked"),
    "_is_replica": Foreign("torch", "refused", f"{REFUSES} at attach"),
    "_is_stateful": Foreign("transformers", "closed", "the layers themselves are read"),
    "_require_grads_hook": Foreign("transformers", "closed", "the backward pass goes on to the embeddings"),
    "_require_grads_hooks": Foreign("transformers", "closed", "the backward pass goes on to the embeddings"),
    "_weight_conversions": Foreign("transformers", "refused", f"{REFUSES} where a checkpoint is written"),
    "_z3_optimizer": Foreign("deepspeed", "refused", f"{REFUSES} where weights are written"),
}
# The same for names that are not private, and not documented either.
PUBLIC = {
    "cpu_linear": Foreign("vllm", "refused", f"{REFUSES} where an engine for slices loads on the CPU"),
    "ds_id": Foreign("deepspeed", "refused", REFUSES),
    "ds_numel": Foreign("deepspeed", "refused", REFUSES),
    "ds_shape": Foreign("deepspeed", "refused", REFUSES),
    "hooks": Foreign("accelerate", "refused", f"{REFUSES} at attach"),
    "neftune_hook_handle": Foreign("transformers", "refused", f"{REFUSES} where a training starts"),
    "offload": Foreign("accelerate", "refused", f"{REFUSES} at attach"),
    "orig_dtype": Foreign("torch", "refused", f"{REFUSES} where a sharded model is attached"),
    "packing_format_for_cpu": Foreign("bitsandbytes", "refused", f"{REFUSES} where a layer is replaced"),
    "quantization_scheme": Foreign("compressed-tensors", "refused", f"{REFUSES} at attach"),
}
# Names that s2ft.foreign.read reads; without its name it raises MissingForeignName.
BY_READ = {
    "ZeROOrderedDict": "deepspeed",
    "_attn_implementation": "transformers",
    "_get_dtype_plan": "transformers",
    "_hf_peft_config_loaded": "transformers",
    "_keys_to_ignore_on_save": "transformers",
}
# Names that are read or imported without one: Python's error names them.
WITHOUT_DEFAULT = set(
    """
    _AutoDispatchBelowAutograd _C __version__ _adapter_manager _all_lora_classes
    _apply_liger_kernel_to_instance _are_functorch_transforms_active _cdata
    _convert_weight_packed_for_cpu _convert_weight_packed_for_cpu_inverse _current_level _dispatch_get_all_op_names
    _dispatch_has_kernel_for_dispatch_key _dp_group _dynamo _format_args _forward_hooks _forward_pre_hooks
    _fsdp_param _fsdp_param_group _fully_shard _get_default_store _get_fsdp_state _get_submodules
    _gradient_checkpointing_func _grouped_mm _hf_deepspeed_config_weak_ref _index_put_impl_ _init_mp_dtypes
    _is_full_backward_hook _is_tracing _is_view _lazy_call _lazy_init_hp_params_optimizer_state _len_torch_dispatch_stack
    _len_torch_function_stack _load_state_dict_post_hooks _load_state_dict_pre_hooks _local_scalar_dense
    _maybe_include_all_linear_layers _member_map_ _member_names_ _model_mapping _module_info _modules _name_
    _non_persistent_buffers_set _option_string_actions _orig_mod _post_load_hook_handle
    _python_dispatch _pytree _replace _replicate_for_data_parallel _reversed_padding_repeated_twice _schema
    _set_stance _stance _StridedShard _state_dict_hooks _subclasses _to_copy _training_state _unsafe_view
    _value2member_map_ _value_ _version
    """.split()
)
