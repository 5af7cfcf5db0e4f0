"""effective="step" on two ranks: DDP gives the bits of the default, and FSDP2 is refused."""

import pytest
import torch
from runs import attached, train
from state.models import ratios, tiny_model
from torch.nn.parallel import DistributedDataParallel

import s2ft


def trained_under_ddp(rank, effective):
    model = attached("llama-grouped", "permuted", effective=effective)
    base = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("s2")}
    train(model, rank, forward=DistributedDataParallel(model))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.items())
    return {name: delta.values for name, delta in s2ft.get_adapter(model, "default").deltas.items()}


def test_ddp_gives_the_bits_of_the_default(ranks):
    default, held = (ranks(trained_under_ddp, effective) for effective in ("call", "step"))
    for rank in range(2):
        assert all(torch.equal(values, held[rank][name]) for name, values in default[rank].items())
    assert all(torch.equal(values, held[1][name]) for name, values in held[0].items())


def refused(rank, order):
    from torch.distributed.fsdp import fully_shard

    model, config = tiny_model("llama"), s2ft.S2FTConfig(**ratios("llama"), effective="step")
    try:
        if order == "sharded first":
            fully_shard(model)
            s2ft.attach(model, config)
        else:
            s2ft.attach(model, config)
            if order == "sharded while held":
                model(input_ids=torch.zeros(1, 3, dtype=torch.long))
            fully_shard(model)
            model(input_ids=torch.zeros(1, 3, dtype=torch.long))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize(
    "order, message",
    {
        "sharded first": "weights are spread over ranks",
        "attached first": "FSDP2 has sharded this model",
        "sharded while held": "FSDP2 has sharded this model",
    }.items(),
)
def test_fsdp2_is_refused(ranks, order, message):
    assert all(message in found and "effective='call'" in found.lower() for found in ranks(refused, order))
