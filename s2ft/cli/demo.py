"""s2ft demo: fine-tune a small model from start to finish."""

from s2ft.cli.parse import parse, quiet_transformers
from s2ft.train.options import DemoOptions

EXAMPLE = """  s2ft demo
  s2ft demo --model HuggingFaceTB/SmolLM2-360M-Instruct --steps 200 --output bigger-demo"""


def run(arguments: list[str]) -> None:
    (options,) = parse(
        "demo",
        "Fine-tune SmolLM2-135M on generated arithmetic word problems.\n"
        "Score the model on held-out problems before and after.",
        [DemoOptions],
        arguments,
        EXAMPLE,
    )
    quiet_transformers()
    from s2ft.train.demo import run_demo

    run_demo(options)
