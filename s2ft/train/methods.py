"""What `s2ft sft`, `s2ft dpo` and `s2ft grpo` do differently from each other."""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any

from s2ft.config import refuse
from s2ft.packages import check_packages
from s2ft.text.collator import calibration_for, needs_calibration
from s2ft.text.data.rows import EXAMPLES, PAIRS, PROMPTS, Shape, load_split
from s2ft.text.divergence import row_of_prompt
from s2ft.text.encoding import UNLIMITED, context_length, encode_pairs, token_row, tokenize_rows
from s2ft.text.evaluation import HeldOut, compare, examples_of, fitting, right_answer
from s2ft.text.prompts import PromptFormat, encode_prompt, prompt_for_rows, with_columns
from s2ft.train.fit import Finetuned, check_dtype, dpo, grpo, log_errors, sft
from s2ft.train.output import write_json
from s2ft.train.parallel import check_divided_rows, devices_of
from s2ft.train.rewards import check_columns, load_rewards
from s2ft.train.run import Encoded, Run
from s2ft.train.trainers import refuse_sharding

ENOUGH, MOST_HELD_OUT = 100, 64  # rows of which s2ft sft holds some out by itself: a twentieth, at most so many
FOR_SFT = "is an option of s2ft sft, which this command does not have: leave it out"


class Method(ABC):
    """What one training command does differently from the others.

    Attributes:
        name: Name of the command.
        fits_batch: Whether fewer rows make an update where there are few of them.
        suggests_rate: Whether the learning rate of a run that names none follows from the model and what is trained.
        shape: What the rows of the data have.
    """

    name: str
    fits_batch = True
    suggests_rate = False
    shape: Shape = EXAMPLES

    def check(self, run: Run) -> None:
        """Check the options before anything is read. Raises ValueError."""
        metric = str(run.arguments.metric_for_best_model).removeprefix("eval_")
        refuse(
            (
                run.options.early_stopping_patience and not run.arguments.load_best_model_at_end,
                "early_stopping_patience keeps the best checkpoint: leave load_best_model_at_end out",
            ),
            (
                run.arguments.load_best_model_at_end and run.arguments.save_strategy == "no",
                "load_best_model_at_end needs checkpoints: leave out save_strategy no, and save_steps 0",
            ),
            (metric == "accuracy" and not run.options.eval_task, "metric_for_best_model accuracy needs eval_task"),
            (
                run.method.name == "sft" and metric not in ("None", "loss", "accuracy"),
                f"metric_for_best_model must be loss or accuracy, got {metric}",
            ),
        )

    def read(self, run: Run) -> tuple[Any, Any]:
        """Return the training rows, and the held-out rows or None.

        Raises:
            ValueError: Rows can't be used, or the run evaluates without held-out rows.
        """
        arguments, options = run.arguments, run.options
        evaluates = options.eval_task is not None or arguments.eval_strategy != "no"
        rows, held_out = load_split(
            run.data, seed=arguments.seed, evaluates=evaluates, eval_limit=options.eval_limit, shape=self.shape
        )
        if held_out is None and (evaluates or options.eval_limit is not None):
            name = "eval_task" if options.eval_task else "eval_limit" if options.eval_limit else "an evaluation"
            raise ValueError(
                f"{name} needs held-out rows: give eval_data, test_split_size, or one data set that has a split "
                f"{run.data.dataset_test_split!r}"
            )
        return rows, held_out

    def prompt(self, run: Run, model, tokenizer, rows) -> PromptFormat:
        """Return the format of the prompts of rows, and set its template in the tokenizer."""
        check_dtype(model, run.arguments)
        prompt = prompt_for_rows(tokenizer, rows, run.data)
        has_prompts = "prompt" in rows.column_names and any(found is not None for found in rows["prompt"])
        if prompt.form == "text" and run.data.form == "auto" and tokenizer.chat_template and has_prompts:
            run.say("the prompts are plain text, so the model's chat template is not used: --form chat uses it")
        prompt.apply_to(tokenizer)
        return prompt

    @abstractmethod
    def encode(self, run: Run, model, tokenizer, rows, held_out) -> Encoded:
        """Choose the prompt's format, set it in the tokenizer, and convert the rows."""

    def calibration(self, run: Run, tokenizer, data: Encoded) -> Any:
        """Return batches for a selection by statistics, or None if the selection needs none."""
        convert, size = partial(self.token_row, tokenizer), run.arguments.per_device_train_batch_size
        return calibration_for(run.config, tokenizer, data.rows, run.options.calibration_examples, size, convert)

    def token_row(self, tokenizer, row) -> Any:
        """Return an encoded row as a token row whose labels are one answer."""
        return row

    @abstractmethod
    def train(self, run: Run, model, tokenizer, data: Encoded, **how: Any) -> Finetuned:
        """Train the attached model and save its adapter."""


