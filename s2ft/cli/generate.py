"""s2ft generate: write one answer to the terminal, token by token."""

from dataclasses import dataclass

from s2ft.cli.parse import ADAPTER, DTYPE, MODEL, parse, quiet_transformers
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option

EXAMPLE = """  s2ft generate --model meta-llama/Llama-3.2-1B-Instruct --adapter my-run --chat --prompt "Hello!"
  s2ft generate --model my-model --prompt-file prompt.txt --temperature 0.7 --top-p 0.9"""


@dataclass
class GenerateArguments:
    model: str = option(text=MODEL)
    adapter: str | None = option(None, ADAPTER, metavar="DIR")
    prompt: str | None = option(None, "the text to continue; - reads it from stdin", metavar="TEXT")
    prompt_file: str | None = option(None, "a text file with the prompt", metavar="FILE")
    max_new_tokens: int = option(256, "longest answer", unit="tokens", least=1)
    temperature: float = option(0.0, "sampling temperature; 0 always takes the most likely token")
    top_p: float = option(
        1.0, "sample from the most likely tokens whose probabilities add up to this share", metavar="SHARE"
    )
    seed: int | None = option(
        None, "seed of the sampling; the same seed gives the same answer", shown="another one each time"
    )
    chat: bool = option(False, "put the prompt into the chat template as the message of a user")
    dtype: str = option("auto", DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        check_fields(self)


def run(arguments: list[str]) -> None:
    (job,) = parse("generate", "Write one answer to a prompt.", [GenerateArguments], arguments, EXAMPLE)
    quiet_transformers()
    generate(job)


def generate(job: GenerateArguments) -> None:
    """Print the answer while it is generated.

    Raises:
        ValueError: An option is wrong, the model can't be loaded, or the generation failed.
    """
    import s2ft
    from s2ft.text.models import dtype_of_base, load_model
    from s2ft.text.prompts import end_ids
    from s2ft.text.running_batch import Row, RunningBatch
    from s2ft.text.sampling import Sampler
    from s2ft.text.streams import TextStream
    from s2ft.train.device import gpu_or_cpu

    prompt = read_prompt(job)
    check(job)
    dtype = dtype_of_base(s2ft.read_adapter(job.adapter), job.dtype) if job.adapter else job.dtype
    model, tokenizer = load_model(job.model, dtype)
    row = Row(prompt_ids(tokenizer, prompt, job.chat), Sampler(job.temperature, job.top_p, job.seed))
    check_room(model, len(row.prompt), job.max_new_tokens)
    if job.adapter:
        s2ft.load_adapter(model, job.adapter)
    batch: RunningBatch[Row] = RunningBatch(model.to(gpu_or_cpu()))
    text, ends = TextStream(tokenizer), set(end_ids(tokenizer, model.generation_config))
    batch.admit([row])
    while not row.failed and row.tokens[-1] not in ends:
        print(text.push(row.tokens[-1]), end="", flush=True)
        if len(row.tokens) == job.max_new_tokens:
            break
        batch.step()
    if row.failed:
        raise ValueError(row.failed)
    print(text.flush())


def read_prompt(job: GenerateArguments) -> str:
    """Read the prompt from the option, the file or stdin, without the last line break of the latter two.

    Raises:
        ValueError: There is no prompt, there are two, or it is not valid text.
    """
    import sys
    from pathlib import Path

    from s2ft.text.examples import check_unicode

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


def check(job: GenerateArguments) -> None:
    """Raise ValueError for a temperature or a share that sampling can't use."""
    if not 0 <= job.temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, got {job.temperature}")
    if not 0 < job.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {job.top_p}")


def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """Return the tokens of the prompt, without an end token. Raises ValueError if there are none."""
    from s2ft.text.prompts import encode_prompt

    if chat:
        return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    ids = tokenizer(prompt)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def check_room(model, prompt: int, new: int) -> None:
    """Raise ValueError if `prompt` tokens and `new` ones are more than the model's context."""
    from s2ft.text.encoding import context_length

    context = context_length(model)
    if context is not None and prompt + new > context:
        raise ValueError(
            f"the model's context is {context} tokens: a prompt of {prompt} tokens and {new} new ones are too many; "
            "lower --max-new-tokens"
        )
