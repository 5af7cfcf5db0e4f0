"""s2ft generate: one answer, written to the terminal as it comes."""

from dataclasses import dataclass, field

from s2ft.cli.parse import parse, quiet_transformers


@dataclass
class GenerateArguments:
    model: str = field(metadata={"help": "a checkpoint folder, a name on the hub, or a .gguf file"})
    adapter: str | None = field(
        default=None, metadata={"help": "an adapter folder, or the output folder of s2ft finetune"}
    )
    prompt: str | None = field(default=None, metadata={"help": "the text to go on from; - reads it from stdin"})
    prompt_file: str | None = field(default=None, metadata={"help": "a text file with the prompt"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer in tokens"})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token, always"})
    top_p: float = field(default=1.0, metadata={"help": "draw among the likeliest tokens with so much probability"})
    seed: int | None = field(default=None, metadata={"help": "the same seed draws the same answer"})
    chat: bool = field(default=False, metadata={"help": "the prompt is a user's message: put it in the chat template"})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (with an adapter that of its training, else the checkpoint's), float32, bfloat16, float16"
        },
    )


def run(arguments: list[str]) -> None:
    (job,) = parse("generate", "Generate one answer.", [GenerateArguments], arguments)
    quiet_transformers()
    generate(job)


def generate(job: GenerateArguments) -> None:
    import torch

    import s2ft.adapter
    from s2ft.serve.batch import Batch, Row
    from s2ft.serve.sampling import Sampler
    from s2ft.serve.text import TextStream
    from s2ft.text.models import dtype_of_base, load_model
    from s2ft.text.prompts import end_ids

    prompt = read_prompt(job)
    check(job)
    dtype = dtype_of_base(s2ft.adapter.read_adapter(job.adapter), job.dtype) if job.adapter else job.dtype
    model, tokenizer = load_model(job.model, dtype)
    row = Row(prompt_ids(tokenizer, prompt, job.chat), Sampler(job.temperature, job.top_p, job.seed))
    check_room(model, len(row.prompt), job.max_new_tokens)
    if job.adapter:
        s2ft.load_adapter(model, job.adapter)
    batch = Batch(model.to("cuda" if torch.cuda.is_available() else "cpu"))
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
    """From the option, the file or stdin. A file's last line break is not part of it."""
    import sys
    from pathlib import Path

    from s2ft.text.examples import check_unicode

    if (job.prompt is None) == (job.prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    if job.prompt_file is not None:
        try:
            return Path(job.prompt_file).read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"prompt_file {job.prompt_file} is not UTF-8 text: {error}") from None
    prompt = sys.stdin.read().removesuffix("\n") if job.prompt == "-" else job.prompt
    check_unicode(prompt, "prompt")  # bytes of another encoding
    return prompt


def check(job: GenerateArguments) -> None:
    if job.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {job.max_new_tokens}")
    if not 0 <= job.temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or above, got {job.temperature}")
    if not 0 < job.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {job.top_p}")


def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    from s2ft.text.prompts import encode_prompt

    if chat:
        return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
    ids = tokenizer(prompt)["input_ids"]
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    if not ids:
        raise ValueError("the prompt is empty")
    return ids


def check_room(model, prompt: int, new: int) -> None:
    from s2ft.text.encoding import context_length

    context = context_length(model)
    if context is not None and prompt + new > context:
        raise ValueError(
            f"the model's context is {context} tokens; the prompt has {prompt}, and {new} new ones are "
            "more than it leaves: lower --max-new-tokens"
        )
