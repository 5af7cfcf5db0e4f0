"""An attached model in the unchanged Trainers of transformers and TRL: checkpoints contain only the adapter."""

import copy

import pytest
import torch
from support import trl_trainers
from support.inside import INDEX, mounted_deltas
from support.models import LAYOUTS
from support.states import same, with_adapter, with_loaded
from train.tiny import tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import s2ft

CONFIG = dict(d_ratio=0.1, v_ratio=0.5, o_ratio=0.25)
ROWS = [
    {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for ids in torch.randint(3, 250, (24, 12), generator=torch.Generator().manual_seed(0))
]


def attached(layout="permuted", seed=0, dtype=torch.float32, **changes):
    return with_adapter(tiny_model(dtype=dtype, **changes), s2ft.S2FTConfig(**CONFIG, layout=layout, seed=seed))


def trainer(model, folder, rows=ROWS, callbacks=(), kind=Trainer, optimizers=(None, None), **changes):
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=8,
        save_steps=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return kind(
        model=model,
        args=TrainingArguments(**{**options, **changes}),
        train_dataset=rows,
        eval_dataset=rows[:6],
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


class StopAt(TrainerCallback):
    """Stop as if the process had been killed after the checkpoint of this step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_trainer_resumes_exactly(layout, dtype, tmp_path, caplog):
    whole, first, second = (attached(layout, dtype=dtype, attention_dropout=0.1) for _ in range(3))
    trainer(whole, tmp_path / "whole").train()
    trainer(first, tmp_path / "cut", callbacks=[StopAt(4)]).train()
    resumed = trainer(second, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8 and same(second, whole)
    assert any((delta.values != 0).any() for delta in mounted_deltas(second._s2ft).values())
    assert "missing keys" not in caplog.text and "unexpected keys" not in caplog.text


def test_checkpoints_hold_the_adapter_and_no_weight_of_the_base(tmp_path):
    model = attached()
    trainer(model, tmp_path).train()
    names = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"s2ft_adapter.safetensors", "s2ft_config.json", INDEX, "README.md", "optimizer.pt"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin", "config.json", "adapter_config.json"}
    with pytest.raises(Exception):  # it is not a model
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert same(s2ft.merge(with_loaded(tiny_model(), tmp_path / "checkpoint-8")), s2ft.merge(model))


SPOILT = {
    "another selection": (dict(seed=1), "other units of"),
    "another projection": (dict(config=dict(d_ratio=0.1)), "trains other projections"),
    "another shape": (dict(hidden_size=16, head_dim=8), "shape"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_resuming_with_another_adapter_is_refused_and_changes_nothing(case, tmp_path):
    changes, message = SPOILT[case]
    trainer(attached(), tmp_path, callbacks=[StopAt(4)]).train()
    model = with_adapter(
        tiny_model(**{key: value for key, value in changes.items() if key not in ("config", "seed")}),
        s2ft.S2FTConfig(**changes.get("config", CONFIG), seed=changes.get("seed", 0)),
    )
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert same(model, before)


def test_merged_and_detached_models_are_saved_in_full(tmp_path):
    for back in (s2ft.merge, s2ft.detach):
        model = attached()
        untouched, plain = copy.deepcopy(model), s2ft.detach(copy.deepcopy(model))
        back(model).save_pretrained(tmp_path / back.__name__)
        assert same(AutoModelForCausalLM.from_pretrained(tmp_path / back.__name__), model)
        assert not model._load_state_dict_pre_hooks
        assert model._keys_to_ignore_on_save == plain._keys_to_ignore_on_save  # set by transformers
        untouched.save_pretrained(tmp_path / "copy")  # a deep copy keeps its save_pretrained
        assert (tmp_path / "copy/s2ft_config.json").exists() and not (tmp_path / "copy/config.json").exists()


def test_rank_that_does_not_write_writes_nothing(tmp_path):
    attached().save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()


def test_save_pretrained_saves_a_given_state(tmp_path):
    model = attached()
    state = {key: torch.full_like(value, 2.0) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert all(bool((d.values == 2).all()) for d in s2ft.read_adapter(tmp_path).deltas.values())
    del state["model.layers.1.mlp.down_proj.s2"]
    with pytest.raises(ValueError, match="no model.layers.1.mlp.down_proj.s2"):
        model.save_pretrained(tmp_path / "less", state_dict=state)


# ---- TRL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", trl_trainers.ROWS)
def test_trls_trainers(kind, tmp_path):
    """They train, do not change the base, write checkpoints of the adapter only, and resume from them."""
    model, again = attached(), attached()
    more = {"ref_model": tiny_model()} if kind == "dpo" else {}
    done, resumed = (trl_trainers.trl_trainer(kind, each, tmp_path, **more) for each in (model, again))
    done.train()
    assert any((delta.values != 0).any() for delta in mounted_deltas(model._s2ft).values())
    last = tmp_path / f"checkpoint-{done.state.global_step}"
    assert (last / "s2ft_adapter.safetensors").exists() and not (last / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(last))
    assert same(again, model) and same(s2ft.detach(model), tiny_model())


# ---- folders that hold another model -----------------------------------------------------------------------


@pytest.mark.parametrize("options", (dict(max_shard_size="20KB"), {}), ids=("sharded", "one file"))
def test_a_folder_that_holds_a_model_is_refused_before_anything_is_written(options, tmp_path):
    tiny_model().save_pretrained(tmp_path, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = attached()
    with pytest.raises(ValueError, match="holds another model.*give another folder"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds another model"):
        trainer(model, tmp_path).save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".bin"} == before
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), tiny_model())


@pytest.mark.parametrize("name", ("pytorch_model.bin", "pytorch_model.bin.index.json", INDEX))
def test_a_folder_with_other_weights_or_an_index_is_refused(name, tmp_path):
    (tmp_path / name).write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(ValueError, match=f"holds another model \\({name}\\)"):
        attached().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
