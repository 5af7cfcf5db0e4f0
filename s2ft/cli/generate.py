"""s2ft generate: write one answer to the terminal, token by token."""

import sys
from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, DTYPE, MODEL, parse, quiet_transformers
from s2ft.cli.sampling import SamplingArguments
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option

DESCRIPTION = """Write one answer to a prompt.

The prompt is the message of a user, in the chat template that the adapter was trained with. Without adapter it is that
of the model; a model without one continues the text."""
EXAMPLE = """  s2ft generate --model meta-llama/Llama-3.2-1B-Instruct --adapter my-run --prompt "Hello!"
  s2ft generate --model my-model --prompt-file prompt.txt --temperature 0.7 --top-p 0.9"""


@dataclass
class GenerateArguments:
    model: str = option(text=MODEL)
    adapter: str | None = option(None, ADAPTER, metavar="ADAPTER")
    prompt: str | None = option(None, "the user's message; - reads it from stdin", metavar="TEXT")
    prompt_file: str | None = option(None, "a text file with the prompt", metavar="FILE")
    system: str | None = option(None, "system prompt", shown="the one of the training, if it had one", metavar="TEXT")
    raw: bool = option(False, "continue the prompt as it is, without the chat template")
    chat: bool = option(False, "use the chat template also for an adapter that was trained on plain text")
    dtype: str = option("auto", DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.raw and (self.chat or self.system is not None):
            raise ValueError(f"raw is without a chat template, so there is no {'chat' if self.chat else 'system'}")


def run(arguments: list[str]) -> None:
    job, sampling = parse("generate", DESCRIPTION, [GenerateArguments, SamplingArguments], arguments, EXAMPLE)
    quiet_transformers()
    generate(job, sampling)


def generate(job: GenerateArguments, sampling: SamplingArguments) -> None:
    """Print the answer while it is generated.

    Raises:
        ValueError: An option is wrong, the model can't be loaded, or the generation failed.
    """
    from s2ft.text.adapter_prompts import load_with_adapter
    from s2ft.text.chat import pieces
    from s2ft.text.running_batch import Row, RunningBatch
    from s2ft.train.device import explain_out_of_memory, gpu_or_cpu, smaller_answers

    prompt = read_prompt(job)
    model, prompter = load_with_adapter(job.model, job.adapter, job.dtype)
    row = Row(prompt_ids(prompter, prompt, job), sampling.sampler())
    limit = longest_answer(model, len(row.prompt), sampling.max_new_tokens)
    with explain_out_of_memory(smaller_answers(1, str(model.dtype))):
        batch: RunningBatch[Row] = RunningBatch(model.to(gpu_or_cpu()))
        batch.admit([row])
        for piece in pieces(batch, row, prompter.tokenizer, prompter.ends, limit):
            print(piece, end="", flush=True)
    print()
    if limit < sampling.max_new_tokens and len(row.tokens) == limit and row.tokens[-1] not in prompter.ends:
        print(f"(cut after {limit} tokens: the model's context is full)", file=sys.stderr)


def read_prompt(job: GenerateArguments) -> str:
    """Read the prompt from the option, the file or stdin, without the last line break of the latter two.

    Raises:
        ValueError: There is no prompt, there are two, or it is not valid text.
    """
    from pathlib import Path

    from s2ft.text.evaluation import check_unicode

    if job.prompt is not None and job.prompt_file is None:
        prompt = sys.stdin.read().removesuffix("\n") if job.prompt == "-" else job.prompt
        check_unicode(prompt, "prompt")  # Bytes of another encoding would fail later, in the tokenizer.
        return prompt
    if job.prompt is not None or job.prompt_file is None:
        raise ValueError("give either --prompt or --prompt-file")
    try:
        return Path(job.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file {job.prompt_file} is not UTF-8 text: {error}") from None


def prompt_ids(prompter, prompt: str, job: GenerateArguments) -> list[int]:
    """Return the tokens of the prompt. Raises ValueError if it is empty."""
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    if job.chat or job.system is not None or (prompter.is_chat and not job.raw):
        return prompter.encode([{"role": "user", "content": prompt}], job.system)
    return prompter.encode_text(prompt)


def longest_answer(model, prompt: int, new: int) -> int:
    """Return `new`, or what the model's context leaves for an answer to `prompt` tokens.

    Raises:
        ValueError: It leaves nothing.
    """
    from s2ft.text.encoding import context_length

    context = context_length(model)
    if context is not None and prompt >= context:
        raise ValueError(f"the model's context is {context} tokens, and the prompt has {prompt}: shorten it")
    return new if context is None else min(new, context - prompt)
