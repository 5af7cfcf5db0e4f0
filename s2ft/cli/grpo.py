"""s2ft grpo: train an adapter by the rewards of its own answers."""

import logging
from dataclasses import dataclass

from s2ft.cli.config_files import set_environment
from s2ft.cli.parse import quiet_transformers
from s2ft.train.options import option

logger = logging.getLogger(__name__)
DESCRIPTION = """Train an adapter by the rewards of its own answers.

A row has a prompt (text, messages or a question) and columns for the rewards, such as answer. The trainer is TRL's
GRPOTrainer: it generates several answers to each prompt, and answers with a higher reward than the others become more
likely. The options are those of s2ft sft and of TRL's GRPOConfig. --batch-size counts answers. With --use-vllm true
vLLM generates them, in this process or, with --vllm-mode server, on a server; it gets the trained slices alone.

--rewards answer_equal  1 for the answer of the column answer: a number, a letter or a text. It is read from
                        <answer>...</answer>, \\boxed{...} or ####, else from the end of the text
--rewards format        1 for a text that marks exactly one answer in one of these ways
--rewards FILE.py:NAME  a function of yours, with TRL's signature: f(completions, answer, **_) -> list of numbers"""
EXAMPLE = """  s2ft grpo --model my-model --data problems.jsonl --rewards answer_equal format --output my-run
  s2ft grpo --model my-model --data problems.jsonl --rewards mine.py:short --output my-run --num-generations 4"""


@dataclass
class RewardOptions:
    rewards: list[str] = option(
        [],
        "what answers are rewarded for: answer_equal, format, FILE.py:NAME, or FILE.py for all its rewards; their sum "
        "counts, weighted by --reward-weights",
        metavar="REWARD",
    )


def run(arguments: list[str]) -> None:
    from s2ft.packages import check_packages

    check_packages("s2ft grpo")
    set_environment(arguments)
    from s2ft.cli.sft import train
    from s2ft.cli.training import parse_training
    from s2ft.config import S2FTConfig
    from s2ft.text.data import DataOptions
    from s2ft.train.options import ForgettingOptions, ModelOptions, RunOptions
    from s2ft.train.rl_arguments import GRPOArguments

    quiet_transformers()
    kinds = [ModelOptions, DataOptions, RewardOptions, S2FTConfig, GRPOArguments, RunOptions, ForgettingOptions]
    parsed = parse_training("grpo", kinds, arguments, DESCRIPTION, EXAMPLE)
    train(parsed, GRPOArguments, _train)


def _train(parsed, folder, ranks, resume):
    from s2ft.cli.forgetting import meter_for, protect_batches, read_other
    from s2ft.cli.rl import read_rows
    from s2ft.cli.sft import begin, naming_what_is_kept
    from s2ft.config import S2FTConfig
    from s2ft.packages import check_packages
    from s2ft.text.data.preferences import PROMPTS
    from s2ft.text.drift import PromptRows
    from s2ft.train.device import say_device
    from s2ft.train.grpo import base_for_vllm, check_count, grpo, largest_batch
    from s2ft.train.loading import fit_layout, load_base
    from s2ft.train.memory import log_memory_of_batch
    from s2ft.train.options import ModelOptions, RunOptions
    from s2ft.train.out_of_memory import explain_out_of_memory
    from s2ft.train.rewards import check_columns, load_rewards
    from s2ft.train.rl_arguments import GRPOArguments
    from s2ft.train.rl_trainers import refuse_sharding
    from s2ft.train.sft import check_dtype, smaller_step

    arguments, options = parsed[GRPOArguments], parsed[RunOptions]
    refuse_sharding(arguments, "s2ft grpo")
    arguments.set_generation()
    if arguments.use_vllm:
        check_packages("use_vllm", "leave --use-vllm out: transformers generates the answers then")
    rewards = load_rewards(parsed[RewardOptions].rewards)
    _check_weights(arguments, rewards)
    train_rows, held_out_rows = read_rows(parsed, arguments, PROMPTS)
    other = read_other(parsed)
    if ranks.is_main_process:
        say_device(ranks.device)
    model, tokenizer = load_base(parsed[ModelOptions], arguments)
    check_dtype(model, arguments)
    prompt, rows, held_out, longest = _prompts(parsed, model, tokenizer, train_rows, held_out_rows, ranks)
    check_columns(rewards, rows.column_names)
    check_count(arguments, rows)
    config = parsed.objects[S2FTConfig] = fit_layout(parsed[S2FTConfig], model, "layout" in parsed.given)
    _refuse_calibration(config)
    if ranks.is_main_process and not resume:
        batch = largest_batch(arguments, longest)
        log_memory_of_batch(model, config, batch, arguments, chunked=True)

    with base_for_vllm(model, tokenizer, arguments) as base:
        meter = meter_for(parsed, other, model, tokenizer, PromptRows(held_out or rows, tokenizer))
        protect = protect_batches(parsed, other, model, tokenizer, arguments)
        begin("grpo", parsed, arguments, model, prompt, rows, folder, ranks, resume, protect=protect)
        settings = dict(options=options, resume=resume, held_out=held_out, base=base, meter=meter)
        with naming_what_is_kept(folder), explain_out_of_memory(smaller_step(arguments), folder.kept):
            return grpo(model, tokenizer, rows, rewards, arguments, folder, **settings)


