"""s2ft generate: write one answer to the terminal, token by token."""

import sys
from dataclasses import dataclass
from pathlib import Path

from s2ft.cli.parse import ADAPTER, BASE_MODEL, DTYPE, parse, quiet_transformers
from s2ft.config import check_fields, option, refuse
from s2ft.text.models import DTYPES

DESCRIPTION = """Write one answer to a prompt.

The prompt is the message of a user, in the chat template that the adapter was trained with. Without adapter it is that
of the model; a model without one continues the text."""
EXAMPLE = """  s2ft generate --model meta-llama/Llama-3.2-1B-Instruct --adapter my-run --prompt "Hello!"
  s2ft generate --model my-model --prompt-file prompt.txt --temperature 0.7 --top-p 0.9"""


@dataclass
class SamplingArguments:
    """How `s2ft generate` and `s2ft chat` choose the tokens of an answer."""

    max_new_tokens: int = option(512, "longest answer", unit="tokens", least=1)
    temperature: float = option(0.0, "sampling temperature; 0 always takes the most likely token")
    top_p: float = option(
        1.0, "sample from the most likely tokens whose probabilities add up to this share", metavar="SHARE"
    )
    top_k: int = option(0, "sample from so many most likely tokens; 0 is all", least=0)
    min_p: float = option(
        0.0, "leave out tokens whose probability is below this share of the most likely one's", metavar="SHARE"
    )
    repetition_penalty: float = option(1.0, "above 1, tokens of the prompt and of the answer become less likely")
    seed: int | None = option(
        None, "seed of the sampling; the same seed gives the same answers", shown="another one each time"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        penalty, infinite = self.repetition_penalty, float("inf")
        refuse(
            (not 0 <= self.temperature < infinite, f"temperature must be 0 or above, got {self.temperature}"),
            (not 0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (not 0 <= self.min_p <= 1, f"min_p must be from 0 to 1, got {self.min_p}"),
            (not 0 < penalty < infinite, f"repetition_penalty must be above 0, got {penalty}"),
        )

    def sampler(self, seed: int | None = None):
        """Return the Sampler of an answer, with another seed if one is given."""
        from s2ft.text.running_batch import Sampler

        return Sampler(
            self.temperature,
            self.top_p,
            self.seed if seed is None else seed,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclass
class GenerateArguments:
    model: str | None = option(None, **BASE_MODEL)
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


def run_generate(arguments: list[str]) -> None:
    job, sampling = parse("generate", DESCRIPTION, [GenerateArguments, SamplingArguments], arguments, EXAMPLE)
    quiet_transformers()
    from s2ft.text.adapter_prompts import base_name, load_with_adapter
    from s2ft.text.chat import pieces
    from s2ft.text.encoding import context_length
    from s2ft.text.running_batch import Row, RunningBatch
    from s2ft.train.device import explain_out_of_memory, gpu_or_cpu, smaller_answers

    prompt = read_prompt(job)
    model, prompter = load_with_adapter(base_name(job.model, job.adapter), job.adapter, job.dtype)
    if job.chat or job.system is not None or (prompter.is_chat and not job.raw):
        ids = prompter.encode([{"role": "user", "content": prompt}], job.system)
    else:
        ids = prompter.encode_text(prompt)
    room = (context_length(model) or len(ids) + sampling.max_new_tokens) - len(ids)
    if room < 1:
        raise ValueError(f"the model's context is {room + len(ids)} tokens, and the prompt has {len(ids)}: shorten it")
    row, limit = Row(ids, sampling.sampler()), min(sampling.max_new_tokens, room)
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
        ValueError: There is no prompt, there are two, or it is empty or not valid text.
    """
    from s2ft.text.data.forms import check_unicode

    if (job.prompt is None) == (job.prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    try:
        prompt = job.prompt if job.prompt_file is None else Path(job.prompt_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file {job.prompt_file} is not UTF-8 text: {error}") from None
    prompt = sys.stdin.read() if job.prompt == "-" else prompt
    check_unicode(prompt, "prompt")  # Bytes of another encoding would fail later, in the tokenizer.
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt if job.prompt not in (None, "-") else prompt.removesuffix("\n")
