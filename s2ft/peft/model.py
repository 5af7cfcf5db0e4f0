"""The tuner of S²FT, which PEFT puts into a PeftModel."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _get_submodules
from torch import Tensor, nn

from s2ft.adapter.adapter import check_weight
from s2ft.attached.mounting import check_gradients_pass
from s2ft.config import refuse
from s2ft.model.coupling import by_key
from s2ft.model.weights import layers_that_repack, set_repacking
from s2ft.peft.adapter_config import S2FTPeftConfig
from s2ft.peft.layer import BASE, S2FTPeftExperts, S2FTPeftLayer
from s2ft.peft.native_adapter import ModuleUnits, select_units
from s2ft.peft.targets import HEADS

PREFIX = "s2ft_"  # PEFT finds the parameters of adapters by it


class S2FTPeftModel(BaseTuner):
    """Wraps each module of which a config selects units in an :class:`S2FTPeftLayer`.

    PEFT creates it: it is `peft_model.base_model`. The methods below are those in which S²FT differs from other tuners.

    Example:
        >>> from peft import get_peft_model
        >>> from s2ft.peft import S2FTPeftConfig
        >>> type(get_peft_model(model, S2FTPeftConfig(d_ratio=0.1)).base_model).__name__
        'S2FTPeftModel'
    """

    prefix = PREFIX
    tuner_layer_cls = S2FTPeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # the selection defines the modules

    # ---- injecting -----------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Select the units, then inject the adapter as PEFT does.

        Raises:
            ValueError: As :func:`.select_units`, or another adapter trains the other dim of a module.
        """
        given: Any = self.peft_config[adapter_name]
        created = given.as_created()
        config = given.updated_to(select_units(created, model))
        config.remember_created(created)
        if given.task_type in HEADS:  # PEFT adds the head to the list of the config that it was given, afterwards
            config.modules_to_save = given.modules_to_save = list(given.modules_to_save or ())
        for path, units in config.module_units.items():
            if isinstance(layer := model.get_submodule(path), S2FTPeftLayer):
                layer.check_dims(adapter_name, units)
        if not config.inference_mode:
            check_gradients_pass(model)
        self.peft_config[adapter_name] = config
        unpacked = layers_that_repack(model)
        set_repacking(unpacked, False)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.remember_created(created)  # once more, because PEFT shortens long lists of target_modules
        self.__dict__.setdefault("_unpacked", unpacked)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str):
        """A target is a module of which units are selected. The selection has applied PEFT's rules already."""
        found = BaseTuner._check_target_module_exists(peft_config, key)
        return found if not found or peft_config.module_units is None else "" in peft_config.module_units.get(key, ())

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        units = peft_config.module_units.get(current_key)
        if units is None:
            raise ValueError(f"{current_key} has weights in the adapter, but the config names no units of it")
        self._wrap(peft_config, adapter_name, parent, target_name, target, units)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Wrap the modules with stacked experts. PEFT calls this for a config with `target_parameters`.

        Returns:
            The names of the parameters.
        """
        stacks = {path: units for path, units in peft_config.module_units.items() if "" not in units}
        for path, units in stacks.items():
            parent, target, name = _get_submodules(model, path)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._wrap(peft_config, adapter_name, parent, name, target, units)
        return [f"{path}.{name}" for path, units in stacks.items() for name in units]

    def _wrap(
        self,
        config: S2FTPeftConfig,
        adapter_name: str,
        parent: nn.Module,
        name: str,
        target: nn.Module,
        units: dict[str, ModuleUnits],
    ) -> None:
        if isinstance(target, S2FTPeftLayer):
            target.update_layer(adapter_name, units, config.init_weights)
            return
        layer = (S2FTPeftLayer if "" in units else S2FTPeftExperts)(target, adapter_name, units, config.init_weights)
        layer.train(target.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained before it is active
        self._replace_module(parent, name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replace a module. PEFT's own step also assigns the old module's weight, which not every module has."""
        setattr(parent, child_name, new_module)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Train the input embedding and the weights that are tied to it as one weight. PEFT ties `modules_to_tie`."""
        embedding = self.model.get_input_embeddings()
        name = next(path for path, module in self.model.named_modules() if module is embedding)
        tied = {key.rpartition(".")[2] for key in (name, *tied_weight_keys)}
        others = [one for one in peft_config.modules_to_save or () if one.rpartition(".")[2] not in tied]
        peft_config.modules_to_save, peft_config.modules_to_tie = [*others, name], set(tied_weight_keys)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """As PEFT finds them; it finds none where an earlier adapter has replaced the modules."""
        earlier = (getattr(config, "modules_to_tie", None) for config in self.peft_config.values())
        return super()._get_module_names_tied_with_embedding() or sorted(next(filter(None, earlier), ()))

    # ---- removing ------------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As PEFT does. `unload`, which does not merge, returns the base bit for bit even if adapters are merged."""
        for module in self.model.modules():
            if isinstance(module, S2FTPeftLayer) and module.merged and not merge:
                module.unmerge()
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        set_repacking(self.__dict__.pop("_unpacked", []), True)
        return model

    # ---- weighted sums -------------------------------------------------------------------------------

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter that is the sum of weight × adapter, on the units of any of them. It is not trainable.

        Args:
            adapters: Names of the adapters.
            weights: Their weights, finite numbers.
            adapter_name: Name of the sum.
            combination_type: Must be "linear".

        Raises:
            ValueError: A name is unknown or taken, a weight is not a finite number, the combination is not "linear", or
                several of the adapters save the same module by modules_to_save, or their couplings differ.

        Example:
            >>> from peft import get_peft_model
            >>> from s2ft.peft import S2FTPeftConfig
            >>> peft_model = get_peft_model(model, S2FTPeftConfig(d_ratio=0.1), "math")
            >>> peft_model.add_adapter("chat", S2FTPeftConfig(d_ratio=0.1, seed=1))
            >>> peft_model.add_weighted_adapter(["math", "chat"], [0.7, 0.3], "both")
            >>> peft_model.set_adapter("both")
        """
        configs = self._check_weighted(adapters, weights, adapter_name, combination_type)
        numbers = by_key((name, number) for config in configs for name in config.units for number in config.units[name])
        paths = {path for config in configs for path, units in config.module_units.items() if "" in units}
        stacks = {path for config in configs for path in config.target_parameters or ()}
        self.peft_config[adapter_name] = replace(
            configs[0],
            units={name: sorted(set(found)) for name, found in numbers.items()},
            target_modules=paths or None,
            target_parameters=stacks or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            init_weights=True,
            inference_mode=True,
            modules_to_save=sorted({name for config in configs for name in config.modules_to_save or ()}) or None,
            ensure_weight_tying=any(config.ensure_weight_tying for config in configs),
            chosen_by={"sum_of": [[name, float(weight)] for name, weight in zip(adapters, weights)]},
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in (module for module in self.model.modules() if isinstance(module, S2FTPeftLayer)):
            for weight, delta in layer.deltas_of(adapter_name).items():
                total = layer.sum_of(weight, adapters, list(map(float, weights)))
                delta.values = nn.Parameter(total.values.detach().clone(), requires_grad=False)
        for module in self.model.modules():  # the sum gets the modules_to_save of its parts
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                for name in set(adapters) & set(module.modules_to_save):
                    module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[name].state_dict())

    def _check_weighted(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
    ) -> list[Any]:
        """Check the arguments of :meth:`add_weighted_adapter`. Returns the configs of the parts."""
        if not adapters or len(adapters) != len(weights):
            raise ValueError(
                f"adapters and weights must have the same length, at least 1, got {len(adapters)} and {len(weights)}"
            )
        for name, weight in zip(adapters, weights):
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
            check_weight(name, weight)
            if cast(Any, self.peft_config[name]).trainable_token_indices is not None:
                raise ValueError(
                    f"adapter {name!r} has trainable_token_indices, and embeddings of tokens can't be added up"
                )
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        refuse(
            (
                any(config.couplings != configs[0].couplings for config in configs),
                f"{', '.join(adapters)} have different couplings, so they can't be added up",
            ),
            (
                adapter_name in self.peft_config,
                f"there is an adapter called {adapter_name!r} already: give the sum another name",
            ),
            (
                combination_type != "linear",
                f"combination_type must be linear, because deltas are added without changes, got {combination_type!r}",
            ),
        )
        clashes = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and sum(name in module.modules_to_save for name in adapters) > 1
        ]
        if clashes:  # the error has PEFT's wording, which users search for
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save, but "
                f"found {len(clashes)} such instance(s). They are {', '.join(clashes)}"
            )
        return configs

    # ---- mixed batches -------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass adapter_names, one for each sequence, to the layers. PEFT enters this around forward and generate."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        self._check_mixed(names, args, kwargs)
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        # an encoder runs before the rows are repeated for beams
        once = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names if module in once else repeated}),
                with_kwargs=True,
            )
            for module in self.model.modules()
            if isinstance(module, (S2FTPeftLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_mixed(self, names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> None:
        """Check the names of a mixed batch. Errors have PEFT's wording, which users search for."""
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
        known = {
            name for module in self.model.modules() if isinstance(module, S2FTPeftLayer) for name in module.s2ft_delta
        }
        unknown = sorted(set(names) - known - {BASE})
        if inputs and len(inputs[0]) != len(names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(inputs[0])}"
            )
        refuse(
            (self.training, "Cannot pass `adapter_names` when the model is in training mode."),
            (unknown, f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}"),
        )

    # ---- saving and loading --------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Remove the adapter's name also where the name of an expert's parameter is between it and the end."""
        mine = f".s2ft_delta.{adapter_name}."
        if mine in key:
            return key.replace(mine, ".s2ft_delta.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map the names of saved weights as PEFT does, and check them before anything is loaded.

        Raises:
            ValueError: Weights are missing, left over, or have other units than the config. Such an adapter would
                change the wrong weights.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {
            f"{path}.s2ft_delta.{adapter_name}.{name and name + '.'}": delta
            for path, module in model.named_modules()
            if isinstance(module, S2FTPeftLayer)
            for name, delta in module.deltas_of(adapter_name).items()
        }
        expected = {f"{key}{part}" for key in layers for part in ("values", "index")}
        found = {key for key in mapped if ".s2ft_delta." in key}
        for what, keys in (("missing", expected - found), ("left over", found - expected)):
            if keys:
                raise ValueError(f"the weights of adapter {adapter_name!r} don't fit its config: {min(keys)} is {what}")
        refuse(
            *(
                (
                    not torch.equal(mapped[f"{key}index"].cpu(), delta.index.cpu()),
                    f"the weights of adapter {adapter_name!r} have other units than its config: {key}",
                )
                for key, delta in layers.items()
            )
        )
        return mapped
