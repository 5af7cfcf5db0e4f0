"""What experiments with training share: the base and what is measured on it, a method made ready, and measures.

The settings that are read here, with their meanings:

| setting | meaning |
|---|---|
| `model`, `dtype` | the base: a folder, a name on the hub, or a .gguf file; null is the demo's |
| `prompt` | "chatml", or a chat template: a file, "alpaca"; null is the tokenizer's own |
| `method`, `options` | a row of s2ft/train/tuners.py and its options; `selection` may be one of selections.py |
| `parameters` | the largest number of trained weights; null leaves the size to the options |
| `training`, `rate`, `seed` | arguments of the trainer by their names in transformers |
| `questions` | numbers of examples: train, validation, test |
| `calibration`, `protect` | training rows for selections that read data; texts that a selection protects |
| `max_length` | longest row in tokens |
| `beams`, `answer_batch`, `max_new_tokens` | how answers are generated; the last one for public tasks |
| `by_choice` | score the likeliest answer of tasks that list their answers |
| `probes`, `probe_texts` | names of texts on which forgetting is measured, and how many |
| `kl_prompts` | number of test questions on whose answers KL(base‖tuned) is measured |
| `kl_texts` | measure KL(base‖tuned) on the texts of the first probe instead |
| `data` | the folder of public files |
"""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import s2ft
from bench.experiments.matched_methods import matched
from bench.experiments.selections import CANDIDATES, choose
from bench.experiments.tasks import TASKS, Task, texts
from s2ft.selection.metrics import METRICS
from s2ft.text.collator import TokenCollator
from s2ft.text.divergence import BaseDistributions, mean_loss
from s2ft.text.encoding import context_length, tokenize_rows
from s2ft.text.evaluation import Example, encode_prompts
from s2ft.text.generation import generate, generation_mode
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat, pad_id, prompt_format
from s2ft.train.demo import default_model
from s2ft.train.device import gpu_or_cpu
from s2ft.train.tuners import Prepared, prepare

# ChatML without the system prompt that SmolLM2's template adds. All methods and the base get the same prompts.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SETTINGS = (
    "model", "dtype", "prompt", "parameters", "training", "questions", "calibration", "protect", "max_length", "beams",
    "answer_batch", "max_new_tokens", "by_choice", "probes", "probe_texts", "kl_prompts", "kl_texts", "data",
)  # fmt: skip
SMALL = 2 * 2**30  # bytes of a base that is kept, and copied for each run


