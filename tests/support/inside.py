"""The internals of s2ft that tests use: what moves inside the package changes one line here, and no test.

A name is imported from its module at first use, so that a test that needs none of the optional packages imports none.
"""

from importlib import import_module

# module of s2ft: the names that tests import from it, `name:other` where two modules have one of a name
MODULES = {
    "": "config distributed",
    "adapter": "native",
    "adapter.adapter": "overlap",
    "adapter.folders": "adapters_in card_of grouped source_of",
    "adapter.formats": "ADAPTER_FORMATS",
    "attached": "hooks:forwards learning_rate:rates mounting",
    "attached.active": "mounted_deltas",
    "attached.hooks": "gated_forward INDEX",
    "attached.loading": "restore_adapter",
    "attached.record": "check_not_offloaded record_of find_record new_record",
    "attached.saving": "add_info gather_trained",
    "cli": "chat main:cli_main plan:cli_plan",
    "cli.chat": "ChatArguments",
    "cli.adapters": "describe",
    "cli.parse": "UsageError parse",
    "cli.serve": "ServeArguments",
    "cli.training": "config_text parser_of read_run",
    "codecs.compressed": "codec_of Nf4",
    "codecs.gguf_file": "GgufFile reader_class",
    "codecs.gguf_types": "TYPES:TYPES_OF_GGUF",
    "distributed": "check_not_in_engine full_tensors has_master_copy is_partitioned",
    "estimation": "devices:strategy MemoryPart OPTIMIZERS",
    "estimation.devices": "size_of",
    "estimation.shadow": "wanted_dtypes",
    "estimation.step": "free_memory Memory storages",
    "conversion": "EXPORTS gguf IMPORTS merged",
    "export": "from_model lora streamed",
    "conversion.gguf": "find_tools VARIABLE",
    "conversion.merged": "export write_merged",
    "export.streamed": "saved_names temporary_folder",
    "conversion.ollama": "modelfile",
    "conversion.packed": "Change export:export_packed Kept patch state PATCHED tuned_weights undo",
    "files": "reading",
    "files.reading": "CONFIG CONFIG:AdapterFolderCONFIG has_adapter lay_out PENDING local_folder stamp_of stored_tensors "
    "StoredTensor TENSORS TENSORS:AdapterFolderTENSORS",
    "integrations.lm_eval": "as_json as_table evaluate",
    "integrations.settings": "config_from",
    "integrations.trl": "main:trl_main",
    "layers": "EXPERTS kind_of NO_FUSE PackedLinear S2ColumnConv S2ColumnExperts S2Layer S2RowConv S2RowExperts S2RowOwnForward",
    "layers.base": "_warn_about_cast S2Layer:BaseS2Layer",
    "layers.derived": "computes_linear",
    "layers.linear": "is_split",
    "layers.quantized": "unpack",
    "layers.experts": "experts_forward project",
    "model": "checkpoint:conversion registry registry:composite",
    "model.checkpoint": "CannotStream conversions_of open_checkpoint packed_base SOURCE StoredWeights",
    "model.coupling": "Projection projections_of Vector",
    "model.discovery": "discover search",
    "model.discovery.examples": "examples_of:examples_examples_of runnable_example",
    "model.discovery.search": "judge trial_of",
    "model.discovery.twin": "copied HEADS kinds_of_blocks paths_and_classes tiny_config tiny_model twins_of",
    "model.families": "named",
    "model.families.decoders": "HIDDEN_ACTS",
    "model.fingerprint": "fingerprint Location",
    "model.parts": "tower_of towers_of trained_towers",
    "model.registry": "couplings_of FAMILIES find_couplings is_known is_too_old SINCE",
    "model.running": "evaluation_mode run_example tensors_in",
    "model.weights": "contiguous_range coupling_order Delta element_order inverse Move MovingTensor tensors_of weight_at",
    "ops": "_build _grouped sliced:_linear",
    "ops._build": "runs_on version why_unusable",
    "ops._grouped": "grouped_mm grouped_outer",
    "ops._library": "REFERENCES",
    "ops.act_mul": "ACTIVATIONS reference reference_backward",
    "ops.in_place": "check_distinct effective_units WRITING",
    "ops.multi_adapter_linear": "reference:multi_adapter_linear_reference without_waiting",
    "foreign": "check_mentioned MissingForeignName newer_than_tested read",
    "packages": "BITSANDBYTES check_packages is_installed MissingPackages NEEDS",
    "peft.layer": "S2FTPeftExperts",
    "selection": "ALLOCATIONS metrics select:select_units unit_parameters",
    "selection.batches": "Calibration",
    "selection.metrics": "METRICS Request shared_by_producers",
    "serve": "access server",
    "serve.engine": "Engine Job",
    "serve.schemas": "ApiError",
    "serve.server_options": "ServerOptions",
    "serve.served_adapters": "Adapters",
    "serve.server": "build_app config_of listen",
    "sync": "EngineError SliceSender TrainedSlices with_slices",
    "sync.places": "NoPlace check_base parts_of places regions",
    "sync.receiver": "Receiver",
    "sync.slices": "TrainedSlices:SlicesTrainedSlices",
    "sync.trl_trainers": "choose_port",
    "sync.wire": "DTYPES SliceSpec from_message hashes_of to_message",
    "text": "divergence",
    "text.adapter_prompts": (
        "Prompter check_same_prompts give_prompt load_with_adapter recorded_format standalone_template"
    ),
    "text.conversation": "Chat",
    "text.collator": "PackedCollator SplitCollator TokenCollator calibration_for",
    "text.data": "DataOptions form_of load_rows load_split",
    "text.data.forms": "BadRow normalised pair scored_prompt",
    "text.data.rows": "PAIRS PROMPTS",
    "text.divergence": "BaseDistributions Drift DriftMeter answer_rows base_switch divergences mean_loss prompt_rows prompts_of read_texts row_of_prompt some text_rows",
    "text.encoding": "RowOutcome encode_pairs token_row tokenize_rows",
    "text.evaluation": (
        "Example HeldOut evaluate:evaluation_evaluate examples_of read_examples encode_prompts compare "
        "first_word is_right last_number right_answer"
    ),
    "text.generation": "contiguous_head generate generation_mode AnswerRow:Row RunningBatch Sampler TextStream rows_interact",
    "text.models": "hollow_model keep_in_float32 load_model locate",
    "text.prompts": "PromptFormat encode_prompt end_ids pad_id prompt_format prompt_text with_columns",
    "text.templates": "TemplateError as_template_takes render_chat template_of encode_rendered",
    "train.methods": "METHODS:TRAINING_METHODS",
    "train": "base_model:train_loading methods parallel trainer",
    "train.arguments": "DPOArguments GRPOArguments SFTArguments",
    "train.batching": "Batching LengthSampler choose_batching has_varlen_attention row_lengths updates_of why_not_packed",
    "train.trainer": "AdapterCheckpoints S2FTTrainer",
    "train.output": "SEAL STATE UNFINISHED checkpoints damage move_into_place newest_valid seal LOCK:LockLOCK RunFolder loss_figure only_run_in read_log",
    "train.comparing": "best_rate report",
    "train.contents": "count_of_trained hash_of_base hash_of_rows",
    "train.demo": "PROBLEMS problem_set",
    "train.device": "explain_out_of_memory words_of_allocator is_out_of_memory keep_freed_memory",
    "train.forgetting": "ForgettingMeter",
    "train.base_model": "apply_kernels check_kernels fit_layout load_base quantization_config",
    "train.loss": ("CHUNK ChunkedLoss IGNORED chunk_of chunked_loss loss_in_chunks sum_of_losses why_not_chunked"),
    "train.options": "ForgettingOptions ModelOptions RunOptions SCHEDULES",
    "train.parallel": "Devices check_divided_rows has_state",
    "train.planning": "planned rows_of saved_by_bits with_memory",
    "train.rewards": "RewardError answer_equal answer_format check_columns checked is_equal load_rewards numbers",
    "train.run": "Encoded fitting_batch load_below set_batches smaller_step",
    "train.tuners": "TUNERS prepare",
    "train.trainers": "DPORunTrainer GRPORunTrainer Reference SFTRunTrainer TokenRowTrainer refuse_sharding",
    "train.fit": "JsonlLog check_dtype check_packages_of_run dpo grpo sft trainer_for",
    "vllm": "served_base:base command compatibility layers lora_requests:loading resolver transfer",
    "vllm.compatibility": "MissingInVLLM private when_imported",
    "vllm.served_base": "lora_of",
    "vllm.layers": "WrappedLayers:Targets",
    "vllm.resolver": "path_of",
    "vllm.slice_bank": "SlotBatch:Batch SliceBank add_slices_",
    "vllm.slice_layer": "Budget encode with_slices:layer_with_slices",
    "vllm.transfer": "is_packed",
}
_HOMES = {
    entry.rpartition(":")[2]: (".".join(filter(None, ("s2ft", module))), entry.partition(":")[0])
    for module, entries in MODULES.items()
    for entry in entries.split()
}


def __getattr__(name: str):
    """Import an internal name, or a module, at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"tests use no internal {name!r}: add it to MODULES")
    module, own = _HOMES[name]
    try:
        return getattr(import_module(module), own)
    except AttributeError:
        return import_module(f"{module}.{own}")
