"""Optimizers as a table: a name of the trade, the class behind it, what it adds to the arguments."""

from __future__ import annotations

import ast
import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.options import OptionError, did_you_mean, named_values
from library.targets.base import ParamGroup
from library.train.options import OptimizerOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One optimizer: a dotted class path, and arguments added unless the user gives them."""

    path: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implementation: Mapping[str, Any] = field(default_factory=dict)  # same results, so metadata doesn't mention it

    @property
    def package(self) -> str:
        return self.path.split(".")[0]


NESTEROV = {"nesterov": True, "momentum": 0.9}
# one kernel for all parameters, which also skips a non-finite update without asking the host
FUSED = {"fused": True}

# keys in lower case: names are matched whatever their case
TABLE: dict[str, Row] = {
    "adamw": Row("torch.optim.AdamW", implementation=FUSED),
    "adamw8bit": Row("bitsandbytes.optim.AdamW8bit"),
    "pagedadamw8bit": Row("bitsandbytes.optim.PagedAdamW8bit"),
    "lion8bit": Row("bitsandbytes.optim.Lion8bit"),
    "pagedlion8bit": Row("bitsandbytes.optim.PagedLion8bit"),
    "lion": Row("lion_pytorch.Lion"),
    "sgdnesterov": Row("torch.optim.SGD", NESTEROV, FUSED),
    "sgdnesterov8bit": Row("bitsandbytes.optim.SGD8bit", NESTEROV),
    "adafactor": Row("transformers.optimization.Adafactor", {"relative_step": True}),
}
PIP_NAMES = {"bitsandbytes": "bitsandbytes", "lion_pytorch": "lion-pytorch"}


def check_optimizer(options: OptimizerOptions) -> None:
    """Raise OptionError for an unknown name, a missing package or unreadable arguments, before anything is loaded."""
    _import_class(_row(options.optimizer_type or "AdamW"))
    parse_arguments(options.optimizer_args, "--optimizer_args")


@dataclass(frozen=True)
class BuiltOptimizer:
    """The optimizer with what metadata and logs say about it."""

    optimizer: torch.optim.Optimizer
    description: str  # "module.Class" or "module.Class(k=v,k=v)"
    group_names: tuple[str, ...]
    chooses_own_rate: bool = False  # Adafactor with relative steps: no learning rate, no schedule


def build_optimizer(options: OptimizerOptions, groups: Sequence[ParamGroup]) -> BuiltOptimizer:
    """The optimizer over `groups`. Raises OptionError for unknown names, missing packages and wrong arguments."""
    row = _row(options.optimizer_type or "AdamW")
    optimizer_class = _import_class(row)
    arguments = {**row.defaults, **parse_arguments(options.optimizer_args, "--optimizer_args")}
    if arguments.get("warmup_init") and row is TABLE["adafactor"]:
        arguments["relative_step"] = True  # warm-up of its own needs relative steps
    chooses_own_rate = row is TABLE["adafactor"] and bool(arguments["relative_step"])
    implementation = (
        {} if "foreach" in arguments else {k: v for k, v in row.implementation.items() if k not in arguments}
    )
    params = [_param_group(group, options.learning_rate, chooses_own_rate) for group in groups]
    try:
        lr = None if chooses_own_rate else options.learning_rate
        optimizer = optimizer_class(params, lr=lr, **arguments, **implementation)
    except (TypeError, ValueError) as error:
        raise OptionError("--optimizer_args", f"{optimizer_class.__name__} refuses them ({error})") from None
    path = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    return BuiltOptimizer(
        optimizer, f"{path}({listed})" if listed else path, tuple(group.name for group in groups), chooses_own_rate
    )


def _param_group(group: ParamGroup, default_lr: float, chooses_own_rate: bool) -> dict[str, Any]:
    """One group; a relative-step optimizer takes no rate, so that a given one has no say (and the table says so)."""
    members: dict[str, Any] = {"params": list(group.parameters)}
    if not chooses_own_rate:
        members["lr"] = default_lr if group.lr is None else group.lr
    return members


def _row(name: str) -> Row:
    if name.lower() in TABLE:
        return TABLE[name.lower()]
    if "." in name:
        return Row(name)
    if hasattr(torch.optim, name):
        return Row(f"torch.optim.{name}")
    names = [row.path.rsplit(".", 1)[1] for row in TABLE.values()] + ["SGDNesterov", "AdaFactor"]
    raise OptionError(
        "--optimizer_type",
        f"{name!r} is not known",
        did_you_mean(name, names)
        or "use a name from docs/train_network.md or a class path such as package.module.Class",
    )


def _import_class(row: Row) -> Any:
    package = PIP_NAMES.get(row.package, row.package)
    needed = f"{row.path} needs the package {package}"
    return import_class(row.path, torch.optim.Optimizer, "--optimizer_type", (needed, f"pip install {package}"))


def import_class(path: str, base: type, where: str, missing: tuple[str, str]) -> Any:
    """The class of a dotted path; OptionError when there is none, or it is no `base`."""
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError:
        raise OptionError(where, *missing) from None
    except AttributeError:
        raise OptionError(where, f"{module_name} has no {class_name}", "check the name") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptionError(where, f"{path} is no {base.__name__}", "name a class of that kind")
    return found


def parse_arguments(items: Sequence[str] | None, where: str) -> dict[str, Any]:
    """name=value items with Python literals as values, as --optimizer_args and --lr_scheduler_args take them."""
    arguments = {}
    for name, text in named_values(items, where).items():
        try:
            arguments[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise OptionError(
                where, f"{text!r} (for {name}) is not a Python value", 'quote texts: name="text"'
            ) from None
    return arguments
