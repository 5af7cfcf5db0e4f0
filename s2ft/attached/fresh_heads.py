"""New heads of a model, which attach leaves frozen unless `modules_to_save` names them."""

from torch import nn

from s2ft.attached.extra_weights import coupled_names
from s2ft.attached.record import Attachment

LOADED = "_is_hf_initialized"  # transformers sets it on every parameter that it has loaded from a checkpoint


def fresh_heads(model: nn.Module, record: Attachment) -> list[str]:
    """Return the paths of frozen modules that look new.

    In a model from from_pretrained these are the modules without a parameter in the checkpoint. In any other
    transformers model they are the modules beside the backbone, and the backbone's pooler. A module that shares a
    parameter with the embeddings or with a language model's head does not count.

    Args:
        model: The model, attached or not.
        record: A record that has the model's couplings.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not hasattr(model, "get_input_embeddings") or not isinstance(prefix, str):
        return []
    language = _language_parameters(model)
    fresh = _not_loaded(model) if any(hasattr(p, LOADED) for p in model.parameters()) else _beside(model, prefix)
    coupled = coupled_names(record.couplings)
    return [
        path
        for path in fresh
        if all(
            id(parameter) not in language and not parameter.requires_grad and f"{path}.{name}" not in coupled
            for name, parameter in model.get_submodule(path).named_parameters()
        )
    ]


def _language_parameters(model: nn.Module) -> set:
    """Return the ids of the parameters of the embeddings and of a language model's head."""
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            found |= {id(parameter) for parameter in module.parameters()}
    return found


def _not_loaded(model: nn.Module) -> list[str]:
    """Return the paths of the topmost modules whose parameters were in no checkpoint."""
    found: list[str] = []
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        if (
            path
            and parameters
            and not any(path.startswith(f"{above}.") for above in found)
            and not any(getattr(parameter, LOADED, False) for parameter in parameters)
        ):
            found.append(path)
    return found


def _beside(model: nn.Module, prefix: str) -> list[str]:
    """Return the paths of the modules beside the backbone, and of the backbone's pooler."""
    backbone = getattr(model, prefix, None)
    if not prefix or not isinstance(backbone, nn.Module):
        return []
    paths = [path for path, module in model.named_children() if module is not backbone]
    if isinstance(getattr(backbone, "pooler", None), nn.Module):
        paths.append(f"{prefix}.pooler")
    return [path for path in paths if any(True for _ in model.get_submodule(path).parameters())]