class Base:
    """A base model, and what is measured on it before any training.

    Args:
        settings: The settings of a run.

    Attributes:
        model: The model, on the GPU if there is one.
        tokenizer: Its tokenizer, with the template of the prompt.
        prompt: The format of prompts.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        model, self.tokenizer = load_model(settings["model"] or default_model(), settings["dtype"])
        if model.dtype == torch.float16:
            raise ValueError("the weights are float16, whose gradients need a loss scaler: set dtype to another one")
        self.model = model.eval().to(gpu_or_cpu())
        chosen = settings.get("prompt")
        self.prompt = (
            PromptFormat(template=CHATML) if chosen == "chatml" else prompt_format(self.tokenizer, chat_template=chosen)
        )
        self.prompt.apply_to(self.tokenizer)
        self.data = settings.get("data")
        self.is_small = sum(one.numel() * one.element_size() for one in model.parameters()) < SMALL
        self._known: dict[str, Any] = {}

    def _once(self, make, *key: Any) -> Any:
        text = json.dumps(key, sort_keys=True)
        if text not in self._known:
            self._known[text] = make()
        return self._known[text]

    def copy(self) -> torch.nn.Module:
        """Return a model to train: a copy of the base, or the base itself if it is large, which is then loaded anew."""
        if self.is_small:
            return copy.deepcopy(self.model)
        BASES.clear()
        return self.model

    def task(self, settings: dict[str, Any], name: str | None = None) -> Task:
        """Return the task of a run, or another one, made once."""
        name = name or settings["task"]
        used = {key: settings.get(key) for key in ("questions", "data", "train", "tests", "answers", "seed")}
        return self._once(lambda: TASKS[name](settings), name, used)

    def texts(self, name: str, count: int) -> list[dict]:
        """Return texts as token rows with a label on every token."""
        limit = context_length(self.model)
        return self._once(
            lambda: [
                self._row([], ids)
                for ids in self.tokenizer(list(texts(name, count, self.data)), max_length=limit, truncation=True)[
                    "input_ids"
                ]
            ],
            "texts",
            name,
            count,
        )

    @staticmethod
    def _row(prompt: list[int], answer: list[int]) -> dict:
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def rows(self, examples: list[Example], settings: dict[str, Any]):
        """Return examples as token rows to train on, a Dataset."""
        from datasets import Dataset

        asked = [
            [{"role": "user", "content": one.conversation}] if isinstance(one.conversation, str) else one.conversation
            for one in examples
        ]
        answers = [{"role": "assistant", "content": one.output} for one in examples]
        rows = [{"messages": [*messages, answer]} for messages, answer in zip(asked, answers)]
        return tokenize_rows(
            Dataset.from_list(rows), self.tokenizer, self.prompt, max_length=settings.get("max_length", 512)
        ).dataset

    def batches(self, rows: list[dict], size: int = 8) -> list[dict[str, Any]]:
        """Return token rows as batches."""
        collate = TokenCollator(pad_id(self.tokenizer))
        return [collate(list(rows[first : first + size])) for first in range(0, len(rows), size)]

    def loss(self, name: str, count: int) -> float:
        """Return the base's loss on texts, in nats a token."""
        return self._once(lambda: mean_loss(self.model, self.texts(name, count)), "loss", name, count)

    def divergence(self, settings: dict[str, Any]) -> BaseDistributions:
        """Return the base's distributions on its own greedy answers to test questions of the task, or on texts."""
        task = self.task(settings)
        if settings.get("kl_texts"):
            name, count = settings["probes"][0], settings.get("probe_texts", 24)
            return self._once(lambda: BaseDistributions.of(self.model, self.texts(name, count)), "kl", name, count)

        def make() -> BaseDistributions:
            asked = [one for ones in task.tests.values() for one in ones][: settings["kl_prompts"]]
            prompts = list(encode_prompts(self.tokenizer, asked, self.room(task), self.prompt).values())
            answers = generate(self.model, self.tokenizer, prompts, 64, task.max_new_tokens)
            ends = [
                self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id]
                for text in answers
            ]
            return BaseDistributions.of(self.model, [self._row(*pair) for pair in zip(prompts, ends)])

        return self._once(make, "kl", settings["task"], settings["questions"], settings["kl_prompts"])

    def room(self, task: Task) -> int:
        """Return the longest prompt in tokens."""
        return context_length(self.model) - task.max_new_tokens

    # ---- measures ----------------------------------------------------------------------------------------

    def accuracy(
        self, model: Any, task: Task, examples: list[Example], settings: dict[str, Any], file: Path | None = None
    ) -> float:
        """Return the share of examples that a model answers right: greedily, or by beams.

        Args:
            model: The model.
            task: Says what is right.
            examples: The examples.
            settings: `beams` and `answer_batch`.
            file: Write the answers to this file, one JSON object a line.
        """
        how = (settings.get("answer_batch", 64), task.max_new_tokens, "answering", settings.get("beams", 1))
        prompts = encode_prompts(self.tokenizer, examples, self.room(task), self.prompt)
        answers = generate(model, self.tokenizer, list(prompts.values()), *how)
        right = [task.right(examples[number], text) for number, text in zip(prompts, answers)]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                {"question": examples[n].question, "generated": text, "right": is_right}
                for n, text, is_right in zip(prompts, answers, right)
            ]
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return sum(right) / len(right)

    @torch.no_grad()
    def choice_accuracy(self, model: Any, task: Task, examples: list[Example]) -> float:
        """Return the share of examples whose right answer is the likeliest of the task's choices."""
        right = 0
        prompts = encode_prompts(self.tokenizer, examples, self.room(task), self.prompt)
        for number, prompt in prompts.items():
            one = examples[number]
            choices = task.choices(one)
            ends = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
            batch = self.batches([self._row(prompt, end) for end in ends], len(ends))[0]
            with generation_mode(model):
                inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
                logits = model(**inputs).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1).cpu()
            sums = [sum(row[place, token].item() for place, token in enumerate(end)) for row, end in zip(logits, ends)]
            right += choices[sums.index(max(sums))] == one.answer
        return right / len(examples)

    def scores(self, model: Any, task: Task, settings: dict[str, Any], folder: Path | None = None) -> dict[str, float]:
        """Return the accuracy on each set of tests: of generated answers, or of the task's choices with `by_choice`."""
        if task.choices and settings.get("by_choice"):
            return {name: self.choice_accuracy(model, task, ones) for name, ones in task.tests.items()}
        score = partial(self.accuracy, model, task, settings=settings)
        return {
            name: score(examples=ones, file=folder and folder / f"{name}.jsonl") for name, ones in task.tests.items()
        }

    @torch.no_grad()
    def losses(self, model: Any, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the losses of the answers to validation and to test questions, in nats a token.

        `each` has the sum over the tokens of each test question's answer, and `tokens` their number.
        """
        rows = self.rows([one for ones in task.tests.values() for one in ones], settings)
        tokens = [sum(label >= 0 for label in row["labels"]) for row in rows]
        each: list[float] = []
        for batch in self.batches(list(rows)):
            labels = batch.pop("labels")[:, 1:].to(model.device)
            moved = {name: one.to(model.device) if torch.is_tensor(one) else one for name, one in batch.items()}
            logits = model(**moved).logits[:, :-1].float()  # of the last positions only, see TokenCollator
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            each += [round(one, 5) for one in losses.view(labels.shape).double().sum(1).tolist()]
        validation = mean_loss(model, self.rows(task.validation, settings))
        return {"validation": validation, "test": sum(each) / sum(tokens), "each": each, "tokens": tokens}

    def base_losses(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return what :meth:`losses` says of the base."""
        return self._once(
            lambda: self.losses(self.model, self.task(settings), settings),
            "losses",
            settings["task"],
            settings["questions"],
            settings["seed"],
        )

    def distance(self, model: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Return how far a model is from its base: the rise of its loss on texts, and KL(base‖model)."""
        probes, count = settings.get("probes", ()), settings.get("probe_texts", 24)
        found: dict[str, Any] = {}
        if probes:
            found["forgetting"] = {
                name: mean_loss(model, self.texts(name, count)) - self.loss(name, count) for name in probes
            }
        if settings.get("kl_prompts") or settings.get("kl_texts"):
            found["kl"] = self.divergence(settings).kl(model)
        return found

    def measure_base(self, settings: dict[str, Any]) -> None:
        """Measure the base before it is changed, as far as :meth:`distance` needs it."""
        for name in settings.get("probes", ()):
            self.loss(name, settings.get("probe_texts", 24))
        if settings.get("scales"):
            self.base_losses(settings)
        if settings.get("kl_prompts") or settings.get("kl_texts"):
            self.divergence(settings)


BASES: dict[str, Base] = {}  # at most one


def base_of(settings: dict[str, Any]) -> Base:
    """Return the base of a run, which this process loads once."""
    key = json.dumps([settings.get(name) for name in ("model", "dtype", "prompt", "data")])
    if key not in BASES:
        BASES.clear()
        BASES[key] = Base(settings)
    return BASES[key]


# ---- a method made ready ---------------------------------------------------------------------------------


def prepared_for(base: Base, model: Any, rows: Any, settings: dict[str, Any], **more: Any) -> Prepared:
    """Give a model the trainable parameters of a run, at most as many as the settings say.

    Args:
        base: The base, for the data of a selection.
        model: The model to change.
        rows: The token rows of the training, of which a selection may read the first ones.
        settings: The settings of the run.
        **more: More arguments of :func:`s2ft.attach`.
    """
    method, options, seed = settings["method"], dict(settings.get("options", {})), settings["seed"]
    if method == "full":  # see bench.experiments.any_method.arguments_of
        return prepare(model.float() if settings["dtype"] == "bfloat16" else model, method)
    if settings.get("parameters") is not None:
        options = matched(model, method, settings["parameters"], options)
    if method != "s2ft":
        return prepare(model, method, options, seed=seed)
    name = options.get("selection", "random")
    needs = options.get("protect_ratio") is not None or name in CANDIDATES
    protect = (
        base.batches(base.texts(settings.get("protect", "protected"), settings.get("probe_texts", 24)))
        if needs
        else None
    )
    needed = base.batches([rows[number] for number in range(min(len(rows), settings.get("calibration", 32)))])
    if name in CANDIDATES:
        config = s2ft.S2FTConfig(**{**options, "selection": "random"}, seed=seed)
        units = choose(model, name, config, needed, protect)
        return prepare(model, method, {"d_ratio": 0.0, "units": units.to_dict()}, seed=seed)
    needed = needed if METRICS[name].calibrated else None
    return prepare(model, method, options, seed=seed, calibration=needed, protect=protect, **more)
