"""Optimizers as a table: a name of the trade, the class behind it, what it adds to the arguments.

Nothing here imports torch, so that a missing package is said before anything is loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.options import OptionError, named_values
from library.packages import is_installed


@dataclass(frozen=True)
class Row:
    """One optimizer: a dotted class path, and arguments added unless the user gives them."""

    path: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implementation: Mapping[str, Any] = field(default_factory=dict)  # same results, so metadata doesn't mention it
    one_rate: bool = False  # raises in its first step where groups have different rates above 0

    @property
    def package(self) -> str:
        """What brings it, as it is imported."""
        return self.path.split(".")[0]

    @property
    def pip_name(self) -> str:
        """What brings it, as it is installed."""
        return PIP_NAMES.get(self.package, self.package)


NESTEROV = {"nesterov": True, "momentum": 0.9}
# one kernel for all parameters, which also skips a non-finite update without asking the host
FUSED = {"fused": True}

# keys in lower case: names are matched whatever their case
TABLE: dict[str, Row] = {
    "adamw": Row("torch.optim.AdamW", implementation=FUSED),
    "adamw8bit": Row("bitsandbytes.optim.AdamW8bit"),
    "pagedadamw": Row("bitsandbytes.optim.PagedAdamW"),
    "pagedadamw8bit": Row("bitsandbytes.optim.PagedAdamW8bit"),
    "pagedadamw32bit": Row("bitsandbytes.optim.PagedAdamW32bit"),
    "lion": Row("lion_pytorch.Lion"),
    "lion8bit": Row("bitsandbytes.optim.Lion8bit"),
    "pagedlion8bit": Row("bitsandbytes.optim.PagedLion8bit"),
    "sgdnesterov": Row("torch.optim.SGD", NESTEROV, FUSED),
    "sgdnesterov8bit": Row("bitsandbytes.optim.SGD8bit", NESTEROV),
    "ademamix8bit": Row("bitsandbytes.optim.AdEMAMix8bit"),
    "pagedademamix8bit": Row("bitsandbytes.optim.PagedAdEMAMix8bit"),
    "dadaptation": Row("dadaptation.experimental.DAdaptAdamPreprint", one_rate=True),
    "dadaptadampreprint": Row("dadaptation.experimental.DAdaptAdamPreprint", one_rate=True),
    "dadaptadagrad": Row("dadaptation.DAdaptAdaGrad"),
    "dadaptadam": Row("dadaptation.DAdaptAdam", one_rate=True),
    "dadaptadan": Row("dadaptation.DAdaptAdan"),
    "dadaptadanip": Row("dadaptation.experimental.DAdaptAdanIP"),
    "dadaptlion": Row("dadaptation.DAdaptLion", one_rate=True),
    "dadaptsgd": Row("dadaptation.DAdaptSGD", one_rate=True),
    "prodigy": Row("prodigyopt.Prodigy", one_rate=True),
    "adafactor": Row("transformers.optimization.Adafactor", {"relative_step": True}),
    "radamschedulefree": Row("schedulefree.RAdamScheduleFree"),
    "adamwschedulefree": Row("schedulefree.AdamWScheduleFree"),
    "sgdschedulefree": Row("schedulefree.SGDScheduleFree"),
}
PIP_NAMES = {"lion_pytorch": "lion-pytorch"}

# as the trade writes the names, for "did you mean"
NAMES = (
    "AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "Lion", "Lion8bit", "PagedLion8bit",
    "SGDNesterov", "SGDNesterov8bit", "AdEMAMix8bit", "PagedAdEMAMix8bit", "DAdaptation", "DAdaptAdamPreprint",
    "DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptAdanIP", "DAdaptLion", "DAdaptSGD", "Prodigy", "AdaFactor",
    "RAdamScheduleFree", "AdamWScheduleFree", "SGDScheduleFree",
)  # fmt: skip


def row_of(name: str) -> Row | None:
    """The row of a name, or one made of a class path; None for a bare name that is in no row."""
    name = name or "AdamW"
    if name.lower() in TABLE:
        return TABLE[name.lower()]
    known = {row.path: row for row in TABLE.values() if not row.defaults}
    return known.get(name, Row(name)) if "." in name else None


def arguments_of(row: Row, items: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of an optimizer beside its parameters and rate: those given, and those its row adds."""
    arguments = {**row.defaults, **parse_arguments(items, "--optimizer_args")}
    if row is TABLE["adafactor"] and arguments.get("warmup_init"):
        arguments["relative_step"] = True  # a warm-up of its own needs steps of its own
    return arguments


def parse_arguments(items: Sequence[str] | None, where: str) -> dict[str, Any]:
    """name=value items with Python literals as values, as --optimizer_args and --lr_scheduler_args take them."""
    arguments = {}
    for name, text in named_values(items, where).items():
        try:
            arguments[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise OptionError(
                where, f"{text!r} (for {name}) is not a Python value", 'quote texts: name="text"'
            ) from None
    return arguments


# ---------------------------------------------------------------------------------------------- kinds of optimizers


def picks_own_rate(name: str, items: Sequence[str] | None) -> bool:
    """Whether the optimizer is Adafactor with relative steps, which has neither a rate nor a schedule from outside."""
    row = row_of(name)
    return row is not None and row is TABLE["adafactor"] and bool(arguments_of(row, items)["relative_step"])


def adapts_rate(name: str) -> bool:
    """Whether the optimizer finds the size of its steps (D-Adaptation, Prodigy): the rate is a factor of about 1."""
    row = row_of(name)
    return row is not None and row.package in ("dadaptation", "prodigyopt")


def is_schedule_free(name: str) -> bool:
    """Whether the optimizer averages its weights in place of a schedule (Defazio et al. 2024)."""
    row = row_of(name)
    return row is not None and row.package == "schedulefree"


# ---------------------------------------------------------------------------------------------- packages


def check_package(name: str) -> None:
    """Raise OptionError where the package that brings an optimizer is not installed."""
    row = row_of(name)
    if row is not None and not is_installed(row.package):
        raise no_package(row)


def no_package(row: Row) -> OptionError:
    """The error for an optimizer whose package can't be imported."""
    return OptionError(
        "--optimizer_type", f"{row.path} needs the package {row.pip_name}", f"pip install {row.pip_name}"
    )
