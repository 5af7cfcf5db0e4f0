"""Training runs whose answers vLLM generates, each in a process of its own: `python vllm_rl.py NAME FOLDER …`.

The folder holds a base with a tokenizer, see :func:`save_base`. A scenario ends with an AssertionError if something is
wrong.
"""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from support.vllm_transfer import engine, load, parameters, run_program, same

RATIOS = dict(q_ratio=0.13, v_ratio=0.26, o_ratio=0.13, u_ratio=0.02, g_ratio=0.01, d_ratio=0.03)


def save_base(folder, dtype="float32"):
    """Write a tiny LLaMA with a tokenizer."""
    from train.tiny import tiny_tokenizer

    from support.vllm_models import tiny_llama

    tiny_llama(initializer_range=0.05).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(scenario: str, folder: Path, *words, **environment: str) -> dict:
    """Run a scenario. Returns what it prints in its last line, as JSON.

    Raises:
        AssertionError: It failed; the message has the end of its output.
    """
    printed = run_program(__file__, scenario, folder, *words, **environment)
    # vLLM may print lines of its own when its processes end
    return json.loads([line for line in printed.splitlines() if line.startswith("{")][-1])


# ---- in the process --------------------------------------------------------------------------------------


def model_in(form: str, folder: str, dtype: torch.dtype, **ratios):
    """The base with an adapter: attached in a layout, or in PEFT's form."""
    from transformers import AutoModelForCausalLM

    import s2ft

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ratios = ratios or RATIOS
    if form == "peft":
        from peft import get_peft_model

        from s2ft.peft import S2FTPeftConfig

        return get_peft_model(model, S2FTPeftConfig(**ratios, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios, layout=form))
    return model


def merged_model(model):
    """The merged model. The given one does not change."""
    import copy

    import s2ft

    while hasattr(model, "module"):
        model = model.module
    made = copy.deepcopy(model)
    return made.merge_and_unload() if hasattr(made, "merge_and_unload") else s2ft.merge(made)


def has_merged(llm, model) -> bool:
    """Whether the engine's parameters are those that its own loader makes of the merged checkpoint."""
    before, merged = parameters(llm), merged_model(model)
    tied = merged.config.tie_word_embeddings
    load(llm, {name: one for name, one in merged.state_dict().items() if not (tied and "lm_head" in name)})
    return same(before, parameters(llm))


