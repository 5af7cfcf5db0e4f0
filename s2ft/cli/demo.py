"""s2ft demo: fine-tune a small model from start to finish."""

from s2ft.cli.parse import parse, quiet_transformers


def run(arguments: list[str]) -> None:
    from s2ft.train.demo import DemoOptions, run_demo

    (options,) = parse(
        "demo",
        "Fine-tune SmolLM2-135M on generated arithmetic word problems and score it, before and "
        "after, on held-out ones.",
        [DemoOptions],
        arguments,
    )
    quiet_transformers()
    run_demo(options)
