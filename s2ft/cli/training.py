"""s2ft sft, dpo, grpo, compare and demo: the options of a run, from the command line and from a file."""

import logging
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Any

from s2ft.cli.parse import OptionParser, command, quiet_transformers, set_environment
from s2ft.config import S2FTConfig
from s2ft.text.data.data_options import DataOptions
from s2ft.train.options import CompareOptions, DemoOptions, ForgettingOptions, ModelOptions, RunOptions

logger = logging.getLogger(__name__)
HELP = {
    "sft": (
        """Train an adapter on your data. s2ft finetune is another name of this command.

The names of the options are those of TRL and transformers, with dashes or underscores; many have a short name.
--config reads them from a YAML file, such as the config.yaml that each run writes into its folder.
Without any ratio the command trains some 430 channels of each down_proj: 3 % of LLaMA-3-8B's, and 3 to 30 %.

Several devices: torchrun --nproc-per-node N -m s2ft sft ...
             or: accelerate launch -m s2ft sft ...""",
        """  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --epochs 3
  s2ft sft --model meta-llama/Llama-3.2-1B --data my-data.jsonl --output my-run --resume
  s2ft sft --config my-run/config.yaml --output another-run --lr 1e-4""",
    ),
    "dpo": (
        """Train an adapter on preferences: pairs of a better and a worse answer to a prompt.

A row has chosen and rejected, and a prompt: text, messages, a ShareGPT chat or a question. The trainer is TRL's
DPOTrainer. Its reference model is the model without the adapter, so that one model is in memory.
The options are those of s2ft sft and of TRL's DPOConfig.""",
        """  s2ft dpo --model my-model --data preferences.jsonl --output my-run --beta 0.1
  s2ft dpo --config my-run/config.yaml --output another-run --lr 2e-5""",
    ),
    "grpo": (
        """Train an adapter by the rewards of its own answers.

A row has a prompt (text, messages or a question) and columns for the rewards, such as answer. The trainer is TRL's
GRPOTrainer: it generates several answers to each prompt, and answers with a higher reward than the others become more
likely. The options are those of s2ft sft and of TRL's GRPOConfig. --batch-size counts answers. With --use-vllm true
vLLM generates them, in this process or, with --vllm-mode server, on a server; it gets the trained slices alone.

--rewards answer_equal  1 for the answer of the column answer: a number, a letter or a text. It is read from
                        <answer>...</answer>, \\boxed{...} or ####, else from the end of the text
--rewards format        1 for a text that marks exactly one answer in one of these ways
--rewards FILE.py:NAME  a function of yours, with TRL's signature: f(completions, answer, **_) -> list of numbers""",
        """  s2ft grpo --model my-model --data problems.jsonl --rewards answer_equal format --output my-run
  s2ft grpo --model my-model --data problems.jsonl --rewards mine.py:short --output my-run --num-generations 4""",
    ),
    "compare": (
        """Train S²FT, LoRA and other methods on your data, and compare them on held-out rows.

Each method gets the same rows, updates and loss, at several rates. A run has a process of its own and is a line of
runs.jsonl: the same command goes on after an interrupt, and makes only what is missing for more rates or seeds.
The options are those of s2ft sft. LoRA has those of TRL: --lora-r, --lora-alpha, --lora-target-modules, --use-dora.
Rank 16 on q, k, v, up and down is the default.""",
        """  s2ft compare --model my-model --data my-data.jsonl --output comparison
  s2ft compare --model my-model --data my-data.jsonl --output comparison --methods s2ft lora full --seeds 0 1 2""",
    ),
}
LIKE = {"compare": "sft"}  # commands with the rows and the arguments of another one
# Secrets, and what concerns one call only.
NOT_WRITTEN = ("hub_token", "resume_from_checkpoint", "overwrite", "stop_after")
NOT_USED = "ignore_bias_buffers"  # an option of `trl sft` that has no meaning here; it is taken, and a line says so


