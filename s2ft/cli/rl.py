"""What s2ft dpo and s2ft grpo share: reading their rows, and the format of their prompts."""


def read_rows(parsed, arguments, shape):
    """Read the training rows and the held-out rows.

    Args:
        parsed: The options of the command.
        arguments: The trainer's arguments.
        shape: The kind of rows.

    Raises:
        ValueError: Rows can't be used, the run evaluates without held-out rows, or an option is for s2ft sft only.
    """
    from s2ft.text.data import DataOptions
    from s2ft.text.data.loading import load_split
    from s2ft.train.options import RunOptions

    data, options = parsed[DataOptions], parsed[RunOptions]
    for name, value in (
        ("streaming", data.is_streamed),
        ("eval_task", options.eval_task),
        ("last_answer_only", data.last_answer_only),
    ):
        if value:
            raise ValueError(f"{name} is an option of s2ft sft, which this command does not have: leave it out")
    evaluates = arguments.eval_strategy != "no"
    train, held_out = load_split(
        data, seed=arguments.seed, evaluates=evaluates, eval_limit=options.eval_limit, shape=shape
    )
    if held_out is None and (evaluates or options.eval_limit is not None):
        name = "eval_limit" if options.eval_limit else "eval_strategy"
        raise ValueError(f"{name} needs held-out rows: give eval_data or test_split_size")
    return train, held_out


def prompt_of(tokenizer, rows, data):
    """Return the format of the prompts of rows, and set its template in the tokenizer."""
    from s2ft.text.prompts import prompt_for_rows

    prompt = prompt_for_rows(tokenizer, rows, data)
    prompt.apply_to(tokenizer)
    return prompt
