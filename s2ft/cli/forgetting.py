"""What the commands do about forgetting: read other text, make the meter of a run, and the batches to protect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OtherText:
    """Rows of text that are not trained on.

    Attributes:
        measured: Rows on which the loss is measured, or None.
        protected: Rows for which the base needs its units, or None.
    """

    measured: Any = None
    protected: Any = None


def read_other(parsed: Any) -> OtherText:
    """Read the files of `--forgetting-data` and `--protect`, before a model is loaded.

    Args:
        parsed: The options of a training command.

    Raises:
        ValueError: A file can't be read.
    """
    from s2ft.config import S2FTConfig
    from s2ft.text.data import DataOptions
    from s2ft.text.drift import read_texts
    from s2ft.train.options import ForgettingOptions

    data, options, seed = parsed[DataOptions], parsed[ForgettingOptions], parsed[S2FTConfig].seed

    def rows(names: list[str], most: int) -> Any:
        if not names:
            return None
        return read_texts(DataOptions(data=names, field=data.field, skip_bad_rows=data.skip_bad_rows), most, seed)

    return OtherText(rows(options.forgetting_data, options.meter_rows), rows(options.protect, options.protect_rows))


def meter_for(parsed: Any, other: OtherText, model, tokenizer, rows):
    """Make the meter of a run, or return None if nothing is to be measured.

    Args:
        parsed: The options of a training command.
        other: The other text.
        model: The model.
        tokenizer: Its tokenizer, with the template of the training.
        rows: Token rows with the prompts of the task.
    """
    from s2ft.config import S2FTConfig
    from s2ft.text.drift import answer_rows, prompt_rows, prompts_of, text_rows
    from s2ft.train.forgetting import ForgettingMeter
    from s2ft.train.options import ForgettingOptions, RunOptions

    options, seed = parsed[ForgettingOptions], parsed[S2FTConfig].seed
    if not options.measures:
        return None
    texts = (
        None
        if other.measured is None
        else text_rows(other.measured, tokenizer, _longest(model), options.meter_rows, seed)
    )
    prompts: Any = prompt_rows(rows, options.meter_rows, seed) if options.measures_kl else None
    if options.measures_kl and options.kl_on == "answers":
        questions, length = prompts_of(rows, options.meter_rows, seed), parsed[RunOptions].max_new_tokens

        def prompts(model):
            return answer_rows(model, tokenizer, questions, length)

    return ForgettingMeter(
        other=texts,
        prompts=prompts,
        every=options.meter_steps,
        stop_at_forgetting=options.stop_at_forgetting,
        stop_at_kl=options.stop_at_kl,
    )


def protect_batches(parsed: Any, other: OtherText, model, tokenizer, arguments):
    """Return batches of the text to protect, or None without any.

    Args:
        parsed: The options of a training command.
        other: The other text.
        model: The model.
        tokenizer: Its tokenizer.
        arguments: The trainer's arguments, with the rows of a forward pass.
    """
    from s2ft.config import S2FTConfig
    from s2ft.text.calibration import batches_of
    from s2ft.text.drift import text_rows
    from s2ft.train.options import ForgettingOptions

    if other.protected is None:
        return None
    options, seed = parsed[ForgettingOptions], parsed[S2FTConfig].seed
    rows = text_rows(other.protected, tokenizer, _longest(model), options.protect_rows, seed)
    return batches_of(rows, tokenizer, arguments.per_device_train_batch_size)


def _longest(model) -> int:
    """Longest row of other text: the context, but at most 1024 tokens, as in training."""
    from s2ft.text.encoding import context_length

    return min(context_length(model) or 1024, 1024)


# ---- s2ft eval -----------------------------------------------------------------------------------------


def read_other_text(job: Any, reading: Any) -> Any:
    """Read the text of `s2ft eval --forgetting`, before a model is loaded. Returns None without any.

    Args:
        job: The options of the command.
        reading: How the data is read.
    """
    from s2ft.text.drift import read_texts

    return read_texts(reading.of(job.forgetting, "test"), job.meter_rows) if job.forgetting else None


def measure_drift(job: Any, model, prompter, other: Any, examples: Sequence) -> dict[str, Any]:
    """Measure how far the loaded adapter has moved the model from its base, and print it.

    Args:
        job: The options of `s2ft eval`.
        model: The model with the adapter.
        prompter: What makes the prompts.
        other: The other text, as :func:`read_other_text` returns it.
        examples: The rows whose prompts are used for the divergence.

    Returns:
        The values for the JSON file, nothing if nothing was asked for.
    """
    if not job.forgetting and not job.kl:
        return {}
    from s2ft.text.drift import DriftMeter, text_rows

    texts = None if other is None else text_rows(other, prompter.tokenizer, _longest(model), job.meter_rows)
    prompts = _prompt_rows(job, model, prompter, examples) if job.kl else None
    meter = DriftMeter(model, other=texts, prompts=prompts, batch_size=min(8, job.batch_size))
    drift = meter.measure(model)
    print(drift)
    base = {} if meter.base_loss is None else {"base_loss": meter.base_loss}
    on = {"kl_on": job.kl_on, "positions": meter.distributions.positions} if job.kl else {}
    return {"drift": {**base, **drift.to_dict(), **on}}


def _prompt_rows(job: Any, model, prompter, examples: Sequence) -> list[dict[str, Any]]:
    """Return the rows on which the divergence is measured."""
    from s2ft.text.drift import answer_rows, drawn, prompt_rows, row_of_prompt
    from s2ft.text.encoding import context_length, encode_prompts

    answers = job.kl_on == "answers"
    room = (context_length(model) or 1 << 30) - (job.max_new_tokens if answers else 1)
    some = [examples[number] for number in drawn(len(examples), job.meter_rows, 0)]
    prompts = [ids for ids in encode_prompts(prompter.tokenizer, some, room, prompter.format) if ids is not None]
    if answers:
        return answer_rows(model, prompter.tokenizer, prompts, job.max_new_tokens)
    return prompt_rows([row_of_prompt(ids) for ids in prompts], len(prompts))
