"""Checks that run before an attached model is changed: its adapters' names, and what its weights allow."""

from collections import Counter

from torch import Tensor, nn

from s2ft.attached.record import Attachment
from s2ft.distributed import has_master_copy, is_dtensor, is_run_by_engine, is_sharded, will_be_loaded_again
from s2ft.distributed.fsdp import check_can_follow, managed_by_fsdp
from s2ft.files.reading import check_adapter_name
from s2ft.layers import kind_of
from s2ft.model.coupling import Coupling, Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.weights import tensors_of, weight_at
from s2ft.ops._memory import check_private
from s2ft.selection import Selection

# ---- names ---------------------------------------------------------------------------------------------


def check_new_name(record: Attachment | None, name: str) -> None:
    """Check the name of an adapter that is made, loaded or renamed.

    Args:
        record: Record of the model; None if it has no adapters.
        name: Name that the adapter would get.

    Raises:
        ValueError: The name could not be saved, or another adapter of the model has it.
    """
    check_adapter_name(name)
    if record is not None and name in record.names:
        raise ValueError(f"there is an adapter called {name!r} already: choose another name")


def check_known(record: Attachment, name: str) -> None:
    """Raise ValueError if the model has no adapter of this name."""
    if name not in record.names:
        raise ValueError(f"no adapter is called {name!r}; there are {', '.join(record.names) or 'none'}")


def check_has_arrived(record: Attachment) -> None:
    """Raise ValueError if the model is still on the meta device."""
    if record.fingerprint is None or any(mount.layer.s2.is_meta for mount in record.mounts.values()):
        raise ValueError(
            "the weights of this model have not arrived on this rank (it is on the meta device): prepare the model "
            "with accelerate, or load its weights, before you read, save or switch its adapters"
        )


# ---- layers and weights --------------------------------------------------------------------------------


def check_not_in_engine(model: nn.Module, what: str, removes: bool = False) -> None:
    """Raise ValueError if DeepSpeed's engine holds the model.

    Args:
        model: The model.
        what: The change, for the message.
        removes: Whether the change only takes layers away. ZeRO-1 and ZeRO-2 leave the weights whole, so that a model
            can be taken out of their engines.
    """
    if is_run_by_engine(model) or (not removes and any(map(has_master_copy, model.parameters()))):
        raise ValueError(
            f"{what} would change the layers of a model that DeepSpeed's engine holds, and its hooks and its optimizer "
            "know only what was there when deepspeed.initialize made them: do this before deepspeed.initialize (before "
            "Trainer.train, or accelerator.prepare), or call s2ft.save_adapter now and go on with a new model"
        )


def check_shards(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError for a weight that is spread over ranks by something else than FSDP2 and tensor parallelism.

    Raises:
        RuntimeError: This version of PyTorch does not have what a model of FSDP2 needs.
    """
    check_can_follow(model)
    managed = managed_by_fsdp(model)
    for coupling in couplings:
        for projection in coupling.projections:
            handle = weight_at(model, projection)
            weight, (owner, _, name) = handle.tensor, projection.path.rpartition(".")
            is_module = isinstance(handle.holder, nn.Module)
            place = (id(handle.holder), "weight") if is_module else (id(model.get_submodule(owner)), name)
            if is_dtensor(weight) and handle.split is None and place not in managed:
                raise ValueError(
                    f"{projection.path} is spread over ranks ({weight.placements}), and neither FSDP2 nor a style of "
                    "tensor parallelism that s2ft knows has done it: load the model without it, attach, and shard it "
                    "by FSDP2 or ZeRO"
                )


def check_can_write_now(model: nn.Module, record: Attachment) -> None:
    """Raise ValueError if the weights are not here yet, so that an adapter would be written into nothing."""
    weights = [tensor for coupling in record.couplings for tensor in tensors_of(model, coupling)]
    if any(weight.is_meta for weight in weights) or (
        will_be_loaded_again() and not any(is_sharded(weight) for weight in weights)
    ):
        raise ValueError(
            "the weights have not arrived on every rank, so an adapter can't be written into them: load it with "
            "trainable=True or active=False, and make it active when the model has been prepared and its weights loaded"
        )


def check_can_move(model: nn.Module, couplings: list[Coupling]) -> None:
    """Raise ValueError if the units of one of the couplings can't be reordered with the weights as they are."""
    names = _names_of_parameters(model)
    for coupling in couplings:
        handles = [weight_at(model, projection) for projection in coupling.projections]
        obstacles = [
            f"{handle.path} is a quantized weight ({type(handle.holder).__name__})"
            for handle in handles
            if handle.read_only
        ]
        tied = [names.get(id(tensor), []) for tensor in tensors_of(model, coupling)]
        obstacles += [f"{' and '.join(found)} are one tied weight" for found in tied if len(found) > 1]
        if obstacles:
            raise ValueError(f"{obstacles[0]}, whose units can't change place: use layout='indexed'")


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def check_one_place(model: nn.Module, couplings: list[Coupling], selection: Selection) -> None:
    """Raise ValueError if a layer to train, or its weight, is in several places of the model.

    Only one of these places would get a trainable layer, and the others would compute with its slice, whose gradient
    would lack their part.
    """
    counts = Counter(id(child) for module in model.modules() for child in module._modules.values())
    owners = _names_of_parameters(model)
    for projection in projections_of(couplings):
        if projection.name not in selection:
            continue
        handle = weight_at(model, projection)
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is handle.holder]
        tied = owners.get(id(handle.tensor), [])
        if counts[id(handle.holder)] > 1:
            raise ValueError(
                f"{' and '.join(names)} are one module, which can't be trained: give each place a module of its own, "
                "or leave its layer out"
            )
        if len(tied) > 1:
            raise ValueError(
                f"{' and '.join(tied)} are one tied weight, which can't be trained, because each place would need the "
                "gradients of the others: give each place a weight of its own, or leave its layer out"
            )


