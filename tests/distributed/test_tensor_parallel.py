"""Weights that tensor parallelism or FSDP2 split before attach are refused, and the message names a way out."""

import pytest
from support.models import model_of
from transformers import AutoModelForCausalLM

import s2ft


def load_split(rank, folder, way):
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=2) if way == "fsdp" else DistributedConfig(tp_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    kinds = {type(parameter.data).__name__ for parameter in model.parameters()}
    before = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    messages = []
    for act in (
        lambda: s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1)),
        lambda: s2ft.load_adapter(model, folder / "adapter"),
    ):
        with pytest.raises(ValueError) as error:
            act()
        messages.append(str(error.value))
    return messages, "DTensor" in kinds, before == {key: p.requires_grad for key, p in model.named_parameters()}


@pytest.mark.parametrize("way, words", [("tp", "tensor parallelism")])
def test_weights_that_are_split_are_refused(ranks, way, words, tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
    s2ft.save_adapter(model, tmp_path / "adapter")
    for messages, split, same in ranks(load_split, tmp_path, way):
        assert split and same and all(words in message for message in messages), messages


def parallelize(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = model_of("llama")
    s2ft.attach(model, s2ft.S2FTConfig(u_ratio=0.1, d_ratio=0.1))
    plan = {"model.layers.0.mlp.up_proj": ColwiseParallel(), "model.layers.0.mlp.down_proj": RowwiseParallel()}
    with pytest.raises(NotImplementedError) as error:
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return str(error.value)


def test_torch_refuses_to_split_trainable_layers(ranks):
    for message in ranks(parallelize):
        assert "only support nn.Linear" in message
