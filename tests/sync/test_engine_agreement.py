"""Log-probabilities of trainer and engine are compared token by token, and a difference is never hidden."""

import os
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from train.tiny import tiny_model, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer

from s2ft.sync.agreement import Rollout, agreement, joint_agreement, keep_rollouts, trainer_logprobs
from s2ft.sync.trl import choose_port

NAN = float("nan")


def rollout(**changes) -> Rollout:
    fields = dict(
        step=0,
        prompts=torch.tensor([[0, 5, 6], [7, 8, 9]]),
        prompt_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        answers=torch.tensor([[10, 11], [12, 0]]),
        answer_mask=torch.tensor([[1, 1], [1, 0]]),
        trainer=torch.tensor([[-1.0, -2.0], [-3.0, -9.0]]),
        engine=torch.tensor([[-1.0, -2.5], [-3.0, 0.0]]),
    )
    return Rollout(**{**fields, **changes})


def test_the_differences_are_those_of_the_tokens_alone():
    found = rollout().agreement
    assert (found.tokens, found.max) == (3, 0.5)
    assert found.mean == pytest.approx(0.5 / 3)


def test_the_quantile_is_the_difference_that_one_token_in_a_thousand_exceeds():
    engine = torch.arange(10000) / 10000
    found = agreement(torch.zeros(10000), engine)
    assert (engine > found.quantile).sum() == 9 and found.max == engine[-1]
    assert agreement(torch.zeros(3), engine[:3]).quantile == engine[2]


def test_a_token_without_a_number_of_the_engine_is_left_out():
    found = agreement(torch.zeros(3), torch.tensor([NAN, 0.25, 0.0]))
    assert (found.tokens, found.max) == (2, 0.25)


def test_a_broken_number_of_the_trainer_shows():
    assert agreement(torch.tensor([NAN, 0.0]), torch.zeros(2)).mean != 0
    assert agreement(torch.tensor([float("-inf"), 0.0]), torch.zeros(2)).max == float("inf")


def test_numbers_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"must have one shape, got \(2,\), \(3,\)"):
        agreement(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must have one shape"):
        agreement(torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="no token to compare"):
        agreement(torch.zeros(2), torch.zeros(2), torch.zeros(2))


def test_sequences_have_no_padding_and_numbers_get_it_back():
    one = rollout()
    assert one.sequences() == [([5, 6], [10, 11]), ([7, 8, 9], [12])]
    padded = one.padded([[-1.0, -2.0], [-3.0]])
    assert padded[0].tolist() == [-1.0, -2.0] and padded[1, 0] == -3.0 and padded[1, 1].isnan()
    assert agreement(one.trainer, padded, one.answer_mask).max == 0


def test_the_tokens_of_several_rollouts_are_compared_together():
    one, other = rollout(), rollout(engine=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), prompts=torch.zeros(2, 1))
    found = joint_agreement([one, other])
    assert (found.tokens, found.max) == (6, 0.5) and found.mean == pytest.approx(0.5 / 6)


class Trainer:
    """A trainer of TRL that generates one answer."""

    def __init__(self, **changes) -> None:
        options = dict(use_vllm=True, vllm_importance_sampling_correction=True)
        self.args = SimpleNamespace(**{**options, **changes})
        self.model, self.state = torch.nn.Linear(1, 1), SimpleNamespace(global_step=3)
        self.output = {
            "prompt_ids": torch.tensor([[5]]),
            "prompt_mask": torch.tensor([[1]]),
            "completion_ids": torch.tensor([[6]]),
            "completion_mask": torch.tensor([[1]]),
            "old_per_token_logps": torch.tensor([[-1.0]]),
            "sampling_per_token_logps": torch.tensor([[-1.5]]),
        }

    def _generate_and_score_completions(self, inputs):
        return self.output


def test_the_rollouts_of_the_training_are_kept():
    trainer = Trainer()
    kept = keep_rollouts(trainer)
    assert trainer._generate_and_score_completions([]) is trainer.output
    trainer.output["completion_ids"].zero_()  # TRL shuffles the tensors
    ((found),) = kept
    assert (found.step, found.answers.tolist(), found.agreement.max) == (3, [[6]], 0.5)
    trainer.model.eval()
    trainer._generate_and_score_completions([])
    assert len(kept) == 1


@pytest.mark.parametrize("changes", [{"use_vllm": False}, {"vllm_importance_sampling_correction": False}])
def test_a_trainer_that_does_not_compare_is_refused(changes):
    with pytest.raises(ValueError, match="must have use_vllm and vllm_importance_sampling_correction"):
        keep_rollouts(Trainer(**changes))


def test_the_trainer_scores_given_tokens(tmp_path):
    """Each answer alone has the same log-probabilities, without padding."""
    model = tiny_model()
    arguments = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=2, num_generations=2, report_to=[], bf16=False, use_cpu=True
    )
    rows = Dataset.from_list([{"prompt": "a"}] * 2)
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), arguments, rows, processing_class=tiny_tokenizer()
    )
    one = rollout()
    found = trainer_logprobs(trainer, one)
    for (prompt, answer), row, mask in zip(one.sequences(), found, one.answer_mask):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(1)[torch.arange(len(answer)), answer]
        torch.testing.assert_close(row[mask.bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("environment", "chosen"),
    [({}, True), ({"MASTER_PORT": "0"}, True), ({"MASTER_PORT": "4321"}, False), ({"WORLD_SIZE": "2"}, False)],
)
def test_runs_that_start_together_have_ports_of_their_own(environment, chosen, monkeypatch):
    for name in ("MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", environment.get("MASTER_PORT", ""))  # and restored afterwards
    choose_port()
    port = os.environ["MASTER_PORT"]
    assert (port != environment.get("MASTER_PORT", "")) == chosen
    assert not chosen or int(port) > 1024
