"""The contract of network modules, the project's own and other people's: the only code that knows it.

A network module is found by name (`networks.lora`, `lycoris.kohya`) and speaks by agreement on names: two functions
that create a network, and methods of the network. Everything required is asked for before it is needed, everything
optional once; what differs between versions is decided by signatures. Arguments from --network_args stay texts.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from library.checkpoints.safetensors_io import is_finite
from library.checkpoints.weights import load_tensors
from library.models.ldm_view import as_files_name_it
from library.options import OptionError
from library.targets.options import no_such_module

FLAG = "--network_module"
WAY_OUT = "use a version of it that has, or another network module"


def import_network_module(name: str) -> ModuleType:
    """The Python module of that name; OptionError when there is none or it can't be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise no_such_module(name) from None
        raise OptionError(FLAG, f"{name} needs the package {missing}", f"install {missing}") from None
    except ImportError as error:
        raise OptionError(FLAG, f"{name} can't be imported: {error}") from error


def read_tensors(file: str, flag: str) -> dict[str, torch.Tensor]:
    """The tensors of a network file; OptionError, naming `flag`, for one that can't be read or holds NaN."""
    tensors = load_tensors(file, flag)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise OptionError(flag, f"{file} holds NaN or infinity ({name})", "take an earlier save of it")
    return tensors


@contextlib.contextmanager
def blamed_on(flag: str) -> Iterator[None]:
    """Put the flag before the messages of network modules, which know files at most."""
    try:
        yield
    except OptionError as error:
        if str(error).startswith("--"):
            raise
        raise OptionError(flag, str(error)) from None


def finding_layers_once(make: Callable[[], Any], unet: torch.nn.Module) -> Any:
    """What `make` makes; once more without the class name of the time embedding, where a layer was found twice.

    LyCORIS 4.1 looks for the two layers of diffusers' TimestepEmbedding by the class around them and by their own
    names, and stops at the second find.
    """
    try:
        return make()
    except AssertionError as error:
        if "duplicated lora name" not in str(error):
            raise
    embedding = unet.get_submodule("time_embedding")
    shown = type(embedding)
    embedding.__class__ = type(f"Named{shown.__name__}", (shown,), {})
    try:
        return make()
    finally:
        embedding.__class__ = shown


def skips_parameters(arguments: Mapping[str, str]) -> bool:
    """Whether a network with these arguments leaves parameters out of some steps: modules, or ranks as DyLoRA does."""
    try:
        drops_modules = float(arguments.get("module_dropout") or 0) > 0
    except ValueError:  # None, as text
        drops_modules = False
    return drops_modules or arguments.get("algo", "").lower() == "dylora"


class NetworkFactory:
    """The functions of a network module."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = import_network_module(name)
        self.casts_itself = bool(getattr(self.module, "CASTS_ITSELF", False))
        self.skips_parameters = bool(getattr(self.module, "SKIPS_PARAMETERS", False))

    def require(self, *functions: str) -> None:
        """Raise OptionError unless the module has these functions."""
        for function in functions:
            if not callable(getattr(self.module, function, None)):
                problem = f"{self.name} has no function {function}, which this run needs"
                raise OptionError(FLAG, problem, WAY_OUT)

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Raise OptionError for arguments that have a flag of their own; let the module check the rest, if it can."""
        create = getattr(self.module, "create_network", None) or self.module.create_network_from_weights
        for name in list(inspect.signature(create).parameters)[:6]:
            if name in arguments:
                raise OptionError(f"--network_args {name}", "is set by the program", f"use a flag such as --{name}")
        check = getattr(self.module, "check_arguments", None)
        if callable(check):
            check(**arguments)

    def create(
        self, dim: int | None, alpha: float, dropout: float | None, models: Models, /, **arguments: Any
    ) -> Adapted:
        """A new network; `dropout` goes to neuron_dropout and, unless `arguments` sets it, to dropout."""
        create = self.module.create_network
        arguments.setdefault("dropout", dropout)
        if _accepts(create, "neuron_dropout"):
            arguments.setdefault("neuron_dropout", dropout)

        def make() -> Any:
            return create(1.0, dim, alpha, models.vae, models.text_encoder, models.named_unet, **arguments)

        return self._adapted(finding_layers_once(make, models.unet))

    def create_from_weights(
        self,
        multiplier: float,
        file: str,
        models: Models,
        /,
        *,
        weights_sd: Mapping[str, torch.Tensor] | None = None,
        for_inference: bool = False,
        **arguments: Any,
    ) -> tuple[Adapted, Mapping[str, torch.Tensor] | None]:
        """(network with the file's modules and ranks, the file's tensors or None).

        `weights_sd`: the tensors, where they are read already; a module of an old form reads them again.
        """
        create = self.module.create_network_from_weights
        if _accepts(create, "for_inference"):
            arguments["for_inference"] = for_inference
        if weights_sd is not None and "weights_sd" in inspect.signature(create).parameters:
            arguments["weights_sd"] = weights_sd

        def make() -> Any:
            return create(multiplier, file, models.vae, models.text_encoder, models.named_unet, **arguments)

        made = finding_layers_once(make, models.unet)
        network, tensors = made if isinstance(made, tuple) else (made, None)
        return self._adapted(network), tensors

    def _adapted(self, network: Any) -> Adapted:
        if network is None:
            raise OptionError(FLAG, f"{self.name} made no network for this model", "see its messages above")
        return Adapted(self.name, network)


