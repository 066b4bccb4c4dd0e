"""The optimizer of a run, built from its row in the table."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.options import OptionError, did_you_mean
from library.targets.base import ParamGroup
from library.train.optimizer_table import (
    NAMES,
    Row,
    adapts_rate,
    arguments_of,
    no_package,
    picks_own_rate,
    row_of,
)
from library.train.options import OptimizerOptions
from library.train.rounding import WideUpdates

logger = logging.getLogger(__name__)


def check_optimizer(options: OptimizerOptions) -> None:
    """Raise OptionError for an unknown name, a missing package or unreadable arguments, before anything is loaded."""
    row = _row(options.optimizer_type)
    _import_class(row)
    arguments_of(row, options.optimizer_args)


@dataclass(frozen=True)
class BuiltOptimizer:
    """The optimizer with what metadata and logs say about it."""

    optimizer: torch.optim.Optimizer
    description: str  # "module.Class" or "module.Class(k=v,k=v)"
    group_names: tuple[str, ...]
    wide: WideUpdates  # works on float32 where parameters are of half precision
    log_names: tuple[str | None, ...] = ()  # of the groups' rates, where targets name them
    chooses_own_rate: bool = False  # Adafactor with relative steps: no learning rate, no schedule

    @property
    def is_schedule_free(self) -> bool:
        """Whether it trains at one point and gives out another one, the average: no schedule."""
        return callable(getattr(self.optimizer, "eval", None))

    @property
    def adapts_rate(self) -> bool:
        """Whether it finds a factor `d` of its rates while it trains."""
        return all("d" in group for group in self.optimizer.param_groups)

    @property
    def needs_all_gradients(self) -> bool:
        """Whether a step is one computation over all parameters, so that it can't be made for one after the other."""
        return self.is_schedule_free or self.adapts_rate

    def rates(self) -> list[float | None]:
        """The rate of each group as the optimizer uses it, None as long as it has none."""
        groups = self.optimizer.param_groups
        found = [self._own_rate(group) if self.chooses_own_rate else group.get("lr") for group in groups]
        return [None if rate is None else float(rate) for rate in found]

    def factors(self) -> list[float]:
        """The factor found so far of each group's rate, for an optimizer that adapts it (D-Adaptation's d); else []."""
        return [float(group["d"]) for group in self.optimizer.param_groups] if self.adapts_rate else []

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; torch casts it to the parameters' dtype, so these are made wide for it."""
        self.wide.widen([parameter for group in self.optimizer.param_groups for parameter in group["params"]])
        try:
            self.optimizer.load_state_dict(state)
        finally:
            self.wide.narrow()

    def _own_rate(self, group: Mapping[str, Any]) -> float | torch.Tensor | None:
        """Adafactor's relative step (Shazeer and Stern 2018, section 9) for a group's first parameter."""
        state = self.optimizer.state.get(group["params"][0])
        if not state or "RMS" not in state:
            return None
        optimizer: Any = self.optimizer
        return optimizer._get_lr(group, state)


def build_optimizer(
    options: OptimizerOptions, groups: Sequence[ParamGroup], *, skips_parameters: bool = False
) -> BuiltOptimizer:
    """The optimizer over `groups`. Raises OptionError for unknown names, missing packages and wrong arguments.

    `skips_parameters`: a step may leave out some of what is trained.
    """
    row = _row(options.optimizer_type)
    optimizer_class = _import_class(row)
    arguments = arguments_of(row, options.optimizer_args)
    own_rate = picks_own_rate(options.optimizer_type, options.optimizer_args)
    implementation = (
        {} if "foreach" in arguments else {k: v for k, v in row.implementation.items() if k not in arguments}
    )
    if skips_parameters and torch.optim.SGD in optimizer_class.__mro__:
        implementation = {}  # torch's fused kernel fails where some parameters have momentum and others not yet
    params = [_param_group(group, options.learning_rate, own_rate) for group in groups]
    if adapts_rate(options.optimizer_type):
        check_adapted_rates(row, [members["lr"] for members in params])
    try:
        lr = None if own_rate else options.learning_rate
        optimizer = optimizer_class(params, lr=lr, **arguments, **implementation)
    except (TypeError, ValueError, AssertionError) as error:
        raise OptionError("--optimizer_args", f"{optimizer_class.__name__} refuses them ({error})") from None
    path = f"{optimizer_class.__module__}.{optimizer_class.__name__}"
    listed = ",".join(f"{name}={value}" for name, value in arguments.items())
    names = tuple(group.name for group in groups)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # schedule-free ones refuse to step before
    wide = WideUpdates([parameter for group in groups for parameter in group.parameters])
    description, log_names = f"{path}({listed})" if listed else path, tuple(group.log_name for group in groups)
    return BuiltOptimizer(optimizer, description, names, wide, log_names, own_rate)


def check_adapted_rates(row: Row, rates: Sequence[float]) -> None:
    """The rates of an optimizer that finds the size of its steps: a warning where they are not factors of about 1."""
    name = row.path.rpartition(".")[2]
    if rates and rates[0] <= 0.1:
        logger.warning("--learning_rate: %g is small for %s, which finds the rate itself; use 1", rates[0], name)
    if rates and max(rates) > 3:
        logger.warning("--learning_rate: %g is large for %s, which finds the rate itself; use 1", max(rates), name)
    if len({rate for rate in rates if rate > 0}) <= 1:
        return
    listed = ", ".join(f"{rate:g}" for rate in rates)
    if row.one_rate:
        way_out = "give --learning_rate alone, without --unet_lr, --text_encoder_lr and rates of blocks"
        raise OptionError("--optimizer_type", f"{name} can't train with different rates ({listed})", way_out)
    logger.warning("%s takes the first rate for all groups: %s", name, listed)


def _param_group(group: ParamGroup, default_lr: float, chooses_own_rate: bool) -> dict[str, Any]:
    """One group; a relative-step optimizer takes no rate, so that a given one has no say (and the table says so)."""
    members: dict[str, Any] = {"params": list(group.parameters)}
    if not chooses_own_rate:
        members["lr"] = default_lr if group.lr is None else group.lr
    return members


def _row(name: str) -> Row:
    row = row_of(name)
    if row is not None:
        return row
    if hasattr(torch.optim, name):
        return Row(f"torch.optim.{name}")
    if name.lower().endswith("8bit"):
        return Row(f"bitsandbytes.optim.{name}")
    raise OptionError(
        "--optimizer_type",
        f"{name!r} is not known",
        did_you_mean(name, NAMES)
        or "use a name from docs/train_network.md or a class path such as package.module.Class",
    )


def _import_class(row: Row) -> Any:
    return import_class(row.path, torch.optim.Optimizer, "--optimizer_type", no_package(row))


def import_class(path: str, base: type, where: str, missing: OptionError) -> Any:
    """The class of a dotted path; `missing` when its module can't be imported, OptionError when it is no `base`."""
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError:
        raise missing from None
    except AttributeError:
        hint = did_you_mean(class_name, dir(sys.modules[module_name]))
        raise OptionError(where, f"{module_name} has no {class_name}", hint or "check the name") from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptionError(where, f"{path} is no {base.__name__}", "name a class of that kind")
    return found