def syncs(folder, form="permuted", dtype="float32", served="", steps="50", workers="1"):
    """Train, and compare all tensors of the engine after each sync. At the end they are those at the start."""
    from support.inside import SliceSender

    torch.manual_seed(0)
    model = model_in(form, folder, getattr(torch, dtype))
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    llm = engine(folder, served or dtype, tensor_parallel_size=int(workers))
    first = parameters(llm)
    data = torch.randint(3, model.config.vocab_size, (2, 16))
    equal = 0
    with SliceSender(model, llm) as sender:
        for _ in range(int(steps)):
            sent = sender.sync()
            if (served or dtype) == dtype:
                equal += has_merged(llm, model)
            model(input_ids=data, labels=data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    size = sum(one.numel() * getattr(torch, served or dtype).itemsize for one in trained)
    assert sent.nbytes <= 1.05 * size
    assert same(first, parameters(llm)), "the base is not restored"
    print(json.dumps({"equal": equal, "bytes": sent.nbytes, "slices": size}))


# ---- TRL -------------------------------------------------------------------------------------------------

LLM = {"enforce_eager": True, "max_model_len": 128, "max_num_batched_tokens": 256}
TRAINERS = {
    "grpo": ("trl", "GRPO"),
    "rloo": ("trl", "RLOO"),
    "online_dpo": ("trl.experimental.online_dpo", "OnlineDPO"),
}


def reward(completions, **_):
    """More distinct characters are better."""
    return [float(len(set(completion))) for completion in completions]


class OnCpu(ModuleType):
    """torch for OnlineDPOTrainer, which asks for the current accelerator. Here there is none."""

    accelerator = SimpleNamespace(current_accelerator=lambda: torch.device("cpu"))

    def __getattr__(self, name):
        return getattr(torch, name)


def trainer_of(kind: str, form: str, folder: str, dtype: str, output: str, server: str = ""):
    """A trainer of TRL on the tiny model, with slices."""
    from importlib import import_module

    from datasets import Dataset
    from transformers import AutoTokenizer

    from support.inside import with_slices

    module, name = TRAINERS[kind]
    module = import_module(module)
    common = dict(
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        logging_steps=1,
        output_dir=output,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        use_vllm=True,
        seed=1,
        **(dict(vllm_mode="server", vllm_server_base_url=server) if server else dict(vllm_mode="colocate")),
    )
    if kind == "online_dpo":
        import_module(f"{TRAINERS[kind][0]}.online_dpo_trainer").torch = OnCpu("torch")
        common |= dict(max_new_tokens=12, max_length=64, missing_eos_penalty=None)
    else:
        common |= dict(num_generations=4, max_completion_length=12)
    args = getattr(module, f"{name}Config")(**common)
    model = model_in(form, folder, getattr(torch, dtype))
    return with_slices(getattr(module, f"{name}Trainer"), llm=LLM)(
        model=model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": f"say {letter}"} for letter in "abcdefgh"]),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )


def colocate(folder, kind="grpo", form="permuted", dtype="float32"):
    """Train by TRL with vLLM in this process. At each generation vLLM has the merged weights."""
    trainer = trainer_of(kind, form, folder, dtype, f"{folder}-out")
    llm = trainer.llm if kind == "online_dpo" else trainer.vllm_generation.llm
    first, generate, checked = parameters(llm), llm.generate, []

    def watched(*args, **options):
        is_trained = trainer.state.global_step == 0 or not same(parameters(llm), first)
        checked.append(is_trained and has_merged(llm, trainer.model))
        return generate(*args, **options)

    llm.generate = watched
    trainer.train()
    assert len(checked) == 3 and all(checked), checked
    assert same(first, parameters(llm)), "the base is not restored"
    print(json.dumps({"checked": len(checked), **differences(trainer)}))


def server(folder, url, kind="grpo", form="permuted", dtype="float32"):
    """Train by TRL with a vLLM server. Its log-probabilities of the answers are the trainer's."""
    trainer = trainer_of(kind, form, folder, dtype, f"{folder}-out", url)
    sizes, sync = [], trainer.slice_sender.sync
    if kind == "online_dpo":
        trainer.slice_sender.sync = lambda: sizes.append(sync().nbytes)
    else:
        trainer.vllm_generation.sync_weights = lambda: sizes.append(sync().nbytes)
    trainer.train()
    assert len(sizes) == 3
    print(json.dumps({"syncs": len(sizes), "bytes": sizes[0], **differences(trainer)}))


class Worker:
    """Gives AsyncGRPOTrainer made-up answers, and compares the server's greedy answers with the trainer's."""

    def __init__(self, url: str, folder: str) -> None:
        import queue

        from support.vllm_server import Server

        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.server, self.trainer, self.folder, self.equal = Server(url, Path()), None, folder, []

    def start(self) -> None:
        self.fill(1)

    def stop(self) -> None:
        """Nothing runs between the updates."""

    def check_health(self, stale_after_s: float) -> None:
        """It is always well."""

    def update_model_version(self, version: int) -> None:
        from transformers import AutoModelForCausalLM

        from support.vllm_models import PROMPTS, answers

        merged = merged_model(self.trainer.model).state_dict()
        model = AutoModelForCausalLM.from_pretrained(self.folder)  # the trainer's attention is for packed rows
        model.load_state_dict(merged)
        self.equal.append([self.server.complete("base", prompt) for prompt in PROMPTS] == answers(model))
        self.fill(version)

    def fill(self, version: int) -> None:
        import numpy as np
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        for number in range(32):
            ids = np.random.default_rng(number).integers(3, 250, 20)
            mask = np.arange(20) >= 8
            messages = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
            logs = np.full(20, -5.0, np.float32)
            advantage = 1.0 if number % 2 else -1.0
            self.rollout_buffer.put(
                RolloutSample(
                    *messages, ids, mask.astype(np.int64), logs, advantage, version, number // 4, {"reward": 0.0}
                )
            )


def attention(q, k, v, starts_q, starts_k, *_, softmax_scale=None, **__):
    """Causal attention of packed rows on the CPU, in place of flash attention: q, k and v are [tokens, heads, size]."""
    found = []
    for row in range(len(starts_q) - 1):
        rows = [one[a:b].transpose(0, 1) for one, (a, b) in zip((q, k, v), _spans(starts_q, starts_k, row))]
        length, width = rows[0].shape[1], rows[1].shape[1]
        mask = torch.ones(length, width, dtype=torch.bool).tril(width - length)
        options = dict(attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        found.append(torch.nn.functional.scaled_dot_product_attention(*rows, **options).transpose(0, 1))
    return torch.cat(found)


def _spans(starts_q, starts_k, row):
    of_q, of_k = ((int(starts[row]), int(starts[row + 1])) for starts in (starts_q, starts_k))
    return of_q, of_k, of_k


def async_grpo(folder, url, form="permuted"):
    """Train by TRL's AsyncGRPOTrainer, which makes the model itself. The server answers as the merged model does."""
    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

    import s2ft
    from s2ft.peft import S2FTPeftConfig
    from support.inside import with_slices

    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None  # TRL asks for the name of a GPU
    args = AsyncGRPOConfig(
        output_dir=f"{folder}-async", max_steps=3, learning_rate=3e-3, report_to="none", use_cpu=True, bf16=False,
        vllm_server_base_url=url, save_strategy="no", per_device_train_batch_size=2, gradient_accumulation_steps=1,
        weight_sync_steps=1,
        token_budget=64, dtype="float32",
    )  # fmt: skip
    worker = Worker(url, folder)
    trainer = with_slices(AsyncGRPOTrainer)(
        model=folder,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": letter}]} for letter in "abcd"]),
        rollout_worker=worker,
        **({"peft_config": S2FTPeftConfig(**RATIOS, task_type="CAUSAL_LM")} if form == "peft" else {}),
    )
    if form != "peft":
        s2ft.attach(trainer.model, s2ft.S2FTConfig(**RATIOS, layout=form))
    worker.trainer = trainer
    trainer.train()
    print(json.dumps({"syncs": len(worker.equal), "equal": all(worker.equal)}))


def command(folder, output, *options):
    """Run `s2ft grpo --use-vllm true` for four updates, two of them after a resume."""
    from train.tiny import write_jsonl

    from s2ft.cli.main import main
    from support.inside import GRPORunTrainer

    found, log = [], GRPORunTrainer.log

    def watched(self, logs, *more):
        log(self, logs, *more)
        found.append(logs.get("sampling/sampling_logp_difference/max"))

    GRPORunTrainer.log = watched
    data = write_jsonl(Path(f"{output}.jsonl"), [{"question": f"{a}+1=", "answer": str(a + 1)} for a in range(8)])
    mine = Path(f"{output}.py")
    mine.write_text("def longer(completions, **_):\n    return [len(set(c[0]['content'])) / 8 for c in completions]\n")
    words = [
        *("grpo", "--model", folder, "--data", str(data), "--rewards", f"{mine}:longer", "--output", output),
        *"--d-ratio 0.1 --v-ratio 0.3 --batch-size 8 --num-generations 4 --max-steps 4 --save-steps 2".split(),
        *"--max-completion-length 8 --use-vllm true --learning-rate 1e-2".split(),
        *("--eval-data", str(data), "--eval-strategy", "steps", "--eval-steps", "2"),
        *options,
    ]
    assert main([*words, "--stop-after", "2"]) == 0 and main([*words, "--resume"]) == 0
    steps = max(json.loads(line)["step"] for line in (Path(output) / "log.jsonl").read_text().splitlines())
    print(json.dumps({"steps": steps, "logp": max(one for one in found if one is not None)}))


def differences(trainer) -> dict:
    """The largest difference of the log-probabilities of sampled tokens, by trainer and engine."""
    name = "sampling/sampling_logp_difference/max"
    found = [line[name] for line in trainer.state.log_history if name in line]
    return {"logp": max(found)} if found else {}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