# ---- the one table of the options: headings, short names, and texts where those of TRL are too long --------

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
        "datasets": ("", ""),
        "field": ("", ""),
        "form": ("", ""),
        "chat_template": ("chat-template-path", ""),
        "system_prompt": ("", ""),
        "max_length": ("", "longest row in tokens"),
        "too_long": ("", ""),
        "skip_bad_rows": ("", ""),
    },
    "comparison": {"methods": ("", ""), "rates": ("", ""), "seeds": ("", "")},
    "selection": {
        "selection_seed": ("", "seed of the selection and of the choice of calibration rows (default: --seed, else 0)"),
        "on_top": ("", ""),
        "init_adapter": ("", ""),
    },
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
        "neftune_noise_alpha": ("neftune", "noise on the embeddings while training (NEFTune)"),
        "loss_type": (
            "",
            "sft: nll or dft; dpo: sigmoid, ipo, ..., several with --loss-weights; grpo: dapo, grpo, ...",
        ),
        "assistant_only_loss": ("", "compute the loss on the assistant's turns of a chat only"),
        "completion_only_loss": ("", "compute the loss on the completion of prompt and completion only"),
        "seed": ("", "seed of the selection, of the order of the rows and of dropout"),
        "data_seed": ("", "seed of the order of the rows (default: the run's seed)"),
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
        "keep_memory": ("", ""),
        "kernels": ("", ""),
        "use_cpu": ("", "train on the CPU although there is a GPU"),
        "dataloader_num_workers": ("", "processes that prepare batches"),
        "deepspeed": ("", "a DeepSpeed configuration, a JSON file"),
        "fsdp": ("", "kinds of FSDP sharding"),
        "fsdp_config": ("", "an FSDP configuration, a JSON file"),
    },
}
TABLE: dict[str, Any] = dict(
    table=OPTIONS,
    groups={
        ModelOptions: "model",
        DataOptions: "data",
        S2FTConfig: "selection",
        RunOptions: "output",
        ForgettingOptions: "forgetting",
        CompareOptions: "comparison",
    },
    rest="more options of transformers and TRL",
    renamed={("S2FTConfig", "seed"): "selection_seed"},  # the seed of the run is another one
    required=(("model_name_or_path",), ("data", "dataset_name", "datasets"), ("output_dir",)),
)


