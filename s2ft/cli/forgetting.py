"""What `s2ft eval` does about forgetting: read other text, and measure how far an adapter has moved its base."""

from collections.abc import Sequence
from typing import Any


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
    from s2ft.text.drift import DriftMeter, longest_other_row, text_rows

    texts = None if other is None else text_rows(other, prompter.tokenizer, longest_other_row(model), job.meter_rows)
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
