"""Names and groups of the options of TRL and transformers that the training commands show. It imports nothing."""

# Group of the help → option → its short names, and a help text where that of the package is too long.
# An option that is not in the table works too. `--help-all` shows it.
OPTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "model": {
        "model_name_or_path": ("model base-model", ""),
        "model_revision": ("revision", ""),
        "dtype": ("torch-dtype", ""),
        "attn_implementation": ("", ""),
        "load_in_8bit": ("", ""),
        "load_in_4bit": ("", ""),
        "trust_remote_code": ("", "run the Python code that a model or tokenizer on the hub brings along"),
        "model_init_kwargs": ("", "more arguments of from_pretrained, as a dictionary in JSON"),
    },
    "data": {
        "data": ("", ""),
        "eval_data": ("", ""),
        "test_split_size": ("", ""),
        "limit": ("max-samples", ""),
        "dataset_name": ("", ""),
        "dataset_config": ("", ""),
        "dataset_train_split": ("", ""),
        "dataset_test_split": ("", ""),
        "dataset_revision": ("", ""),
        "dataset_streaming": ("", ""),
        "datasets": ("", ""),
        "field": ("", ""),
        "form": ("", ""),
        "chat_template": ("chat-template-path", ""),
        "system_prompt": ("", ""),
        "max_length": ("", "longest row in tokens"),
        "too_long": ("", ""),
        "skip_bad_rows": ("", ""),
    },
    "selection": {"on_top": ("", "")},
    "training": {
        "num_train_epochs": ("epochs num-epochs", "passes over the data"),
        "max_steps": ("", "number of updates; a positive number replaces --epochs"),
        "learning_rate": ("lr", "peak learning rate; the paper uses 2e-4 for commonsense and 1e-3 for arithmetic"),
        "lr_scheduler_type": ("schedule scheduler", "schedule after the warm-up: linear, cosine, constant, ..."),
        "lr_scheduler_kwargs": ("", "arguments of the schedule, as a dictionary in JSON"),
        "warmup_steps": ("warmup-ratio", ""),
        "optim": ("optimizer", "optimizer by its name in transformers: sgd, adafactor, adamw_8bit, ..."),
        "optim_args": ("", "arguments of the optimizer, as name=value,name=value"),
        "weight_decay": ("", "weight decay of the deltas"),
        "adam_beta1": ("beta1", "first decay rate of Adam"),
        "adam_beta2": ("beta2", "second decay rate of Adam"),
        "adam_epsilon": ("epsilon", "epsilon of Adam"),
        "max_grad_norm": ("", "clip the norm of the gradient to this value; 0 turns clipping off"),
        "label_smoothing_factor": ("label-smoothing", "share of the loss that is spread over all tokens"),
        "neftune_noise_alpha": ("neftune", "noise on the embeddings while training (NEFTune)"),
        "loss_type": ("", "nll, or dft (dynamic fine-tuning)"),
        "assistant_only_loss": ("", "compute the loss on the assistant's turns of a chat only"),
        "completion_only_loss": ("", "compute the loss on the completion of prompt and completion only"),
        "seed": ("", "seed of the selection, of the order of the rows and of dropout"),
        "data_seed": ("", "seed of the order of the rows"),
    },
    "rewards and preferences": {
        "rewards": ("", ""),
        "reward_weights": ("", "weight of each reward in the sum"),
        "num_generations": ("", "answers to each prompt, which are compared with each other"),
        "max_completion_length": ("", "longest generated answer in tokens"),
        "temperature": ("", "temperature of the generated answers"),
        "top_p": ("", "generate from the likeliest tokens with this probability together"),
        "top_k": ("", "generate from so many of the likeliest tokens; 0: from all"),
        "steps_per_generation": ("", "forward passes that use answers generated at once"),
        "num_iterations": ("", "updates with the same answers"),
        "epsilon": ("", "how far an update may change the probability of an answer, as a share"),
        "beta": ("", "how strongly the model is kept near the base, which is the reference"),
        "label_smoothing": ("", "share of the pairs whose preference may be wrong, for some losses"),
        "precompute_ref_log_probs": ("", "run the reference on all pairs before the training: faster steps"),
    },
    "batches": {
        "batch_size": ("", ""),
        "per_device_train_batch_size": ("micro-batch-size", "rows of one forward pass on one device"),
        "gradient_accumulation_steps": ("", "forward passes whose gradients are added up"),
        "packing": ("", "put several rows into one row of --max-length tokens"),
        "packing_strategy": ("", "how rows are packed"),
        "padding_free": ("", "join the rows of a batch instead of padding them"),
        "train_sampling_strategy": ("", "order of the rows: random, sequential, or group_by_length"),
    },
    "evaluation": {
        "eval_strategy": ("", "when to evaluate on the held-out rows while training"),
        "eval_steps": ("", "updates between two evaluations; 0 evaluates at the end only"),
        "per_device_eval_batch_size": ("", "held-out rows of one forward pass on one device"),
        "load_best_model_at_end": ("", "make the best checkpoint the adapter, not the last one"),
        "metric_for_best_model": ("", "metric of the best checkpoint: loss, or accuracy with --eval-task"),
        "greater_is_better": ("", "whether a greater metric is better"),
        "eval_task": ("", ""),
        "eval_limit": ("", ""),
        "max_new_tokens": ("", ""),
        "early_stopping_patience": ("", ""),
        "early_stopping_threshold": ("", ""),
    },
    "forgetting": {
        "forgetting_data": ("", ""),
        "measure_kl": ("", ""),
        "kl_on": ("", ""),
        "meter_steps": ("", ""),
        "meter_rows": ("", ""),
        "stop_at_forgetting": ("", ""),
        "stop_at_kl": ("", ""),
        "protect": ("", ""),
        "protect_rows": ("", ""),
    },
    "output": {
        "output_dir": ("output out", "folder for the adapter, log.jsonl, loss.png, config.yaml and checkpoints"),
        "name": ("", ""),
        "resume_from_checkpoint": (
            "resume",
            "continue the run in --output from its newest valid checkpoint, or from the named one",
        ),
        "overwrite": ("overwrite-output-dir", ""),
        "logging_steps": ("log-steps", ""),
        "report_to": ("", ""),
        "run_name": ("", "name of the run for --report-to"),
        "save_strategy": ("", "when to write checkpoints"),
        "save_steps": ("", ""),
        "save_total_limit": ("keep-checkpoints", ""),
        "stop_after": ("", ""),
    },
    "hub": {
        "push_to_hub": ("", "upload the adapter with its model card at the end"),
        "hub_model_id": ("", "repository, as org/name"),
        "hub_private_repo": ("", "whether a repository that is created now is private"),
        "hub_revision": ("", "branch of the repository"),
        "hub_token": ("", "token of the hub; config.yaml leaves it out"),
    },
    "devices": {
        "bf16": ("", ""),
        "fp16": ("", "multiply in float16 while the weights keep their dtype; needs a GPU"),
        "gradient_checkpointing": ("activation-checkpointing", ""),
        "torch_compile": ("compile", "compile the model with torch.compile"),
        "chunked_loss": ("", ""),
        "kernels": ("", ""),
        "use_cpu": ("", "train on the CPU although there is a GPU"),
        "dataloader_num_workers": ("", "processes that prepare batches"),
        "deepspeed": ("", "a DeepSpeed configuration, a JSON file"),
        "fsdp": ("", "kinds of FSDP sharding"),
        "fsdp_config": ("", "an FSDP configuration, a JSON file"),
    },
}
GROUP_OF = {name: group for group, options in OPTIONS.items() for name in options}
KIND_GROUPS = {"ModelOptions": "model", "DataOptions": "data", "S2FTConfig": "selection", "RunOptions": "output",
               "ForgettingOptions": "forgetting"}  # fmt: skip
