"""Learning-rate schedules as a table. A step is an optimizer update, whatever accumulation and number of processes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import optimization as diffusers_schedules
from torch.optim.lr_scheduler import PolynomialLR
from transformers import optimization as transformers_schedules

from library.options import OptionError
from library.train.optimizer_table import parse_arguments
from library.train.optimizers import BuiltOptimizer, import_class
from library.train.options import ScheduleOptions

logger = logging.getLogger(__name__)

TABLE: dict[str, Callable[..., torch.optim.lr_scheduler.LambdaLR]] = {
    "constant": diffusers_schedules.get_constant_schedule,
    "constant_with_warmup": diffusers_schedules.get_constant_schedule_with_warmup,
    "piecewise_constant": diffusers_schedules.get_piecewise_constant_schedule,
    "linear": diffusers_schedules.get_linear_schedule_with_warmup,
    "cosine": diffusers_schedules.get_cosine_schedule_with_warmup,
    "cosine_with_restarts": diffusers_schedules.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": diffusers_schedules.get_polynomial_decay_schedule_with_warmup,
    "inverse_sqrt": transformers_schedules.get_inverse_sqrt_schedule,
    "cosine_with_min_lr": transformers_schedules.get_cosine_with_min_lr_schedule_with_warmup,
    "warmup_stable_decay": transformers_schedules.get_wsd_schedule,
}
# what schedules call the length of the run, where a class asks for it
LENGTHS = ("num_training_steps", "total_steps", "T_max", "total_iters")


def build_lr_scheduler(
    options: ScheduleOptions, built: BuiltOptimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule over `num_steps` updates, or None where the optimizer has no rate to follow one."""
    if built.chooses_own_rate or built.is_schedule_free:
        return None
    arguments = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    if options.lr_scheduler_type:
        return _custom(options.lr_scheduler_type, built.optimizer, num_steps, arguments)
    name = options.name
    if name == "piecewise_constant" and "step_rules" not in arguments:
        raise OptionError(
            "--lr_scheduler", "piecewise_constant needs step_rules", '--lr_scheduler_args step_rules="1:10,0.1:20,0.01"'
        )
    make = TABLE[name]
    taken = set(inspect.signature(make).parameters) - {"optimizer", "last_epoch"}
    unknown = [argument for argument in arguments if argument not in taken]
    if unknown:
        raise OptionError("--lr_scheduler_args", f"{name} takes no {', '.join(unknown)}")
    settings = {key: value for key, value in _settings(name, options, num_steps).items() if key in taken}
    if "min_lr" in arguments:
        settings.pop("min_lr_rate", None)  # the one as a rate, the other as a share of it
    try:
        return make(built.optimizer, **{**settings, **arguments})
    except (ValueError, AttributeError, TypeError) as error:  # polynomial ends at 1e-7 and needs a rate above it
        raise OptionError("--lr_scheduler", f"{name} refuses the settings ({error})") from None


def _settings(name: str, options: ScheduleOptions, num_steps: int) -> dict[str, Any]:
    """The options by the names that the functions of the table give them."""
    warmup, decay = options.warmup_steps(num_steps), options.decay_steps(num_steps)
    settings: dict[str, Any] = {
        "num_warmup_steps": warmup,
        "num_training_steps": num_steps,
        "power": options.lr_scheduler_power,
        "timescale": options.lr_scheduler_timescale,
        "min_lr_rate": options.lr_scheduler_min_lr_ratio,
    }
    if name == "cosine_with_restarts":
        settings["num_cycles"] = options.lr_scheduler_num_cycles
    if name in ("cosine_with_min_lr", "warmup_stable_decay"):
        settings["num_cycles"] = options.lr_scheduler_num_cycles / 2
    if name == "warmup_stable_decay":
        del settings["num_training_steps"]  # it takes that or the stable steps
        settings |= {"num_decay_steps": decay, "num_stable_steps": max(0, num_steps - warmup - decay)}
        settings["min_lr_ratio"] = options.lr_scheduler_min_lr_ratio or 0.0
    return settings


def _custom(
    path: str, optimizer: torch.optim.Optimizer, num_steps: int, arguments: dict[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of any class; where its constructor asks for the length of the run and is not told, it is."""
    scheduler_class = _class_of(path)
    step: Any = scheduler_class.step
    needed = [p for p in list(inspect.signature(step).parameters.values())[1:] if p.default is p.empty]
    if needed:
        problem = f"{scheduler_class.__name__} follows {needed[0].name}, which a step does not have"
        raise OptionError("--lr_scheduler_type", problem, "use a schedule of the number of steps")
    told = dict.fromkeys(_lengths_wanted(scheduler_class, arguments), num_steps)
    for name in told:
        logger.info("%s: %s is %d, the length of the run", scheduler_class.__name__, name, num_steps)
    try:
        return scheduler_class(optimizer, **arguments, **told)
    except (TypeError, ValueError) as error:
        raise OptionError("--lr_scheduler_args", f"{scheduler_class.__name__} refuses them ({error})") from None


def _class_of(path: str) -> Any:
    path = path if "." in path else f"torch.optim.lr_scheduler.{path}"
    missing = OptionError("--lr_scheduler_type", f"there is no {path}", "is the package installed?")
    return import_class(path, torch.optim.lr_scheduler.LRScheduler, "--lr_scheduler_type", missing)


def _lengths_wanted(scheduler_class: Any, arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that stand for the length of the run and are not given.

    PolynomialLR's default of 5 is none to keep: its rate is 0 from there on.
    """
    if "steps_per_epoch" in arguments:
        return []
    parameters = inspect.signature(scheduler_class).parameters
    return [
        name
        for name in LENGTHS
        if name in parameters
        and name not in arguments
        and (scheduler_class is PolynomialLR or parameters[name].default in (inspect.Parameter.empty, None))
    ]


def depends_on_length(options: ScheduleOptions) -> bool:
    """Whether a longer run has other rates: a schedule of the table, or a class that is told the run's length."""
    if not options.lr_scheduler_type:
        return options.depends_on_length
    arguments = parse_arguments(options.lr_scheduler_args, "--lr_scheduler_args")
    return bool(_lengths_wanted(_class_of(options.lr_scheduler_type), arguments))


@contextlib.contextmanager
def length_kept(scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> Iterator[None]:
    """Let a new schedule, inside the block, load the state of one of another length; only its place is taken over.

    Afterwards rates are those of a run that had this schedule from its first step on.
    """
    if scheduler is None:
        yield
        return
    groups = scheduler.optimizer.param_groups
    first, rates = copy.deepcopy(scheduler.state_dict()), [group["lr"] for group in groups]
    yield
    done = scheduler.last_epoch
    scheduler.load_state_dict(first)
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    step_to(scheduler, done)


def step_to(scheduler: torch.optim.lr_scheduler.LRScheduler, step: int) -> None:
    """Bring a new schedule to where it is after `step` updates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an update before each of these steps
        for _ in range(step):
            scheduler.step()
