"""s2ft dpo: train an adapter on preferences."""

import logging

from s2ft.cli.config_files import set_environment
from s2ft.cli.parse import quiet_transformers

logger = logging.getLogger(__name__)
DESCRIPTION = """Train an adapter on preferences: pairs of a better and a worse answer to a prompt.

A row has chosen and rejected, and a prompt: text, messages, a ShareGPT chat or a question. The trainer is TRL's
DPOTrainer. Its reference model is the model without the adapter, so that one model is in memory.
The options are those of s2ft sft and of TRL's DPOConfig."""
EXAMPLE = """  s2ft dpo --model my-model --data preferences.jsonl --output my-run --beta 0.1
  s2ft dpo --config my-run/config.yaml --output another-run --lr 2e-5"""


def run(arguments: list[str]) -> None:
    from s2ft.packages import check_packages

    check_packages("s2ft dpo")
    set_environment(arguments)
    from s2ft.cli.sft import train
    from s2ft.cli.training import parse_training
    from s2ft.config import S2FTConfig
    from s2ft.text.data import DataOptions
    from s2ft.train.options import ForgettingOptions, ModelOptions, RunOptions
    from s2ft.train.rl_arguments import DPOArguments

    quiet_transformers()
    kinds = [ModelOptions, DataOptions, S2FTConfig, DPOArguments, RunOptions, ForgettingOptions]
    parsed = parse_training("dpo", kinds, arguments, DESCRIPTION, EXAMPLE)
    train(parsed, DPOArguments, _train)


def _train(parsed, folder, ranks, resume):
    from s2ft.cli.forgetting import meter_for, protect_batches, read_other
    from s2ft.cli.sft import begin, naming_what_is_kept
    from s2ft.config import S2FTConfig
    from s2ft.text.calibration import calibration_for
    from s2ft.text.pairs import ChosenRows, longest_batch
    from s2ft.train.device import say_device
    from s2ft.train.dpo import dpo
    from s2ft.train.loading import fit_layout, load_base
    from s2ft.train.memory import log_memory_of_batch
    from s2ft.train.options import ModelOptions, RunOptions
    from s2ft.train.out_of_memory import explain_out_of_memory
    from s2ft.train.rl_arguments import DPOArguments
    from s2ft.train.rl_trainers import refuse_sharding
    from s2ft.train.sft import check_dtype, smaller_step

    arguments, options = parsed[DPOArguments], parsed[RunOptions]
    refuse_sharding(arguments, "s2ft dpo")
    train_rows, held_out_rows = _read(parsed)
    other = read_other(parsed)
    if ranks.is_main_process:
        say_device(ranks.device)
    model, tokenizer = load_base(parsed[ModelOptions], arguments)
    check_dtype(model, arguments)
    prompt, rows, held_out = _encode(parsed, model, tokenizer, train_rows, held_out_rows, ranks)
    config = parsed.objects[S2FTConfig] = fit_layout(parsed[S2FTConfig], model, "layout" in parsed.given)
    micro = arguments.per_device_train_batch_size
    calibration = calibration_for(config, tokenizer, ChosenRows(rows), options.calibration_examples, micro)
    if ranks.is_main_process and not resume:
        log_memory_of_batch(model, config, longest_batch(rows, tokenizer, micro), arguments, chunked=True)
    meter = meter_for(parsed, other, model, tokenizer, ChosenRows(rows if held_out is None else held_out))
    protect = protect_batches(parsed, other, model, tokenizer, arguments)
    begin("dpo", parsed, arguments, model, prompt, rows, folder, ranks, resume, calibration, protect)

    with naming_what_is_kept(folder), explain_out_of_memory(smaller_step(arguments), folder.kept):
        settings = {"options": options, "resume": resume, "held_out": held_out, "meter": meter}
        return dpo(model, tokenizer, rows, arguments, folder, **settings)


def _read(parsed):
    from s2ft.cli.rl import read_rows
    from s2ft.text.data.preferences import PAIRS
    from s2ft.train.rl_arguments import DPOArguments

    return read_rows(parsed, parsed[DPOArguments], PAIRS)


def _encode(parsed, model, tokenizer, train_rows, held_out_rows, ranks):
    """Choose the prompt's format, set it in the tokenizer, and convert the pairs to tokens."""
    from s2ft.cli.rl import prompt_of
    from s2ft.text.data import DataOptions
    from s2ft.text.encoding import context_length
    from s2ft.text.pairs import encode_pairs
    from s2ft.train.rl_arguments import DPOArguments

    data, arguments = parsed[DataOptions], parsed[DPOArguments]
    prompt = prompt_of(tokenizer, train_rows, data)
    arguments.max_length = min(arguments.max_length or 1 << 30, context_length(model) or 1 << 30)
    how = {
        "max_length": arguments.max_length,
        "too_long": data.too_long,
        "skip_bad_rows": data.skip_bad_rows,
        "processes": arguments.dataset_num_proc,
    }
    rows = encode_pairs(train_rows, tokenizer, prompt, **how)
    if ranks.is_main_process:
        logger.info(str(rows))
    held_out = None if held_out_rows is None else encode_pairs(held_out_rows, tokenizer, prompt, **how).dataset
    return prompt, rows.dataset, held_out