SHORT_NAMES = {
    name: tuple(short.replace("-", "_") for short in names.split())
    for options in OPTIONS.values()
    for name, (names, _) in options.items()
}
HELP = {name: text for options in OPTIONS.values() for name, (_, text) in options.items() if text}
# Help texts of options that mean something else in another command than in s2ft sft.
HELP_OF = {
    ("DPOArguments", "loss_type"): "sigmoid, ipo, hinge, robust, sft, ...; several are added with --loss-weights",
    ("GRPOArguments", "loss_type"): "dapo, grpo, dr_grpo, bnpo, cispo, ...",
}
# Options of a command that have the short name of another option in s2ft sft.
OWN_NAMES = {"DPOArguments": ("label_smoothing",), "GRPOArguments": ("epsilon",)}
# Fields that are another option on the command line, because another dataclass has the name.
RENAMED = {("S2FTConfig", "seed"): "selection_seed"}
MORE_METADATA = {
    "selection_seed": {"shown": "--seed if that is given, else 0"},
    "data_seed": {"shown": "the run's seed"},
}
# Options that other programs or older versions have. They are suggested.
ELSEWHERE = {
    "batch-size": "bs",
    "bf16": "autocast precision mixed-precision",
    "dtype": "torchdtype",
    "max-length": "cutoff-len max-seq-length max-seq-len sequence-len",
    "match-lora-rank": "lora-rank r rank",
    "train-sampling-strategy group_by_length": "group-by-length",
    "eval-data": "eval-dataset validation-file",
    "data": "dataset train-file",
    "use-cpu": "no-cuda",
    "weight-decay": "wd",
}
# Options of `trl sft` that have no meaning here. They are accepted, and a line says so.
NOT_USED = "ignore_bias_buffers"