# ---- the commands --------------------------------------------------------------------------------------


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a training command.

    Args:
        command: "sft", "dpo", "grpo" or "compare".
        arguments: Words of the command line after the command's name.
    """
    from s2ft.packages import check_packages

    check_packages(f"s2ft {command}")
    made = read_run(command, arguments)
    if command == "compare":
        from s2ft.train.comparing import compare_tuners

        compare_tuners(made, arguments)
        return
    from s2ft.train.run import train

    train(made, config_text)


def read_run(command: str, arguments: Sequence[str]):
    """Read the options of a training command from the command line and from the file of `--config`.

    The command line takes precedence over the file. An option has TRL's name, with dashes or underscores, and may have
    short names. The arguments are those of :func:`run`.

    Returns:
        The :class:`s2ft.train.run.Run`.

    Raises:
        UsageError: An option or a key is unknown, missing, given twice, or has a wrong value.
        SystemExit: The help was asked for and printed.
    """
    set_environment(arguments)  # before libraries are imported that read it
    quiet_transformers()
    parser = parser_of(command, "--help-all" in arguments)
    given = parser.given(arguments)
    if command != "compare":
        _take_lora(given, parser)
    filled = {**given, **_evaluation(given, parser)}
    if given.get("dataset_text_field", "text") != "text":  # TRL's name of the field with the text
        filled["field"] = [*given.get("field", []), f"text={given['dataset_text_field']}"]
    if "seed" in given:  # the selection has the seed that the run is given, unless it has its own
        filled.setdefault("selection_seed", given["seed"])
    model, data, config, trainer, options, forgetting, *_ = parser.objects(filled)
    from s2ft.train.methods import METHODS  # after all mistakes in the options, because they import much
    from s2ft.train.run import Run

    return Run(METHODS[LIKE.get(command, command)], model, data, config, trainer, options, forgetting, given)


@command(
    "Fine-tune SmolLM2-135M on generated arithmetic word problems.\n"
    "Score the model on held-out problems before and after.",
    """  s2ft demo
  s2ft demo --model HuggingFaceTB/SmolLM2-360M-Instruct --steps 200 --output bigger-demo""",
)
def run_demo(options: DemoOptions) -> None:
    from s2ft.train import demo

    demo.run_demo(options)


@cache
def parser_of(command: str, everything: bool = False) -> OptionParser:
    """Return the parser of a training command. With `everything` its help shows all options."""
    from trl import ModelConfig

    from s2ft.train.arguments import ARGUMENTS

    kinds = [ModelOptions, DataOptions, S2FTConfig, ARGUMENTS[LIKE.get(command, command)], RunOptions]
    kinds += [ForgettingOptions, *([CompareOptions] if command == "compare" else [])]
    # The options of `trl sft` that S²FT replaces. The help leaves them out.
    hidden = {"hidden": True}
    taken = [
        (one.name, one.type, field(default=None, metadata=hidden))
        for one in fields(ModelConfig)
        if one.name.startswith(("lora_", "use_")) and one.name != "use_bnb_nested_quant"
    ]
    lora = make_dataclass("LoraOptions", [*taken, (NOT_USED, bool, field(default=False, metadata=hidden))])
    return OptionParser(command, HELP[command][0], [*kinds, lora], HELP[command][1], **TABLE, everything=everything)


# ---- config.yaml ---------------------------------------------------------------------------------------


def config_text(run) -> str:
    """Return the text of config.yaml, which `--config` reads: the options that were given, also by their defaults.

    Other values, such as the rows of an update, depend on whether an option was given, not on its value alone.

    Args:
        run: The :class:`s2ft.train.run.Run`.
    """
    from importlib.metadata import version

    import yaml

    values = {key: value for key, value in run.given.items() if key not in NOT_WRITTEN}
    versions = ", ".join(f"{name} {version(name)}" for name in ("s2ft", "torch", "transformers", "trl", "datasets"))
    return f"# {versions}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)}"


# ---- options that follow from others -------------------------------------------------------------------


def _evaluation(given: dict[str, Any], parser: OptionParser) -> dict[str, Any]:
    """The options that follow from those of the evaluation: when to evaluate, and that the best checkpoint is kept."""
    found: dict[str, Any] = {}
    every, save = given.get("eval_steps"), given.get("save_strategy", "steps")
    best = given.get("load_best_model_at_end", bool(given.get("early_stopping_patience")))
    if best:
        found = {"load_best_model_at_end": True, "eval_strategy": "steps" if every or save == "best" else save}
    elif every:
        found = {"eval_strategy": "steps"}
    if every == 0:
        found["eval_steps"] = None
    if not every and {**found, **given}.get("eval_strategy") == "steps" and (best or "logging_steps" not in given):
        found["eval_steps"] = (
            given.get("save_steps") or parser.defaults["save_steps"]
        )  # transformers would take those of the log: 1
    if best and every and "save_steps" not in given:
        found["save_steps"] = every  # so that each evaluation has a checkpoint
    return {key: value for key, value in found.items() if key not in given or key == "eval_steps"}


def _take_lora(given: dict[str, Any], parser: OptionParser) -> None:
    """Turn the rank of a LoRA into the size of the selection, drop its other options, and log that."""
    found = {one.name: given.pop(one.name) for one in fields(parser.kinds[-1]) if one.name in given}
    if not found:
        return
    taken = {}
    sizes = ("match_lora_rank", "budget", "units", "init_adapter", *(f"{letter}_ratio" for letter in "qkvougdli"))
    if found.get("use_peft", True) and not any(name in given for name in sizes):
        taken = {"match_lora_rank": found["lora_r"]} if "lora_r" in found else {}
    if found.get("lora_modules_to_save") and "modules_to_save" not in given:
        taken["modules_to_save"] = found["lora_modules_to_save"]
    given.update(taken)
    ignored = [name for name in found if name not in ("use_peft", "lora_r" if "match_lora_rank" in taken else "",
               "lora_modules_to_save" if "modules_to_save" in taken else "")]  # fmt: skip
    said = [f"{key} {value}" for key, value in taken.items()]
    logger.info(
        "S²FT takes the place of LoRA%s%s",
        f": {', '.join(said)}" if said else "",
        f"; not used: {', '.join(ignored)}" if ignored else "",
    )