def _refuse_calibration(config) -> None:
    from s2ft.text.calibration import needs_calibration

    if needs_calibration(config):
        raise ValueError(
            f"selection {config.selection} needs answers to calibrate on, and s2ft grpo has none: choose units with "
            "s2ft select, and give the file with units"
        )


def _check_weights(arguments, rewards) -> None:
    if arguments.reward_weights is not None and len(arguments.reward_weights) != len(rewards):
        raise ValueError(
            f"reward_weights has {len(arguments.reward_weights)} numbers for {len(rewards)} rewards "
            f"({', '.join(reward.title for reward in rewards)}): give one for each"
        )


def _prompts(parsed, model, tokenizer, train_rows, held_out_rows, ranks):
    """Choose the prompt's format, set it in the tokenizer, and leave out prompts that are too long.

    Returns:
        The format, the rows, the held-out rows or None, and the tokens of the longest prompt.
    """
    from s2ft.cli.rl import prompt_of
    from s2ft.text.data import DataOptions
    from s2ft.text.data.preferences import with_columns
    from s2ft.text.encoding import context_length
    from s2ft.train.rl_arguments import GRPOArguments

    prompt = prompt_of(tokenizer, train_rows, parsed[DataOptions])
    room = (context_length(model) or 1 << 30) - parsed[GRPOArguments].max_completion_length
    rows, longest = _fitting(with_columns(train_rows, prompt), tokenizer, room, ranks, "prompts")
    held_out, other = None, 0
    if held_out_rows is not None:
        rest = with_columns(held_out_rows, prompt)
        held_out, other = _fitting(rest, tokenizer, room, ranks, "prompts to evaluate on")
    arguments = parsed[GRPOArguments]
    if arguments.vllm_max_model_length is None:  # vLLM would keep room for the model's whole context
        arguments.vllm_max_model_length = max(longest, other) + arguments.max_completion_length
    return prompt, rows, held_out, longest


def _fitting(rows, tokenizer, room: int, ranks, what: str):
    """Leave out rows with a prompt of more than `room` tokens, and return also the tokens of the longest one."""
    from s2ft.text.prompts import encode_prompt

    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    kept = [number for number, length in enumerate(lengths) if length <= room]
    left = len(rows) - len(kept)
    if not kept:
        raise ValueError(
            f"none of {len(rows)} prompts fits into the {room} tokens that the context leaves for a prompt"
        )
    if ranks.is_main_process:
        note = f"; {left} left out, longer than the {room} tokens that the context leaves for a prompt" if left else ""
        logger.info("%d %s%s", len(kept), what, note)
    return rows.select(kept) if left else rows, max(lengths[number] for number in kept)
