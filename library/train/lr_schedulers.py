"""Learning-rate schedules as a table. A step is an optimizer update, whatever accumulation and number of processes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from library.options import OptionError
from library.train.optimizers import BuiltOptimizer, import_class, parse_arguments
from library.train.options import ScheduleOptions

logger = logging.getLogger(__name__)


def build_lr_scheduler(
    options: ScheduleOptions, built: BuiltOptimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule over `num_steps` updates, or None where the optimizer chooses its own rate."""
    if built.chooses_own_rate:
        if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
            logger.warning("--lr_scheduler has no effect: Adafactor with relative_step chooses its own rate")
        return None
    arguments = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return _custom(options.lr_scheduler_type, built.optimizer, arguments)
    name = options.lr_scheduler
    if name == "constant" and options.lr_warmup_steps:
        logger.info("--lr_scheduler constant with --lr_warmup_steps: constant_with_warmup is used")
        name = "constant_with_warmup"
    if name == "cosine_with_restarts":
        arguments.setdefault("num_cycles", options.lr_scheduler_num_cycles)
    if name == "polynomial":
        arguments.setdefault("power", options.lr_scheduler_power)
    return _named(name, built.optimizer, options.lr_warmup_steps, num_steps, arguments)


def _named(
    name: str, optimizer: torch.optim.Optimizer, num_warmup_steps: int, num_steps: int, arguments: dict[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    if name == "piecewise_constant" and "step_rules" not in arguments:
        raise OptionError(
            "--lr_scheduler", "piecewise_constant needs step_rules", '--lr_scheduler_args step_rules="1:10,0.1:20,0.01"'
        )
    if num_warmup_steps > num_steps:
        raise OptionError("--lr_warmup_steps", f"{num_warmup_steps} is longer than the run's {num_steps} steps")
    known = {key: arguments.pop(key) for key in ("num_cycles", "power", "step_rules") if key in arguments}
    if arguments:
        raise OptionError("--lr_scheduler_args", f"{name} takes no {', '.join(arguments)}")
    try:
        return get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps, **known)
    except (ValueError, AttributeError, TypeError) as error:  # polynomial ends at 1e-7 and needs a rate above it
        raise OptionError("--lr_scheduler", f"{name} refuses the settings ({error})") from None


def _custom(
    path: str, optimizer: torch.optim.Optimizer, arguments: dict[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    path = path if "." in path else f"torch.optim.lr_scheduler.{path}"
    missing = (f"there is no {path}", "is the package installed?")
    scheduler_class = import_class(path, torch.optim.lr_scheduler.LRScheduler, "--lr_scheduler_type", missing)
    try:
        return scheduler_class(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise OptionError("--lr_scheduler_args", f"{scheduler_class.__name__} refuses them ({error})") from None