def _room(run: Run, model) -> int:
    """Tokens of the longest row."""
    return min(run.arguments.max_length or UNLIMITED, context_length(model))


class SFT(Method):
    """Rows of prompt and answer, whose answers are learned."""

    name = "sft"
    suggests_rate = True

    def read(self, run: Run) -> tuple[Any, Any]:
        task, arguments = run.options.eval_task, run.arguments
        rows, held_out = super().read(run)
        size = min(MOST_HELD_OUT, len(rows) // 20) if len(rows) >= ENOUGH else 0
        if held_out is None and run.data.test_split_size is None and size:
            rows, held_out = rows.train_test_split(size, seed=arguments.seed).values()
            run.say(
                f"{size} of {len(rows) + size} rows are held out, to compare the base and the adapter; "
                "--test-split-size 0 trains on all"
            )
        if task is not None:
            for example in examples_of(held_out):
                right_answer(example, task)
        return (rows.shuffle(seed=arguments.seed) if arguments.shuffle_dataset else rows), held_out

    def encode(self, run: Run, model, tokenizer, rows, held_out) -> Encoded:
        data, arguments, options = run.data, run.arguments, run.options
        prompt = self.prompt(run, model, tokenizer, rows)
        how = {
            "max_length": _room(run, model),
            "too_long": data.too_long,
            "loss_on": "last" if data.last_answer_only else "assistant" if arguments.assistant_only_loss else "all",
            "completion_only": arguments.completion_only_loss is not False,
            "skip_bad_rows": data.skip_bad_rows,
            "processes": arguments.dataset_num_proc,
        }
        tokens = tokenize_rows(rows, tokenizer, prompt, **how)
        run.say(str(tokens))
        check_divided_rows(model, arguments)
        if held_out is None:
            return Encoded(prompt, tokens.dataset)
        examples = list(examples_of(held_out)) if options.eval_task else ()
        others = tokenize_rows(held_out, tokenizer, prompt, **how).dataset
        scored = HeldOut(others, examples, options.eval_task, options.max_new_tokens, prompt)
        return Encoded(prompt, tokens.dataset, scored)

    def train(self, run: Run, model, tokenizer, data: Encoded, **how: Any):
        result = sft(model, tokenizer, data.rows, run.arguments, run.folder, **how)
        if data.held_out is None or not result.finished or devices_of(run.arguments).count > 1:
            return result
        with log_errors("the base and the adapter were not compared"):
            size = run.arguments.per_device_train_batch_size
            result = replace(result, comparison=compare(model, tokenizer, data.held_out.rows, batch_size=size))
            write_json(run.folder.report, result.to_dict())
        return result


class RL(Method):
    """What DPO and GRPO share: they need whole models."""

    def check(self, run: Run) -> None:
        super().check(run)
        refuse_sharding(run.arguments, f"s2ft {self.name}")
        refuse(
            (run.options.eval_task, f"eval_task {FOR_SFT}"), (run.data.last_answer_only, f"last_answer_only {FOR_SFT}")
        )


class DPO(RL):
    """Pairs of a better and a worse answer."""

    name = "dpo"
    shape = PAIRS

    def encode(self, run: Run, model, tokenizer, rows, held_out) -> Encoded:
        data, arguments = run.data, run.arguments
        prompt = self.prompt(run, model, tokenizer, rows)
        arguments.max_length = _room(run, model)
        how = {
            "max_length": arguments.max_length,
            "too_long": data.too_long,
            "skip_bad_rows": data.skip_bad_rows,
            "processes": arguments.dataset_num_proc,
        }
        pairs = encode_pairs(rows, tokenizer, prompt, **how)
        run.say(str(pairs))
        others = None if held_out is None else encode_pairs(held_out, tokenizer, prompt, **how).dataset
        return Encoded(prompt, pairs.dataset, others)

    def token_row(self, tokenizer, row) -> Any:
        return token_row(row, "chosen_ids")

    def train(self, run: Run, model, tokenizer, data: Encoded, **how: Any):
        return dpo(model, tokenizer, data.rows, run.arguments, run.folder, **how)


class GRPO(RL):
    """Prompts, whose answers by the model are rewarded."""

    name = "grpo"
    fits_batch = False  # it counts answers, and there are several to each row
    shape = PROMPTS

    def check(self, run: Run) -> None:
        super().check(run)
        arguments = run.arguments
        arguments.set_generation()
        if arguments.use_vllm:
            check_packages("use_vllm", "leave --use-vllm out: transformers generates the answers then")
        rewards = load_rewards(arguments.rewards)
        weights = rewards if arguments.reward_weights is None else arguments.reward_weights
        refuse(
            (
                len(weights) != len(rewards),
                f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards "
                f"({', '.join(reward.title for reward in rewards)}): give one for each",
            ),
            (
                run.options.init_adapter is None and needs_calibration(run.config),
                f"selection {run.config.selection} needs answers to calibrate on, and s2ft grpo has none: choose units "
                "with s2ft select, and give the file with units",
            ),
        )

    def encode(self, run: Run, model, tokenizer, rows, held_out) -> Encoded:
        arguments = run.arguments
        prompt = self.prompt(run, model, tokenizer, rows)
        room = context_length(model) - arguments.max_completion_length
        kept, longest = _fitting(with_columns(rows, prompt), tokenizer, room, run, "prompts")
        others, other = None, 0
        if held_out is not None:
            others, other = _fitting(with_columns(held_out, prompt), tokenizer, room, run, "prompts to evaluate on")
        if arguments.vllm_max_model_length is None:  # vLLM would keep room for the model's whole context
            arguments.vllm_max_model_length = max(longest, other) + arguments.max_completion_length
        rewards = load_rewards(arguments.rewards)
        check_columns(rewards, kept.column_names)
        if others is not None:
            check_columns(rewards, others.column_names)
            compared = arguments.num_generations_eval or arguments.num_generations  # answers to one prompt
            step = compared // math.gcd(compared, arguments.world_size)
            arguments.per_device_eval_batch_size = -(-arguments.per_device_eval_batch_size // step) * step
        needed = arguments.generation_batch_size // arguments.num_generations
        if len(kept) < needed:
            raise ValueError(
                f"there {'is 1 prompt' if len(kept) == 1 else f'are {len(kept)} prompts'}, and each generation takes "
                f"{needed} (generation_batch_size {arguments.generation_batch_size} divided by num_generations "
                f"{arguments.num_generations}): lower batch_size or raise num_generations"
            )
        return Encoded(prompt, kept, others)

    def token_row(self, tokenizer, row) -> Any:
        return row_of_prompt(encode_prompt(tokenizer, row["prompt"]))

    def train(self, run: Run, model, tokenizer, data: Encoded, **how: Any):
        arguments = run.arguments
        return grpo(model, tokenizer, data.rows, load_rewards(arguments.rewards), arguments, run.folder, **how)


def _fitting(rows, tokenizer, room: int, run: Run, what: str):
    """Leave out rows with a prompt of more than `room` tokens, and return also the tokens of the longest one."""
    lengths = [len(encode_prompt(tokenizer, row["prompt"])) for row in rows]
    kept = fitting(lengths, room)
    run.say(f"{len(kept)} {what}")
    return rows.select(kept), max(lengths[number] for number in kept)


METHODS = {method.name: method for method in (SFT(), DPO(), GRPO())}