def check_memory(model: nn.Module, projections: list[Projection]) -> None:
    """Raise ValueError for a weight in read-only or shared memory, computed from others, or not quantized yet."""
    for path, projection in {projection.path: projection for projection in projections}.items():
        handle = weight_at(model, projection)
        found = handle.holder
        if handle.read_only and handle.tensor.is_meta:
            raise ValueError(
                f"{path} is on the meta device ({type(found).__name__}), and its quantization is known only when it is "
                "loaded: load the quantized weights, on every rank"
            )
        if handle.read_only:
            continue
        if isinstance(found, nn.Module) and "weight" not in found._parameters:
            raise ValueError(
                f"{path}.weight is not a parameter but is computed by a hook, as by torch.nn.utils.prune and "
                "weight_norm: make it a parameter first (prune.remove, remove_weight_norm)"
            )
        if not is_sharded(handle.tensor):
            check_private(f"{path}.weight" if isinstance(found, nn.Module) else path, handle.tensor)


def check_gradients_pass(model: nn.Module) -> None:
    """Raise ValueError for a quantized layer, trained or not, that passes no gradient to its input."""
    for path, module in model.named_modules():
        if not kind_of(module).passes_gradient(module):
            raise ValueError(
                f"{path} ({type(module.weight).__name__}) passes no gradient to its input, because it "
                "quantizes that too: use a configuration that quantizes weights only"
            )


def check_can_merge(record: Attachment) -> None:
    """Raise ValueError if a trainable layer has a quantized weight, or one that another trainable layer has too."""
    for path, mount in record.mounts.items():
        if mount.layer.kind.read_only:
            raise ValueError(f"{path}: {mount.layer.kind.read_only}")
    _check_apart({path: mount.layer.weight for path, mount in record.mounts.items()})


def check_can_write(model: nn.Module, record: Attachment, deltas: dict[str, Delta]) -> None:
    """Raise ValueError if a weight that the deltas would change is quantized, or tied to another one of theirs.

    deltas: by projection.
    """
    changed = [projection for projection in projections_of(record.couplings) if projection.name in deltas]
    for projection in changed:
        if weight_at(model, projection).read_only:
            raise ValueError(
                f"{projection.path} is quantized, and an adapter can't be written into it: load it with "
                "trainable=True, which adds it in the forward, or load the base unquantized"
            )
    _check_apart({projection.path: weight_at(model, projection).tensor for projection in changed})


def _check_apart(weights: dict[str, Tensor]) -> None:
    """Raise ValueError if two paths have one tied weight. Their updates differ, so that none of them could be kept."""
    paths: dict[int, str] = {}
    for path, weight in weights.items():
        other = paths.setdefault(id(weight), path)
        if other != path:
            raise ValueError(
                f"{other} and {path} are one tied weight, and an adapter that trains each by itself can't be written "
                "into it: train one of them only, by couplings= or by the config's layers"
            )