@dataclass(frozen=True)
class Models:
    """A model as network modules take it: one text encoder as it is, several as a list."""

    text_encoders: Sequence[torch.nn.Module]
    unet: torch.nn.Module
    vae: torch.nn.Module

    @cached_property
    def named_unet(self) -> torch.nn.Module:
        """The U-Net under the paths that files name its layers by."""
        return as_files_name_it(self.unet)

    @property
    def text_encoder(self) -> Any:
        return self.text_encoders[0] if len(self.text_encoders) == 1 else list(self.text_encoders)


class Adapted:
    """A network, whoever wrote it, with one signature per method."""

    REQUIRED = ("apply_to", "prepare_optimizer_params", "prepare_grad_etc", "on_epoch_start", "save_weights")

    def __init__(self, module_name: str, network: Any) -> None:
        self.module_name = module_name
        self.network = network
        if not isinstance(network, torch.nn.Module):
            raise OptionError(FLAG, f"{module_name} made a {type(network).__name__}, which is no torch module")
        self._prepare = self._optional("prepare_network")
        self._on_step_start = self._optional("on_step_start")
        self._max_norm = self._optional("apply_max_norm_regularization")

    def require(self, *methods: str) -> None:
        """Raise OptionError unless the network has these methods."""
        for method in methods:
            if self._optional(method) is None:
                problem = f"the network of {self.module_name} has no method {method}, which this run needs"
                raise OptionError(FLAG, problem, WAY_OUT)

    def _optional(self, method: str) -> Callable[..., Any] | None:
        found = getattr(self.network, method, None)
        return found if callable(found) else None

    # ------------------------------------------------------------------ setting up

    def prepare(self, options: Mapping[str, Any]) -> None:
        """Hand the run's options over as a namespace, if the network wants them."""
        if self._prepare is not None:
            self._prepare(SimpleNamespace(**options))

    def apply(self, models: Models, *, text: bool, unet: bool) -> None:
        self.network.apply_to(models.text_encoder, models.named_unet, text, unet)

    def load(self, file: str, tensors: Mapping[str, torch.Tensor]) -> int:
        """Load a file non-strictly; returns how many of its `tensors` the network has."""
        known = self.network.state_dict()
        result = self.network.load_weights(file)
        missing = getattr(result, "missing_keys", None)  # a module may understand other names than its own
        return len(frozenset(known) & frozenset(tensors)) if missing is None else len(known) - len(missing)

    def merge(
        self, models: Models, tensors: Mapping[str, torch.Tensor] | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.network.merge_to(models.text_encoder, models.named_unet, tensors, dtype, device)

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()

    def prepare_gradients(self, models: Models) -> None:
        self.network.prepare_grad_etc(models.text_encoder, models.named_unet)

    # ------------------------------------------------------------------ generating

    @property
    def is_mergeable(self) -> bool:
        asked = self._optional("is_mergeable")
        return asked is not None and bool(asked())

    @property
    def can_calculate_weights(self) -> bool:
        """Whether the change can go into the model's weights and out of them again."""
        return all(map(self._optional, ("backup_weights", "restore_weights", "pre_calculation")))

    def back_up_weights(self) -> None:
        """Keep the model's weights aside, before any network is calculated into them."""
        self.network.backup_weights()

    def restore_weights(self) -> None:
        self.network.restore_weights()

    def calculate_weights(self) -> None:
        """Add the change to the model's weights and work no other way, until `restore_weights`."""
        self.network.pre_calculation()

    def set_region(self, part: int, is_last: bool, mask_HW: torch.Tensor) -> None:
        """Give the network a part of the prompt and a mask; the last one in use couples the attention of all."""
        self.network.set_region(part, is_last, mask_HW)

    def begin_generation(self, batch: int, num_parts: int, size: tuple[int, int], shared: dict[Any, Any]) -> None:
        """A batch of pictures of `size` (width, height) begins; `shared` is one dictionary for all networks."""
        self.network.set_current_generation(batch, num_parts, *size, shared)

    def leave_region(self) -> None:
        """Work everywhere again, where the network can: other people's stay with their region."""
        if leave := self._optional("leave_region"):
            leave()

    @property
    def regions_by(self) -> str:
        """Which code divides the picture: networks of one picture have to agree about it."""
        return str(getattr(self.network.set_region, "__module__", ""))

    # ------------------------------------------------------------------ training

    def param_groups(
        self, text_encoder_lr: float | tuple[float, ...] | None, unet_lr: float | None, default_lr: float
    ) -> list[tuple[str | None, dict[str, Any]]]:
        """[(the module's own name of the group, if any, a dictionary with "params" and maybe "lr")].

        Several rates of text encoders need a method of their own, as in later versions of the trade's networks.
        """
        prepare = self.network.prepare_optimizer_params
        rates = (text_encoder_lr, unet_lr, default_lr)
        if isinstance(text_encoder_lr, tuple):
            self._require_several_rates()
            made = self.network.prepare_optimizer_params_with_multiple_te_lrs(list(text_encoder_lr), *rates[1:])
        else:
            made = prepare(*rates) if _binds(prepare, *rates) else prepare(text_encoder_lr, unet_lr)
        names: Sequence[str | None] = ()
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list):
            made, names = made[0], made[1] or ()
        made = list(made)
        if not all(isinstance(item, dict) for item in made):
            made = [{"params": made}]
        groups = [{**group, "params": list(group["params"])} for group in made]
        padded = [*names, *[None] * len(groups)]
        return [(name, group) for name, group in zip(padded, groups, strict=False) if group["params"]]

    def _require_several_rates(self) -> None:
        if self._optional("prepare_optimizer_params_with_multiple_te_lrs") is None:
            problem = f"networks of {self.module_name} take one rate for all text encoders"
            raise OptionError("--text_encoder_lr", problem, "give one number")

    def on_epoch_start(self, models: Models) -> None:
        self.network.on_epoch_start(models.text_encoder, models.named_unet)

    def set_multiplier(self, multiplier: float) -> None:
        """How strong the network's change is; raises OptionError for a network that can't change it."""
        self.require("set_multiplier")
        self.network.set_multiplier(multiplier)

    def on_step_start(self, models: Models) -> None:
        if self._on_step_start is not None:
            self._on_step_start(models.text_encoder, models.named_unet)

    @property
    def can_limit_norms(self) -> bool:
        return self._max_norm is not None

    def limit_norms(self, limit: float, device: torch.device) -> tuple[Any, Any, Any]:
        """Scale modules down to a norm of `limit`; returns (modules scaled, mean norm, largest norm)."""
        assert self._max_norm is not None
        return self._max_norm(limit, device)

    # ------------------------------------------------------------------ files

    def save(self, file: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        self.network.save_weights(str(file), dtype, dict(metadata))


def _accepts(function: Callable[..., Any], keyword: str) -> bool:
    """Whether a function takes this keyword argument."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or (p.name == keyword and p.kind is not p.POSITIONAL_ONLY) for p in parameters)


def _binds(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be called with these positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True
