"""The same training on one process and on two, and the comparison of the saved adapters."""

import json
import os
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.models import model_of
from support.ranks import forget_deepspeed
from support.slices import everything as config_for
from support.states import with_adapter
from support.tolerances import GEMM
from torch import nn

import s2ft

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
STEPS, ROWS, LENGTH = 4, 4, 7
RANKS = 2
EXTRA = dict(modules_to_save=["model.norm", "lm_head"])  # weights that are trained in full


def attach_to(model, case, layout="permuted", **changes):
    """Attach with the ratios of a case, and with data if the selection needs some."""
    config = config_for(case, layout=layout, **changes)
    calibrated = config.selection in ("activation", "product", "gradient")
    return with_adapter(model, config, calibration=batches(model, 2) if calibrated else None)


def attached(case, layout="permuted", dtype=torch.float32, **changes):
    return attach_to(model_of(case, dtype), case, layout, **changes)


def batches(model, steps=STEPS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=generator) for _ in range(steps)]


def rows_of(rank):
    return slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)


def train(model, rank=None, steps=STEPS, lr=1e-2, forward=None, seen=None):
    """AdamW steps on this rank's half of every batch. A rank of None trains on both halves, one after the other.

    The list `seen` gets the loss of the last half and the norm of the gradients of each step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
    model.train()
    for batch in batches(model, steps):
        halves = [batch[rows_of(one)] for one in range(RANKS)] if rank is None else [batch[rows_of(rank)]]
        for half in halves:
            loss = (forward or model)(input_ids=half, labels=half).loss / len(halves)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        if seen is not None:
            seen += [loss.item(), float(norm)]
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def blocks_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def sharded(model, blocks=True, offload=False, **options):
    """Shard every block and the model with FSDP2, or the model only."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for block in blocks_of(model) if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


# ---- ways to spread a model: ddp, fsdp, fsdp first (before the adapter), fsdp of transformers, tp, zero 1, zero 2, zero 3 --------------


def base_on(how, folder):
    """The model in a folder, spread as far as it is before an adapter is attached."""
    from transformers import AutoModelForCausalLM

    if how in ("tp", "fsdp of transformers"):
        from transformers.distributed import DistributedConfig

        split = DistributedConfig(**{"tp_size" if how == "tp" else "fsdp_size": dist.get_world_size()})
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=split)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if how == "fsdp first":
        return sharded(model)
    return partitioned(model) if how == "zero 3" else model


def run_on(how, model):
    """Spread a model that has its adapters. Returns what runs a forward."""
    if how == "fsdp":
        return sharded(model)
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    return engine_for(model, int(how[-1])) if how.startswith("zero") else model


def partitioned(model, dtype=torch.float32):
    """The model after deepspeed.zero.Init: every rank has a part of each parameter."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    return model


def engine_for(model, stage, half=False):
    """DeepSpeed's engine, with AdamW on what is trained."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": half},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def reset(way="cpu"):
    """Reset the states of accelerate, which are singletons, and remove the environment variables that they set."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    forget_deepspeed()
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]
    if way == "deepspeed":  # accelerate uses it only if no one asks for CPUs, and here are only CPUs
        PartialState(cpu=True)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"


@contextmanager
def unchanged_environment():
    """TrainingArguments set variables, which must not reach the other tests of this process."""
    with mock.patch.dict(os.environ):
        reset()
        yield


# ---- comparing ---------------------------------------------------------------------------------------------------


def files(directory):
    """(tensors, config) of a saved adapter. The digest of the tensors is removed from the config."""
    config = json.loads((directory / "s2ft_config.json").read_text())
    del config["tensors_sha256"]
    return load_file(directory / "s2ft_adapter.safetensors"), config


def check_same_files(ours, theirs, rtol=GEMM[torch.float32][0], atol=GEMM[torch.float32][1], exactly=False):
    """Check that keys, dtypes, indices and config are the same, and deltas the same within rounding."""
    (tensors, config), (expected, expected_config) = files(ours), files(theirs)
    assert config == expected_config and tensors.keys() == expected.keys() and tensors
    for key, value in tensors.items():
        assert value.dtype == expected[key].dtype, key
        if exactly or key.endswith(".index"):
            assert torch.equal(value, expected[key]), key
        else:
            torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol)
    assert any(bool(value.any()) for key, value in tensors.items() if key.endswith(".delta"))


def base_is(model, case, dtype=torch.float32):
    """Whether the parameters of a detached model are those of the case, bit for bit. Every rank calls this."""
    base, now = dict(model_of(case, dtype).named_parameters()), dict(model.named_parameters())
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in now.items()}
    return whole.keys() == base.keys() and all(torch.equal(whole[name], value) for name, value in base.items())


@torch.no_grad()
def logits(model, forward=None):
    return (forward or model)(input_ids=batches(model, 1)[0]).logits.clone()


def adapters_of_one_process(tmp_path_factory, attached_model):
    """Return a function that trains an adapter in this process, once for each set of its arguments, and gives its folder.

    attached_model: Function (case, layout, **changes of the config) that returns the attached model.
    """
    made = {}

    def get(case, layout, **changes):
        key = repr((case, layout, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("alone")
            s2ft.save_adapter(train(attached_model(case, layout, **changes)), made[key])
        return made[key]

    return get
