"""GRPO: answers are generated with the adapter, one model is in memory, and a resumed run is exact."""

import pytest
from datasets import Dataset
from support.inside import (
    GRPOArguments,
    GRPORunTrainer,
    RunFolder,
    RunOptions,
    checked,
    encode_prompt,
    grpo,
    prompt_format,
    read_log,
    scored_prompt,
    with_columns,
)
from support.states import same, tensors_of, with_adapter
from train.tiny import CHAT, tiny_model, tiny_tokenizer
from trl.trainer import grpo_trainer

import s2ft

CONFIG = s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25)
ROWS = [{"question": f"{a}+1=", "answer": str(a + 1), "level": a % 3} for a in range(8)]


def short(completions, **_):
    return [-len(completion[0]["content"]) / 10 for completion in completions]


REWARDS = [checked(short, "short")]


def prompts(tokenizer, rows=ROWS):
    found = Dataset.from_list([{**scored_prompt(row, {}), "place": "row"} for row in rows])
    return with_columns(found, prompt_format(tokenizer))


def arguments(path, **changes):
    more = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_steps=2,
        max_steps=6,
        seed=3,
    )
    found = GRPOArguments(output_dir=str(path), **{**more, **changes})
    assert found.metric_for_best_model == "reward"  # the loss is that of rounding
    return found


def run(path, resume=False, options=RunOptions(), rewards=REWARDS, **changes):
    """Train the tiny model; 8 prompts are 4 updates, so 6 updates reach the second epoch."""
    model, tokenizer, folder = with_adapter(tiny_model(), CONFIG), tiny_tokenizer(), RunFolder(path)
    folder.begin({}, resume)
    given = prompts(tokenizer), rewards, arguments(path, **changes), folder
    return model, folder, grpo(model, tokenizer, *given, resume=resume, options=options)


def logged(folder):
    return [(line["step"], line["loss"], line.get("reward"), line.get("kl")) for line in read_log(folder.log)]


@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, marks=pytest.mark.slow), {"beta": 0.1, "num_iterations": 2}],
    ids=["plain", "reference and two updates"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(changes, tmp_path):
    """That includes the generated answers, and the order of the rows in a later epoch."""
    _, whole, result = run(tmp_path / "whole", save_steps=0, **changes)
    run(tmp_path / "half", options=RunOptions(stop_after=4), **changes)
    _, half, _ = run(tmp_path / "half", resume=True, **changes)
    assert logged(half) == logged(whole) and result.reward is not None
    assert same(tensors_of(half.adapter), tensors_of(whole.adapter))


def test_no_second_model_is_loaded_and_the_model_is_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", None)
    model, tokenizer = with_adapter(tiny_model(), CONFIG), tiny_tokenizer()
    config = dict(vars(model.generation_config))
    trainer = GRPORunTrainer(
        model,
        REWARDS,
        arguments(tmp_path, beta=0.1, max_steps=2, save_steps=0),
        prompts(tokenizer),
        tokenizer=tokenizer,
    )
    assert list(trainer.ref_model.parameters()) == []
    trainer.train()
    trainer.restore_model()
    assert vars(model.generation_config) == config and "forward" not in vars(model)
    assert same(s2ft.detach(model), tiny_model())


@pytest.mark.parametrize("template", [CHAT, CHAT.replace("m['content']", "m['content'][0]['text']")])
def test_answers_are_generated_for_the_prompts(template, tmp_path, monkeypatch):
    model, tokenizer = with_adapter(tiny_model(), CONFIG), tiny_tokenizer(template)
    trainer = GRPORunTrainer(
        model, REWARDS, arguments(tmp_path, max_steps=1, save_steps=0), prompts(tokenizer), tokenizer=tokenizer
    )
    generate, found = model.generate, []

    def watched(*args, **options):
        found.append([ids[mask.bool()].tolist() for ids, mask in zip(options["input_ids"], options["attention_mask"])])
        return generate(*args, **options)

    monkeypatch.setattr(model, "generate", watched)
    trainer.train()
    (asked,) = found
    expected = [encode_prompt(tokenizer, [{"role": "user", "content": row["question"]}]) for row in ROWS]
    assert len(asked) == 8 and all(ids in expected for ids in asked)


def test_the_columns_reach_the_rewards(tmp_path):
    seen = []

    def reward(prompts, completions, answer, level, **_):
        seen.extend(zip([prompt[-1]["content"] for prompt in prompts], answer, level))
        return [0.0] * len(completions)

    run(tmp_path, rewards=[checked(reward, "reward")], max_steps=1, save_steps=0)
    assert seen and set(seen) <= {(row["question"], row["answer"], row["level"]) for row in ROWS}


def test_an_attached_model_that_would_be_sent_whole_is_refused_before_vllm_starts(tmp_path):
    from support.inside import AdapterCheckpoints
    from trl import GRPOConfig, GRPOTrainer

    class Mine(AdapterCheckpoints, GRPOTrainer):
        """A user's own."""

    model = with_adapter(tiny_model(), CONFIG)
    options = GRPOConfig(str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=r"use s2ft.sync.with_slices\(Mine\), which sends the trained slices"):
        Mine(model, short, args=options, train_dataset=prompts(tiny_tokenizer()))
